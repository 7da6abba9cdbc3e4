"""Depth, distribution shift and few training tasks.

Derivations: notes/dependence-depth-shift.md.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.in_context import Prediction, context_second_moment, moment_risk, optimal_weights, pair_variance
from lindm_theory.moments import Number


def depth_bias(A: Array, Lambda: Array, Psi: Array, Lambda_q: Array, k: int) -> Array:
    """tr(Lq (I - A Lambda)^k Psi ((I - A Lambda)^k)'): bias of k steps w <- w + A (S - G w) on infinite contexts (ours).

    k = 1 is the bias of one layer. At A = A_N the eigenvalues of I - A Lambda are 1/(1 + N x_i), in (0, 1) for every law, so
    the bias falls geometrically in k and like N^{-2k} in N.  All [d, d].
    """
    step = jnp.linalg.matrix_power(jnp.eye(len(A), dtype=A.dtype) - A @ Lambda, k)
    return jnp.trace(Lambda_q @ step @ Psi @ step.T)


def depth_error(A: Array, G: Array, S: Array, w: Array, k: int) -> Array:
    """w_k - w after k steps w <- w + A (S - G w) from 0 on a given context, G = (1/M) sum x x' (ours).

    A, G [d, d], S, w [d] -> [d]. Without label noise S = G w and this is -(I - A G)^k w: depth then removes the *estimation*
    error as well as the bias, wherever the spectral radius of I - A G is below one; with noise it tends to the error of least
    squares.
    """

    def step(_: int, guess: Array) -> Array:
        return guess + A @ (S - G @ guess)

    return jax.lax.fori_loop(0, k, step, jnp.zeros_like(w)) - w


def onehot_depth_risk(a: Array, rho: Array, psi: Array, q: Array, M: int, k: int) -> Array:
    """Exact risk of k noiseless steps, one-hot x, diagonal A and Psi (ours): sum_i q_i psi_i E[(1 - a_i n_i/M)^{2k}].

    n_i ~ Bin(M, rho_i); a, rho, psi, q [d] are the diagonals of A, Lambda, Psi, Lambda_q -> []. As k grows it tends to
    sum_i q_i psi_i (1 - rho_i)^M, the coordinates never seen, if all a_i < 2, and diverges if some a_i > 2.
    """
    n = jnp.arange(M + 1, dtype=a.dtype)
    chance = jax.scipy.stats.binom.pmf(n[None, :], M, rho[:, None])
    left = (1.0 - a[:, None] * n[None, :] / M) ** (2 * k)
    return jnp.sum(q * psi * jnp.sum(chance * left, axis=1))


def scale_shift(
    A: Array, Lambda: Array, Psi: Array, K: Array, M: Number, Lambda_q: Array, c: Number, noise: Array | None = None
) -> Prediction:
    """Risk when the features of the test contexts are c times those of training (queries as given by Lambda_q) (ours).

    S becomes c^2 S (labels follow the features), so what = A S is multiplied by c^2: Lambda -> c^2 Lambda, K -> c^4 K, and
    E[eps^2 x x'] -> c^2 of it. Queries that scale as well multiply the result by c^2.
    """
    variance = c**4 * pair_variance(Lambda, Psi, K) if noise is None else c**4 * pair_variance(Lambda, Psi, K) + c**2 * noise
    return moment_risk(A, c**2 * Lambda, Psi, variance / M, Lambda_q)


def shift_floor(A: Array, Lambda_test: Array, Psi: Array, Lambda_q: Array) -> Array:
    """tr(Lq (A L_test - I) Psi (A L_test - I)'): what no test prompt, however long, removes.  All [d, d]."""
    return moment_risk(A, Lambda_test, Psi, jnp.zeros_like(A), Lambda_q).bias


def few_task_score(A: Array, deviation: Array, Lambda: Array, fourth: Callable[[Array], Array], N: Number) -> Array:
    """Derivative of the normal equations: E Lambda - A [(1 - 1/N) Lambda E Lambda + K(E)/N], E = Psi_T - Psi.  [d, d].

    `fourth` is the linear map Psi -> K(Psi) of the feature law.
    """
    return deviation @ Lambda - A @ context_second_moment(Lambda, deviation, fourth(deviation), N)


def few_task_coefficient(
    Lambda: Array, Psi: Array, fourth: Callable[[Array], Array], N: Number, Lambda_q: Array, noise: Array | None = None
) -> Array:
    """C with E[excess risk of A_N(Psi_T) over A_N(Psi)] = C/T + o(1/T) (ours); Psi_T = (1/T) sum w w' of T tasks w ~ N(0, Psi).

    The excess at M = N is tr(Lq (A_T - A) B (A_T - A)') and A_T - A = Z B^{-1} to first order, Z = few_task_score(Psi_T - Psi):
    C = E_w tr(Lq Z(w) B^{-1} Z(w)'). Gaussian w: the entries of F^{-1} (w w' - Psi) F^{-T} are uncorrelated with variance 1
    off the diagonal and 2 on it. C = O(1/N^2): for long prompts few tasks are enough, once T >= d.
    """
    d = len(Lambda)
    A = optimal_weights(Lambda, Psi, fourth(Psi), N, noise)
    B = context_second_moment(Lambda, Psi, fourth(Psi), N, noise)
    spectrum, basis = jnp.linalg.eigh(Psi)
    F = basis * jnp.sqrt(jnp.maximum(spectrum, 0.0))[None, :]

    def cost(i: Array, j: Array) -> Array:
        # sum over i < j of g_i g_j (f_i f_j' + f_j f_i') is half the sum over i != j; on the diagonal g_i^2 - 1 has variance 2
        Z = few_task_score(A, (jnp.outer(F[:, i], F[:, j]) + jnp.outer(F[:, j], F[:, i])) / 2, Lambda, fourth, N)
        return 2.0 * jnp.trace(Lambda_q @ Z @ jnp.linalg.solve(B, Z.T))

    index = jnp.arange(d)
    return jnp.sum(jax.vmap(jax.vmap(cost, (None, 0)), (0, None))(index, index))


def few_task_weights(
    tasks: Array, Lambda: Array, fourth: Callable[[Array], Array], N: Number, noise: Array | None = None
) -> Array:
    """A_N(Psi_T), what training on the T given tasks tends to: Psi_T = (1/T) sum w w'.  tasks [T, d] -> [d, d]."""
    Psi = tasks.T @ tasks / len(tasks)
    return optimal_weights(Lambda, Psi, fourth(Psi), N, noise)
