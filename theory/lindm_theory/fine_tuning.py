r"""Fine-tuning a linear attention layer: from the optimum of old tasks towards that of new tasks.

A layer at A_0 = A_N(Psi_0), the optimum of old tasks, is trained on new tasks with moments B = E[S S'], ESw = E[S w'] and optimum
A_1 = ESw' B^{-1}. With F_i(A) = E||A S - w||^2_{Lq} of old (0) and new (1) tasks at the training length, the excess
F_1(A) - F_1(A_1) is what is left to learn and the forgetting F_0(A) - F_0(A_0) is what is lost, both
`in_context.optimization_error`. Time is that of gradient flow of F_1 / 2 (as in `gradient_flow`). Four ways of training:

    reduced          dA/dt = -Lq (A - A_1) B                                     closed form
    all weights      dA/dt = -||A|| (D + <D, A> A / ||A||^2),  D = Lq (A B - ESw')   U and u, from the balanced start
    key-query only   U alone: the reduced flow at speed u_0^2 = ||A_0||
    value only       u alone: A = c(t) A_0, a number that relaxes to c*

Derived here; cf. Lee, Sohn, Lee, arXiv 2602.23197 (fine-tuning linear attention). Proofs: notes/fine-tuning.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.in_context import context_second_moment, optimal_weights, solve_normal_equations
from lindm_theory.moments import Number
from lindm_theory.robustness import few_task_score


def reduced_path(A0: Array, B: Array, ESw: Array, Lambda_q: Array, times: Array) -> Array:
    """A(t) of dA/dt = -Lq (A B - ESw'), exactly: A_1 + P (e^{-t l_i b_j} (P'(A_0 - A_1) R)_ij) R' (ours).

    times [T] -> [T, d, d]. Lq = P diag(l) P', B = R diag(b) R'. The excess of the new tasks is
    sum_ij l_i b_j e^{-2 t l_i b_j} (P'(A_0 - A_1) R)_ij^2.
    """
    A1 = solve_normal_equations(ESw, B)
    queries, P = jnp.linalg.eigh(Lambda_q)
    contexts, R = jnp.linalg.eigh(B)
    rates = jnp.outer(queries, contexts)
    start = P.T @ (A0 - A1) @ R
    moved = jnp.exp(-times[:, None, None] * rates[None]) * start[None]
    return A1[None] + jnp.einsum("ij,tjk,lk->til", P, moved, R)


def key_query_path(A0: Array, B: Array, ESw: Array, Lambda_q: Array, times: Array) -> Array:
    """A(t) if U alone is trained from the balanced start: the reduced path at ||A_0||_F times its speed (ours).  -> [T, d, d]."""
    return reduced_path(A0, B, ESw, Lambda_q, jnp.linalg.norm(A0) * times)


def balanced_field(A: Array, B: Array, ESw: Array, Lambda_q: Array) -> Array:
    """dA/dt of all weights (U, u) with u^2 = ||U||_F^2: -||A|| (D + <D, A> A / ||A||^2), D = Lq (A B - ESw') (ours).  [d, d].

    The first term is the key-query matrix's part, the second, radial one the value weight's.
    """
    D = Lambda_q @ (A @ B - ESw.T)
    size = jnp.linalg.norm(A)
    return -(size * D + jnp.sum(D * A) * A / size)


def value_limit(A0: Array, B: Array, ESw: Array, Lambda_q: Array) -> Array:
    """c* = tr(Lq A_0 ESw) / tr(Lq A_0 B A_0'): the best multiple of A_0 for the new tasks (ours).  -> [].

    If A_0 has a smaller risk on the new tasks than the zero predictor, c* > 1/2. It can be negative otherwise.
    """
    return jnp.trace(Lambda_q @ A0 @ ESw) / jnp.trace(Lambda_q @ A0 @ B @ A0.T)


def value_path(A0: Array, B: Array, ESw: Array, Lambda_q: Array, times: Array) -> Array:
    """c(t) with A(t) = c(t) A_0, if u alone is trained: c* + (1 - c*) e^{-t tr(Lq A_0 B A_0') / ||A_0||} (ours).

    times [T] -> [T]. c(t) > 0 at all times iff c* >= 0: then the greedy policy never changes (it is blind to a positive scale),
    for new and for old tasks. With c* < 0 the scale passes zero and the policy is turned around.
    """
    limit = value_limit(A0, B, ESw, Lambda_q)
    rate = jnp.trace(Lambda_q @ A0 @ B @ A0.T) / jnp.linalg.norm(A0)
    return limit + (1.0 - limit) * jnp.exp(-rate * times)


def replay_weights(share: Number, B0: Array, ESw0: Array, B1: Array, ESw1: Array) -> Array:
    """Minimizer of p F_0 + (1 - p) F_1, p = `share` of old tasks in the training mixture (ours).  [d, d].

    For laws that differ in Psi alone it is A_N(p Psi_0 + (1 - p) Psi_1). The minimizers for p in [0, 1] are exactly the layers of
    which no other layer is better on old tasks without being worse on new ones.
    """
    return solve_normal_equations(share * ESw0 + (1 - share) * ESw1, share * B0 + (1 - share) * B1)


def start_curvature(velocity: Array, A0: Array, B0: Array, B1: Array, ESw1: Array, Lambda_q: Array) -> Array:
    """kappa with forgetting = kappa gain^2 + ... as a path leaves A_0 with `velocity` (ours).  -> [].

    Forgetting begins with the square of the time, the gain F_1(A_0) - F_1(A(t)) with its first power. kappa is
    tr(Lq V B_0 V') / <D, V>^2, D = 2 Lq (A_0 B_1 - ESw_1'), for <D, V> < 0.
    """
    D = 2.0 * Lambda_q @ (A0 @ B1 - ESw1.T)
    return jnp.trace(Lambda_q @ velocity @ B0 @ velocity.T) / jnp.sum(D * velocity) ** 2


def least_start_curvature(A0: Array, B0: Array, B1: Array, ESw1: Array, Lambda_q: Array) -> Array:
    """1 / tr(D' Lq^{-1} D B_0^{-1}), the least kappa of any velocity; that of replay (p near 1) and of V = -Lq^{-1} D B_0^{-1}.

    (ours) It is the gradient preconditioned with the curvature of the old loss.  -> [].
    """
    D = 2.0 * Lambda_q @ (A0 @ B1 - ESw1.T)
    return 1.0 / jnp.trace(D.T @ jnp.linalg.solve(Lambda_q, D) @ jnp.linalg.inv(B0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ValueRow:
    """The value row (v, u) of a layer whose key-query matrix U stays and whose block z is zero: what = U'(G v + u S)."""

    v: Array  # [d]
    u: Array  # []


def _row_curvature(U: Array, Lambda: Array, fourth: Callable[[Array], Array], N: Number, Lambda_q: Array) -> tuple[Array, Array]:
    """C = U Lq U' and K = E[G C G], both [d, d]: the risk of a value row is quadratic in v with K, and in u with tr(C B)."""
    C = U @ Lambda_q @ U.T
    return C, context_second_moment(Lambda, C, fourth(C), N)


def value_row_limit(
    U: Array,
    Lambda: Array,
    Psi: Array,
    mean: Array,
    fourth: Callable[[Array], Array],
    N: Number,
    Lambda_q: Array,
    noise: Array | None = None,
) -> ValueRow:
    """Best value row for tasks with mean m and second moment Psi (ours): v = b - u m, u as for tasks with their mean removed.

    b = K^{-1} Lambda U Lq m, K = E[G C G], C = U Lq U', u = tr(U Lq Cov Lambda) / tr(C B(Cov)), Cov = Psi - m m'. So the row
    predicts the mean task from the features and regresses on centered labels: what = U'(G b + u (S - G m)). U must be invertible.
    """
    C, K = _row_curvature(U, Lambda, fourth, N, Lambda_q)
    covariance = Psi - jnp.outer(mean, mean)
    B = context_second_moment(Lambda, covariance, fourth(covariance), N, noise)
    u = jnp.trace(U @ Lambda_q @ covariance @ Lambda) / jnp.trace(C @ B)
    return ValueRow(jnp.linalg.solve(K, Lambda @ U @ Lambda_q @ mean) - u * mean, u)


def value_row_risk(
    row: ValueRow,
    U: Array,
    Lambda: Array,
    Psi: Array,
    mean: Array,
    fourth: Callable[[Array], Array],
    N: Number,
    Lambda_q: Array,
    noise: Array | None = None,
) -> Array:
    """E||U'(G v + u S) - w||^2_{Lq} on contexts of N pairs of tasks with mean m and second moment Psi (ours).  -> [].

    v'K v + 2 u v'K m + u^2 tr(C B) - 2 v'Lambda U Lq m - 2 u tr(U Lq Psi Lambda) + tr(Lq Psi). Zero-shot (a prompt without
    labels, S = 0) is u = 0.
    """
    C, K = _row_curvature(U, Lambda, fourth, N, Lambda_q)
    B = context_second_moment(Lambda, Psi, fourth(Psi), N, noise)
    pull = Lambda @ U @ Lambda_q
    squares = row.v @ K @ row.v + 2.0 * row.u * (row.v @ K @ mean) + row.u**2 * jnp.trace(C @ B)
    return squares - 2.0 * (row.v @ pull @ mean) - 2.0 * row.u * jnp.trace(pull @ Psi) + jnp.trace(Lambda_q @ Psi)


def zero_shot_path(
    U: Array, Lambda: Array, mean: Array, fourth: Callable[[Array], Array], N: Number, Lambda_q: Array, times: Array
) -> tuple[Array, Array]:
    """Value-only training on prompts without labels: v(t) = (I - e^{-K t}) b, and e(t) = v'K v (ours).  times [T] -> [T, d], [T].

    u does not move. The zero-shot gain on tasks of mean m is 2 v'K b - v'K v, and in-context risk on old tasks of mean zero (same
    features and N) grows by exactly e(t): never more than the gain, and equal to it, b'K b, in the end.
    """
    K = _row_curvature(U, Lambda, fourth, N, Lambda_q)[1]
    spectrum, basis = jnp.linalg.eigh(K)
    b = basis.T @ jnp.linalg.solve(K, Lambda @ U @ Lambda_q @ mean)
    v = -jnp.expm1(-times[:, None] * spectrum[None, :]) * b[None, :]
    return v @ basis.T, jnp.square(v) @ spectrum


def few_task_forgetting(
    A0: Array,
    B0: Array,
    tasks: Array,
    Lambda: Array,
    fourth: Callable[[Array], Array],
    N: Number,
    Lambda_q: Array,
    noise: Array | None = None,
) -> Array:
    """C_0 with E[forgetting of A_N(Psi_T)] = (that of A_N(Psi_1)) + C_0/T + o(1/T), T new tasks drawn from `tasks` [P, d] (ours).

    With X = w w' - Psi_1, Z = few_task_score(X) and D = B(X) = (1 - 1/N) L X L + K(X)/N, in the mean over the tasks
    C_0 = E tr(Lq Z B^{-1} B_0 B^{-1} Z') - 2 E tr(Lq Z B^{-1} D B^{-1} B_0 (A_1 - A_0)'). It may be negative.  -> [].
    """
    Psi = tasks.T @ tasks / len(tasks)
    A1 = optimal_weights(Lambda, Psi, fourth(Psi), N, noise)
    inverse = jnp.linalg.inv(context_second_moment(Lambda, Psi, fourth(Psi), N, noise))
    pull = inverse @ B0 @ (A1 - A0).T @ Lambda_q

    def cost(w: Array) -> Array:
        X = jnp.outer(w, w) - Psi
        first = few_task_score(A1, X, Lambda, fourth, N) @ inverse
        D = context_second_moment(Lambda, X, fourth(X), N)
        return jnp.trace(Lambda_q @ first @ B0 @ first.T) - 2.0 * jnp.trace(first @ D @ pull)

    return jnp.mean(jax.vmap(cost)(tasks))


def few_task_correction(
    A0: Array,
    B0: Array,
    tasks: Array,
    Lambda: Array,
    fourth: Callable[[Array], Array],
    N: Number,
    Lambda_q: Array,
    times: Array,
    noise: Array | None = None,
) -> tuple[Array, Array]:
    """c_1(t), c_0(t): E over T new tasks of what is left to learn, and forgotten, is that of the law + c(t)/T + o(1/T) (ours).

    T tasks drawn from `tasks` [P, d]; reduced flow; times [K] -> two [K]. c(t) = E d^2/de^2 f_t(Psi_1 + e (w w' - Psi_1)) / 2 at
    e = 0, as the first derivative has mean zero. c begins with t^2, a gain with t: few tasks cost little at first. As t grows c_1
    and c_0 tend to `robustness.few_task_coefficient` and `few_task_forgetting`. B must have distinct eigenvalues.
    """
    Psi = tasks.T @ tasks / len(tasks)
    B1 = context_second_moment(Lambda, Psi, fourth(Psi), N, noise)
    A1 = solve_normal_equations(Lambda @ Psi, B1)

    def excess(path: Array, A: Array, B: Array) -> Array:
        return jnp.einsum("ij,tjk,kl,til->t", Lambda_q, path - A[None], B, path - A[None])

    def risks(P: Array) -> tuple[Array, Array]:
        B = context_second_moment(Lambda, P, fourth(P), N, noise)
        path = reduced_path(A0, B, Lambda @ P, Lambda_q, times)
        return excess(path, A1, B1), excess(path, A0, B0)

    def second(w: Array) -> tuple[Array, Array]:
        X = jnp.outer(w, w) - Psi

        def slope(e: Array) -> tuple[Array, Array]:
            return jax.jvp(lambda a: risks(Psi + a * X), (e,), (jnp.ones_like(e),))[1]

        zero = jnp.zeros((), Psi.dtype)
        return jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]

    new, old = jax.vmap(second)(tasks)
    return jnp.mean(new, axis=0) / 2, jnp.mean(old, axis=0) / 2
