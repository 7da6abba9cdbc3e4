"""The tie rule: which actions count as optimal when action values differ by rounding alone.

An action a is optimal at a row of Q [..., S, A] if

    max_a' Q(s, a') - Q(s, a) <= TOLERANCE * scale,      scale = max_s |max_a' Q(s, a')|,

and the greedy action is the optimal one with the lowest index. Without a tolerance, rounding would decide between equal values,
and differently on different machines.

The rule is scale-free: a positive factor of Q never changes an action. Its scale is that of the rows that are computed together
(the states of a stage), because the largest of them sets the rounding of all: a tie of values near zero is still a tie. The value
of an action that is not optimal, however low, does not enter the scale. Values at a belief or a history are normalized by its
probability, so each history is a stage of its own: use `per_row`, or pass one row Q [A].

Labels, greedy and optimal policies, certificates and agreement figures all use this rule. The functions accept numpy and JAX
arrays and return the same kind.
"""

from typing import Any

import numpy as np

TOLERANCE = 1e-12  # relative: rounding of sums of double-precision products, with two digits to spare

Values = Any  # a numpy or a JAX array


def tie_tolerance(V: Values, per_row: bool = False) -> Values:
    """The largest difference that is a tie, from optimal values V [..., S, 1]: [..., 1, 1]. V [] or [1] keeps its shape."""
    scale = abs(V) if per_row or V.ndim < 2 else abs(V).max(-2, keepdims=True)
    return TOLERANCE * scale


def optimal_actions(Q: Values, per_row: bool = False) -> Values:
    """Which actions are optimal: bool, of the shape of Q [..., S, A] or [A].

    Args:
      per_row: every row of the last axis is a stage of its own, as at histories.
    """
    V = Q.max(-1, keepdims=True)
    return V - tie_tolerance(V, per_row) <= Q


def greedy(Q: Values, per_row: bool = False) -> Values:
    """The greedy action, int32 [..., S]: the optimal action with the lowest index. Arguments as `optimal_actions`."""
    return optimal_actions(Q, per_row).argmax(-1).astype(np.int32)
