"""The bounds of `lindm.solvers.point_based`: alpha vectors below, corners and visited beliefs above.

Both are for unnormalized beliefs and non-negative rewards, for a number of stages to go that may be infinite.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import sparse

from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.legal_supports import saturated

ITERATIONS = 10_000  # of the bounds that a search starts with; after any number of them they are valid
EPSILON = 1e-12  # changes below this fraction of the largest value are rounding


class Successors(NamedTuple):
    """The unnormalized beliefs after each action and possible observation of a belief, on the states that they reach."""

    states: np.ndarray  # [k]
    mass: np.ndarray  # [n, k]
    total: np.ndarray  # [n] probability of the observation
    action: np.ndarray  # [n], rising
    observation: np.ndarray  # [n]
    first: np.ndarray  # [A] the first row of each action

    def part(self, action: int) -> slice:
        """The rows of an action."""
        return slice(int(self.first[action]), int(self.first[action + 1]) if action + 1 < len(self.first) else len(self.total))


@dataclass(kw_only=True, eq=False)
class Belief:
    """A visited belief on its support; what follows it is computed once."""

    states: np.ndarray  # [k]
    mass: np.ndarray  # [k], sums to one
    allowed: np.ndarray | None = None  # [A] bool, actions that may be taken; None: all
    after: Successors | None = None
    points: dict[float, int] = field(default_factory=dict)  # stages to go -> row of the upper bound
    above: dict[float, np.ndarray] = field(default_factory=dict)  # stages to go -> the last upper bounds of action values [A]


class LowerBound:
    """Alpha vectors with their policies. Those in use are columns of one matrix; each has a number that never changes."""

    def __init__(self, states: int):
        self.values: dict[int, np.ndarray] = {}  # number -> [S]
        self.policy: dict[int, tuple[int, np.ndarray]] = {}  # number -> action, number of the successor for each observation
        self.least: dict[int, float] = {}  # number -> the fewest stages to go with which the vector is a bound
        self.used = np.zeros(0, int)  # numbers of the columns
        self.stages = np.zeros(0)  # `least` of the columns
        self._columns = np.empty((states, 64))
        self._next = 0

    @property
    def columns(self) -> np.ndarray:
        return self._columns[:, : len(self.used)]

    @property
    def next_number(self) -> int:
        """The number of the next vector."""
        return self._next

    def add(self, values: np.ndarray, action: int, successors: np.ndarray | None, least: float, in_use: bool = True) -> int:
        """A new vector; without successors it names itself."""
        number = self._next
        self._next += 1
        self.values[number], self.least[number] = values, least
        self.policy[number] = (action, successors if successors is not None else np.array([number]))
        if in_use:
            if len(self.used) == self._columns.shape[1]:
                self._columns = np.concatenate([self._columns, np.empty_like(self._columns)], axis=1)
            self._columns[:, len(self.used)] = values
            self.used, self.stages = np.append(self.used, number), np.append(self.stages, least)
        return number

    def keep(self, positions: np.ndarray) -> None:
        """Use these columns only, and forget vectors that nothing in use leads to."""
        kept = self.columns[:, positions]
        self.used, self.stages = self.used[positions], self.stages[positions]
        self._columns[:, : len(self.used)] = kept
        reached, ahead = set(), self.used.tolist()
        while ahead:
            if (number := ahead.pop()) not in reached:
                reached.add(number)
                ahead += self.policy[number][1].tolist()
        for number in self.values.keys() - reached:
            del self.values[number], self.policy[number], self.least[number]

    def at(self, states: np.ndarray, mass: np.ndarray, stages: float) -> tuple[np.ndarray, np.ndarray]:
        """The bound [n] at unnormalized beliefs [n, k] on some states, and the position of the best column."""
        scores = mass @ self.columns[states]
        scores[:, self.stages > stages] = -np.inf
        best = scores.argmax(1)
        return scores[np.arange(len(mass)), best], best


class UpperBound:
    """Values at the corners of the simplex, for each number of stages to go, and at visited beliefs."""

    def __init__(self, corners: np.ndarray):
        self.corners = corners  # [H + 1, S] by the stages to go; [1, S] over an infinite horizon
        self.values = np.empty(64)
        self.most = np.empty(64)  # the most stages to go with which the value is a bound
        self.count = 0
        self._first = np.zeros(65, int)  # rows of the flat arrays
        self._states: np.ndarray = np.empty(1024, int)
        self._mass: np.ndarray = np.empty(1024)

    def corner(self, stages: float) -> np.ndarray:
        return self.corners[int(stages) if stages < math.inf else 0]

    def put(self, belief: Belief, value: float, stages: float) -> None:
        """The value at a belief is at most this."""
        if len(belief.states) == 1:
            rows = slice(0, int(stages) + 1) if stages < math.inf else slice(0, 1)
            s = belief.states[0]
            self.corners[rows, s] = np.minimum(self.corners[rows, s], value)
            return
        if (row := belief.points.get(stages)) is not None:
            self.values[row] = min(self.values[row], value)
            return
        row = belief.points[stages] = self.count
        start, end = self._first[row], self._first[row] + len(belief.states)
        if row == len(self.values):
            self.values, self.most = (np.resize(x, 2 * row) for x in (self.values, self.most))
            self._first = np.resize(self._first, 2 * row + 1)
        while end > len(self._states):
            self._states, self._mass = (np.resize(x, 2 * len(x)) for x in (self._states, self._mass))
        self._states[start:end], self._mass[start:end] = belief.states, belief.mass
        self.values[row], self.most[row], self._first[row + 1] = value, stages, end
        self.count += 1

    def at(self, states: np.ndarray, mass: np.ndarray, stages: float) -> np.ndarray:
        """The bound [n] at unnormalized beliefs [n, k] on some states."""
        corner = self.corner(stages)
        bound = mass @ corner[states]
        n = self.count
        if not n:
            return bound
        first, end = self._first[:n], int(self._first[n])
        column = np.full(len(corner), -1)
        column[states] = np.arange(len(states))
        columns = column[self._states[:end]]
        drop = np.add.reduceat(self._mass[:end] * corner[self._states[:end]], first) - self.values[:n]
        useful = (np.minimum.reduceat(columns, first) >= 0) & (drop > 0) & (self.most[:n] >= stages)
        if not useful.any():
            return bound
        sizes = np.diff(self._first[: n + 1])
        inside = np.repeat(useful, sizes)
        starts = np.concatenate([[0], sizes[useful].cumsum()[:-1]])
        ratio = np.minimum.reduceat(mass[:, columns[inside]] / self._mass[:end][inside], starts, axis=1)
        # a ratio above the mass of u is rounding: the entries of both sum to one
        return bound - (np.minimum(ratio, mass.sum(1, keepdims=True)) * drop[useful]).max(1)


def informed_bound(
    problem: StationaryPOMDP, rewards: np.ndarray, horizon: float, is_over: Callable[[], bool] = lambda: False
) -> np.ndarray:
    """The fast informed bound of max_a Q by the stages to go [H + 1, S], or [1, S] over an infinite horizon.

    Args:
      rewards: [S, A] not negative, or `legal_supports.ILLEGAL`.
      is_over: whether to take the bound as it is; it is looser then, over an infinite horizon.
    """
    S, A = rewards.shape
    gamma = problem.discount
    kernels = []
    for P, O in zip(problem.P, problem.O, strict=True):
        possible = np.flatnonzero(np.bincount(O.indices, minlength=problem.num_observations))
        kernels.append(sparse.csr_array(sparse.vstack([P.multiply(O[:, [o]].T) for o in possible])))

    def back_up(Q: np.ndarray) -> np.ndarray:
        Q = rewards + gamma * np.stack([(K @ Q).max(1).reshape(-1, S).sum(0) for K in kernels], axis=1)
        return Q if problem.legal is None else saturated(Q)

    if horizon < math.inf:
        Q = np.zeros((S, A))
        bounds = [Q.max(1)]
        for _ in range(int(horizon)):
            Q = back_up(Q)
            bounds.append(Q.max(1))
        return np.array(bounds)
    V = np.full(S, rewards.max() / (1 - gamma))
    for _ in range(ITERATIONS):  # the optimal value of the MDP, from above
        Q = np.minimum(rewards + gamma * np.stack([P @ V for P in problem.P], axis=1), V[:, None])
        V, last = Q.max(1), V
        if np.abs(V - last).max() <= EPSILON * rewards.max() or is_over():
            break
    for _ in range(ITERATIONS):
        Q, last = np.minimum(back_up(Q), Q), Q
        if np.abs(Q - last).max() <= 1e-6 * rewards.max() or is_over():
            break
    return Q.max(1)[None]
