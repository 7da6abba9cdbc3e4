"""Label laws: the labels y of the pairs (s, a) of a context, and their exact means and variances.

    oracle    y_i = <x_i, w*_h>                          noiseless, or with Gaussian or bounded noise added
    return    y_i = return-to-go of one rollout of pi* after (s_i, a_i)     mean Q*_h(s_i, a_i), heteroscedastic
    bellman   y_i = r_i + max_a Qhat_{h+1}(s'_i, a)       no oracle: a target made of an earlier estimate

A pair is the flat index s * A + a. Functions are written for one task: `vmap` outside.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lindm.random import flat
from lindm.solvers.rollout import act, step
from lindm.types import MDP, at_stage

LabelLaw = Callable[[Array, Array, Array], Array]
"""(key, idx[H, n], x[H, n, d]) -> y[H, n]: the labels of the pairs of every stage of one task."""


# --- labels ------------------------------------------------------------------------------------------------------------


def oracle_labels(x: Array, w: Array) -> Array:
    """y = <x, w>: x [..., n, d], w [..., d] -> y [..., n]."""
    return jnp.einsum("...nd,...d->...n", x, w)


def noisy_labels(key: Array, x: Array, w: Array, sigma: ArrayLike) -> Array:
    """Oracle labels plus independent N(0, sigma^2): the closed forms are exact for this noise."""
    y = oracle_labels(x, w)
    return y + jnp.asarray(sigma, y.dtype) * flat(jax.random.normal, key, y.shape, y.dtype)


def bounded_labels(key: Array, x: Array, w: Array, half_width: ArrayLike) -> Array:
    """Oracle labels plus independent Uniform(-half_width, half_width), variance half_width^2 / 3: bounded, as rung 5 requires."""
    y = oracle_labels(x, w)
    return y + jnp.asarray(half_width, y.dtype) * flat(jax.random.uniform, key, y.shape, y.dtype, -1, 1)


def return_labels(key: Array, mdp: MDP, pi: Array, h: ArrayLike, idx: Array) -> Array:
    """Return-to-go of one rollout of pi after each pair: unbiased for Q^pi_h, with the variance of `return_moments`.

    Args:
        pi: [H, S] int actions or [H, S, A] probabilities, followed from stage h + 1 on.
        h: stage of each pair, counted from zero: a number, or an array of the shape of idx.
        idx: [...] pairs taken at stage h.
    Returns: y [...]. Rewards are the mean rewards of the MDP: all randomness is in the next states and actions.
    """
    A = mdp.num_actions
    stages = jnp.broadcast_to(jnp.asarray(h, jnp.int32), idx.shape)
    s0, a0 = idx // A, idx % A
    u = flat(jax.random.uniform, key, (2, mdp.horizon, *idx.shape), mdp.P.dtype)

    # each rollout stays at (s0, a0) until its own stage: one scan serves all stages
    def stage(carry, at):
        s, total = carry
        k, r, policy, u_act, u_step = at
        s = jnp.where(stages >= k, s0, s)
        a = jnp.where(stages >= k, a0, act(policy, s, u_act))
        total = total + jnp.where(stages <= k, r[s, a], 0)
        return (step(at_stage(mdp.P, k), s, a, u_step), total), None

    steps = (jnp.arange(mdp.horizon, dtype=jnp.int32), mdp.r, pi, u[0], u[1])
    (_, total), _ = jax.lax.scan(stage, (s0, jnp.zeros(idx.shape, mdp.r.dtype)), steps)
    return total


def next_states(key: Array, mdp: MDP, h: ArrayLike, idx: Array) -> Array:
    """One next state for each pair idx[...] at stage h (a number): int32 [...]."""
    A = mdp.num_actions
    return step(at_stage(mdp.P, h), idx // A, idx % A, flat(jax.random.uniform, key, idx.shape, mdp.P.dtype))


def bellman_labels(key: Array, mdp: MDP, h: ArrayLike, idx: Array, Q_next: Array) -> Array:
    """y_i = r_h(s_i, a_i) + max_a Q_next(s'_i, a), s'_i ~ P_h(.|s_i, a_i): a bootstrapped target.

    Args:
        h: stage, counted from zero; idx: [...] pairs; Q_next: [S, A] estimate for stage h + 1 (zeros at the last stage).
    Returns: y [...].
    """
    return mdp.r[h].ravel()[idx] + jnp.max(Q_next, axis=-1)[next_states(key, mdp, h, idx)]


# --- exact moments of the labels ---------------------------------------------------------------------------------------


def return_moments(mdp: MDP, pi: Array) -> tuple[Array, Array]:
    """Mean and variance of the return-to-go after every pair, by dynamic programming.

    With G_h = r_h(s,a) + G_{h+1}(s', a'), a' ~ pi:  Q_h = r_h + P_h V_{h+1}  and, by the law of total variance,
    Var_h(s,a) = sum_s' P_h(s'|s,a) [ var_{h+1}(s') + (V_{h+1}(s') - P_h V_{h+1}(s,a))^2 ],
    var_h(s) = sum_a pi_h(a|s) [ Var_h(s,a) + (Q_h(s,a) - V_h(s))^2 ]   (Sobel, J. Appl. Probab. 1982).
    Deviations are centered before they are squared, so that no digits are lost where the variance is small.

    Returns: Q [H, S, A] and Var [H, S, A] under pi ([H, S] int or [H, S, A] probabilities).
    """
    probabilities = jax.nn.one_hot(pi, mdp.num_actions, dtype=mdp.r.dtype) if pi.ndim == 2 else pi
    chex.assert_equal_shape([probabilities, mdp.r])

    def stage(carry, at):
        V, var = carry
        h, r, policy = at
        P = at_stage(mdp.P, h)
        mean = P @ V
        deviation = V[None, None] - mean[..., None]
        Var = jnp.einsum("sat,sat->sa", P, var[None, None] + deviation**2)
        Q = r + mean
        V = jnp.sum(policy * Q, axis=-1)
        var = jnp.sum(policy * (Var + (Q - V[:, None]) ** 2), axis=-1)
        return (V, var), (Q, Var)

    zero = jnp.zeros(mdp.rho.shape, mdp.r.dtype)
    _, (Q, Var) = jax.lax.scan(stage, (zero, zero), (jnp.arange(mdp.horizon), mdp.r, probabilities), reverse=True)
    return Q, Var


def bellman_moments(mdp: MDP, h: ArrayLike, Q_next: Array) -> tuple[Array, Array]:
    """Mean and variance [S, A] of a bellman label at stage h: r + P V and P (V - P V)^2, V = max_a Q_next."""
    V = jnp.max(Q_next, axis=-1)
    P = at_stage(mdp.P, h)
    mean = P @ V
    return mdp.r[h] + mean, jnp.einsum("sat,sat->sa", P, (V[None, None] - mean[..., None]) ** 2)


def noise_moment(phi: Array, design: Array, variance: Array) -> Array:
    """E[eps^2 x x'] of heteroscedastic labels: phi [S, A, d], design [S*A], variance [S, A] of the label -> [d, d]."""
    x = phi.reshape(-1, phi.shape[-1])
    chex.assert_shape([design, variance], [x.shape[:1], phi.shape[:2]])
    return jnp.einsum("n,nd,ne->de", design * variance.ravel(), x, x)


# --- laws of all stages of a task ---------------------------------------------------------------------------------------------


def oracle_law(w: Array) -> LabelLaw:
    """Labels <x, w_h>, w [H, d]."""
    return lambda key, idx, x: oracle_labels(x, w)


def noisy_law(w: Array, sigma: ArrayLike) -> LabelLaw:
    """Labels <x, w_h> + N(0, sigma^2), w [H, d]."""
    return lambda key, idx, x: noisy_labels(key, x, w, sigma)


def bounded_law(w: Array, half_width: ArrayLike) -> LabelLaw:
    """Labels <x, w_h> + Uniform(-half_width, half_width), w [H, d]."""
    return lambda key, idx, x: bounded_labels(key, x, w, half_width)


def return_law(mdp: MDP, pi: Array) -> LabelLaw:
    """Labels from one rollout of pi ([H, S] or [H, S, A]) after each pair."""

    def labels(key: Array, idx: Array, x: Array) -> Array:
        stages = jnp.arange(idx.shape[0], dtype=jnp.int32)[:, None]
        return return_labels(key, mdp, pi, stages, idx).astype(x.dtype)

    return labels
