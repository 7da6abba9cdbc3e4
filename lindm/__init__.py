"""In-context learning for sequential decisions: decision problems, exact solutions, labeled data, policies and what they lose.

    import lindm as ld

The names below are imported when they are first used, so that `import lindm` and `lindm --help` do not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from lindm import icl as icl
    from lindm.api import Solution as Solution
    from lindm.api import apomdp as apomdp
    from lindm.api import linear_mdp as linear_mdp
    from lindm.api import load_solution as load_solution
    from lindm.api import make as make
    from lindm.api import mdp as mdp
    from lindm.api import pomdp as pomdp
    from lindm.api import read_pomdp as read_pomdp
    from lindm.api import solve as solve
    from lindm.api import suite as suite
    from lindm.evaluation import policies as policies
    from lindm.types import APOMDP as APOMDP
    from lindm.types import MDP as MDP
    from lindm.types import POMDP as POMDP
    from lindm.types import LinearMDP as LinearMDP

# name -> module, or module:attribute, where it is defined
PUBLIC = {
    **{name: f"lindm.types:{name}" for name in ("APOMDP", "LinearMDP", "MDP", "POMDP")},
    **{
        name: f"lindm.api:{name}"
        for name in (
            *("Solution", "apomdp"),
            *("linear_mdp", "load_solution", "make", "mdp", "pomdp", "read_pomdp", "solve", "suite"),
        )
    },
    "icl": "lindm.icl",
    "policies": "lindm.evaluation.policies",
}
__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'lindm' has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    value = importlib.import_module(module)
    value = getattr(value, attribute) if attribute else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
