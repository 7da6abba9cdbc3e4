"""The named policies, the baselines of language models: their constructors, such as `policies.qmdp()`.

Each uses only information that a prompt could contain: the demonstrations with rewards and, if the state is hidden, the model.
The names are imported when they are first used: the command line reads `registry` and does not wait for jax.

>>> ld.policies.default_policies(ld.suite("pomdp"))
('oracle', 'random', 'bc', 'certainty-equivalence', 'qmdp')
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lindm.evaluation.policies.registry import POLICIES, default_policies

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from lindm.evaluation.policies.attention_layer import AttentionLayer as layer
    from lindm.evaluation.policies.bayes_policies import Bayes as bayes
    from lindm.evaluation.policies.bayes_policies import BayesDemo as bayes_demo
    from lindm.evaluation.policies.bayes_policies import Thompson as thompson
    from lindm.evaluation.policies.beliefs import QMDP as qmdp
    from lindm.evaluation.policies.demonstrations import BC as bc
    from lindm.evaluation.policies.offline_rl import LSVI as lsvi
    from lindm.evaluation.policies.offline_rl import PEVI as pevi
    from lindm.evaluation.policies.optimal import Behavior as behavior
    from lindm.evaluation.policies.optimal import Oracle as oracle
    from lindm.evaluation.policies.optimal import Random as random
    from lindm.evaluation.policies.planning import CertaintyEquivalence as certainty_equivalence

__all__ = [
    "bayes",
    "bayes_demo",
    "bc",
    "behavior",
    "certainty_equivalence",
    "default_policies",
    "layer",
    "lsvi",
    "oracle",
    "pevi",
    "qmdp",
    "random",
    "thompson",
]


def __getattr__(name: str) -> Any:
    info = POLICIES.get(name.replace("_", "-"))
    if info is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, policy = info.policy.partition(":")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), policy)
    return value


def __dir__() -> list[str]:
    return __all__
