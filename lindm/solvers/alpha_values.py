"""What the policy of a set of alpha vectors earns without an end, whoever computed the vectors and whatever they promise.

The policy takes the action of the vector that is best at the belief, so its value is that of a Markov chain over the beliefs that
it reaches. These are followed from the start, the likeliest first; beliefs that differ by rounding are one. If there are few, as
those of a policy that returns to where it was, the value is exact: it solves linear equations. Otherwise beliefs that were not
followed are worth between the lowest and the highest reward at every stage, which bounds the value.
"""

import heapq

import numpy as np
from scipy import sparse

from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.belief import normalize
from lindm.solvers.legal_supports import without_bound
from lindm.solvers.stationary_solution import total_discount

MAX_BELIEFS = 20_000
DIGITS = 10  # to which beliefs are told apart
PRECISION = 1e-13  # of the solution of the equations, relative to the largest value


def policy_value_bounds(
    problem: StationaryPOMDP,
    actions: np.ndarray,
    vectors: np.ndarray,
    *,
    tolerance: float = 1e-6,
    max_beliefs: int = MAX_BELIEFS,
) -> tuple[float, float]:
    """Certified bounds of the value at the start, over an infinite horizon.

    Args:
      actions, vectors: [n] the action of each vector [n, S].
      tolerance: width of the bounds at which no more beliefs are followed.
      max_beliefs: number of beliefs that are followed at most.

    Raises:
      ValueError: the discount is one, or no vector has a legal action at a belief that the policy reaches.
    """
    gamma = problem.discount
    if not gamma < 1:
        raise ValueError(f"discount must be below 1 where the horizon is infinite; got {gamma}")
    forever = float(total_discount(gamma, np.inf))
    low, high = float(problem.r.min()) * forever, float(problem.r.max()) * forever
    O = [x.toarray() for x in problem.O]
    beliefs, index = [problem.rho], {_key(problem.rho): 0}
    weights, ahead, followed = [1.0], [(-1.0, 0)], set()
    rewards: dict[int, float] = {}
    edges: list[tuple[int, int, float]] = []
    open_weight = 1.0  # discounted probability of beliefs that are not followed yet
    while ahead and len(followed) < max_beliefs and open_weight * (high - low) > tolerance:
        _, i = heapq.heappop(ahead)
        if i in followed:
            continue
        followed.add(i)
        open_weight -= weights[i]
        belief = beliefs[i]
        (best,), (legal,) = best_vectors(problem, actions, vectors, belief[None])
        if not legal:
            rule = "vectors must have one with a legal action at every belief that the policy reaches"
            raise ValueError(f"{rule}; got none where the states {np.flatnonzero(belief).tolist()[:12]} are possible")
        a = int(actions[best])
        rewards[i] = float(belief @ problem.r[:, a])
        joint = (belief @ problem.P[a])[:, None] * O[a]
        for o in np.flatnonzero(joint.sum(0) > 0):
            mass = float(joint[:, o].sum())
            after = joint[:, o] / mass
            j = index.setdefault(_key(after), len(beliefs))
            if j == len(beliefs):
                beliefs.append(after)
                weights.append(0.0)
            edges.append((i, j, mass))
            if j not in followed:
                weights[j] += gamma * weights[i] * mass
                open_weight += gamma * weights[i] * mass
                heapq.heappush(ahead, (-weights[j], j))
    return _solve(len(beliefs), rewards, edges, gamma, low, high)


def best_vectors(
    problem: StationaryPOMDP, actions: np.ndarray, vectors: np.ndarray, beliefs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best vector [n] at beliefs [n, S] among those with an action that is legal there, and whether there is one [n]."""
    scores = beliefs @ vectors.T
    if problem.legal is not None:
        scores = np.where(problem.legal_at(beliefs)[:, actions], scores, -np.inf)
    best = scores.argmax(-1)
    return best, scores[np.arange(len(best)), best] > -np.inf


def action_bounds(problem: StationaryPOMDP, beliefs: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """What each action earns at least [n, A] at beliefs [n, S] if every vector [k, S] earns what it says; one step of lookahead.

    -inf where an action is not legal in a state that a belief holds possible.
    """
    lower = beliefs @ problem.r
    for row, belief in enumerate(beliefs):
        for a in range(problem.num_actions):
            lower[row, a] += problem.discount * (vectors @ joint_measure(problem, belief, a)).max(0).sum()
    return without_bound(np.where(problem.legal_at(beliefs), lower, -np.inf))


def joint_measure(problem: StationaryPOMDP, belief: np.ndarray, a: int) -> np.ndarray:
    """The joint measure [S, O] of the next state and the observation after an action at a belief [S]."""
    return (belief @ problem.P[a])[:, None] * problem.O[a].toarray()


def beliefs_after(problem: StationaryPOMDP, beliefs: np.ndarray, actions: np.ndarray, observations: np.ndarray) -> np.ndarray:
    """The beliefs [n, S] after an action and an observation at each of n beliefs; zeros after an impossible one."""
    steps = zip(beliefs, actions, observations, strict=True)
    return np.array([normalize(joint_measure(problem, belief, a)[:, o])[0] for belief, a, o in steps])


def _key(belief: np.ndarray) -> bytes:
    return (np.round(belief, DIGITS) + 0.0).tobytes()


def _solve(
    n: int, rewards: dict[int, float], edges: list[tuple[int, int, float]], gamma: float, low: float, high: float
) -> tuple[float, float]:
    """Both bounds of the value of the first belief; beliefs without a reward were not followed."""
    rows, columns, masses = (np.array(part) for part in zip(*edges, strict=True))
    step = sparse.csr_array((gamma * masses, (rows, columns)), shape=(n, n))
    reward, known = np.zeros(n), np.zeros(n, bool)
    known[list(rewards)] = True
    reward[known] = [rewards[int(i)] for i in np.flatnonzero(known)]
    bounds = []
    for end in (low, high):
        values = np.full(n, end)
        while True:  # from below it rises and from above it falls, so that it is a bound after any number of steps
            values, last = np.where(known, reward + step @ values, end), values
            if np.abs(values - last).max() <= PRECISION * max(abs(low), abs(high)):
                break
        bounds.append(float(values[0]))
    return min(bounds), max(bounds)
