"""The named policies, the baselines of language models: their constructors, such as `policies.qmdp()`.

Each uses only information that a prompt could contain: the demonstrations with rewards and, if the state is hidden, the model.

>>> ld.policies.default_policies(ld.suite("pomdp"))
('oracle', 'random', 'bc', 'certainty-equivalence', 'qmdp')
"""

from lindm.evaluation.policies.attention_layer import AttentionLayer as layer
from lindm.evaluation.policies.beliefs import QMDP as qmdp
from lindm.evaluation.policies.demonstrations import BC as bc
from lindm.evaluation.policies.offline_rl import LSVI as lsvi
from lindm.evaluation.policies.offline_rl import PEVI as pevi
from lindm.evaluation.policies.optimal import Behavior as behavior
from lindm.evaluation.policies.optimal import Oracle as oracle
from lindm.evaluation.policies.optimal import Random as random
from lindm.evaluation.policies.planning import CertaintyEquivalence as certainty_equivalence
from lindm.evaluation.policies.registry import default_policies

__all__ = [
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
]
