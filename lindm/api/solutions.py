"""Solved problems: values, bounds, best actions, files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lindm.api.problems import as_source
from lindm.evaluation.environments import double_precision
from lindm.evaluation.policies.solution import SolutionPolicy
from lindm.families.registry import NamedProblem
from lindm.solvers import solution_file
from lindm.solvers import solve as solvers
from lindm.types import LinearMDP, Problem

NAMES = ("states", "actions", "observations", "models")


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A solved problem.

    >>> solution = ld.solve(ld.read_pomdp("tiger.pomdp", horizon=4))
    >>> solution.method, solution.exact, solution.first_action
    ('tree', True, 'listen')
    """

    source: NamedProblem
    solution: solvers.Solution  # the tables of the method

    @property
    def problem(self) -> Problem:
        """The problem."""
        return self.source.problem

    @property
    def value(self) -> float:
        """Optimal expected total reward: exact, or the middle of the bounds."""
        return float(self.solution.value)

    @property
    def lower(self) -> float:
        """Certified lower bound of the value."""
        return float(self.solution.lower)

    @property
    def upper(self) -> float:
        """Certified upper bound of the value."""
        return float(self.solution.upper)

    @property
    def method(self) -> str:
        """Backward induction, tree, hsvi or net."""
        return self.solution.method

    @property
    def exact(self) -> bool:
        """Whether the bounds are the value itself."""
        return self.solution.exact

    @property
    def first_action(self) -> int | str:
        """The best first action, by name where actions have names. ValueError for an MDP, where it depends on the state."""
        with double_precision():
            action = int(solvers.first_action(self.solution))
        return self.source.actions[action] if self.source.actions else action

    @property
    def policy(self) -> SolutionPolicy:
        """Its policy, for `evaluate`: optimal where the solution is exact, otherwise that of the best lower bound.

        >>> tiger = ld.read_pomdp("tiger.pomdp", horizon=3)
        >>> ld.evaluate(tiger, {"tree": ld.solve(tiger).policy}, tasks=1, demos=1)["tree"].gap
        0.0
        """
        return SolutionPolicy(self.solution)

    def save(self, path: str | Path) -> None:
        """Write the problem and its solution to one .npz file, which `load_solution` reads.

        >>> ld.solve(ld.read_pomdp("tiger.pomdp", horizon=3)).save("tiger.npz")
        >>> ld.load_solution("tiger.npz").first_action
        'listen'
        """
        names = {part: getattr(self.source, part) for part in NAMES}
        solution_file.save_solution(Path(path), self.solution, names)


def load_solution(path: str | Path) -> Solution:
    """Read a file of `Solution.save`. DataError where it is none.

    >>> ld.solve(ld.make("mdp", horizon=4)).save("mdp.npz")
    >>> ld.load_solution("mdp.npz").method
    'backward induction'
    """
    with double_precision():
        solution, names = solution_file.load_solution(Path(path))
    return Solution(source=NamedProblem(problem=solution.problem, **names), solution=solution)


def solve(
    problem: NamedProblem | Problem | LinearMDP,
    method: Literal["auto", "tree", "hsvi", "net"] = "auto",
    *,
    effort: int | None = None,
) -> Solution:
    """The value of a problem with bounds, and its best actions.

    Args:
      method: auto is exact where the belief tree fits in 2 GiB, and gives certified bounds otherwise.
      effort: trials of hsvi [default: 256] or points of the net [default: 20,000].

    Raises:
      ValueError: the method does not fit the problem, or its tables do not fit in memory.

    >>> solution = ld.solve(ld.read_pomdp("tiger.pomdp", horizon=3))
    >>> round(solution.value, 4), solution.lower == solution.upper
    (2.3098, True)
    """
    source = as_source(problem)
    with double_precision():
        return Solution(source=source, solution=solvers.solve(source.problem, method, effort=effort))
