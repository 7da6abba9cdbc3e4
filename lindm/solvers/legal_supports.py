r"""Actions that are not legal where the state is hidden: recursions over the sets of possible states.

An action is legal at a belief if every state of positive probability allows it. So what is legal depends on the belief's support
X alone, and so does the support after an action and an observation. An action is viable at X if it is legal there and a viable
action exists at every support that can follow; the optimal value is -inf where no action is viable.

With rewards of -inf for states that do not allow an action, this is an ordinary POMDP: its value is convex and positively
homogeneous, and alpha vectors, the fast informed bound and the sawtooth bound it as they are if 0 times -inf is 0. Here -inf is
the number `ILLEGAL`, whose product with a probability of zero is zero; sums below `LIMIT` are `ILLEGAL` again (`saturated`).

The first policy of a search takes a viable action by the support, so its alpha vectors

    alpha_h^X(s) = r_h(s, a_X) + sum_{o, s'} K_h[a_X, o, s, s'] alpha_{h+1}^{X after (a_X, o)}(s')     for s in X, -inf elsewhere

are finite at every belief that has a viable action. Where one action is legal in all states, "always that action" is such a
policy, and too many supports are no obstacle.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lindm.types import POMDP

ILLEGAL = -1e300
LIMIT = -1e200  # what is below is -inf; a product of ILLEGAL with a positive probability is
MAX_SUPPORTS = 4096
MAX_ENTRIES = 1 << 24  # of a table of supports and states

Kernels = Sequence[tuple[Sequence[Any], Sequence[np.ndarray]]]
"""For each stage, or once for all: of each action P [S, S], dense or sparse, and O [S, O]."""


class TooManySupportsError(ValueError):
    """A problem leads to more than `MAX_SUPPORTS` sets of possible states."""


def saturated(values: Any) -> Any:
    """Values with `ILLEGAL` in place of all that are below `LIMIT`; numpy and JAX arrays."""
    return values.__array_namespace__().where(values < LIMIT, ILLEGAL, values)


def penalized(r: Any, legal: Any) -> Any:
    """Rewards [..., S, A] with `ILLEGAL` where a state does not allow the action; `legal` None: as they are."""
    return r if legal is None else r.__array_namespace__().where(legal, r, ILLEGAL)


def without_bound(values: Any) -> Any:
    """Values with -inf in place of `ILLEGAL`; numpy and JAX arrays."""
    return values.__array_namespace__().where(values < LIMIT, -math.inf, values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Supports:
    """The sets of possible states that legal actions reach, and what follows them."""

    states: np.ndarray  # [n, S] bool; the first ones are those of the first beliefs
    legal: np.ndarray  # [n, A] bool, actions that all states of the set allow
    after: list[np.ndarray]  # for each stage, or once for all: [n, A, O] the next set, -1 where it is not reached
    expanded: list[np.ndarray]  # the same: [n] bool, whether the set is reached at that stage

    def viable(self, stage: int, alive: np.ndarray) -> np.ndarray:
        """[n, A] whether an action is viable at a stage, if these sets [n] have a viable action at the next one."""
        t = min(stage, len(self.after) - 1)
        after = self.after[t]
        return self.legal & ((after < 0) | alive[after]).all(-1) & self.expanded[t][:, None]

    def viable_forever(self) -> np.ndarray:
        """[n, A] whether an action is viable without an end."""
        alive = np.ones(len(self.states), bool)
        while not ((now := np.any(viable := self.viable(0, alive), axis=1)) == alive).all():
            alive = now
        return viable

    def number(self) -> dict[bytes, int]:
        """The row of a set, by the bytes of its states (int64)."""
        return {np.flatnonzero(row).astype(np.int64).tobytes(): i for i, row in enumerate(self.states)}


def supports(first: np.ndarray, kernels: Kernels, legal: np.ndarray) -> Supports:
    """All supports that legal actions reach from the first beliefs [k, S]. ValueError: there are more than `MAX_SUPPORTS`."""
    (S, A), O = legal.shape, kernels[0][1][0].shape[1]
    index: dict[bytes, int] = {}
    rows: list[np.ndarray] = []
    most = min(MAX_SUPPORTS, MAX_ENTRIES // S)

    def number(row: np.ndarray) -> int:
        key = np.packbits(row).tobytes()
        if key not in index:
            if len(rows) == most:
                rule = f"at most {most} sets of possible states if no action is legal in all states"
                raise TooManySupportsError(
                    f"legal must lead to {rule}; here are more: a shorter horizon may be solved by its tree"
                )
            index[key] = len(rows)
            rows.append(row)
        return index[key]

    tables: list[dict[int, np.ndarray]] = [{} for _ in kernels]
    level = {number(row > 0) for row in first}
    for h in itertools.count():
        if h == len(kernels) > 1:
            break
        table = tables[min(h, len(kernels) - 1)]
        numbers = sorted(level - table.keys())
        if not numbers:
            break
        P, O_of = kernels[min(h, len(kernels) - 1)]
        X = np.array([rows[i] for i in numbers])
        allowed, block = _allowed(X, legal), np.full((len(X), A, O), -1)
        for a in range(A):
            here = np.flatnonzero(allowed[:, a])
            following = X[here].astype(float) @ P[a] > 0
            for o in range(O):
                child = following & (O_of[a][:, o] > 0)
                there = child.any(1)
                block[here[there], a, o] = [number(row) for row in child[there]]
        table.update(zip(numbers, block, strict=True))
        level = set(block[block >= 0].tolist())
    states = np.array(rows)
    nothing = np.full((A, O), -1)
    return Supports(
        states=states,
        legal=_allowed(states, legal),
        after=[np.array([table.get(i, nothing) for i in range(len(rows))]) for table in tables],
        expanded=[np.array([i in table for i in range(len(rows))]) for table in tables],
    )


def _allowed(X: np.ndarray, legal: np.ndarray) -> np.ndarray:
    """[n, A] actions that every state of the sets [n, S] allows."""
    return X.astype(float) @ (~legal).astype(float) == 0


def kernels_of(problem: POMDP) -> Kernels:
    """The kernels of a problem on the host."""
    P, O = np.asarray(problem.P), np.asarray(problem.O)
    stages = 1 if len(P) == len(O) == 1 else problem.horizon - 1
    return [(P[min(h, len(P) - 1)].swapaxes(0, 1), O[min(h, len(O) - 1)]) for h in range(max(stages, 1))]


def next_values(found: Supports, kernels: Kernels, stage: int, a: int, values: np.ndarray) -> np.ndarray:
    """sum_{o, s'} K[a, o, s, s'] values of the next set [n, S], from the sets' values [n, S] in each state."""
    t = min(stage, len(kernels) - 1)
    (P, O), after = (kernels[t][0][a], kernels[t][1][a]), found.after[t][:, a]
    following = np.zeros_like(values)
    for o in range(O.shape[1]):
        following += np.where(after[:, o, None] < 0, 0.0, O[:, o] * values[after[:, o]])
    return following @ P.T


def support_vectors(problem: POMDP) -> np.ndarray:
    """The alpha vectors [H, n, S] of a policy that takes a viable action by the support; `ILLEGAL` where it has none.

    Raises:
      ValueError: there are too many supports, and no action is legal in all states.
    """
    try:
        return _vectors(problem, uniform=False)
    except TooManySupportsError:
        if np.asarray(problem.legal).all(0).any():
            return np.zeros((problem.horizon, 0, problem.num_states))
        raise


def uniform_value(problem: POMDP) -> float | None:
    """The value of a uniformly random viable action at every stage; None: there are too many supports to compute it."""
    try:
        return float(_vectors(problem, uniform=True)[0, 0] @ np.asarray(problem.rho))
    except TooManySupportsError:
        return None


def _vectors(problem: POMDP, uniform: bool) -> np.ndarray:
    """The alpha vectors [H, n, S] of the viable action with the best mean over the support, or of a random viable one."""
    r, legal, kernels = np.asarray(problem.r), np.asarray(problem.legal), kernels_of(problem)
    found = supports(np.asarray(problem.rho)[None], kernels, legal)
    n, X = len(found.states), found.states
    vectors, alive = np.empty((problem.horizon, n, problem.num_states)), np.ones(n, bool)
    for h in reversed(range(problem.horizon)):
        last = h + 1 == problem.horizon
        viable = found.legal if last else found.viable(h, alive)
        best, score = np.zeros(X.shape), np.full(n, -math.inf)
        for a in range(problem.num_actions):
            now = np.broadcast_to(r[h, :, a], X.shape)
            now = now if last else now + next_values(found, kernels, h, a, vectors[h + 1])
            if uniform:
                best = best + np.where(viable[:, a, None], now, 0) / np.maximum(viable.sum(1), 1)[:, None]
                continue
            mean = np.where(viable[:, a], np.where(X, now, 0).sum(1), -math.inf)  # over X, up to its size
            best, score = np.where((mean > score)[:, None], now, best), np.maximum(score, mean)
        alive = np.any(viable, axis=1)
        vectors[h] = np.where(X & alive[:, None], best, ILLEGAL)
    return vectors
