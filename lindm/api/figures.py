"""Figures of solutions."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from lindm.api.solutions import Solution
from lindm.evaluation.environments import double_precision
from lindm.figures import beliefs
from lindm.figures.policy_graph import draw_policy_graph
from lindm.figures.style import picture_kind, render
from lindm.problems.stationary import from_pomdp
from lindm.solvers.policy_graph import PolicyGraph
from lindm.solvers.stationary_mdp import MDPSolution
from lindm.solvers.stationary_solution import StationarySolution
from lindm.types import APOMDP, POMDP

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(
    solution: Solution | StationarySolution | PolicyGraph,
    path: str | Path | None = None,
    *,
    timeout: float = 60.0,
    on_belief: Callable[[int, int], None] = lambda done, total: None,
) -> "Figure":
    """Draw a solution of a POMDP with two or three states over its beliefs, or a policy graph.

    The figure of a POMDP has the bounds of the value and the best first action. The figure of an ambiguous POMDP has the best
    first action over belief and attitude to ambiguity. The figure of a graph has a box for each node and an arrow for each
    observation.

    Args:
      solution: of `solve` or `solve_stationary`, or the `graph()` of the latter.
      path: of a PNG, PDF or SVG file. [default: nothing is written]
      timeout: seconds after which the bounds over the beliefs are drawn as they are.
      on_belief: called with the number of beliefs that are done, and of all.

    Raises:
      ValueError: the name of the file has another ending, the problem is an MDP or has more than three states, the trees over the
        attitudes are too large, or the graph has too many nodes.
      StorageError: the file cannot be written.

    >>> tiger = ld.read_pomdp("tiger.pomdp", horizon=2)
    >>> ld.plot(ld.solve(tiger), "tiger.png").get_label()
    'Value over the belief, between its bounds, and a strip of the best first action, 2 stages.'
    """
    if path is not None:
        picture_kind(path)  # before minutes of computing
    if isinstance(solution, PolicyGraph):
        return render(partial(draw_policy_graph, solution), path)
    if not has_beliefs(solution):
        mdp = isinstance(solution, Solution | StationarySolution | MDPSolution)
        got = "the solution of an MDP, whose state is observed" if mdp else type(solution).__name__
        raise ValueError(f"solution must be that of a POMDP, whose beliefs are drawn, or a policy graph; got {got}")
    if isinstance(solution, StationarySolution):
        problem, horizon = solution.problem, solution.horizon
    elif isinstance(solution.problem, APOMDP):
        with double_precision():
            best = beliefs.attitude_actions(solution.problem, on_belief)
        names, alpha = (solution.source.states, solution.source.actions), float(solution.problem.alpha)
        return render(partial(beliefs.draw_attitudes, best, *names, alpha), path)
    else:
        assert isinstance(solution.problem, POMDP)
        names = {part: getattr(solution.source, part) for part in ("states", "actions", "observations")}
        problem, horizon = replace(from_pomdp(solution.problem), **names), float(solution.problem.horizon)
    values = beliefs.belief_values(problem, horizon, timeout=timeout, on_belief=on_belief)
    return render(partial(beliefs.draw_belief_values, values, problem, horizon), path)


def has_beliefs(solution: Any) -> TypeGuard[Solution | StationarySolution]:
    """Whether it is the solution of a problem whose state is hidden."""
    if isinstance(solution, StationarySolution):
        return bool(solution.problem.O)
    return isinstance(solution, Solution) and isinstance(solution.problem, POMDP | APOMDP)
