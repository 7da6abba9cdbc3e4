"""The margin: the effect of the bias on a policy, and of the distribution of gaps on the slope in M.

As M grows, Qhat_h -> phi' A_h Lambda w_h, the bias-greedy values. Where they rank an optimal action strictly first, the
probability of a wrong action falls exponentially in M; where they do not, no context length corrects it.  Proofs:
notes/policy.md.
"""

from collections.abc import Callable

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
    every M, infinite where every action is optimal. For two given actions the margin, as a function of N, changes sign at most
    d - 1 times; the greedy action of a state can change more often, up to d - 1 times for each pair of its actions.
    """
    level = tolerance * jnp.max(jnp.abs(Qstar))
    optimal = Qstar >= jnp.max(Qstar, axis=-1, keepdims=True) - level
    right = jnp.max(jnp.where(optimal, values, -jnp.inf), axis=-1)
    wrong = jnp.max(jnp.where(optimal, -jnp.inf, values), axis=-1)
    return right - wrong


def flip_length(margins: Array, N: Array) -> Array:
    """The largest N of the grid at which the bias flips an action in some state; zero if it does at none.

    margins [n, H, S] of `bias_margin` for the grid N [n] of training lengths -> []. At every larger N of the grid, but for ties,
    the loss falls exponentially in M under bounded noise. The set of N that flip need not be an interval when d >= 3, nor, with
    three or more actions, when d = 2.
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


def gaussian_decision_loss(side: Array, A: Array, Psi: Array, ESw: Array, ESS: Array) -> Array:
    """E SubOpt of choosing by the sign of side'A S if (w, S) is jointly Gaussian with mean zero (ours; H = 1, two actions).

    side = phi_1 - phi_2 [d]; A, Psi = E[w w'], ESw = E[S w'], ESS = E[S S'] all [d, d]: sd(g)(1 - corr(g, side'A S))/sqrt(2 pi)
    with g = side'w. The correlation is largest at the regression of w on S, A = E[w S'] E[S S']^{-1}: then N = M is best for the
    policy too. Exact where G does not vary and tasks and noise are Gaussian; the limit of M -> infinity, sigma^2 of order M.
    """
    spread = jnp.sqrt(side @ Psi @ side)
    correlation = (side @ A @ ESw @ side) / (spread * jnp.sqrt(side @ A @ ESS @ A.T @ side))
    return spread * (1.0 - correlation) / jnp.sqrt(2.0 * jnp.pi)


def policy_length_ratio(
    sides: Array, chances: Array, Lambda: Array, Psi: Array, fourth: Callable[[Array], Array], noise: Array | None = None
) -> Array:
    """Limit of N*/M as M -> infinity, N* the training length with the smallest E SubOpt (ours; H = 1, two actions).

    sides [n, d] = phi(s, 1) - phi(s, 2), chances [n] of the states, Lambda, Psi [d, d], `fourth` the map Psi -> K(Psi), noise =
    E[eps^2 x x'] -> []; infinity if longer training prompts are better at every multiple of M. Tasks w ~ N(0, Psi), bounded
    features, label noise whose law does not depend on the task, A = A_N. With C = Lambda^{-1} R Lambda^{-1} and, for each state,
    g = side'w of variance v, kappa = Psi side / v, u = w - g kappa, h(u) = side'C Psi^{-1} u, C_u and C_ku the covariance of a
    pair, between two Lambda^{-1}, at the task u and its polar form at (kappa, u),

        E SubOpt = r(M) + sum_s chance_s / sqrt(2 pi v) [ b/(2 N^2) - a/(N M) ] + O(M^-3),       N* = M sum b / sum a,
        b = E h(u)^2,     a = E side'C_u Psi^{-1} C side - (side'C side / v) E side'C_u side - E h(u) side'C_ku side.

    For the risk of Qhat the ratio is 1 in every case; here it is 1 if the covariance of S given the task is the same for all
    tasks (C_u = C, C_ku = 0), which it is not for i.i.d. pairs with little label noise.
    """
    inverse = jnp.linalg.inv(Lambda)

    def covariance(second: Array) -> Array:
        return inverse @ (fourth(second) - Lambda @ second @ Lambda) @ inverse

    added = jnp.zeros_like(Lambda) if noise is None else inverse @ noise @ inverse
    C = covariance(Psi) + added

    def state(side: Array) -> tuple[Array, Array]:
        v = side @ Psi @ side
        kappa = Psi @ side / v
        rest = Psi - v * jnp.outer(kappa, kappa)
        C_u = covariance(rest) + added
        tilt = jnp.linalg.solve(Psi, C @ side)
        gamma = side @ C @ side / v
        toward = rest @ tilt
        polar = covariance(jnp.outer(kappa, toward) + jnp.outer(toward, kappa))
        a = side @ C_u @ tilt - gamma * side @ C_u @ side - side @ polar @ side
        return tilt @ rest @ tilt / jnp.sqrt(v), a / jnp.sqrt(v)

    b, a = jax.vmap(state)(sides)
    total = jnp.sum(chances * a)
    return jnp.where(total > 0, jnp.sum(chances * b) / jnp.where(total > 0, total, 1.0), jnp.inf)
