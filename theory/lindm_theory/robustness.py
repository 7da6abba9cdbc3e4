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

    k = 1 is the bias of one layer. If Lambda, Psi and R are positive definite, the eigenvalues of I - A_N Lambda are
    1/(1 + N x_i), in (0, 1) for every law, so the bias at A = A_N falls geometrically in k and like N^{-2k} in N. A singular Psi
    adds eigenvalues 1 outside its range, which Psi does not see. All [d, d].
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
    sum_i q_i psi_i (1 - rho_i)^M, the coordinates never seen, if all a_i < 2, and diverges if some a_i > 2 (with rho_i, q_i,
    psi_i > 0), because a context that shows only pair i has positive probability. At A_N (Psi = I, no noise)
    a_i = N/((N - 1) rho_i + 1), so that all a_i < 2 needs N (d - 2) < 2 (d - 1): for d >= 3 only N <= 3. `largest_step` gives a
    step that is safe at every depth, `unstable_chance` the share of contexts on which the full step is not.
    """
    n = jnp.arange(M + 1, dtype=a.dtype)
    chance = jax.scipy.stats.binom.pmf(n[None, :], M, rho[:, None])
    left = (1.0 - a[:, None] * n[None, :] / M) ** (2 * k)
    return jnp.sum(q * psi * jnp.sum(chance * left, axis=1))


def largest_step(A: Array, phi: Array) -> Array:
    """2 / max_n phi_n'A phi_n: w <- w + step A (S - G w) with a smaller step diverges on no context (ours).

    A [d, d] symmetric and positive definite, phi [n, d] the support of the features -> []. Every G in the convex hull of the x x'
    has A^{1/2} G A^{1/2} <= max x'A x; so step A G has eigenvalues in [0, 2) and without noise the error in the norm of A^{-1}
    never rises. On infinite contexts the bias of a mode then contracts by 1 - step N x/(1 + N x) a layer. At step 1 this asks for
    max x'A x < 2, which is out of reach at A_N for long prompts and d >= 3, since E x'A_N x = tr(A_N Lambda) -> d.
    """
    return 2.0 / jnp.max(jnp.einsum("ni,ij,nj->n", phi, A, phi))


def unstable_chance(A: Array, phi: Array, M: Number, step: Number = 1.0) -> Array:
    """d (e/4)^{M/b}, b = step max_n phi_n'A phi_n: at most this share of the contexts of M pairs has step A G with an eigenvalue
    of 2 or more (derived in notes/dependence-depth-shift.md; matrix Chernoff bound of Ahlswede and Winter).

    A [d, d] symmetric with eigenvalues of step A Lambda at most one, as at A_N; phi [n, d] the support -> []. On every other
    context the error without noise never rises, and tends to zero on the span of the pairs.
    """
    reach = step * jnp.max(jnp.einsum("ni,ij,nj->n", phi, A, phi))
    return phi.shape[-1] * jnp.exp(-(2.0 * jnp.log(2.0) - 1.0) * M / reach)


def scale_shift(
    A: Array, Lambda: Array, Psi: Array, K: Array, M: Number, Lambda_q: Array, c: Number, noise: Array | None = None
) -> Prediction:
    """Risk when the features of the test contexts are c times those of training (queries as given by Lambda_q) (ours).

    Without noise S becomes c^2 S (labels follow the features) and what = A S is multiplied by c^2: Lambda -> c^2 Lambda,
    K -> c^4 K, and E[eps^2 x x'] -> c^2 of it. Queries that scale as well multiply the result by c^2.
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
    """A_N(Psi_T), what training on the T given tasks tends to: Psi_T = (1/T) sum w w'.  tasks [T, d] -> [d, d].

    Fresh contexts of these tasks without end; E[S S'] > 0, which R > 0 ensures even for T < d. `noise` is E[eps^2 x x'] averaged
    over the *T tasks*: sigma^2 Lambda for noise that does not depend on the task. Not for `return` labels, whose noise does.
    """
    Psi = tasks.T @ tasks / len(tasks)
    return optimal_weights(Lambda, Psi, fourth(Psi), N, noise)
