"""The tiger (Kaelbling, Littman, Cassandra, Artif. Intell. 101, 1998), and its exact action values without a tree.

A growl is heard right with 0.85, the discount is 0.95. One growl moves the logarithm of the odds by a constant, so on a grid of
its fractions dynamic programming is exact for every horizon.
"""

import numpy as np

from lindm.problems.pomdp import pomdp
from lindm.types import POMDP

HEARD, DISCOUNT = 0.85, 0.95
PARTS, GROWLS = 40, 5  # of the beliefs: fractions of a growl, and how many growls they reach to either side


def tiger(num_states: int, num_observations: int, horizon: int) -> POMDP:
    """Listen, open the left door, open the right door; states: the tiger is left, right, and others that never are; observations:
    a growl from the left, from the right, and others, of which those states give the third."""
    listen, anew = np.eye(num_states), np.eye(num_states)
    anew[:2, :2] = 0.5
    growl, silent = np.zeros((2, num_states, num_observations))
    growl[:2, :2] = [[HEARD, 1 - HEARD], [1 - HEARD, HEARD]]
    silent[:2, :2] = 0.5
    growl[2:, 2] = silent[2:, 2] = 1
    r = np.full((num_states, 3), -1.0)
    r[:2, 1:] = [[-100, 10], [10, -100]]
    P = np.stack([listen, anew, anew], 1)
    return pomdp(P, np.stack([growl, silent, silent]), r, np.eye(num_states)[:2].mean(0), horizon=horizon, discount=DISCOUNT)


def tiger_beliefs() -> np.ndarray:
    """That the tiger is left [n]: the odds after -GROWLS .. GROWLS growls from the left, in fractions of a growl."""
    return _left(np.arange(-PARTS * GROWLS, PARTS * GROWLS + 1))


def _left(parts: np.ndarray) -> np.ndarray:
    return 1 / (1 + ((1 - HEARD) / HEARD) ** (parts / PARTS))


def tiger_answers(horizon: int) -> np.ndarray:
    """Exact action values [horizon, n, A] at `tiger_beliefs`, with 1 .. horizon stages to go."""
    reach = PARTS * (GROWLS + horizon)
    V, kept = np.zeros(2 * reach + 1), []
    for _ in range(horizon):
        middle, reach = V[reach], reach - PARTS
        b = _left(np.arange(-reach, reach + 1))
        growl = HEARD * b + (1 - HEARD) * (1 - b)
        listen = -1 + DISCOUNT * (growl * V[2 * PARTS :] + (1 - growl) * V[: -2 * PARTS])
        Q = np.stack([listen, 10 - 110 * b + DISCOUNT * middle, 110 * b - 100 + DISCOUNT * middle], -1)
        V = Q.max(-1)
        kept.append(Q[reach - PARTS * GROWLS : reach + PARTS * GROWLS + 1])
    return np.stack(kept)
