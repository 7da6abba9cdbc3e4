"""The closed form of the trained layer and the exact error of its predictions.

A context of N pairs (x_i, y_i), y_i = x_i'w + eps_i, enters through S_N = (1/N) sum y_i x_i, and the layer predicts x_q' A S_N.
With Lambda = E[x x'], Psi = E[w w'], K = E[x x' Psi x x'] and the noise moment V = E[eps^2 x x'],

    E[S_N S_N'] = (1 - 1/N) Lambda Psi Lambda + (K + V) / N,      E[S_N w'] = Lambda Psi,

so the best A solves A E[S_N S_N'] = Psi Lambda, whatever the law of the query. Every other statement follows from these two
moments; the proofs are in notes/in-context.md. With R = K - Lambda Psi Lambda + V (the covariance of one pair, averaged over
tasks)

    risk(M, N) = (1/M) tr(Lq A R A') + tr(Lq (A Lambda - I) Psi (A Lambda - I)').
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.moments import Number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prediction:
    """A predicted mean squared error of Qhat in its two parts; any common shape."""

    estimation: Array  # falls as 1/M, the length of the test prompt
    bias: Array  # does not depend on M; falls as 1/N^2 at A = A_N

    @property
    def total(self) -> Array:
        """estimation + bias."""
        return self.estimation + self.bias


def pair_variance(Lambda: Array, Psi: Array, K: Array, noise: Array | None = None) -> Array:
    """R = K - Lambda Psi Lambda + noise = E_tasks Cov(x y | task).  All [d, d]; `noise` = E[eps^2 x x'], None for none."""
    R = K - Lambda @ Psi @ Lambda
    return R if noise is None else R + noise


def context_second_moment(Lambda: Array, Psi: Array, K: Array, N: Number, noise: Array | None = None) -> Array:
    """E[S_N S_N'] = Lambda Psi Lambda + R / N for an i.i.d. context.  All [d, d]; `noise` = E[eps^2 x x'] (sigma^2 Lambda)."""
    return Lambda @ Psi @ Lambda + pair_variance(Lambda, Psi, K, noise) / N


def solve_normal_equations(ESw: Array, ESS: Array) -> Array:
    """The best A from E[S w'] and E[S S']: A E[S S'] = E[S w']'.  [d, d], [d, d] -> [d, d].

    For covariances that differ from task to task and for dependent contexts: any moments can be used.
    """
    return jnp.linalg.solve(ESS, ESw).T


def optimal_weights(Lambda: Array, Psi: Array, K: Array, N: Number, noise: Array | None = None) -> Array:
    """A_N = Psi Lambda [(1 - 1/N) Lambda Psi Lambda + (K + noise)/N]^{-1}, for any law of features (ours).  All [d, d]."""
    return solve_normal_equations(Lambda @ Psi, context_second_moment(Lambda, Psi, K, N, noise))


def gaussian_gamma(Lambda: Array, N: Number, sigma: Number = 0.0) -> Array:
    """Gamma = (1 + 1/N) Lambda + ((tr Lambda + sigma^2)/N) I; A_N = Gamma^{-1} for x ~ N(0, Lambda), Psi = I.

    [ZFB] and [ZAS] eq. (4) at sigma = 0.  [d, d] -> [d, d].
    """
    return (1.0 + 1.0 / N) * Lambda + (jnp.trace(Lambda) + sigma**2) / N * jnp.eye(len(Lambda), dtype=Lambda.dtype)


def onehot_gamma(rho: Array, N: Number, sigma: Number = 0.0) -> Array:
    """Gamma = (1 - 1/N) diag(rho) + ((1 + sigma^2)/N) I; A_N = Gamma^{-1} for one-hot x, Psi = I (ours).  [d] -> [d, d]."""
    return (1.0 - 1.0 / N) * jnp.diag(rho) + (1.0 + sigma**2) / N * jnp.eye(len(rho), dtype=rho.dtype)


def risk(A: Array, Lambda: Array, Psi: Array, K: Array, M: Number, Lambda_q: Array, noise: Array | None = None) -> Prediction:
    """Exact E (x_q'(A S_M - w))^2 of *any* A on i.i.d. test contexts of M pairs (ours).

    Lambda, K, noise are the moments of the *test* contexts and Lambda_q = E[x_q x_q'] that of the queries, so the same function
    answers for matched and for shifted tests. All matrices [d, d]; M a number.
    """
    return moment_risk(A, Lambda, Psi, pair_variance(Lambda, Psi, K, noise) / M, Lambda_q)


def moment_risk(A: Array, mean: Array, Psi: Array, variance: Array, Lambda_q: Array) -> Prediction:
    """Exact risk of any A from mean = E[G] and variance = E[S S'] - E[G] Psi E[G] of a context of any dependence (ours)."""
    miss = A @ mean - jnp.eye(len(A), dtype=A.dtype)
    return Prediction(jnp.trace(Lambda_q @ A @ variance @ A.T), jnp.trace(Lambda_q @ miss @ Psi @ miss.T))


def gaussian_risk(Lambda: Array, M: Number, N: Number, sigma: Number = 0.0) -> Prediction:
    """x ~ N(0, Lambda), Psi = I, Lambda_q = Lambda, A = Gamma_N^{-1}, in the form of Gamma alone (ours).  [d, d].

    tr(Lambda^2 Gamma_N^-2 (Gamma_M - Lambda)) + tr(Lambda Gamma_N^-2 (Gamma_N - Lambda)^2); everything commutes.
    """
    gamma_N, gamma_M = gaussian_gamma(Lambda, N, sigma), gaussian_gamma(Lambda, M, sigma)
    once = jnp.linalg.solve(gamma_N, Lambda)
    miss = jnp.linalg.solve(gamma_N, gamma_N - Lambda)
    return Prediction(jnp.trace(once @ once @ (gamma_M - Lambda)), jnp.trace(Lambda @ miss @ miss))


def optimization_error(Ahat: Array, A: Array, second_moment: Array, Lambda_q: Array) -> Array:
    """tr(Lq (Ahat - A) E[S S'] (Ahat - A)'): the excess risk of weights Ahat (ours).  All [d, d].

    With A = A_N and second_moment = E[S_N S_N'] this is the whole excess risk at M = N, because w - A_N S_N is orthogonal to
    S_N. At M != N there is also `optimization_cross`.
    """
    off = Ahat - A
    return jnp.trace(Lambda_q @ off @ second_moment @ off.T)


def optimization_cross(Ahat: Array, A: Array, ESw: Array, second_moment: Array, Lambda_q: Array) -> Array:
    """2 tr(Lq (Ahat - A)(E[S_M S_M'] A' - E[S w'])): zero at M = N, the only other term of the excess at M != N (ours)."""
    return 2.0 * jnp.trace(Lambda_q @ (Ahat - A) @ (second_moment @ A.T - ESw))


def paper_bound(Lambda: Array, M: Number, N: Number) -> Prediction:
    """(d+1) tr(Lambda)/M + (1 + 2d + d^2 kappa) tr(Lambda)/N^2: Gaussian x, Psi = I, no noise.  [ZAS] eq. (6), [ZFB] Cor. 4.3."""
    d = len(Lambda)
    spectrum = jnp.linalg.eigvalsh(Lambda)
    trace = jnp.trace(Lambda)
    return Prediction((d + 1) * trace / M, (1.0 + 2 * d + d**2 * spectrum[-1] / spectrum[0]) * trace / N**2)


def general_bound(
    Lambda: Array, Psi: Array, K: Array, M: Number, N: Number, Lambda_q: Array, noise: Array | None = None
) -> Prediction:
    """Eq. (6) for every law of features, every Psi > 0 and any noise (ours): with C = Lambda^{-1} R Lambda^{-1},

        risk(M, N) <= tr(Lq C)/M + tr(Lq C Psi^{-1} C)/N^2,

    for every M and N, both parts separately, and with the right constants: est * M -> tr(Lq C) as N -> infinity and
    bias * N^2 -> tr(Lq C Psi^{-1} C), both from below. For Gaussian x, Psi = I, no noise: (d+1) tr(Lambda)/M as in eq. (6) and
    (1 + 2d) tr(Lambda) + tr(Lambda)^2 tr(Lambda^{-1}) over N^2, which eq. (6) relaxes by tr(Lambda) tr(Lambda^{-1}) <= d^2 kappa.
    All matrices [d, d].
    """
    C = jnp.linalg.solve(Lambda, jnp.linalg.solve(Lambda, pair_variance(Lambda, Psi, K, noise)).T)
    return Prediction(jnp.trace(Lambda_q @ C) / M, jnp.trace(Lambda_q @ C @ jnp.linalg.solve(Psi, C)) / N**2)


def modes(Lambda: Array, Psi: Array, K: Array, Lambda_q: Array, noise: Array | None = None) -> tuple[Array, Array]:
    """The modes (ours): the signal-to-noise ratio x[d] of each mode and its weight q[d], which determine the risk.

    With Psi = F F' and X = F' Lambda R^{-1} Lambda F = V diag(x) V', q = diag(V' F' Lq F V). R must be positive definite. Then

        estimation(M, N) = sum_i q_i N^2 x_i / (M (1 + N x_i)^2),    bias(N) = sum_i q_i / (1 + N x_i)^2.
    """
    spectrum, basis = jnp.linalg.eigh(Psi)
    F = basis * jnp.sqrt(jnp.maximum(spectrum, 0.0))[None, :]
    G = Lambda @ F
    X = G.T @ jnp.linalg.solve(pair_variance(Lambda, Psi, K, noise), G)
    x, V = jnp.linalg.eigh((X + X.T) / 2)
    return x, jnp.einsum("ki,kl,li->i", F @ V, Lambda_q, F @ V)


def modal_risk(x: Array, q: Array, M: Number, N: Number) -> Prediction:
    """Risk of A_N from `modes` (x[d], q[d]).  For given M it is least at N = M, mode by mode: not at N = infinity (ours).

    That is a statement about the squared error of Qhat with test contexts of the training law (any query law). The policy of A_N
    may lose least at another N, smaller or larger: `margin.policy_length_ratio`.
    """
    shrink = 1.0 / (1.0 + N * x)
    return Prediction(jnp.sum(q * x * jnp.square(N * shrink)) / M, jnp.sum(q * jnp.square(shrink)))


def balance_length(x: Array, q: Array, M: Number, steps: int = 80) -> Array:
    """The real N at which the bias of A_N equals its estimation error on M pairs (ours).  x[d], q[d] of `modes`.

    Unique because estimation rises and bias falls in N; by bisection in log N. For large M it is
    sqrt(M sum(q/x^2) / sum(q/x)).
    """

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        parts = modal_risk(x, q, M, jnp.exp(middle))
        above = parts.bias > parts.estimation
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    start = jnp.asarray(0.0, x.dtype)
    low, high = jax.lax.fori_loop(0, steps, halve, (start - 40.0, start + 40.0))
    return jnp.exp((low + high) / 2)
