"""The search of `lindm.solvers.point_based`: its state, trials, backups and pruning."""

import math
import time
from collections.abc import Callable

import numpy as np
from scipy import sparse

from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.legal_supports import ILLEGAL, LIMIT, penalized, saturated, without_bound
from lindm.solvers.point_actions import LegalActions
from lindm.solvers.point_bounds import EPSILON, ITERATIONS, Belief, LowerBound, Successors, UpperBound, informed_bound
from lindm.solvers.stationary_solution import StationarySolution, total_discount

SHARE = 0.9  # a trial goes on while the weighted gap at its belief is above this share of the gap at the start
SWEEPS = 8  # backups between the trials for each backup of a trial: they leave the upper bound, which costs most, as it is
GROWTH = 1.3  # vectors are pruned when their number has grown by this factor
TAIL = 0.1  # the largest share of the tolerance that the stages beyond a finite horizon may take
DEPTH = 2000  # the longest trial over an infinite horizon
BLIND = 1 << 28  # bytes that the values of the policies "always a" may take
CACHE = 1 << 29  # bytes of successors of visited beliefs that are kept


class Search:
    """The state of a search.

    Args:
      horizon: of the problem.
      accuracy: of its value that is asked for.
      starts: [k, S] all beliefs at which the search may begin. [default: that of the problem]

    Raises:
      ValueError: of `LegalActions`, where a state does not allow every action.
    """

    def __init__(
        self, problem: StationaryPOMDP, horizon: float, timeout: float, accuracy: float, starts: np.ndarray | None = None
    ):
        self.problem, self.deadline = problem, time.monotonic() + timeout
        self.floor = problem.lowest_reward
        self.rewards = problem.r - self.floor  # >= 0
        self.actions = None
        if problem.legal is not None:
            self.actions = LegalActions(problem, horizon, problem.rho[None] if starts is None else starts)
            self.rewards = penalized(self.rewards, problem.legal)
        self.stages = self.horizon = horizon  # of the problem and of the search
        self.tail = 0.0  # how much more the search's horizon can be worth than the problem's
        if problem.discount < 1:
            tail = problem.discount**horizon * float(self.rewards.max()) / (1 - problem.discount)
            if tail <= TAIL * accuracy:
                self.horizon, self.tail = math.inf, tail
        columns = [[o] for o in range(problem.num_observations)]
        self.kernel = sparse.csr_array(
            sparse.hstack([P.multiply(O[:, o].T) for P, O in zip(problem.P, problem.O, strict=True) for o in columns])
        )  # [S, A * O * S]
        self.scale = max(1.0, float(self.rewards.max()))
        self.lower = LowerBound(problem.num_states)
        self.upper = UpperBound(informed_bound(problem, self.rewards, self.horizon, self.is_over))
        self._add_blind_policies()
        self.beliefs: dict[bytes, Belief] = {}
        self.visited: dict[tuple[int, float], Belief] = {}  # by the belief's identity and the stages to go
        states = np.flatnonzero(problem.rho)
        self.start = self.belief(states, problem.rho[states])
        self.pruned_at = self.blind = len(self.lower.used)
        self.backups = self.swept = self.trials = self._cached = 0
        self.rng = np.random.default_rng(0)

    def is_over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.deadline

    def shift(self, stages: float) -> float:
        """What the shift of the rewards takes from values with these stages to go."""
        return self.floor * float(total_discount(self.problem.discount, stages))

    def solution(self) -> "StationarySolution":
        """The result so far, without vectors that nothing in use leads to."""
        if self.visited:
            self.prune()
        lower, upper = sorted(self.bounds())  # rounding may swap bounds that meet
        q_lower, q_upper = self.q_bounds()
        numbers = sorted(self.lower.values)
        position = {number: i for i, number in enumerate(numbers)}
        O = self.problem.num_observations
        named = [np.broadcast_to(self.lower.policy[number][1], (O,)) for number in numbers]
        least = np.array([self.lower.least[number] for number in numbers])
        shifts = np.array([self.shift(stages) for stages in least])
        return StationarySolution(
            problem=self.problem,
            horizon=self.stages,
            lower=lower,
            upper=upper,
            trials=self.trials,
            q_lower=q_lower,
            q_upper=q_upper,
            vectors=self._kept(np.array([self.lower.values[number] for number in numbers]) + shifts[:, None]),
            actions=np.array([self.lower.policy[number][0] for number in numbers]),
            successors=np.array([[position[int(k)] for k in row] for row in named]),
            least=least,
        )

    def _add_blind_policies(self) -> None:
        problem, gamma = self.problem, self.problem.discount
        S, A = self.rewards.shape
        if self.actions is not None:
            self.actions.add_policies(self.lower, self.rewards, self.horizon, self.is_over)
        if self.horizon == math.inf:
            for a in range(A):
                value, reward = np.zeros(S), self.rewards[:, a]
                for _ in range(ITERATIONS):  # every iterate is below the next one, so below the value
                    value, last = self._kept(reward + gamma * (problem.P[a] @ value)), value
                    if np.abs(value - last).max() <= EPSILON * self.scale or self.is_over():
                        break
                self.lower.add(last, a, None, math.inf)
            return
        longest = int(min(self.horizon, max(1, BLIND // (8 * S * A))))
        for a in range(A):
            value, number = np.zeros(S), None
            for n in range(1, longest + 1):
                value = self._kept(self.rewards[:, a] + gamma * (problem.P[a] @ value))
                successor = None if number is None else np.array([number])
                number = self.lower.add(value, a, successor, n, in_use=n & (n - 1) == 0 or n == longest)

    def _kept(self, values: np.ndarray) -> np.ndarray:
        """Values, `saturated` where the problem has actions that are not legal."""
        return values if self.actions is None else saturated(values)

    def belief(self, states: np.ndarray, mass: np.ndarray) -> Belief:
        """The belief with this law; the same object for laws that differ by rounding."""
        key = states.tobytes() + np.round(mass, 12).tobytes()
        if (known := self.beliefs.get(key)) is None:
            allowed = None if self.actions is None else self.actions.at(states)
            known = self.beliefs[key] = Belief(states=states, mass=mass, allowed=allowed)
        return known

    def successors(self, belief: Belief) -> Successors:
        if belief.after is None:
            S, O = self.problem.num_states, self.problem.num_observations
            rows = self.kernel[belief.states]
            weights = rows.data * np.repeat(belief.mass, np.diff(rows.indptr))
            entries, where = np.unique(rows.indices, return_inverse=True)
            branch, state = np.divmod(entries, S)
            branches, row = np.unique(branch, return_inverse=True)
            states, column = np.unique(state, return_inverse=True)
            mass = np.zeros((len(branches), len(states)))
            mass[row, column] = np.bincount(where, weights)
            action, observation = np.divmod(branches, O)
            first = np.searchsorted(action, np.arange(self.problem.num_actions))
            belief.after = Successors(states, mass, mass.sum(1), action, observation, first)
            self._cached += mass.nbytes
            if self._cached > CACHE:
                for other in self.beliefs.values():
                    other.after = None
                self._cached = 0
                return self.successors(belief)
        return belief.after

    def lookahead(self, belief: Belief, stages: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower bounds of the action values [A]; those of the successors [n], and their best columns [n]."""
        after = self.successors(belief)
        now = belief.mass @ self.rewards[belief.states]
        now = now if belief.allowed is None else np.where(belief.allowed, now, ILLEGAL)
        if stages == 1:
            zero = np.zeros(len(after.mass))
            return now, zero, zero.astype(int)
        low, best = self.lower.at(after.states, after.mass, stages - 1)
        return now + self.problem.discount * np.add.reduceat(low, after.first), low, best

    def look_above(self, belief: Belief, stages: float, action: int) -> tuple[float, np.ndarray]:
        """The upper bound of an action's value; those of the successors [k]."""
        after = self.successors(belief)
        now = float(belief.mass @ self.rewards[belief.states, action])
        part = after.part(action)
        if stages == 1:
            return now, np.zeros(part.stop - part.start)
        high = self.upper.at(after.states, after.mass[part], stages - 1)
        return now + self.problem.discount * float(high.sum()), high

    def best_above(self, belief: Belief, stages: float) -> tuple[int, float, np.ndarray]:
        """The action with the largest upper bound; the bound, and those of the action's successors [k].

        Bounds only fall, so what was computed before still holds: only actions that it leaves in front are computed again.
        """
        before = np.inf if belief.allowed is None else np.where(belief.allowed, np.inf, ILLEGAL)
        q = belief.above.setdefault(stages, np.full(self.problem.num_actions, before))
        while True:
            a = int(q.argmax())
            value, high = self.look_above(belief, stages, a)
            q[a] = min(q[a], value)
            if q.argmax() == a:
                return a, float(q[a]), high

    def back_up(self, belief: Belief, stages: float, upper: bool = True) -> bool:
        """Tighten the bounds at a belief; whether there is a new vector."""
        self.backups += 1
        if upper:
            self.visited[id(belief), stages] = belief
            self.upper.put(belief, self.best_above(belief, stages)[1], stages)
        low, _, best = self.lookahead(belief, stages)
        a = int(low.argmax())
        now = self.lower.at(belief.states, belief.mass[None], stages)[0][0]
        if not low[a] > max(now, LIMIT) + EPSILON * self.scale:
            return False
        after, lower = self.successors(belief), self.lower
        part = after.part(a)
        chosen = np.zeros(self.problem.num_observations, int)
        chosen[after.observation[part]] = best[part]
        # after an observation that is possible elsewhere, nothing is known but what it says of the state
        elsewhere = np.setdiff1d(self.problem.O[a].indices, after.observation[part])
        if len(elsewhere):
            said = sparse.csr_array(self.problem.O[a][:, elsewhere].T)
            chosen[elsewhere] = self._scores(said, np.full(len(elsewhere), stages - 1), slice(None)).argmax(1)
        if stages == 1:
            values, least = self.rewards[:, a].copy(), 1.0
        else:
            following = np.asarray(self.problem.O[a].multiply(lower.columns[:, chosen]).sum(1)).ravel()
            values = self._kept(self.rewards[:, a] + self.problem.discount * (self.problem.P[a] @ following))
            least = 1 + lower.stages[chosen].max()
        lower.add(values, a, lower.used[chosen], least)
        return True

    def gap(self) -> tuple[float, float]:
        """Bounds of the value at the start, of the shifted rewards."""
        start = self.start
        low = self.lower.at(start.states, start.mass[None], self.horizon)[0][0]
        return float(low), float(self.upper.at(start.states, start.mass[None], self.horizon)[0])

    def bounds(self) -> tuple[float, float]:
        """Bounds of the problem's value."""
        low, high = self.gap()
        return low - self.tail + self.shift(self.stages), high + self.shift(self.stages)

    def q_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the action values at the start [A]."""
        low = self.lookahead(self.start, self.horizon)[0]
        high = np.array([self.look_above(self.start, self.horizon, a)[0] for a in range(self.problem.num_actions)])
        if self.start.allowed is not None:
            high = np.where(self.start.allowed, high, ILLEGAL)
        return without_bound(low - self.tail + self.shift(self.stages)), without_bound(high + self.shift(self.stages))

    def run(
        self,
        tolerance: float,
        relative: float,
        trials: float = math.inf,
        on_trial: Callable[[int, float, float], None] = lambda trials, lower, upper: None,
    ) -> None:
        """Search from the start as `solve` says."""
        while True:
            lower, upper = self.bounds()
            width = max(tolerance, relative * max(abs(lower), abs(upper)), EPSILON * self.scale, 2 * self.tail)
            on_trial(self.trials, lower, upper)
            if upper - lower <= width or self.trials >= trials or self.is_over():
                return
            self.trial(width)
            if len(self.lower.used) > GROWTH * self.pruned_at + 20:
                self.prune()
            while self.trials % 5 == 0 and self.swept < SWEEPS * (self.backups - self.swept) and not self.is_over():
                self.sweep()
                self.prune()

    def trial(self, tolerance: float) -> None:
        """Descend from the start, then back up what was visited."""
        low, high = self.gap()
        target = max(tolerance, SHARE * (high - low))
        path: list[tuple[Belief, float]] = []
        belief, stages = self.start, self.horizon
        while True:
            path.append((belief, stages))
            if stages == 1 or not self.problem.discount or len(path) == DEPTH or self.is_over():
                break
            a, _, high = self.best_above(belief, stages)
            after = self.successors(belief)
            part = after.part(a)
            low = self.lower.at(after.states, after.mass[part], stages - 1)[0]
            target /= self.problem.discount
            excess = high - low - after.total[part] * target
            row = part.start + int(excess.argmax())
            if not excess.max() > 0:
                break
            # what is legal depends on all possible states
            least = EPSILON * after.total[row] if self.actions is None else 0
            inside = np.flatnonzero(after.mass[row] > least)
            belief = self.belief(after.states[inside], after.mass[row, inside] / after.mass[row, inside].sum())
            stages -= 1
        for visited in reversed(path):
            self.back_up(*visited)
        self.trials += 1

    def sweep(self) -> None:
        """Back up random visited beliefs until each has been backed up, or its lower bound has risen by another's vector."""
        before = self.backups
        matrix, stages = self._visited()
        scores = self._scores(matrix, stages, slice(None))
        beliefs = list(self.visited.values())
        old, not_risen = scores.max(1), np.ones(len(stages), bool)
        while not_risen.any() and not self.is_over():
            i = self.rng.choice(np.flatnonzero(not_risen))
            not_risen[i] = False
            if self.back_up(beliefs[i], float(stages[i]), upper=False):
                not_risen &= self._scores(matrix, stages, slice(-1, None))[:, 0] <= old + EPSILON * self.scale
        self.swept += self.backups - before

    def prune(self) -> None:
        """Put aside the vectors that are best at no visited belief."""
        matrix, stages = self._visited()
        best = self._scores(matrix, stages, slice(None)).argmax(1)
        start = self.lower.at(self.start.states, self.start.mass[None], self.horizon)[1]
        # the policies "always a" stay: elsewhere a vector made for a visited belief can be far worse
        self.lower.keep(np.unique(np.concatenate([np.arange(self.blind), best, start])))
        self.pruned_at = len(self.lower.used)

    def _visited(self) -> tuple[sparse.csr_array, np.ndarray]:
        """The visited beliefs as rows [n, S], and their stages to go [n]."""
        beliefs = self.visited.values()
        sizes = np.array([len(b.states) for b in beliefs])
        entries = [np.concatenate([getattr(b, name) for b in beliefs]) for name in ("mass", "states")]
        shape = (len(sizes), self.problem.num_states)
        matrix = sparse.csr_array((*entries, np.concatenate([[0], sizes.cumsum()])), shape=shape)
        return matrix, np.array([stages for _, stages in self.visited])

    def _scores(self, matrix: sparse.csr_array, stages: np.ndarray, columns: slice) -> np.ndarray:
        """The products of beliefs with vectors in use [n, m]; -inf where a vector needs more stages to go."""
        scores = matrix @ self.lower.columns[:, columns]
        return np.where(self.lower.stages[columns] <= stages[:, None], scores, -np.inf)
