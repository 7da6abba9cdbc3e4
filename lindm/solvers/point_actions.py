"""The actions that the search of `lindm.solvers.point_based` may take where a state does not allow all of them."""

import math
from collections.abc import Callable

import numpy as np

from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.legal_supports import ILLEGAL, Supports, next_values, saturated, supports
from lindm.solvers.point_bounds import EPSILON, ITERATIONS, LowerBound


class LegalActions:
    """Actions by the set of possible states: those that are legal, and viable without an end.

    Args:
      horizon: of the problem.
      starts: [k, S] the beliefs at which a search begins.

    Raises:
      ValueError: no action is legal in all states, and there are too many sets of possible states; no policy takes legal actions
        alone; or a finite horizon of a problem in which legal actions can lead to a belief without one.
    """

    def __init__(self, problem: StationaryPOMDP, horizon: float, starts: np.ndarray):
        assert problem.legal is not None
        self.problem, self.legal = problem, problem.legal
        self.kernels = [(problem.P, [O.toarray() for O in problem.O])]
        self.supports: Supports | None = None
        if self.legal.all(0).any():  # it is always viable, and so is every action that is legal
            return
        found = self.supports = supports(starts, self.kernels, self.legal)
        self.viable, self._number = found.viable_forever(), found.number()
        if horizon < math.inf and not (self.viable == found.legal).all():
            rule = "point-based has no finite horizon where legal actions lead to a belief without one"
            raise ValueError(f"{rule}: hsvi and the tree have one; the horizon inf takes actions that avoid such beliefs")
        if not all(self.at(np.flatnonzero(start)).any() for start in starts):
            rule = "legal must allow an action at every belief that can be reached"
            raise ValueError(f"{rule}; every policy comes to one without any")

    def at(self, states: np.ndarray) -> np.ndarray:
        """[A] the actions where these states are possible."""
        if self.supports is None:
            return np.all(self.legal[states], axis=0)
        return self.viable[self._number[states.astype(np.int64).tobytes()]]

    def add_policies(self, lower: LowerBound, rewards: np.ndarray, horizon: float, is_over: Callable[[], bool]) -> None:
        """The vectors of a policy that takes the viable action with the highest mean reward over the possible states.

        Args:
          rewards: [S, A] not negative, or `ILLEGAL`.
        """
        found = self.supports
        if found is None:
            return
        alive = np.any(self.viable, axis=1)
        rows, X = np.flatnonzero(alive), found.states
        mean = np.where(self.viable, X @ np.where(self.legal, rewards, 0) / X.sum(1, keepdims=True), -math.inf)
        chosen = mean.argmax(1)
        names = found.after[0][np.arange(len(X)), chosen]  # [n, O] the next set after each observation
        names = np.where(names < 0, rows[0] if len(rows) else 0, names)
        now = np.where(X & alive[:, None], rewards[:, chosen].T, ILLEGAL)

        def back_up(values: np.ndarray) -> np.ndarray:
            following = np.zeros_like(values)
            for a in np.unique(chosen):
                following = np.where((chosen == a)[:, None], next_values(found, self.kernels, 0, int(a), values), following)
            return saturated(np.where(now > ILLEGAL, now + self.problem.discount * following, ILLEGAL))

        if horizon == math.inf:
            values = np.where(now > ILLEGAL, 0.0, ILLEGAL)
            for _ in range(ITERATIONS):  # every iterate is below the next one, so below the value
                values, last = back_up(values), values
                if np.abs(values - last).max() <= EPSILON * max(1.0, float(rewards.max())) or is_over():
                    break
            first = lower.next_number
            position = {int(i): first + k for k, i in enumerate(rows)}
            for i in rows:
                lower.add(last[i], int(chosen[i]), np.array([position[int(j)] for j in names[i]]), math.inf)
            return
        before: dict[int, int] = {}
        values = now
        for n in range(1, int(horizon) + 1):
            values = now if n == 1 else back_up(values)
            numbers = {}
            for i in rows:
                successors = np.array([before[int(j)] for j in names[i]]) if before else None
                numbers[int(i)] = lower.add(values[i], int(chosen[i]), successors, n)
            before = numbers
