"""The table of the policies that `lindm eval` knows by name (`POLICIES`).

To add a policy, add a module with a subclass of `Policy` to this package, and an entry to the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lindm.datasets import DatasetConfig
from lindm.errors import did_you_mean
from lindm.evaluation.policies.attention_layer import AttentionLayer
from lindm.evaluation.policies.beliefs import QMDP
from lindm.evaluation.policies.demonstrations import BC
from lindm.evaluation.policies.offline_rl import LSVI, PEVI
from lindm.evaluation.policies.optimal import Behavior, Oracle, Random
from lindm.evaluation.policies.planning import CertaintyEquivalence
from lindm.evaluation.policy import Policy
from lindm.families.registry import NamedProblem
from lindm.families.suites import Suite
from lindm.types import APOMDP, MDP, Problem

Kind = Literal["mdp", "pomdp", "apomdp"]
KINDS: tuple[Kind, ...] = ("mdp", "pomdp", "apomdp")
HIDDEN: tuple[Kind, ...] = ("pomdp", "apomdp")


@dataclass(frozen=True, kw_only=True)
class PolicyInfo:
    """A named policy of `lindm eval`."""

    summary: str  # one sentence
    make: Callable[[Any, DatasetConfig], Policy]  # for tasks of this source and dataset
    kinds: tuple[Kind, ...] = KINDS  # kinds of problems to which it applies
    default: bool = True  # whether it is evaluated when no policies are given


POLICIES: dict[str, PolicyInfo] = {
    "oracle": PolicyInfo(summary="An optimal action at every history.", make=lambda source, dataset: Oracle()),
    "random": PolicyInfo(summary="Every action with the same probability.", make=lambda source, dataset: Random()),
    "behavior": PolicyInfo(
        summary="The policy that made the demonstrations: the oracle, but with probability epsilon a random action.",
        make=lambda source, dataset: Behavior(dataset.exploration[0]),
        default=False,
    ),
    "bc": PolicyInfo(
        summary="Most frequent action of the demonstrations after the same last observation.", make=lambda source, dataset: BC()
    ),
    "certainty-equivalence": PolicyInfo(
        summary="Plans in the estimated MDP; where the state is hidden, takes the likeliest state for the state.",
        make=lambda source, dataset: CertaintyEquivalence(),
    ),
    "lsvi": PolicyInfo(
        summary="Least-squares value iteration on the demonstrations' transitions.",
        make=lambda source, dataset: LSVI(),
        kinds=("mdp",),
        default=False,
    ),
    "pevi": PolicyInfo(summary="Pessimistic least-squares value iteration.", make=lambda source, dataset: PEVI(), kinds=("mdp",)),
    "qmdp": PolicyInfo(
        summary="Knows the model; action values of the observed state, averaged over the belief.",
        make=lambda source, dataset: QMDP(),
        kinds=HIDDEN,
    ),
    "layer": PolicyInfo(
        summary="One linear attention layer per stage, trained on 2048 other tasks of the suite.",
        make=AttentionLayer,
        kinds=("mdp",),
        default=False,
    ),
}
LANGUAGE_MODELS = ("icl:MODELDIR", "sft:RUNDIR")  # read by `lindm.llm.policy`


def kind_of(source: Suite | NamedProblem | Problem) -> Kind:
    """mdp, pomdp or apomdp."""
    source = source.problem if isinstance(source, NamedProblem) else source
    if isinstance(source, Suite):
        return "apomdp" if source.M else "pomdp" if source.O else "mdp"
    return "mdp" if isinstance(source, MDP) else "apomdp" if isinstance(source, APOMDP) else "pomdp"


def default_policies(source: Suite | NamedProblem | Problem) -> tuple[str, ...]:
    """The names of the policies that are evaluated where none is named: all that are cheap."""
    return tuple(name for name, info in POLICIES.items() if info.default and kind_of(source) in info.kinds)


def check_name(name: str, source: Suite | NamedProblem | Problem) -> None:
    """ValueError where no policy of that name exists for problems of this source."""
    kind = kind_of(source)
    known = [name for name, info in POLICIES.items() if kind in info.kinds]
    if name not in known:
        rule = f"one of {', '.join((*known, *LANGUAGE_MODELS))} for an {kind.upper()}"
        raise ValueError(f"policy must be {rule}; got {name!r}{did_you_mean(name, known)}")


def make_policy(name: str, source: Suite | NamedProblem | Problem, dataset: DatasetConfig) -> Policy:
    """The policy of that name for tasks of a source.

    Raises:
      ValueError: these tasks have no policy of that name.
    """
    check_name(name, source)
    return POLICIES[name].make(source, dataset)
