r"""Softmax attention on a long prompt: its limit, and how far a finite prompt is from it.

One softmax head with score matrix U and value weight u predicts, at a query q, with k = U q,

    R_M = u sum_i p_i y_i,      p_i = exp(x_i'k) / sum_j exp(x_j'k),      y_i = x_i'w + eps_i,

a self-normalized importance sampler of u E[y e^{x'k}] / E[e^{x'k}] = u w' grad log E[e^{x'k}]. For x ~ N(0, Lambda) the tilted
mean is Lambda k, so the limit u w'Lambda U q is that of *linear* attention with the same U and u, at every temperature (derived
here; cf. Boursier, Boyer, arXiv 2512.11784). Three numbers of a query and its task law determine the mean
square distance from the limit for every finite prompt on Gaussian features:

    s = k'Lambda k,      m2 = E[(w'Lambda k)^2] (= (w'Lambda k)^2 for one task),      v = E[y^2].

All results are for u = 1; mean squares scale with u^2. Proofs: notes/softmax-limit.md.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.moments import Number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QueryNumbers:
    """The three numbers of a query that determine E(R_M - limit)^2 on Gaussian features; any common shape."""

    s: Array  # k'Lambda k, the variance of a score
    m2: Array  # E[(w'Lambda k)^2], the second moment of the limit
    v: Array  # E[y^2], the second moment of a label


def query_numbers(k: Array, Lambda: Array, Psi: Array, sigma: Number = 0.0) -> QueryNumbers:
    """s, m2 and v of a query with k = U q.  k [..., d], Lambda, Psi = E[w w'] (w w' for one task) [d, d] -> three [...]."""
    mean = k @ Lambda
    s = jnp.sum(mean * k, axis=-1)
    m2 = jnp.einsum("...i,ij,...j->...", mean, Psi, mean)
    return QueryNumbers(s, m2, jnp.broadcast_to(jnp.trace(Lambda @ Psi) + sigma**2, s.shape))


def tilted_mean(phi: Array, weights: Array, k: Array) -> Array:
    """grad log E[e^{x'k}] = E[x e^{x'k}] / E[e^{x'k}]: the limit is u w' times this, for any law of finite support.

    phi [n, d], weights [n], k [..., d] -> [..., d]. It stays in the convex hull of the features and is linear in k only to first
    order, with slope the centered covariance: E[x] + Cov(x) k + O(|k|^2).
    """
    return tilt(phi, weights, k) @ phi


def tilt(phi: Array, weights: Array, k: Array) -> Array:
    """The tilted probabilities weights e^{phi k} / sum of these.  phi [n, d], weights [n], k [..., d] -> [..., n]."""
    score = k @ phi.T
    score = jnp.exp(score - jnp.max(score, axis=-1, keepdims=True)) * jnp.broadcast_to(weights, score.shape)
    return score / jnp.sum(score, axis=-1, keepdims=True)


def tilted_constant(phi: Array, weights: Array, k: Array, w: Array, variance: Number = 0.0) -> Array:
    """V = E[e^{2x'k} (y - m)^2] / E[e^{x'k}]^2: M E(R_M - m)^2 -> V for any law of finite support (delta method).

    phi [n, d], weights [n], k [..., d], w [d], variance of the label noise (a number or [n]) -> [...].
    """
    p = tilt(phi, weights, k)
    y, chance, noise = (jnp.broadcast_to(a, p.shape) for a in (phi @ w, weights, variance))
    return jnp.sum(p**2 / chance * (jnp.square(y - jnp.sum(p * y, axis=-1, keepdims=True)) + noise), axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMoments:
    """Moments of the softmax weights of M independent scores N(0, s), exact for every M."""

    participation: Array  # E sum_i p_i^2, at least 1/M; E R_M = (1 - participation) w'Lambda k
    square: Array  # E (sum_i p_i score_i / s - 1)^2


def attention_moments(s: Number, M: Number) -> AttentionMoments:
    """The exact moments by 1/D^2 = int_0^inf lambda e^{-lambda D} dlambda, D the sum of exp of M independent scores (ours).

    With g = lambda e^{zeta}, zeta ~ N(0, s), L = E e^{-g}, and the measure dlambda/lambda,

        E sum p_i^2          = M int E[g^2 e^{-g}] L^{M-1},
        E sum p_i zeta_i     = s (1 - E sum p_i^2)          (Stein's identity),
        E (sum p_i zeta_i)^2 = M int E[zeta^2 g^2 e^{-g}] L^{M-1} + M (M-1) int E[zeta g e^{-g}]^2 L^{M-2}.

    s > 0 and M >= 1 are numbers; use float64. The trapezoidal rule is exact to 1e-9 for s <= 9, M <= 1e6.
    """
    root = jnp.sqrt(s)
    z = jnp.linspace(-9.0, 9.0, 181)
    density = jnp.exp(-(z**2) / 2)
    density = density / jnp.sum(density)
    zeta = root * z
    low, high = -45.0 - 9.0 * root, 6.0 + 9.0 * root  # below: g < e^-45 for every score; above: g > e^6, so that e^-g is 0
    points = 801
    level = low + (high - low) * jnp.linspace(0.0, 1.0, points)
    g = jnp.exp(jnp.clip(level[:, None] + zeta[None, :], -700.0, 50.0))
    decay = jnp.exp(-g)
    one = (g * decay) @ (zeta * density)
    two = (g**2 * decay) @ density
    three = (g**2 * decay) @ (zeta**2 * density)
    log_L = jnp.maximum(jnp.log1p(jnp.maximum(jnp.expm1(-g) @ density, -1.0)), -700.0)
    step = (high - low) / (points - 1)
    rest = M * step * jnp.exp((M - 1) * log_L)
    # M = 1 has no pairs; -inf * 0 is avoided
    pairs = jnp.where(M > 1, M * (M - 1) * step * jnp.exp(jnp.maximum(M - 2, 0) * log_L), 0.0)
    participation = jnp.sum(rest * two)
    square = (jnp.sum(rest * three) + jnp.sum(pairs * one**2)) / s**2
    return AttentionMoments(participation, square - 2.0 * (1.0 - participation) + 1.0)


def mean_square_distance(numbers: QueryNumbers, M: Number) -> Array:
    """E (R_M - w'Lambda k)^2 on Gaussian features, exactly: (v - m2/s) E sum p_i^2 + m2 E (sum p_i score_i/s - 1)^2 (ours).

    `numbers` hold scalars (vmap for more).  -> [].
    """
    moments = attention_moments(numbers.s, M)
    return (numbers.v - numbers.m2 / numbers.s) * moments.participation + numbers.m2 * moments.square


def softmax_constant(numbers: QueryNumbers) -> Array:
    """e^s (v + m2): M E (R_M - limit)^2 tends to it (ours). The bias E R_M - limit is about -e^s (limit) / M.  -> [...].

    The law is that of importance sampling: it needs M well above e^{2s}, the relative correction being about
    -2 e^{2s} (v + 4 m2) / ((v + m2) M) (`attention_moments` has no such limit).
    """
    return jnp.exp(numbers.s) * (numbers.v + numbers.m2)


def linear_constant(numbers: QueryNumbers) -> Array:
    """v s + m2: M E (k'S_M - limit)^2 for linear attention with the same U and u, exactly for every M (A 3).  -> [...]."""
    return numbers.v * numbers.s + numbers.m2


def two_head_constant(numbers: QueryNumbers) -> Array:
    """v sinh(s) + m2 cosh(s): the same for two heads with scores k and -k, (R(k) - R(-k)) / 2 (ours).  -> [...].

    The label mean cancels. With small weights (s -> 0) this is the constant of linear attention: two softmax heads can be one
    linear layer, one cannot.
    """
    return numbers.v * jnp.sinh(numbers.s) + numbers.m2 * jnp.cosh(numbers.s)


def alignment(numbers: QueryNumbers) -> Array:
    """r = m2 / (v s) in [0, 1]: it does not depend on the temperature; 1 for one noiseless task w parallel to k.  -> [...]."""
    return numbers.m2 / (numbers.v * numbers.s)


def price(s: Array | float, r: Array | float) -> Array:
    """softmax_constant / linear_constant = e^s (1 + r s) / (s (1 + r)): pairs that the softmax head needs for one of the linear.

    s is free: U -> c U, u -> u / c keeps the limit and multiplies s by c^2.  [...] -> [...].
    """
    return jnp.exp(s) * (1.0 + r * s) / (s * (1.0 + r))


def best_score_variance(r: Array | float) -> Array:
    """The s of the least price, the root of s + r s^2 = 1: 1 at r = 0, 0.618 at r = 1 (ours).  [...] -> [...]."""
    return 2.0 / (1.0 + jnp.sqrt(1.0 + 4.0 * jnp.asarray(r)))


def least_price(r: Array | float) -> Array:
    """e^s / (s^2 (1 + r)) at the best s: e at r = 0 falling to 2.4286 at r = 1 (ours).  [...] -> [...].

    At no temperature, fixed as M grows, does a softmax head need less than 2.4286 times the pairs of linear attention with the
    same limit.
    """
    s = best_score_variance(r)
    return price(s, r)


def nonlinearity(phi: Array, weights: Array, U: Array) -> Array:
    """Share of the tilted mean that is not affine in the query, queries from the same law (ours).  [n, d], [n], [d, d] -> [].

    1 - (variance explained by the best affine map of q) / (variance of the tilted mean at k = U q), summed over coordinates. Zero
    for Gaussian features; zero means that the limit is a linear layer with a constant.
    """
    target = tilted_mean(phi, weights, phi @ U.T)
    return unexplained(phi, weights, target)


def unexplained(phi: Array, weights: Array, target: Array) -> Array:
    """Weighted share of `target` [n, d] that no affine function of phi [n, d] explains.  -> []."""
    root = jnp.sqrt(weights)[:, None]
    design = root * jnp.concatenate([phi, jnp.ones_like(phi[:, :1])], axis=1)
    centered = root * (target - (weights @ target)[None, :])
    left = centered - design @ (jnp.linalg.pinv(design) @ centered)
    return jnp.sum(left**2) / jnp.sum(centered**2)


def batch_distance(numbers: QueryNumbers, M: Array) -> Array:
    """`mean_square_distance` of queries [Q] at lengths [L].  -> [L, Q]."""
    return jax.vmap(lambda n: jax.vmap(lambda q: mean_square_distance(q, n))(numbers))(M)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """One softmax head with U = scale * I and value weight u, and its risk."""

    scale: Array
    u: Array
    risk: Array


_STEP = 0.25  # of the logarithmic grids of best_isotropic_head


def _parts(s: Array, rho: Array, scale: Array, d: Number, sigma: Number, moments: AttentionMoments) -> tuple[Array, Array]:
    """E R^2 and E[R w'q] given |q|^2 = rho at the scores' variance s = scale^2 rho; w, x ~ N(0, I).  All [...]."""
    seen = 1.0 - moments.participation
    square = moments.square + 2.0 * seen - 1.0  # E (sum_i p_i score_i / s)^2
    return (d - 1.0 + sigma**2) * moments.participation + s * square, scale * rho * seen


def _chi_square(log_rho: Array, d: Number) -> Array:
    """Weights of the trapezoidal rule for rho ~ chi^2_d on a grid of its logarithm, sum 1."""
    density = d / 2 * log_rho - jnp.exp(log_rho) / 2
    density = jnp.exp(density - jnp.max(density))
    return density / jnp.sum(density)


def isotropic_risk(scale: Number, u: Number, d: int, M: Number, sigma: Number = 0.0) -> Array:
    """E (u R_M - w'q)^2 of one softmax head with U = scale * I on x, w, q ~ N(0, I), exactly (ours).  -> [].

    u^2 E R^2 - 2 u E[R w'q] + d with, given rho = |q|^2 and s = scale^2 rho, E R^2 = (d - 1 + sigma^2) E sum p^2 + s E Z^2,
    E[R w'q] = scale rho (1 - E sum p^2), Z = sum p score / s; the mean over rho ~ chi^2_d by the trapezoidal rule, which cuts off
    rho < e^-9: 1e-4 at d = 2, not for d = 1. Numbers.
    """
    log_rho = jnp.arange(-9.0, 5.0, _STEP)
    rho = jnp.exp(log_rho)
    moments = jax.lax.map(lambda s: attention_moments(s, M), scale**2 * rho)
    square, cross = _parts(scale**2 * rho, rho, jnp.asarray(scale), d, sigma, moments)
    weights = _chi_square(log_rho, d)
    return u**2 * (weights @ square) - 2.0 * u * (weights @ cross) + weights @ rho


def best_isotropic_head(d: int, N: Number, sigma: Number = 0.0) -> Head:
    """The head of least `isotropic_risk` at length N: u in closed form, the scale by search (ours).  2 <= d <= 30.

    What training is predicted to find; that the best U is a multiple of I is assumed, by symmetry. The scale is sought in
    [0.14, 2.7]: on logarithmic grids of scale^2 and rho the variances scale^2 rho form one grid too, so that the moments are
    computed once; then a parabola.
    """
    log_rho, log_square = jnp.arange(-9.0, 5.0, _STEP), jnp.arange(-4.0, 2.0, _STEP)
    number, rho = len(log_rho), jnp.exp(log_rho)
    s = jnp.exp(log_rho[0] + log_square[0] + _STEP * jnp.arange(number + len(log_square)))
    moments = jax.lax.map(lambda v: attention_moments(v, N), s)
    weights = _chi_square(log_rho, d)

    def at(j: Array) -> tuple[Array, Array]:
        here = jax.tree.map(lambda a: jax.lax.dynamic_slice(a, (j,), (number,)), (s, moments))
        square, cross = _parts(here[0], rho, jnp.exp(log_square[j] / 2), d, sigma, here[1])
        return weights @ square, weights @ cross

    square, cross = jax.vmap(at)(jnp.arange(len(log_square)))
    risks = weights @ rho - cross**2 / square
    k = jnp.clip(jnp.argmin(risks), 1, len(risks) - 2)
    left, middle, right = risks[k - 1], risks[k], risks[k + 1]
    shift = (left - right) / (2.0 * (left - 2.0 * middle + right))
    u = cross / square
    scale = jnp.exp((log_square[k] + _STEP * shift) / 2)
    u = u[k] + shift * (u[k + 1] - u[k - 1]) / 2 + shift**2 * (u[k + 1] - 2.0 * u[k] + u[k - 1]) / 2
    return Head(scale, u, isotropic_risk(scale, u, d, N, sigma))
