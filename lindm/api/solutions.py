"""Solved problems: values, bounds, best actions, files."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, overload

from lindm.api.problems import as_source
from lindm.evaluation.environments import double_precision
from lindm.evaluation.policies.solution import SolutionPolicy
from lindm.families.registry import NamedProblem
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers import point_based, solution_file, stationary_mdp, ties
from lindm.solvers import solve as solvers
from lindm.solvers.stationary_solution import StationarySolution
from lindm.types import MDP, LinearMDP, Plan, Problem

NAMES = ("states", "actions", "observations", "models")


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A solved problem.

    >>> solution = ld.solve(ld.read_pomdp("tiger.pomdp", horizon=4))
    >>> print(solution)
    Solution(value 1.795544219, exact, method tree)
    >>> solution.method, solution.exact, solution.first_action
    ('tree', True, 'listen')
    """

    source: NamedProblem
    solution: solvers.Solution  # the tables of the method

    def __str__(self) -> str:
        bounds = "exact" if self.exact else f"certified to lie in [{self.lower:.10g}, {self.upper:.10g}]"
        return f"Solution(value {self.value:.10g}, {bounds}, method {self.method})"

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
        """The best first action, by name where actions have names. ValueError for an MDP with several first states."""
        with double_precision():
            action = int(solvers.first_action(self.solution))
        return self.source.actions[action] if self.source.actions else action

    @property
    def first_actions(self) -> dict[int | str, int | str]:
        """Of an MDP: the best first action in each state in which it can begin. ValueError for other problems.

        >>> solution = ld.solve(ld.make("mdp", horizon=4))
        >>> sorted(solution.first_actions)
        [0, 1, 2, 3, 4]
        """
        if not isinstance(self.problem, MDP):
            raise ValueError(f"problem must be an MDP: its state is observed; got {type(self.problem).__name__}")
        with double_precision():
            tables = self.solution.tables
            assert isinstance(tables, Plan)
            best = ties.greedy(tables.Q[0])
        states, actions = self.source.states, self.source.actions
        possible = [s for s, p in enumerate(self.problem.rho.tolist()) if p > 0]
        return {states[s] if states else s: actions[int(best[s])] if actions else int(best[s]) for s in possible}

    @property
    def policy(self) -> SolutionPolicy:
        """Its policy, for `evaluate` and `act`: optimal where the solution is exact, otherwise that of the best lower bound.

        The policy of an ambiguous problem needs the model of each step. `.policy.assuming(model)` is the policy that takes
        every step for one of this model, so that its histories have actions and observations alone.

        >>> tiger = ld.read_pomdp("tiger.pomdp", horizon=3)
        >>> ld.evaluate(tiger, {"tree": ld.solve(tiger).policy}, tasks=1, demos=1)["tree"].gap
        0.0
        >>> policy = ld.solve(ld.make("prostate", horizon=3)).policy
        >>> policy.act((), "defer UCSF psa-3-null").action, policy.assuming("UCSF").act((), "defer psa-3-null").action
        ('defer', 'defer')
        """
        return SolutionPolicy(self.solution, self.source)

    def save(self, path: str | Path) -> None:
        """Write the problem and its solution to one .npz file, which `load_solution` reads.

        >>> ld.solve(ld.read_pomdp("tiger.pomdp", horizon=3)).save("tiger.npz")
        >>> ld.load_solution("tiger.npz").first_action
        'listen'
        """
        names = {part: getattr(self.source, part) for part in NAMES}
        solution_file.save_solution(Path(path), self.solution, names)


def load_solution(path: str | Path) -> Solution:
    """Read a file of `Solution.save`. Raises DataError for any other file.

    >>> ld.solve(ld.make("mdp", horizon=4)).save("mdp.npz")
    >>> ld.load_solution("mdp.npz").method
    'backward induction'
    """
    with double_precision():
        solution, names = solution_file.load_solution(Path(path))
    return Solution(source=NamedProblem(problem=solution.problem, **names), solution=solution)


StationaryMethod = Literal["auto", "point-based", "value-iteration", "policy-iteration"]
StationaryResult = StationarySolution | stationary_mdp.MDPSolution


@overload
def solve(
    problem: NamedProblem | Problem | LinearMDP,
    method: Literal["auto", "tree", "hsvi", "net"] = "auto",
    *,
    effort: int | None = None,
) -> Solution: ...
@overload
def solve(problem: StationaryPOMDP, method: StationaryMethod = "auto") -> StationaryResult: ...
def solve(problem, method="auto", *, effort: int | None = None):
    """Compute the value of a problem with bounds, and its best actions.

    Args:
      problem: a problem with a horizon, or without one; the latter is solved by `solve_stationary`, which has more options.
      method: auto is exact if the belief tree fits in 2 GiB, and computes certified bounds otherwise.
      effort: number of trials of hsvi [default: 256] or of points of net [default: 20,000].

    Raises:
      ValueError: the method does not fit the problem, or its tables do not fit in memory.

    >>> solution = ld.solve(ld.read_pomdp("tiger.pomdp", horizon=3))
    >>> round(solution.value, 4), solution.lower == solution.upper
    (2.3098, True)
    """
    if isinstance(problem, StationaryPOMDP):
        if effort is not None:
            raise ValueError(f"effort must be left out for a problem without a horizon; got {effort}")
        return solve_stationary(problem, method=cast(StationaryMethod, method))
    source = as_source(problem)
    with double_precision():
        return Solution(source=source, solution=solvers.solve(source.problem, cast(solvers.Method, method), effort=effort))


def solve_stationary(
    problem: StationaryPOMDP,
    horizon: float = math.inf,
    *,
    method: StationaryMethod = "auto",
    tolerance: float | str | None = None,
    timeout: float = 60.0,
    on_trial: Callable[[int, float, float], None] = lambda trials, lower, upper: None,
) -> StationaryResult:
    """Bound the value of a POMDP or MDP with an infinite horizon, and compute a policy that earns the lower bound.

    Args:
      problem: a problem of `read_stationary_pomdp` or `stationary_mdp`.
      horizon: number of stages, or inf.
      method: auto is point-based for a POMDP, and policy-iteration for an MDP (backward induction over a finite horizon).
      tolerance: the search ends when the bounds at the start are this close: a number, or a percentage of the value.
        [default: 0.1% for a POMDP, 1e-7% for an MDP]
      timeout: seconds after which the search ends with the bounds found so far.
      on_trial: called with the number of trials (for an MDP: iterations) and the bounds.

    Raises:
      ValueError: an argument is out of range.

    >>> solution = ld.solve_stationary(ld.read_stationary_pomdp("tiger.pomdp"), horizon=5, tolerance=1e-9)
    >>> round(solution.lower, 6), solution.regret
    (2.763096, 0.0)
    """
    if not isinstance(problem, StationaryPOMDP):
        made = "`read_stationary_pomdp` and `stationary_mdp` make one, `solve` takes the others"
        raise ValueError(f"problem must be a StationaryPOMDP ({made}); got {type(problem).__name__}")
    observed = not problem.O
    absolute, relative = _parse_tolerance(tolerance if tolerance is not None else "1e-7%" if observed else "0.1%")
    if not horizon >= 1 or (horizon < math.inf and horizon != int(horizon)):
        raise ValueError(f"horizon must be a whole number of at least 1, or inf; got {horizon}")
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds; got {timeout}")
    ends = {"tolerance": absolute, "relative": relative, "timeout": timeout}
    if observed:
        if method == "point-based":
            raise ValueError("method point-based is for POMDPs; an MDP takes auto, value-iteration or policy-iteration")
        return stationary_mdp.solve(problem, horizon, method=method, on_iteration=on_trial, **ends)
    if method not in ("auto", "point-based"):
        raise ValueError(f"method must be auto or point-based for a POMDP: {method} needs a state that is observed")
    return point_based.solve(problem, horizon, on_trial=on_trial, **ends)


def _parse_tolerance(tolerance: float | str) -> tuple[float, float]:
    """The absolute and the relative part of "0.01" or "1%". ValueError for anything else, or a negative number."""
    text = str(tolerance).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"tolerance must be a number >= 0, or a percentage such as 1%; got {tolerance!r}")
    return (0.0, number / 100) if text.endswith("%") else (number, 0.0)
