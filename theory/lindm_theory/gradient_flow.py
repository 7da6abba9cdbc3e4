"""Gradient flow of the linear attention layer: its limit and its path.

The layer with v = z = 0 predicts x_q' (u U)' S_N; its loss is E (S'(uU) x_q - w'x_q)^2 / 2. With B = E[S_N S_N'] and
E[S_N w'] = Lambda Psi, gradient flow is

    dU/dt = -(u^2 B U Lq - u Lambda Psi Lq),      du/dt = -(u tr(B U Lq U') - tr(Lambda Psi Lq U')),

which conserves u^2 - ||U||_F^2. For Gaussian x and Psi = I, B = Gamma Lambda and this is [ZFB] Lemma 5.2. Started from the
initialization of [ZFB] (u = s, U = s Theta Theta') it ends at u U = A_N', u = ||A_N||_F^{1/2}, for *every* law of features if
it starts below the loss of the zero network (ours; notes/gradient-flow.md).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.in_context import context_second_moment, gaussian_gamma, solve_normal_equations
from lindm_theory.moments import Number


def vector_field(U: Array, u: Array, B: Array, ESw: Array, Lambda_q: Array) -> tuple[Array, Array]:
    """(dU/dt, du/dt) for any law: B = E[S S'], ESw = E[S w'] = Lambda Psi, Lambda_q of the queries.  U [d, d], u a number."""
    dU = -(u**2 * B @ U @ Lambda_q - u * ESw @ Lambda_q)
    du = -(u * jnp.trace(B @ U @ Lambda_q @ U.T) - jnp.trace(ESw @ Lambda_q @ U.T))
    return dU, du


def gaussian_vector_field(U: Array, u: Array, Lambda: Array, N: Number, sigma: Number = 0.0) -> tuple[Array, Array]:
    """The same for x ~ N(0, Lambda), Psi = I, Lambda_q = Lambda, in the form of [ZFB] Lemma 5.2.

    dU/dt = -u^2 Gamma Lambda U Lambda + u Lambda^2,  du/dt = -tr(u Gamma Lambda U Lambda U' - Lambda^2 U').
    """
    both = gaussian_gamma(Lambda, N, sigma) @ Lambda @ U @ Lambda
    square = Lambda @ Lambda
    return -(u**2) * both + u * square, -jnp.trace(u * both @ U.T - square @ U.T)


def initial(Theta: Array, scale: float, Gamma: Array) -> tuple[Array, Array]:
    """U = s Theta Theta', u = s, after scaling Theta so that ||Theta Theta'||_F = 1: [ZFB] Assumption 3.3.  [d, d] -> [d, d], [].

    Raises ValueError unless s > 0 and s^2 ||Gamma||_op sqrt(d) < 2. (Concrete arrays only: it checks numbers.)
    """
    product = Theta @ Theta.T
    size = float(jnp.linalg.norm(product))
    if not size > 0:
        raise ValueError(f"Theta must not be zero (||Theta Theta'||_F > 0); got {size}")
    if not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
    limit_value = scale**2 * float(jnp.linalg.norm(Gamma, 2)) * len(Gamma) ** 0.5
    if not limit_value < 2:
        raise ValueError(f"scale must satisfy scale^2 ||Gamma||_op sqrt(d) < 2; got {limit_value:.6g} at scale = {scale}")
    return scale * product / size, jnp.asarray(scale, product.dtype)


def loss_above_zero_network(U: Array, u: Array, B: Array, ESw: Array, Lambda_q: Array) -> Array:
    """Loss at (U, u) minus the loss of the zero network: u^2 tr(B U Lq U')/2 - u tr(ESw Lq U').  -> [].

    Negative at a start with u^2 = ||U||_F^2, u > 0 is all that convergence to A_N needs, for every law (ours). For Gaussian x
    and Psi = I this is s^2 tr(Gamma Lambda T Lambda T) < 2 tr(Lambda^2 T), T = Theta Theta'; s^2 ||Gamma||_op < 2 implies it,
    so the sqrt(d) of [ZFB] Assumption 3.3 is not needed.
    """
    return u**2 * jnp.trace(B @ U @ Lambda_q @ U.T) / 2 - u * jnp.trace(ESw @ Lambda_q @ U.T)


def limit(A: Array) -> tuple[Array, Array]:
    """End of the flow: U = ||A||_F^{-1/2} A', u = ||A||_F^{1/2} ([ZFB] Thm 4.1 at A = Gamma^{-1}).  [d, d] -> [d, d], []."""
    u = jnp.sqrt(jnp.linalg.norm(A))
    return A.T / u, u


def conserved(U: Array, u: Array) -> Array:
    """u^2 - ||U||_F^2, constant along the flow."""
    return u**2 - jnp.sum(jnp.square(U), axis=(-2, -1))


def integrate(U: Array, u: Array, B: Array, ESw: Array, Lambda_q: Array, *, step: Number, steps: int) -> tuple[Array, Array]:
    """Runge-Kutta of order four.  -> U [steps + 1, d, d] and u [steps + 1], the start included; time of entry k is k * step."""

    def move(state: tuple[Array, Array], slope: tuple[Array, Array], length: Number) -> tuple[Array, Array]:
        return state[0] + length * slope[0], state[1] + length * slope[1]

    def advance(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        k1 = vector_field(*state, B, ESw, Lambda_q)
        k2 = vector_field(*move(state, k1, step / 2), B, ESw, Lambda_q)
        k3 = vector_field(*move(state, k2, step / 2), B, ESw, Lambda_q)
        k4 = vector_field(*move(state, k3, step), B, ESw, Lambda_q)
        slope = jax.tree.map(lambda a, b, c, e: (a + 2 * b + 2 * c + e) / 6, k1, k2, k3, k4)
        state = move(state, slope, step)
        return state, state

    start = (U, jnp.asarray(u, U.dtype))
    _, (path_U, path_u) = jax.lax.scan(advance, start, None, length=steps)
    return jnp.concatenate([start[0][None], path_U]), jnp.concatenate([start[1][None], path_u])


def leak_field(
    U: Array, u: Array, mean: Array, Lambda: Array, fourth: Callable[[Array], Array], N: Number, Lambda_q: Array
) -> Array:
    """dv/dt at v = z = 0: -(u E[G C G] mean - Lambda U Lq mean), C = U Lq U', mean = E[w] (ours).  -> [d].

    It is linear in E[w] and does not vanish for a non-zero mean however symmetric x is: the block v leaks exactly when tasks have
    a mean. (The block z has a gradient of third order in w: it stays zero when w and -w have one law.)
    """
    C = U @ Lambda_q @ U.T
    return -(u * context_second_moment(Lambda, C, fourth(C), N) @ mean - Lambda @ U @ Lambda_q @ mean)


def leak_weights(
    b: Array, Lambda: Array, Psi: Array, mean: Array, fourth: Callable[[Array], Array], N: Number, noise: Array | None = None
) -> tuple[Array, Array]:
    """Best A for what = A (S + G b), the layer with block v = u b, and E[(S + G b) w'] (ours).  b, mean [d] -> two [d, d].

    b acts as a shift of every task to w + b. The loss E||what - w||^2_{Lq} is tr(Lq (Psi - A E[(S + G b) w'])): minimize it over
    b for what the full layer can gain from a prior mean; b = 0 is the reduced layer.
    """
    moved = Psi + jnp.outer(mean, b) + jnp.outer(b, mean) + jnp.outer(b, b)
    cross = Lambda @ (Psi + jnp.outer(b, mean))
    return solve_normal_equations(cross, context_second_moment(Lambda, moved, fourth(moved), N, noise)), cross
