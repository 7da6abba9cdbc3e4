"""In-context learning for sequential decisions: decision problems, exact solutions, labeled data, policies and what they lose.

    import lindm as ld

The names below are imported when they are first used, so that `import lindm` and `lindm --help` do not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from lindm import errors as errors
    from lindm import icl as icl
    from lindm.api.benchmarks import benchmark as benchmark
    from lindm.api.data import draw_tasks as draw_tasks
    from lindm.api.data import export_dataset as export_dataset
    from lindm.api.data import make_dataset as make_dataset
    from lindm.api.decisions import load_alpha_vectors as load_alpha_vectors
    from lindm.api.decisions import load_saved_policy as load_saved_policy
    from lindm.api.decisions import read_demonstrations as read_demonstrations
    from lindm.api.estimation import estimate as estimate
    from lindm.api.evaluation import evaluate as evaluate
    from lindm.api.figures import plot as plot
    from lindm.api.generation import generate as generate
    from lindm.api.models import Run as Run
    from lindm.api.models import describe_model as describe_model
    from lindm.api.models import export as export
    from lindm.api.models import finetune as finetune
    from lindm.api.models import import_model as import_model
    from lindm.api.models import job_file as job_file
    from lindm.api.models import plan as plan
    from lindm.api.problems import apomdp as apomdp
    from lindm.api.problems import from_gymnasium as from_gymnasium
    from lindm.api.problems import linear_mdp as linear_mdp
    from lindm.api.problems import make as make
    from lindm.api.problems import mdp as mdp
    from lindm.api.problems import pomdp as pomdp
    from lindm.api.problems import read_pomdp as read_pomdp
    from lindm.api.problems import read_stationary_pomdp as read_stationary_pomdp
    from lindm.api.problems import stationary_mdp as stationary_mdp
    from lindm.api.problems import suite as suite
    from lindm.api.problems import to_gymnasium as to_gymnasium
    from lindm.api.problems import with_names as with_names
    from lindm.api.solutions import Solution as Solution
    from lindm.api.solutions import load_solution as load_solution
    from lindm.api.solutions import solve as solve
    from lindm.api.solutions import solve_stationary as solve_stationary
    from lindm.cli.doctor import doctor as doctor
    from lindm.cli.families import list_families as list_families
    from lindm.evaluation import policies as policies
    from lindm.llm.policy import load_policy as load_policy
    from lindm.problems.stationary import StationaryPOMDP as StationaryPOMDP
    from lindm.solvers.stationary_mdp import MDPSolution as MDPSolution
    from lindm.solvers.stationary_solution import StationarySolution as StationarySolution
    from lindm.types import APOMDP as APOMDP
    from lindm.types import MDP as MDP
    from lindm.types import POMDP as POMDP
    from lindm.types import LinearMDP as LinearMDP
    from lindm_experiments.harness.check import check as check
    from lindm_experiments.harness.mutants import verify_mutants as verify_mutants
    from lindm_experiments.harness.public import redraw as redraw
    from lindm_experiments.harness.public import report as report
    from lindm_experiments.harness.verify import run_experiment as run_experiment
    from lindm_experiments.harness.verify import verify as verify
    from lindm_experiments.toolkit import theory as theory
    from lindm_experiments.toolkit.layers import measure_ladder as measure_ladder
    from lindm_experiments.toolkit.layers import measure_risk as measure_risk

_DEFINED = {
    "lindm.api.benchmarks": ("benchmark",),
    "lindm.api.problems": (
        "apomdp",
        "from_gymnasium",
        "linear_mdp",
        "make",
        "mdp",
        "pomdp",
        "read_pomdp",
        "read_stationary_pomdp",
        "stationary_mdp",
        "suite",
        "to_gymnasium",
        "with_names",
    ),
    "lindm.api.solutions": ("Solution", "load_solution", "solve", "solve_stationary"),
    "lindm.api.data": ("make_dataset", "draw_tasks", "export_dataset"),
    "lindm.api.models": ("Run", "describe_model", "export", "finetune", "import_model", "job_file", "plan"),
    "lindm.api.decisions": ("load_alpha_vectors", "load_saved_policy", "read_demonstrations"),
    "lindm.api.estimation": ("estimate",),
    "lindm.api.evaluation": ("evaluate",),
    "lindm.api.figures": ("plot",),
    "lindm.api.generation": ("generate",),
    "lindm.llm.policy": ("load_policy",),
    "lindm.cli.doctor": ("doctor",),
    "lindm.cli.families": ("list_families",),
    "lindm.problems.stationary": ("StationaryPOMDP",),
    "lindm.solvers.stationary_mdp": ("MDPSolution",),
    "lindm.solvers.stationary_solution": ("StationarySolution",),
    "lindm_experiments.harness.check": ("check",),
    "lindm_experiments.harness.public": ("redraw", "report"),
    "lindm_experiments.harness.mutants": ("verify_mutants",),
    "lindm_experiments.harness.verify": ("run_experiment", "verify"),
    "lindm_experiments.toolkit.layers": ("measure_ladder", "measure_risk"),
    "lindm.types": ("APOMDP", "LinearMDP", "MDP", "POMDP"),
}
# name -> module, or module:attribute, where it is defined
PUBLIC = {
    **{name: f"{module}:{name}" for module, names in _DEFINED.items() for name in names},
    "errors": "lindm.errors",
    "icl": "lindm.icl",
    "policies": "lindm.evaluation.policies",
    "theory": "lindm_experiments.toolkit.theory",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'lindm' has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    value = importlib.import_module(module)
    value = getattr(value, attribute) if attribute else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({"__version__", *PUBLIC})
