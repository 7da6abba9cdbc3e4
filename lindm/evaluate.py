"""From an estimate of Q to a policy and its exact loss."""

import jax.numpy as jnp
from jax import Array

from lindm.oracles.mdp import backward_induction, policy_value
from lindm.types import MDP, Measurement


def greedy(Q: Array, tolerance: float = 1e-12) -> Array:
    """The greedy action [..., S] (int32) of Q [..., S, A]: the lowest index among those within tolerance of the best.

    The tolerance is relative to the largest |Q| of the stage (the last two axes), which sets the size of the rounding in all its
    states: a positive factor of Q never changes an action, and a tie of values near zero is still a tie. Without a tolerance
    rounding would break ties, and break them differently on different machines.
    """
    slack = tolerance * jnp.abs(Q).max((-2, -1) if Q.ndim > 1 else -1, keepdims=True)
    return jnp.argmax(Q.max(-1, keepdims=True) - slack <= Q, axis=-1).astype(jnp.int32)


def suboptimality(mdp: MDP, pi: Array) -> Array:
    """V*_1 - V^pi_1 [] averaged over the first state, by dynamic programming; pi as in `policy_value`."""
    return mdp.rho @ (backward_induction(mdp).V[0] - policy_value(mdp, pi)[0])


def measurement(values: Array) -> Measurement:
    """Mean and standard error of values [n, ...] over independent instances; raises `ValueError` for fewer than two."""
    n = values.shape[0]
    if n < 2:
        raise ValueError(f"values must hold at least two instances for a standard error; got {n}")
    return Measurement(gap=values.mean(0), sem=values.std(0, ddof=1) / jnp.sqrt(n), n=n)
