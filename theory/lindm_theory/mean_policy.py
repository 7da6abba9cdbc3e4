"""Rung 6, the mean policy (ours): the loss averaged over contexts is the exact loss of one stochastic policy.

V^pi is linear in the rule of every stage separately. If the contexts of different stages are independent given the task, then
pihat_1, ..., pihat_H are independent, and the mean over contexts of V^pihat is V^pibar with pibar_h(a|s) = P(pihat_h(s) = a): an
equality. So E SubOpt is at most the largest loss of any policy with pi_h(a|s) <= cap_h(s,a), for any upper bounds cap on those
probabilities, and dynamic programming finds that maximum. Caps come from the exact mean and variance of Qhat(s,b) - Qhat(s,a).
Caps in {0, 1} turn the same program into a bound that holds with high probability.  Proofs: notes/policy.md.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.concentration import bernstein_exponent, bernstein_radius, bernstein_tail, cantelli, chernoff_exponent
from lindm_theory.moments import Number, pair_covariance


def difference_moments(
    phi: Array, A: Array, w: Array, weights: Array, noise_bound: Array | float = 0.0, noise_variance: Array | float = 0.0
) -> tuple[Array, Array, Array]:
    """Margin, variance and bound of one pair's contribution Z_b,a = (phi_b - phi_a)' A x y to Qhat(s,b) - Qhat(s,a).

    phi [S, A, d], A [H, d, d], w [H, d], weights [S*A] the law of the pairs; noise broadcasts to [H, S*A]
    -> three arrays [H, S, A, A] indexed (h, s, a, b): E Z, Var Z and sup(E Z - Z), exact by enumeration of the support.
    """
    flat = phi.reshape(-1, phi.shape[-1])
    shape = (len(w), len(flat))
    bounds = jnp.broadcast_to(jnp.asarray(noise_bound, flat.dtype), shape)
    variances = jnp.broadcast_to(jnp.asarray(noise_variance, flat.dtype), shape)

    def stage(A: Array, w: Array, bound: Array, variance: Array) -> tuple[Array, Array, Array]:
        side = (phi[:, None, :, :] - phi[:, :, None, :]) @ A
        reach = side @ flat.T
        value = reach * (flat @ w)[None, None, None, :]
        mean = value @ weights
        variance_of_difference = jnp.einsum("sabi,ij,sabj->sab", side, pair_covariance(flat, weights, w, variance), side)
        below = mean[..., None] - value + jnp.abs(reach) * bound[None, None, None, :]
        below = jnp.where((weights > 0)[None, None, None, :], below, 0.0)
        return mean, jnp.maximum(variance_of_difference, 0.0), jnp.max(below, axis=-1)

    return jax.vmap(stage)(A, w, bounds, variances)


def flip_probability(margin: Array, variance: Array, bound: Array, M: Number) -> Array:
    """min(Cantelli, Bernstein) on P(Qhat(s,a) >= Qhat(s,b)) after M pairs.  Arrays of `difference_moments` -> same shape."""
    return jnp.minimum(cantelli(margin, variance / M), bernstein_tail(margin, variance, bound, M))


def chernoff_flip_probability(
    phi: Array, A: Array, w: Array, weights: Array, M: Number, noise_bound: Array | float = 0.0
) -> Array:
    """exp(-M Cramer's rate) on P(Qhat(s,a) >= Qhat(s,b)): the right exponent where labels carry no noise.

    Arguments as in `difference_moments`; noise has mean zero given the pair -> [H, S, A, A] indexed (h, s, a, b).
    """
    flat = phi.reshape(-1, phi.shape[-1])
    bounds = jnp.broadcast_to(jnp.asarray(noise_bound, flat.dtype), (len(w), len(flat)))

    def stage(A: Array, w: Array, bound: Array) -> Array:
        reach = (phi[:, None, :, :] - phi[:, :, None, :]) @ A @ flat.T

        def rate(r: Array) -> Array:
            return chernoff_exponent(r * (flat @ w), weights, jnp.abs(r) * bound)

        return jnp.exp(-M * jax.vmap(jax.vmap(jax.vmap(rate)))(reach))

    return jax.vmap(stage)(A, w, bounds)


def action_caps(probability: Array) -> Array:
    """P(pihat(s) = a) <= min_{b != a} P(Qhat(s,a) >= Qhat(s,b)).  [..., A, A] indexed (a, b) -> [..., A]."""
    own = jnp.eye(probability.shape[-1], dtype=bool)
    own = jnp.broadcast_to(own, probability.shape)
    return jnp.minimum(jnp.min(jnp.where(own, 1.0, probability), axis=-1), 1.0)


def mean_policy_rung(P: Array, gap: Array, rho: Array, caps: Array) -> Array:
    """Largest loss of a policy with pi_h(a|s) <= caps_h(s,a) (ours): the bound on E SubOpt over the contexts of one task.

    P [H, S, A, S], gap [H, S, A] = V* - Q*, rho [S], caps [H, S, A] -> []. Backwards, U_h(s) = max_pi sum_a pi(a) v(a) with
    v(a) = gap_h(s,a) + P_h(.|s,a)'U_{h+1}: fill the actions in falling order of v up to their caps. Valid caps sum to at least
    one; should rounding leave mass over, it is charged at max v.
    """

    def stage(U: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        kernel, gap, cap = inputs
        value = gap + kernel @ U
        order = jnp.argsort(-value, axis=-1)
        value = jnp.take_along_axis(value, order, axis=-1)
        cap = jnp.take_along_axis(cap, order, axis=-1)
        before = jnp.cumsum(cap, axis=-1) - cap
        mass = jnp.clip(1.0 - before, 0.0, cap)
        left = 1.0 - jnp.sum(mass, axis=-1)
        return jnp.sum(mass * value, axis=-1) + left * value[:, 0], None

    U, _ = jax.lax.scan(stage, jnp.zeros_like(rho), (P, gap, caps), reverse=True)
    return jnp.sum(rho * U)


def policy_loss(P: Array, gap: Array, rho: Array, pi: Array) -> Array:
    """V*_1 - V^pi_1 of a stochastic policy pi [H, S, A], same recursion; with pi = pibar it is E SubOpt exactly.  -> []."""

    def stage(U: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        kernel, gap, rule = inputs
        return jnp.sum(rule * (gap + kernel @ U), axis=-1), None

    U, _ = jax.lax.scan(stage, jnp.zeros_like(rho), (P, gap, pi), reverse=True)
    return jnp.sum(rho * U)


def high_probability_margin_rung(
    P: Array, gap: Array, rho: Array, margin: Array, variance: Array, bound: Array, M: Number, delta: Number
) -> Array:
    """With probability >= 1 - delta over the contexts of one task, SubOpt is at most this (ours).

    It is 0 once M is large enough, if in phi'A Lambda w every strictly worse action is behind some other one.

    Arrays of `difference_moments`. With t the radius of Bernstein at level delta/(H S (A-1) A), all Qhat(s,b) - Qhat(s,a) are at
    least margin - t at once, so pihat never takes an action with margin - t > 0 against some b: the worst policy among the
    others, by dynamic programming. Needs no independence between stages.  -> [].
    """
    H, S, A = gap.shape
    radius = bernstein_radius(variance, bound, M, delta / (H * S * A * max(A - 1, 1)))
    return mean_policy_rung(P, gap, rho, action_caps(jnp.where(margin > radius, 0.0, 1.0)))


def decay_exponent(gap: Array, margin: Array, variance: Array, bound: Array, tolerance: float = 1e-9) -> Array:
    """Least Bernstein exponent over all (h, s) and strictly worse actions a, each against its best alternative b (ours).  -> [].

    E SubOpt <= H (A - 1) max(gap) exp(-M exponent): the margin claim. It needs bounded noise (`bound` is infinite otherwise, and
    the exponent zero) and independent stages. Zero when the bias alone leaves some wrong action possible. It can be so small that
    the bound is empty at every M in use: `informative_length`.
    """
    level = tolerance * jnp.max(gap)
    positive = margin > 0
    rate = jnp.where(positive, bernstein_exponent(jnp.where(positive, margin, 1.0), variance, bound), 0.0)
    return jnp.min(jnp.where(gap > level, jnp.max(rate, axis=-1), jnp.inf))


def informative_length(exponent: Array, A: int, share: Number = 1.0) -> Array:
    """The M from which H (A - 1) max(gap) exp(-M exponent) is below `share` of the trivial bound H max(gap) (ours).  [] -> [].

    log((A - 1)/share)/exponent. As the exponent is at most m^2/(2 v), m the margin of any strictly worse action behind its best
    alternative and v the variance of a pair's part of it, this is at least 2 (v/m^2) log((A - 1)/share): below it the
    bound says nothing.
    """
    return jnp.log((A - 1) / share) / exponent
