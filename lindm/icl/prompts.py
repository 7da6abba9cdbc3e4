"""Contexts: which pairs (s, a) a learner is shown, what label each carries, and the prompt made of them.

A pair is one flat index i = s * A + a, so that a table [S, A, ...] reshaped to [S * A, ...] is indexed by it.
Pairs come i.i.d. from a design, from episodes of a behaviour policy, or from one long Markov chain.
A label law y(key, pairs) is one of

    oracle   y_i = <x_i, w*_h>                          noiseless, or with Gaussian or bounded noise added
    return   y_i = return-to-go of one rollout of pi* after (s_i, a_i)     mean Q*_h(s_i, a_i), heteroscedastic
    bellman  y_i = r_i + max_a Qhat_{h+1}(s'_i, a)       no oracle: a target made of an earlier estimate

Functions are written for one task: `vmap` outside.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from lindm import validate
from lindm.random import flat
from lindm.solvers.rollout import act, cumulative, invert, rollout, step
from lindm.types import MDP, Prompt, at_stage

LabelLaw = Callable[[Array, Array, Array], Array]
"""(key, idx[H, n], x[H, n, d]) -> y[H, n]: the labels of the pairs of every stage of one task."""


def _concrete(*arrays: ArrayLike) -> bool:
    """Whether values can be looked at: checks are for the door, not for traced code."""
    return not any(isinstance(array, Tracer) for array in arrays)


# --- pairs ----------------------------------------------------------------------------------------------------------------


def design_cdf(design: ArrayLike) -> Array:
    """Running sums of a design over pairs, checked once, to hand to `draw_pairs`.

    Args:
        design: [S*A] (or [S, A]) probabilities of the pairs.
    Returns: cdf [S*A], dtype of the design, flat at pairs of probability zero.
    Raises: ValueError if the design is not finite, negative, or does not sum to one.
    """
    if not _concrete(design):
        return cumulative(jnp.ravel(jnp.asarray(design)))
    p = validate.distribution(validate.finite(design, "design").ravel(), "design")
    # summed one after the other in double precision: never falls, and rounding keeps that
    return jnp.asarray(np.cumsum(np.maximum(p, 0), dtype=np.float64), dtype=p.dtype)


def draw_pairs(key: Array, cdf: Array, n: int | tuple[int, ...]) -> Array:
    """I.i.d. pairs from a design by inverse CDF.

    Args:
        cdf: [S*A] from `design_cdf` or `cumulative`.
        n: how many, or a shape such as (H, n).
    Returns: idx int32 [n], the pair s * A + a; never one of probability zero.
    """
    shape = (n,) if isinstance(n, int) else n
    return invert(cdf, flat(jax.random.uniform, key, shape, cdf.dtype))


def trajectory_pairs(key: Array, mdp: MDP, pi: Array, n: int) -> Array:
    """The pairs that n episodes of a behaviour policy visit: idx int32 [H, n].

    Within a stage the n pairs are i.i.d. from the occupancy of pi; the i-th pairs of different stages belong to one episode
    and depend on each other. Contexts that must be independent over stages need one key per stage.
    """
    episodes = rollout(key, mdp, pi, n)
    return (episodes.s * mdp.num_actions + episodes.a).T


def pair_kernel(P: Array, pi: Array) -> Array:
    """Kernel of the chain of pairs of a time-homogeneous MDP: K[(s,a), (s',a')] = P[s,a,s'] pi[s',a'].

    Args:
        P: [S, A, S]; pi: [S, A] probabilities.
    Returns: [S*A, S*A].
    """
    S, A = pi.shape
    return (P[:, :, :, None] * pi[None, None]).reshape(S * A, S * A)


def stationary(kernel: Array) -> Array:
    """The law p with p K = p, sum p = 1 of an irreducible kernel [n, n]: a linear system with one equation replaced by the sum.

    A kernel with more than one stationary law makes the system singular: the answer is then not finite or not a law.
    """
    n = kernel.shape[-1]
    balance = (jnp.eye(n, dtype=kernel.dtype) - kernel.T).at[-1].set(1)
    p = jnp.maximum(jnp.linalg.solve(balance, jnp.zeros(n, kernel.dtype).at[-1].set(1)), 0)
    return p / jnp.sum(p)


def chain(key: Array, kernel: Array, start: Array, length: int) -> Array:
    """One trajectory of a stationary kernel over pairs: a dependent context.

    Args:
        kernel: [n, n] rows sum to one; start: [n] law of the first pair (`stationary(kernel)` makes every pair follow it).
    Returns: idx int32 [length].
    """
    validate.count(length, "length")
    u = jax.random.uniform(key, (length,), kernel.dtype)
    first = invert(cumulative(start), u[0])
    rows = cumulative(kernel)

    def move(i, u_step):
        j = invert(rows[i], u_step)
        return j, j

    _, rest = jax.lax.scan(move, first, u[1:])
    return jnp.concatenate([first[None], rest])


# --- labels ------------------------------------------------------------------------------------------------------------


def oracle_labels(x: Array, w: Array) -> Array:
    """y = <x, w>: x [..., n, d], w [..., d] -> y [..., n]."""
    return jnp.einsum("...nd,...d->...n", x, w)


def noisy_labels(key: Array, x: Array, w: Array, sigma: ArrayLike) -> Array:
    """Oracle labels plus independent N(0, sigma^2): the noise that the closed forms cover exactly."""
    y = oracle_labels(x, w)
    return y + jnp.asarray(sigma, y.dtype) * flat(jax.random.normal, key, y.shape, y.dtype)


def bounded_labels(key: Array, x: Array, w: Array, half_width: ArrayLike) -> Array:
    """Oracle labels plus independent Uniform(-half_width, half_width), variance half_width^2 / 3: bounded, for rung 5."""
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

    # every pair waits at (s0, a0) until its own stage comes; all stages then cost one scan
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


def transitions(key: Array, mdp: MDP, phi: Array, idx: Array) -> tuple[Array, Array, Array]:
    """What offline value iteration is given for the pairs of every stage.

    Args:
        phi: [S, A, d]; idx: [H, n] pairs.
    Returns: x [H, n, d], r [H, n], and phi(s', .) [H, n, A, d] at one sampled next state each.
    """
    keys = jax.random.split(key, idx.shape[0])
    r = jax.vmap(lambda r_h, i: r_h.ravel()[i])(mdp.r, idx)
    A = phi.shape[1]

    def move(k, h, i):
        return step(at_stage(mdp.P, h), i // A, i % A, jax.random.uniform(k, i.shape, mdp.P.dtype))

    return phi.reshape(-1, phi.shape[-1])[idx], r, phi[jax.vmap(move)(keys, jnp.arange(idx.shape[0]), idx)]


# --- exact moments of the labels ---------------------------------------------------------------------------------------


def return_moments(mdp: MDP, pi: Array) -> tuple[Array, Array]:
    """Mean and variance of the return-to-go after every pair, by dynamic programming.

    With G_h = r_h(s,a) + G_{h+1}(s', a'), a' ~ pi:  Q_h = r_h + P_h V_{h+1}  and, by the law of total variance,
    Var_h(s,a) = sum_s' P_h(s'|s,a) [ var_{h+1}(s') + (V_{h+1}(s') - P_h V_{h+1}(s,a))^2 ],
    var_h(s) = sum_a pi_h(a|s) [ Var_h(s,a) + (Q_h(s,a) - V_h(s))^2 ]   (Sobel, J. Appl. Probab. 1982).
    Centred, so that no digits are lost where the variance is small.

    Returns: Q [H, S, A] and Var [H, S, A] under pi ([H, S] int or [H, S, A] probabilities).
    """
    probabilities = jax.nn.one_hot(pi, mdp.num_actions, dtype=mdp.r.dtype) if pi.ndim == 2 else pi

    def stage(carry, at):
        V, var = carry
        h, r, policy = at
        P = at_stage(mdp.P, h)
        mean = P @ V
        spread = V[None, None] - mean[..., None]
        Var = jnp.einsum("sat,sat->sa", P, var[None, None] + spread**2)
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
    return jnp.einsum("n,nd,ne->de", design * variance.ravel(), x, x)


# --- prompts -----------------------------------------------------------------------------------------------------------


def stage_prompt(x: ArrayLike, y: ArrayLike, query: ArrayLike) -> Prompt:
    """A prompt from a user's arrays: x [..., N, d], y [..., N], query [..., Q, d].

    Raises: ValueError if the shapes do not fit, N is zero, or a value is not finite.
    """
    x, y, query = jnp.asarray(x), jnp.asarray(y), jnp.asarray(query)
    if x.ndim < 2 or x.shape[-2] < 1:
        raise ValueError(f"x must have shape [..., N, d] with N at least 1; got {x.shape}")
    if y.shape != x.shape[:-1]:
        raise ValueError(f"y must hold one label for each row of x, shape {x.shape[:-1]}; got {y.shape}")
    if query.ndim != x.ndim or query.shape[-1] != x.shape[-1] or query.shape[:-2] != x.shape[:-2]:
        raise ValueError(f"query must have shape [..., Q, d] with the leading axes and d of x {x.shape}; got {query.shape}")
    for name, array in (("x", x), ("y", y), ("query", query)):
        if _concrete(array) and not bool(jnp.all(jnp.isfinite(array))):
            raise ValueError(f"{name} must be finite; got a NaN or an infinity")
    return Prompt(x=x, y=y, query=query)


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


def label_pairs(key: Array, phi: Array, idx: Array, labels: LabelLaw) -> Prompt:
    """Prompts of all stages of one task from given pairs idx [H, n] (i.i.d., from trajectories, from a chain).

    Returns: Prompt with x [H, n, d], y [H, n] and, as queries, every pair in the order of the tables: query [H, S*A, d].
    A predictor vmapped over the stages then returns Qhat as [H, S*A].
    """
    features = phi.reshape(-1, phi.shape[-1])
    x = features[idx]
    query = jnp.broadcast_to(features[None], (idx.shape[0], *features.shape))
    return Prompt(x=x, y=labels(key, idx, x), query=query)


def stage_prompts(key: Array, phi: Array, cdf: Array, H: int, n: int, labels: LabelLaw) -> Prompt:
    """Prompts of all H stages of one task, the contexts i.i.d. from one design and independent from stage to stage.

    Args:
        phi: [S, A, d]; cdf: [S*A] of the design; n: pairs in each context; labels: a label law of this task.
    Returns: Prompt with leading axis H, as `label_pairs`.
    """
    key_pairs, key_labels = jax.random.split(key)
    return label_pairs(key_labels, phi, draw_pairs(key_pairs, cdf, (H, n)), labels)


def training_prompt(
    key: Array, phi: Array, w: Array, cdf: Array, n: int, queries: int, sigma: ArrayLike = 0.0
) -> tuple[Prompt, Array]:
    """One stage of one task as training sees it: a context and queries from the same design, and the noiseless target.

    Args:
        phi: [S, A, d]; w: [d] of the stage; cdf: [S*A]; n: pairs in the context; sigma: standard deviation of the labels.
    Returns: Prompt(x [n, d], y [n], query [queries, d]) and target [queries] = <query, w>.
    """
    key_pairs, key_noise = jax.random.split(key)
    points = phi.reshape(-1, phi.shape[-1])[draw_pairs(key_pairs, cdf, n + queries)]
    x, query = points[:n], points[n:]
    noiseless = isinstance(sigma, (int, float)) and sigma == 0  # no random numbers for nothing in the training loop
    y = oracle_labels(x, w) if noiseless else noisy_labels(key_noise, x, w, sigma)
    return Prompt(x=x, y=y, query=query), oracle_labels(query, w)
