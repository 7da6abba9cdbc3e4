"""Tail bounds for the mean of the M pairs of one context.

All bounds are for the mean of M independent copies of a bounded variable. `margin` is the expectation of the quantity that must
stay positive (for instance Qhat(s, a*) - Qhat(s, a)); a margin that is not positive gives the trivial bound 1.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.moments import Number, design_moment


def smale_zhou(b: Array, v: Array, M: Number, delta: Number) -> Array:
    """2 b log(2/delta)/M + sqrt(2 v log(2/delta)/M): with probability at least 1 - delta it is above ||mean of M centered z||.

    Hilbert space, ||z|| <= b, E||z||^2 <= v: [SZ] Lemma 2, after Pinelis.  Any common shape.
    """
    level = jnp.log(2.0 / delta)
    return 2.0 * b * level / M + jnp.sqrt(2.0 * v * level / M)


def cantelli(margin: Array, variance: Array) -> Array:
    """P(Y <= 0) <= variance/(variance + margin^2), where E Y = margin > 0 and Var Y = variance.  Any common shape."""
    safe = jnp.where(margin > 0, margin, 1.0)
    return jnp.where(margin > 0, variance / (variance + jnp.square(safe)), 1.0)


def bernstein_tail(margin: Array, variance: Array, bound: Array, M: Number) -> Array:
    """P(mean of M copies of Z <= 0) <= exp(-M margin^2 / (2 (variance + bound margin/3))).  Any common shape.

    E Z = margin > 0, Var Z = variance, margin - Z <= bound almost surely (Bernstein).
    """
    safe = jnp.where(margin > 0, margin, 1.0)
    return jnp.where(margin > 0, jnp.exp(-M * bernstein_exponent(safe, variance, bound)), 1.0)


def bernstein_exponent(margin: Array, variance: Array, bound: Array) -> Array:
    """margin^2 / (2 (variance + bound margin/3)): the rate at which log P(mean of M copies <= 0) falls at least; margin > 0."""
    return jnp.square(margin) / (2.0 * (variance + bound * margin / 3.0))


def bernstein_radius(variance: Array, bound: Array, M: Number, delta: Number) -> Array:
    """t with P(E Z - mean of M copies >= t) <= delta: sqrt(2 v L/M + (b L/(3M))^2) + b L/(3M), L = log(1/delta).

    Bernstein solved for t exactly: M t^2 = 2 L (v + b t/3).  Any common shape.
    """
    level = jnp.log(1.0 / delta)
    half = bound * level / (3.0 * M)
    return half + jnp.sqrt(jnp.square(half) + 2.0 * variance * level / M)


def chernoff_exponent(value: Array, weights: Array, noise: Array | float = 0.0, steps: int = 60) -> Array:
    """Cramer's rate sup_{t >= 0} -log E exp(-t Z), Z = value + noise * xi: P(mean of M copies <= 0) <= exp(-M rate).

    value [n] with probabilities weights [n] (zero allowed); noise [n] (or a number) is the largest size of a further term whose
    mean given the point is zero, for which E exp(-t noise xi) <= cosh(t noise). Exact in the exponent when noise = 0. The
    function of t is concave; any t gives a valid bound, so the search (bisection on the sign of the slope) need not be exact.

    -> [].
    """
    rare = jnp.finfo(value.dtype).tiny
    log_weights = jnp.where(weights > 0, jnp.log(jnp.maximum(weights, rare)), -jnp.inf)
    noise_bound = jnp.broadcast_to(jnp.asarray(noise, value.dtype), value.shape)

    def cumulant(t: Array) -> Array:
        cosh = jnp.logaddexp(t * noise_bound, -t * noise_bound) - jnp.log(2.0)
        return jax.scipy.special.logsumexp(log_weights - t * value + cosh)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        falling = jax.grad(cumulant)(jnp.exp(middle)) < 0
        return jnp.where(falling, middle, low), jnp.where(falling, high, middle)

    size = jnp.max(jnp.abs(value) + noise_bound)
    scale = jnp.log(jnp.where(size > 0, size, 1.0))
    low, high = jax.lax.fori_loop(0, steps, halve, (-scale - 12.0, -scale + 7.0))
    return jnp.maximum(-cumulant(jnp.exp((low + high) / 2)), 0.0)


def gaussian_flip_prediction(margin: Array, variance: Array) -> Array:
    """Phi(-margin/sqrt(variance)): central-limit *prediction*, not a bound, of P(Y <= 0), E Y = margin, Var Y = variance."""
    return jax.scipy.stats.norm.cdf(-margin / jnp.sqrt(variance))


def error_size(
    phi: Array,
    weights: Array,
    A: Array,
    w: Array,
    Lambda_q: Array,
    noise_bound: Array | float = 0.0,
    noise_variance: Array | float = 0.0,
) -> tuple[Array, Array]:
    """(b, v): supremum and second moment of ||Lq^{1/2} A z||, z = x y - Lambda w, y = x'w + eps, |eps| <= noise_bound.

    Exact by enumeration of the support phi [n, d] with probabilities weights [n]; noise [n] or numbers; A, Lambda_q [d, d];
    w [d]. Points of zero probability do not count. The norm is convex in eps, so its supremum is at eps = +-noise_bound.
    """
    answer = phi @ w
    mean = design_moment(phi, weights) @ w
    bound = jnp.broadcast_to(jnp.asarray(noise_bound, phi.dtype), answer.shape)
    variance = jnp.broadcast_to(jnp.asarray(noise_variance, phi.dtype), answer.shape)

    def square(vectors: Array) -> Array:
        return jnp.einsum("ni,ji,jk,kl,nl->n", vectors, A, Lambda_q, A, vectors)

    ends = [square(phi * (answer + sign * bound)[:, None] - mean[None, :]) for sign in (1.0, -1.0)]
    b = jnp.sqrt(jnp.max(jnp.where(weights > 0, jnp.maximum(*ends), 0.0)))
    v = jnp.sum(weights * (square(phi * answer[:, None] - mean[None, :]) + variance * square(phi)))
    return b, v


def high_probability_rung(
    phi: Array,
    A: Array,
    w: Array,
    weights: Array,
    M: Number,
    delta: Number,
    Lambda_q: Array,
    noise_bound: Array | float = 0.0,
    noise_variance: Array | float = 0.0,
) -> Array:
    """Rung 5 (ours, by [SZ]): with probability >= 1 - delta over the contexts of one task, its suboptimality is at most

        2 sum_h [ max_{s,a} |phi'(A_h Lambda - I) w_h| + L (2 b_h log(2H/delta)/M + sqrt(2 v_h log(2H/delta)/M)) ].

    phi [S, A, d], A [H, d, d], w [H, d], weights [S*A] the law of the pairs, Lambda_q [d, d] any positive definite matrix; noise
    bounds and variances broadcast to [H, S*A]. L = max ||phi||_{Lq^{-1}}.  -> [].
    """
    flat = phi.reshape(-1, phi.shape[-1])
    Lambda = design_moment(flat, weights)
    L = feature_norm(phi, Lambda_q)
    shape = (len(w), len(flat))
    bounds = jnp.broadcast_to(jnp.asarray(noise_bound, flat.dtype), shape)
    variances = jnp.broadcast_to(jnp.asarray(noise_variance, flat.dtype), shape)

    def stage(A: Array, w: Array, bound: Array, variance: Array) -> Array:
        b, v = error_size(flat, weights, A, w, Lambda_q, bound, variance)
        bias = jnp.max(jnp.abs(flat @ (A @ Lambda @ w - w)))
        return bias + L * smale_zhou(b, v, M, delta / shape[0])

    return 2.0 * jnp.sum(jax.vmap(stage)(A, w, bounds, variances))


def feature_norm(phi: Array, W: Array) -> Array:
    """L = max_n ||phi_n||_{W^{-1}}.  phi [..., d], W [d, d] positive definite -> []."""
    flat = phi.reshape(-1, phi.shape[-1])
    return jnp.sqrt(jnp.max(jnp.sum(flat * jnp.linalg.solve(W, flat.T).T, axis=-1)))


def difference_norm(phi: Array, W: Array) -> Array:
    """max_{s,a,b} ||phi(s,a) - phi(s,b)||_{W^{-1}} <= 2 L: what greedy can see (ours).  phi [S, A, d], W [d, d] -> []."""
    return feature_norm(phi[:, :, None, :] - phi[:, None, :, :], W)


def g_optimal_moment(phi: Array, steps: int = 2000) -> Array:
    """W = sum_n p_n phi_n phi_n' with max ||phi||^2_{W^{-1}} near d, its least value (Kiefer and Wolfowitz 1960).

    phi [..., d] spanning R^d -> [d, d], by Titterington's multiplicative steps p_n <- p_n ||phi_n||^2_{W^{-1}} / d. A_N does not
    depend on the law of the queries, so this W may stand for Lambda_q in rungs 4 and 5.
    """
    flat = phi.reshape(-1, phi.shape[-1])

    def improve(_: int, p: Array) -> Array:
        return p * jnp.sum(flat * jnp.linalg.solve(design_moment(flat, p), flat.T).T, axis=-1) / flat.shape[-1]

    p = jax.lax.fori_loop(0, steps, improve, jnp.full(len(flat), 1.0 / len(flat), flat.dtype))
    return design_moment(flat, p)
