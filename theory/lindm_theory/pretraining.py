"""Pretraining on T prompts: what the reduced layer learns from a finite number of contexts.

A prompt is a context of N pairs with its task w; the layer predicts x_q'A S and is fitted by (ridge) least squares on T prompts,
either at one query x_q of each prompt (features x_q S', d^2 parameters in one regression) or at all queries (d regressions of
the d coordinates of w on S). Notation as in `in_context`: B = E[S S'], A_N = Psi Lambda B^{-1}, u = w - A_N S.

Two kinds of statements. *First order*, proved: T (excess risk) has a limit law of mean C, from the fourth
moments of (u, S).
*Deterministic equivalent*, a prediction: in the proportional limit N ~ d, T ~ d^2 the features act like Gaussian vectors of the
same covariance, which is Lq x B exactly. Derivations: notes/pretraining.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.in_context import Prediction, context_second_moment, moment_risk, optimal_weights
from lindm_theory.moments import Number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WeightLaw:
    """Mean and covariance of fitted weights A: Cov(A) = sum_ij variance_ij (r_i r_i') x (c_j c_j'), over the training prompts.

    Covariances between different rows r_i are left out; `all_query_weights` says where they matter.
    """

    mean: Array  # [d, d]
    variance: Array  # [d, d]
    rows: Array  # [d, d], orthonormal columns r_i
    columns: Array  # [d, d], orthonormal columns c_j


def expected_risk(law: WeightLaw, Lambda: Array, Psi: Array, R: Array, M: Number, Lambda_q: Array) -> Prediction:
    """Risk of random weights, averaged over them: `in_context.risk` at the mean plus sum_ij variance_ij (r'Lq r)_i (c'X c)_j.

    X = R/M for the estimation error and Lambda Psi Lambda for the bias. Lambda, Psi, R (`in_context.pair_variance`) and Lambda_q
    are those of the *test*, all [d, d]: a mismatch of tasks is another Psi here than in training.
    """
    at_mean = moment_risk(law.mean, Lambda, Psi, R / M, Lambda_q)

    def spread(X: Array) -> Array:
        return along(law.rows, Lambda_q) @ law.variance @ along(law.columns, X)

    return Prediction(at_mean.estimation + spread(R / M), at_mean.bias + spread(Lambda @ Psi @ Lambda))


def along(basis: Array, matrix: Array) -> Array:
    """(b_i' matrix b_i)_i for the columns b_i of a basis.  [d, d], [d, d] -> [d]."""
    return jnp.einsum("ki,kl,li->i", basis, matrix, basis)


def effective_ridge(spectrum: Array, T: Number, ridge: Number, steps: int = 100) -> Array:
    """kappa >= 0 with sum_i s_i/(s_i + kappa) + ridge/kappa = T; 0 for ridge = 0 and T >= p.  spectrum s[p] -> [].

    The sum falls in kappa, so bisection in log kappa finds the root.
    """
    center = jnp.log((jnp.sum(spectrum) + ridge) / T)  # kappa is at most this: s/(s + kappa) <= s/kappa

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        kappa = jnp.exp(middle)
        above = jnp.sum(spectrum / (spectrum + kappa)) + ridge / kappa > T
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, steps, halve, (center - 60.0, center))
    return jnp.exp((low + high) / 2)


def ridge_equivalent(spectrum: Array, target: Array, residual: Number, T: Number, ridge: Number) -> tuple[Array, Array]:
    """Mean and variance of the coefficients of ridge regression on T samples of Gaussian features, as T and p grow together.

    Minimizing sum_t (y_t - z_t'a)^2 + ridge |a|^2, z with independent coordinates of variances s[p], y = z'target + noise of
    variance `residual`: with kappa = `effective_ridge`,

        mean_i = s_i target_i/(s_i + kappa),    variance_i = v s_i/(s_i + kappa)^2,
        v = (residual + kappa^2 sum s_i target_i^2/(s_i + kappa)^2) / (T - sum s_i^2/(s_i + kappa)^2).

    ridge = 0 is the least-squares solution of smallest norm; it diverges at T = p.
    """
    kappa = effective_ridge(spectrum, T, ridge)
    shrink = spectrum / (spectrum + kappa)
    missed = jnp.sum(spectrum * jnp.square((1.0 - shrink) * target))
    v = (residual + missed) / (T - jnp.sum(jnp.square(shrink)))
    return shrink * target, v * shrink / (spectrum + kappa)


def one_query_weights(A: Array, B: Array, residual: Number, Lambda_q: Array, T: Number, ridge: Number = 0.0) -> WeightLaw:
    """Deterministic equivalent of the weights fitted on T prompts at one query each: p = d^2, double descent at T = d^2.

    A = A_N and B = E[S S'] [d, d]. residual = tr(Lq (Psi - A Lambda Psi)) + the variance of the label noise of the query in the
    proportional limit; `prompt_coefficient` / d^2 in its place makes the excess exact to first order in 1/T at every d. The
    penalty is ridge ||A||_F^2 beside the sum of T squares.
    """
    q, rows = jnp.linalg.eigh(Lambda_q)
    b, columns = jnp.linalg.eigh(B)
    target = rows.T @ A @ columns
    mean, variance = ridge_equivalent(jnp.outer(q, b).ravel(), target.ravel(), residual, T, ridge)
    return WeightLaw(rows @ mean.reshape(A.shape) @ columns.T, variance.reshape(A.shape), rows, columns)


def all_query_weights(A: Array, B: Array, residuals: Array, Lambda_q: Array, T: Number, ridge: Number = 0.0) -> WeightLaw:
    """The same when the loss of a prompt is the exact mean over queries, |w - A S|^2 in Lq: p = d, double descent at T = d.

    residuals = E[u u'] = Psi - A Lambda Psi [d, d] in the limit; E[u u' S'B^{-1}S] / d (`prompt_moment`) makes the excess exact
    to first order in 1/T. Each eigenvector of Lq is a regression of its own, with ridge/q_i. Their fits share the prompts; the
    covariances between them are left out, which is right for test queries whose Lq is diagonal in the same eigenvectors.
    """
    q, rows = jnp.linalg.eigh(Lambda_q)
    b, columns = jnp.linalg.eigh(B)

    def row(target: Array, residual: Array, weight: Array) -> tuple[Array, Array]:
        return ridge_equivalent(b, target, residual, T, ridge / weight)

    mean, variance = jax.vmap(row)(rows.T @ A @ columns, along(rows, residuals), q)
    return WeightLaw(rows @ mean @ columns.T, variance, rows, columns)


def prompt_moment(G: Array, weights: Array, noise: Array, A: Array, B: Array, Psi: Array) -> Array:
    """E[u u' S'B^{-1}S] for tasks w ~ N(0, Psi) and Gaussian noise, which gives the C of the excess C/T (ours).  -> [d, d].

    G [P, d, d] with weights [P] is the law of (1/N) sum x x'; noise [P, d, d] the covariance of the noise in S given G
    (sigma^2 G/N). Given G, (u, S) is Gaussian, and Isserlis gives C_uu tr(B^{-1} C_SS) + 2 C_uS B^{-1} C_uS'.
    """

    inverse = jnp.linalg.inv(B)

    def given(G: Array, noise: Array) -> Array:
        SS = G @ Psi @ G + noise
        uS = Psi @ G - A @ SS
        uu = Psi - A @ G @ Psi - uS @ A.T
        return uu * jnp.sum(inverse * SS) + 2.0 * uS @ inverse @ uS.T

    return jnp.einsum("p,pij->ij", weights, jax.vmap(given)(G, noise))


def prompt_coefficient(moment: Array, query: Array, query_noise: Number = 0.0) -> Array:
    """C of the excess C/T of T prompts, to first order: tr(query E[u u' S'B^{-1}S]) + query_noise d^2 (ours).

    moment = `prompt_moment` [d, d]. A loss over all queries: query = Lq, query_noise = 0. One query a prompt:
    query = K(Lq^{-1}) = E[x_q x_q' (x_q' Lq^{-1} x_q)] [d, d], which is (d + 2) Lq for Gaussian queries, and the variance of the
    label noise of the query.
    """
    return jnp.add(jnp.trace(query @ moment), query_noise * len(query) ** 2)


def repeated_task_excess(task: Number, prompt: Number, T: Number, m: Number) -> Array:
    """C_task/T + (C_prompt - C_task)/(T m): excess risk of T tasks with m prompts each, to first order in 1/T (ours).

    `task` = robustness.few_task_coefficient, `prompt` = `prompt_coefficient`; C_prompt >= C_task (law of total variance). Label
    noise has the same second moment V for all tasks, and m is fixed.
    """
    return jnp.asarray(task / T + (prompt - task) / (T * m))


def mismatch_excess(
    Lambda: Array,
    Psi: Array,
    Psi_test: Array,
    fourth: Callable[[Array], Array],
    N: Number,
    Lambda_q: Array,
    noise: Array | None = None,
) -> Array:
    """tr(Lq (A - A')B'(A - A')'), A = A_N(Psi), A' = A_N(Psi_test), B' = E[S S'] at the test: the price at T = infinity, M = N of
    pretraining on tasks of second moment Psi when those of the test have Psi_test (ours). `fourth` is Psi -> K(Psi)."""
    off = optimal_weights(Lambda, Psi, fourth(Psi), N, noise) - optimal_weights(Lambda, Psi_test, fourth(Psi_test), N, noise)
    return jnp.trace(Lambda_q @ off @ context_second_moment(Lambda, Psi_test, fourth(Psi_test), N, noise) @ off.T)


def many_prompts_limit(alpha: Number, kappa: Number, rho: Number) -> Array:
    """Error on fresh tasks after T/d^2 -> infinity prompts of k = kappa d distinct tasks, N = alpha d, d -> infinity.

    x ~ N(0, I/d), w ~ N(0, I), label noise rho, test at M = N, the noise rho of the query's label included: with
    c = (1 + rho)/alpha and h_j = int (l + c)^-j of the Marchenko-Pastur law of (1/k) sum w w',

        rho + int (c^2 + c l^2)/(l + c)^2 = rho + c^2 h_2 + c (1 - 2 c h_1 + c^2 h_2).

    Derived here from `robustness.few_task_weights`: .63738 at alpha = 1, rho = .1, kappa = 10 and .69898 at kappa = 2. The same
    function is the limit of the ridgeless formula of Lu, Letey, Zavatone-Veth, Maiti, Pehlevan, arXiv 2405.11751 (notes, 4).
    """
    c, y = (1.0 + rho) / alpha, 1.0 / kappa
    edge = 1.0 - y + c
    h1 = (jnp.sqrt(edge**2 + 4.0 * y * c) - edge) / (2.0 * y * c)
    h2 = (y * h1**2 + h1) / (2.0 * y * c * h1 + edge)
    return rho + c**2 * h2 + c * (1.0 - 2.0 * c * h1 + c**2 * h2)
