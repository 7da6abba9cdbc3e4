"""Moments of the context: all that the closed forms need of the law of the features.

A law of features enters the theory through three quantities: Lambda = E[x x'], the linear map Psi -> K(Psi) = E[x x' Psi x x'],
and the noise moment E[eps^2 x x']. All three are second moments under a reweighted law, because x x' Psi x x' = (x' Psi x) x x'.
A context whose pairs depend on one another (one trajectory) enters through (1/N^2) sum_ij E[x_i x_i' Psi x_j x_j'] instead.
"""

import jax
import jax.numpy as jnp
from jax import Array

Number = Array | float | int


def design_moment(phi: Array, weights: Array) -> Array:
    """Lambda = sum_n weights_n phi_n phi_n'.  phi [n, d], weights [n] -> [d, d]."""
    return jnp.einsum("n,ni,nj->ij", weights, phi, phi)


def design_fourth(phi: Array, weights: Array, Psi: Array) -> Array:
    """K(Psi) = E[(x' Psi x) x x'], exactly, for a law of finite support.  phi [n, d], weights [n], Psi [d, d] -> [d, d]."""
    return design_moment(phi, weights * jnp.einsum("ni,ij,nj->n", phi, Psi, phi))


def gaussian_fourth(Lambda: Array, Psi: Array) -> Array:
    """K(Psi) = 2 Lambda Psi Lambda + tr(Psi Lambda) Lambda for x ~ N(0, Lambda) (Isserlis).  [d, d], [d, d] -> [d, d]."""
    return 2.0 * Lambda @ Psi @ Lambda + jnp.trace(Psi @ Lambda) * Lambda


def onehot_fourth(rho: Array, Psi: Array) -> Array:
    """K(Psi) = diag(rho_i Psi_ii) for x = e_i with probability rho_i.  rho [d], Psi [d, d] -> [d, d]."""
    return jnp.diag(rho * jnp.diagonal(Psi))


def noise_moment(phi: Array, weights: Array, variance: Array) -> Array:
    """E[eps^2 x x'] for label noise whose variance depends on the pair.  phi [n, d], weights [n], variance [n] -> [d, d].

    With variance = sigma^2 everywhere this is sigma^2 Lambda.
    """
    return design_moment(phi, weights * variance)


def pair_covariance(phi: Array, weights: Array, w: Array, variance: Array | None = None) -> Array:
    """Cov(x y | task) of one pair, y = x'w + eps: K(w w') - Lambda w w' Lambda + E[eps^2 x x'].

    phi [n, d], weights [n], w [d], variance [n] of the label noise or None -> [d, d]. The covariance of S_M is this over M.
    """
    power = jnp.square(phi @ w) if variance is None else jnp.square(phi @ w) + variance
    mean = design_moment(phi, weights) @ w
    return design_moment(phi, weights * power) - jnp.outer(mean, mean)


def chain_moments(P: Array, rho: Array, phi: Array, Psi: Array, N: int) -> tuple[Array, Array]:
    """First and second moment of G_N = (1/N) sum_i x_i x_i' along one Markov chain, exactly.

    P [n, n] (or [N - 1, n, n], one kernel a step), rho [n] the law of the first state, which need not be stationary,
    phi [n, d], Psi [d, d] symmetric -> (E[G_N], E[G_N Psi G_N]), both [d, d].

    T_j(b) = sum_{i <= j} E[x_i x_i' 1{s_j = b}] obeys T_j(b) = sum_a P(a, b) T_{j-1}(a) + p_j(b) x_b x_b', and the terms i < j
    of the double sum are sum_b (P' T_{j-1})(b) Psi x_b x_b'. One product of P with an [n, d^2] array a step: O(N n^2 d^2)
    time, O(n d^2) memory.
    """
    n, d = phi.shape
    outer = phi[:, :, None] * phi[:, None, :]
    right = jnp.einsum("ij,njk->nik", Psi, outer)
    kernels = jnp.broadcast_to(P, (N - 1, n, n)) if P.ndim == 2 else P

    def visit(p: Array, past: Array) -> tuple[Array, Array]:
        now = p[:, None, None] * outer
        cross = jnp.einsum("nij,njk->ik", past, right)
        same = jnp.einsum("nij,njk->ik", now, right)
        return past + now, same + cross + cross.T

    def step(carry: tuple[Array, Array, Array, Array], kernel: Array) -> tuple[tuple[Array, Array, Array, Array], None]:
        p, past, mean, second = carry
        p = p @ kernel
        past, term = visit(p, jnp.tensordot(kernel.T, past, axes=1))
        return (p, past, mean + jnp.tensordot(p, outer, axes=1), second + term), None

    past, second = visit(rho, jnp.zeros((n, d, d), phi.dtype))
    start = (rho, past, jnp.tensordot(rho, outer, axes=1), second)
    (_, _, mean, second), _ = jax.lax.scan(step, start, kernels)
    return mean / N, second / N**2


def chain_second_moment(P: Array, rho: Array, phi: Array, Psi: Array, N: int) -> Array:
    """(1/N^2) sum_ij E[x_i x_i' Psi x_j x_j'] along one Markov chain; arguments as in `chain_moments`."""
    return chain_moments(P, rho, phi, Psi, N)[1]


def independent_copies(mean: Array, second: Array, Psi: Array, copies: Number) -> Array:
    """E[G Psi G] for a context made of `copies` independent pieces of equal length and equal law.

    mean = E[G_piece], second = E[G_piece Psi G_piece], all [d, d]: second / copies + (1 - 1/copies) mean Psi mean.
    A piece of one pair gives back the i.i.d. context: mean = Lambda, second = K(Psi).
    """
    return second / copies + (1.0 - 1.0 / copies) * mean @ Psi @ mean


def effective_sample_size(A: Array, pair_variance: Array, context_variance: Array, Lambda_q: Array) -> Array:
    """How many i.i.d. pairs a dependent context is worth: tr(Lq A V_1 A') / tr(Lq A V A').

    pair_variance V_1 = K(Psi) - Lambda Psi Lambda (+ noise) of one pair, context_variance V = E[S S'] - E[G] Psi E[G] of the
    whole dependent context; A, Lambda_q and both [d, d]. For an i.i.d. context of N pairs V = V_1 / N and the answer is N.
    """

    def size(V: Array) -> Array:
        return jnp.trace(Lambda_q @ A @ V @ A.T)

    return size(pair_variance) / size(context_variance)
