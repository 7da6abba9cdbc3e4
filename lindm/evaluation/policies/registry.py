"""The table of the policies that `lindm eval` knows by name (`POLICIES`).

To add a policy, add a module with a subclass of `Policy` to this package, and an entry to the table. The command line reads this
module, so it imports nothing heavy.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from lindm.errors import did_you_mean

if TYPE_CHECKING:
    from lindm.datasets import DatasetConfig
    from lindm.evaluation.policy import Policy
    from lindm.families.registry import NamedProblem
    from lindm.families.suites import Suite
    from lindm.types import Problem

Kind = Literal["mdp", "pomdp", "apomdp"]
KINDS: tuple[Kind, ...] = ("mdp", "pomdp", "apomdp")
HIDDEN: tuple[Kind, ...] = ("pomdp", "apomdp")


@dataclass(frozen=True, kw_only=True)
class PolicyInfo:
    """A named policy of `lindm eval`."""

    summary: str  # one sentence
    policy: str  # module:class of this package
    kinds: tuple[Kind, ...] = KINDS  # kinds of problems to which it applies
    default: bool = True  # whether it is evaluated when no policies are given
    needs_suite: bool = False  # whether it computes from the law of the suite, beside the problem


POLICIES: dict[str, PolicyInfo] = {
    "oracle": PolicyInfo(summary="An optimal action at every history.", policy="optimal:Oracle"),
    "random": PolicyInfo(summary="Every action with the same probability.", policy="optimal:Random"),
    "behavior": PolicyInfo(
        summary="The policy that made the demonstrations: the oracle, but with probability epsilon a random action.",
        policy="optimal:Behavior",
        default=False,
    ),
    "bc": PolicyInfo(
        summary="Behavior cloning: the most frequent action of the demonstrations after the same last observation (of all steps "
        "if no demonstration has it).",
        policy="demonstrations:BC",
    ),
    "certainty-equivalence": PolicyInfo(
        summary="In an MDP, plans in the model that is estimated from the demonstrations. If the state is hidden, knows the "
        "model and acts as if the likeliest state were the state.",
        policy="planning:CertaintyEquivalence",
    ),
    "lsvi": PolicyInfo(
        summary="Least-squares value iteration on the demonstrations' transitions.",
        policy="offline_rl:LSVI",
        kinds=("mdp",),
        default=False,
    ),
    "pevi": PolicyInfo(
        summary="Pessimistic value iteration: lsvi minus a bonus for uncertainty.", policy="offline_rl:PEVI", kinds=("mdp",)
    ),
    "qmdp": PolicyInfo(
        summary="Knows the model; averages the action values of the observed state over the belief.",
        policy="beliefs:QMDP",
        kinds=HIDDEN,
    ),
    "bayes": PolicyInfo(
        summary="Plans with the posterior over the suite's tasks, given the transitions and rewards of the demonstrations and "
        "of the episode.",
        policy="bayes_policies:Bayes",
        default=False,
        needs_suite=True,
    ),
    "bayes-demo": PolicyInfo(
        summary="Like bayes, and also uses the demonstrators' actions as evidence.",
        policy="bayes_policies:BayesDemo",
        default=False,
        needs_suite=True,
    ),
    "thompson": PolicyInfo(
        summary="Takes each action with the posterior probability that it is the best one.",
        policy="bayes_policies:Thompson",
        default=False,
        needs_suite=True,
    ),
    "layer": PolicyInfo(
        summary="One linear attention layer per stage, trained on 2048 other tasks of the suite.",
        policy="attention_layer:AttentionLayer",
        kinds=("mdp",),
        default=False,
        needs_suite=True,
    ),
}
LANGUAGE_MODELS = {  # read by `lindm.llm.policy`
    "base:MODELDIR": "A language model without training: it reads the demonstrations in its context.",
    "sft:RUNDIR": "A language model that `lindm sft` trained.",
}


POLICY_FILES = {  # read by `lindm.llm.named_policies`
    "alpha:FILE": "Alpha vectors of one POMDP, from `lindm solve --save` or pomdp-solve (.alpha), or from SARSOP (.policy).",
}


def help_table() -> dict[str, str]:
    """Name -> sentence of every policy, with the kinds of problems where it does not apply to all."""
    rows = {}
    for name, info in POLICIES.items():
        kinds = "" if info.kinds == KINDS else f" ({' and '.join(kind.upper() for kind in info.kinds)} only)"
        rows[name] = info.summary.removesuffix(".") + kinds + "."
    return rows | LANGUAGE_MODELS | POLICY_FILES


def needs_suite(name: str) -> bool:
    """Whether the policy of that name computes from the law of a suite."""
    return name in POLICIES and POLICIES[name].needs_suite


def kind_of(source: "Suite | NamedProblem | Problem") -> Kind:
    """mdp, pomdp or apomdp."""
    from lindm.families.registry import NamedProblem
    from lindm.families.suites import Suite
    from lindm.types import APOMDP, MDP

    source = source.problem if isinstance(source, NamedProblem) else source
    kind = source.kind if isinstance(source, Suite) else type(source)
    return "mdp" if kind is MDP else "apomdp" if kind is APOMDP else "pomdp"


def default_policies(source: "Suite | NamedProblem | Problem") -> tuple[str, ...]:
    """The names of the policies that are evaluated where none is named: all that are cheap."""
    return tuple(name for name, info in POLICIES.items() if info.default and kind_of(source) in info.kinds)


def check_name(name: str, source: "Suite | NamedProblem | Problem") -> None:
    """ValueError where no policy of that name exists for problems of this source."""
    kind = kind_of(source)
    known = [name for name, info in POLICIES.items() if kind in info.kinds]
    if name not in known:
        others = (*LANGUAGE_MODELS, *(POLICY_FILES if kind == "pomdp" else ()))
        rule = f"one of {', '.join((*known, *others))} for {'a' if kind == 'pomdp' else 'an'} {kind.upper()}"
        near = did_you_mean(name, known)
        if name.endswith((".alpha", ".policy")):
            near = f"; a file of alpha vectors is alpha:{name}"
        elif not near:
            near = "; ld.evaluate in Python takes a function of your own"
        raise ValueError(f"policy must be {rule}; got {name!r}{near}")


def make_policy(name: str, source: "Suite | NamedProblem | Problem", dataset: "DatasetConfig") -> "Policy":
    """The policy of that name for tasks of a source.

    Raises:
      ValueError: these tasks have no policy of that name.
    """
    check_name(name, source)
    module, _, policy = POLICIES[name].policy.partition(":")
    return getattr(import_module(f"{__package__}.{module}"), policy).for_tasks(source, dataset)
