"""The margin: the effect of the bias on a policy, and of the distribution of gaps on the slope in M.

As M grows, Qhat_h -> phi' A_h Lambda w_h, the bias-greedy values. Where they rank an optimal action strictly first, the
probability of a wrong action falls exponentially in M; where they do not, no context length corrects it.  Proofs:
notes/policy.md.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.moments import Number


def infinite_context_values(phi: Array, A: Array, Lambda: Array, w: Array) -> Array:
    """Qhat at M = infinity: phi' A_h Lambda_h w_h.

    phi [S, A, d], A [H, d, d], Lambda [d, d] or [H, d, d], w [H, d] -> [H, S, A].
    """
    limit = jnp.einsum("hij,hjk,hk->hi", A, jnp.broadcast_to(Lambda, A.shape), w)
    return jnp.einsum("sad,hd->hsa", phi, limit)


def bias_margin(values: Array, Qstar: Array, tolerance: float = 1e-9) -> Array:
    """Best value among the optimal actions minus best value among the others, by `infinite_context_values`.

    values, Qstar [..., A] -> [...]: positive where the right action survives the bias, negative where the bias flips it for
    every M, infinite where every action is optimal.
    """
    level = tolerance * jnp.max(jnp.abs(Qstar))
    optimal = Qstar >= jnp.max(Qstar, axis=-1, keepdims=True) - level
    right = jnp.max(jnp.where(optimal, values, -jnp.inf), axis=-1)
    wrong = jnp.max(jnp.where(optimal, -jnp.inf, values), axis=-1)
    return right - wrong


def flip_length(margins: Array, N: Array) -> Array:
    """The largest N of the grid at which the bias flips an action in some state; zero if it does at none.

    margins [n, H, S] of `bias_margin` for the grid N [n] of training lengths -> []. At every larger N of the grid the loss falls
    exponentially in M. The set of N that flip need not be an interval when d >= 3.
    """
    flipped = jnp.any(margins < 0, axis=(1, 2))
    return jnp.max(jnp.where(flipped, N, 0))


def gap_law(density: Number, beta: Number, deviation: Number, M: Number) -> Array:
    """E[g Phi(-g sqrt(M)/s)] for gaps with P(gap <= t) = density t^beta near zero (ours; beta is the margin exponent of
    Audibert and Tsybakov 2007): density beta s^{1+beta} m_{1+beta} / (2 (1+beta)) M^{-(1+beta)/2}, m_p = E|N(0,1)|^p.

    s = deviation is the standard deviation of one pair's part of the difference of the two Qhat. A *prediction* for large M.
    """
    power = 1.0 + jnp.asarray(beta, float)
    moment = 2.0 ** (power / 2) * jnp.exp(jax.scipy.special.gammaln((power + 1) / 2)) / jnp.sqrt(jnp.pi)
    return density * beta * deviation**power * moment / (2.0 * power) * M ** (-power / 2)


def no_gap_law(density: Number, deviation: Number, M: Number) -> Array:
    """f(0) s^2/(4 M): the same when the density f of the gap is positive at zero (ours; beta = 1).  A *prediction*."""
    return jnp.asarray(density * deviation**2 / (4.0 * M))
