"""Where one linear layer cannot vanish: contexts whose covariance depends on the task.

If the kernel of a task moves its context, then E[x x'] = Lambda_t differs from task to task, and the layer sees S -> Lambda_t w
as M grows, from which no matrix A recovers w for all tasks at once. With moments over the tasks t

    E[S w'] = m = E[Lambda_t w w'],    E[S S'] -> D = E[Lambda_t w w' Lambda_t],

the risk of *every* fixed A at *every* M is at least floor = tr(Lq (Psi - m' D^+ m)), and A_N attains it as M = N -> infinity. For
the policy there are tasks that have one and the same law of S and opposite best actions: `twin_tasks`. Derivations:
notes/lower-bound.md; cf. arXiv 2502.08136, which shows a lower bound that does not vanish for a class of one-layer linear
transformers on linear dynamical systems.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.in_context import Prediction
from lindm_theory.moments import Number


def task_moments(Lambda: Array, w: Array, weights: Array) -> tuple[Array, Array, Array]:
    """(Psi, m, D) = E[w w'], E[Lambda_t w w'], E[Lambda_t w w' Lambda_t] over tasks.

    Lambda [P, d, d], w [P, d], weights [P] -> [d, d] each.
    """
    mean = jnp.einsum("pij,pj->pi", Lambda, w)

    def moment(left: Array, right: Array) -> Array:
        return jnp.einsum("p,pi,pj->ij", weights, left, right)

    return moment(w, w), moment(mean, w), moment(mean, mean)


def limit_weights(m: Array, D: Array) -> Array:
    """m' D^+, the best A at M = N = infinity; D may be singular, because m = D X for some X.  [d, d], [d, d] -> [d, d]."""
    return m.T @ jnp.linalg.pinv(D, hermitian=True)


def floor(Psi: Array, m: Array, D: Array, Lambda_q: Array) -> Array:
    """tr(Lq (Psi - m' D^+ m)) <= risk of every A at every M, N (ours).  Zero iff one A has A Lambda_t w = w for almost all tasks.

    ("Iff" for Lq > 0.) If w is independent of Lambda_t and Psi > 0: iff Lambda_t is one invertible matrix for almost all tasks.
    """
    return jnp.trace(Lambda_q @ (Psi - limit_weights(m, D) @ m))


def task_risk(A: Array, Psi: Array, m: Array, D: Array, R: Array, M: Number, Lambda_q: Array) -> Prediction:
    """Exact risk of any A over the tasks: tr(Lq A R A')/M + tr(Lq (A D A' - A m - m'A' + Psi)).

    R [d, d] = E[Cov(x y | task)] (`moments.pair_covariance`), averaged over the tasks, for contexts i.i.d. given the task.
    """
    bias = A @ D @ A.T - A @ m - m.T @ A.T + Psi
    return Prediction(jnp.trace(Lambda_q @ A @ R @ A.T) / M, jnp.trace(Lambda_q @ bias))


def scale_floor(c: Array, weights: Array, Psi: Array, Lambda_q: Array) -> Array:
    """tr(Lq Psi) Var(c)/E[c^2]: the floor if Lambda_t = c_t Lambda, Lambda > 0, c_t independent of w (ours).  c [P], weights [P].

    A layer that divides by tr G does not have it: Lambda_t / tr Lambda_t is the same for all tasks.
    """
    mean, square = jnp.sum(weights * c), jnp.sum(weights * jnp.square(c))
    return jnp.trace(Lambda_q @ Psi) * (1.0 - jnp.square(mean) / square)


def depth_floor(A: Array, Lambda: Array, w: Array, weights: Array, Lambda_q: Array, k: int) -> Array:
    """E |(I - A Lambda_t)^k w|^2 in Lq: risk of k steps w <- w + A (S - G w) as M -> infinity (ours).

    Lambda [P, d, d], w [P, d], weights [P]. k = 1 is the bias of one layer. It vanishes as k grows if I - A Lambda_t has spectral
    radius below one for every task: each step uses the G of its own context.
    """

    def step(_: int, left: Array) -> Array:
        return left - jnp.einsum("ij,pjk,pk->pi", A, Lambda, left)

    left = jax.lax.fori_loop(0, k, step, w)
    return jnp.einsum("p,pi,ij,pj->", weights, left, Lambda_q, left)


def depth_bound(low: Number, high: Number, k: int, Psi: Array, Lambda_q: Array) -> Array:
    """((high - low)/(high + low))^2k tr(Psi) max eig(Lq) >= `depth_floor` at A = 2/(low + high) I (ours).

    0 < low <= Lambda_t <= high. Attained if Lq is a multiple of I and every Lambda_t w is low w or high w.
    """
    rate = (high - low) / (high + low)
    return rate ** (2 * k) * jnp.trace(Psi) * jnp.linalg.eigvalsh(Lambda_q)[-1]


def testing_bound(first: Array, second: Array, gap_first: Number, gap_second: Number) -> Array:
    """sum_S min(gap_1 p_1(S), gap_2 p_2(S))/2 <= mean loss over two equally likely tasks of two actions, best ones opposite.

    Le Cam's bound, for every policy that sees the context through S alone; attained by the best test. first, second [n]: laws of
    S under the two tasks. Equal laws and gaps: gap/2, the loss of *every* such policy.
    """
    return jnp.sum(jnp.minimum(gap_first * first, gap_second * second)) / 2


def twin_tasks(best: Number, other: Number, z: Array) -> tuple[Array, Array]:
    """Two tasks with one law of S and opposite best actions (ours): r^2 = |x|^2 [task, action] and w [task, action].

    Task 0 has w = (best, other), task 1 has w = (other, best). A context takes action a with the same chance in both, in a state
    of feature length r: x = r e_a with r^2 = z_a / w_a, so that y x = z_a e_a whatever the task: labels carry no noise.
    z [2] > 0, best > other > 0.
    """
    w = jnp.stack([jnp.stack([jnp.asarray(best), jnp.asarray(other)]), jnp.stack([jnp.asarray(other), jnp.asarray(best)])])
    return z[None, :] / w, w


def twin_full_weights(best: Number, other: Number, z: Array, chance: Array) -> tuple[Array, Array, Array, Array]:
    """(v [2], U [2, 2], u [], z [2]) of a full layer that loses gap/4, the least of all, on the signed twins as M grows (ours).

    yhat_1 - yhat_2 = v'G 1 + S'1 with v orthogonal to the diagonal of E[G] in task 0 and large enough to decide in task 1:
    task 0 is right for both signs of w, task 1 for one. chance [2]: how often a context takes each action.
    """
    r2, _ = twin_tasks(best, other, z)
    first, second = chance * r2[0], chance * r2[1]
    v = jnp.stack([first[1], -first[0]])
    size = 2.0 * jnp.sum(chance * z) / jnp.abs(v @ second)
    one = jnp.ones((), v.dtype)
    return size * v, jnp.stack([jnp.stack([one, 0 * one])] * 2), one, jnp.zeros_like(v)
