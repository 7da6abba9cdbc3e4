"""Prompts of the theory: which pairs (s, a) a context contains, and the labeled pairs and queries made of them.

A pair is one flat index i = s * A + a, so a table [S, A, ...] reshaped to [S * A, ...] is indexed by it. Pairs are i.i.d. from a
design, or come from episodes of a behavior policy, or from one long Markov chain. Labels follow a law of `lindm.icl.label_laws`.

Functions are written for one task: `vmap` outside.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from lindm import validate
from lindm.icl.label_laws import LabelLaw, noisy_labels, oracle_labels
from lindm.random import flat
from lindm.solvers.rollout import cumulative, invert, step
from lindm.types import MDP, Prompt, at_stage


def _concrete(*arrays: ArrayLike) -> bool:
    """Whether the values are known: traced arrays are not checked."""
    return not any(isinstance(array, Tracer) for array in arrays)


# --- pairs ----------------------------------------------------------------------------------------------------------------


def design_cdf(design: ArrayLike) -> Array:
    """Cumulative sums of a checked design over pairs, as `draw_pairs` takes them.

    Args:
        design: [S*A] (or [S, A]) probabilities of the pairs.
    Returns: cdf [S*A], dtype of the design, flat at pairs of probability zero.
    Raises: ValueError if the design is not finite, negative, or does not sum to one.
    """
    if not _concrete(design):
        return cumulative(jnp.ravel(jnp.asarray(design)))
    p = validate.distribution(validate.finite(design, "design").ravel(), "design")
    # sequential sums in double precision never decrease, and rounding to the dtype keeps that
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


# --- transitions ---------------------------------------------------------------------------------------------------------


def transitions(key: Array, mdp: MDP, phi: Array, idx: Array) -> tuple[Array, Array, Array]:
    """The transitions that offline value iteration uses, from the pairs of every stage.

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


# --- prompts -----------------------------------------------------------------------------------------------------------


def td_prompt(x: Array, x_next: Array, r: Array, query: Array, gamma: ArrayLike) -> Prompt:
    """A prompt of transitions for policy evaluation: columns (x_i; gamma x'_i) with label r_i, queries (q; 0).

    With it the linear layers of `lindm.icl.attention` run temporal-difference learning (Wang, Blaser, Daneshmand, Zhang, arXiv
    2405.13861): where blocks are [[C, 0], [-C, 0]], k blocks are k steps w <- w + C mean_i x_i (r_i + gamma x'_i'w - x_i'w), and
    the predictions are q'w.

    Args:
        x, x_next: [..., N, d] features of a pair and of the pair after it; r: [..., N] rewards; query: [..., Q, d].
    Returns: Prompt with 2d features.
    """
    chex.assert_equal_shape([x, x_next])
    return Prompt(
        x=jnp.concatenate([x, jnp.asarray(gamma, x.dtype) * x_next], axis=-1),
        y=r,
        query=jnp.concatenate([query, jnp.zeros_like(query)], axis=-1),
    )


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
        phi: [S, A, d]; cdf: [S*A] of the design; n: pairs in each context; labels: a law of `lindm.icl.label_laws`.
    Returns: Prompt with leading axis H, as `label_pairs`.
    """
    key_pairs, key_labels = jax.random.split(key)
    return label_pairs(key_labels, phi, draw_pairs(key_pairs, cdf, (H, n)), labels)


def training_prompt(
    key: Array, phi: Array, w: Array, cdf: Array, n: int, queries: int, sigma: ArrayLike = 0.0
) -> tuple[Prompt, Array]:
    """One stage of one task for training: a context and queries from the same design, and noiseless targets.

    Args:
        phi: [S, A, d]; w: [d] of the stage; cdf: [S*A]; n: pairs in the context; sigma: standard deviation of the labels.
    Returns: Prompt(x [n, d], y [n], query [queries, d]) and target [queries] = <query, w>.
    """
    key_pairs, key_noise = jax.random.split(key)
    points = phi.reshape(-1, phi.shape[-1])[draw_pairs(key_pairs, cdf, n + queries)]
    x, query = points[:n], points[n:]
    noiseless = isinstance(sigma, (int, float)) and sigma == 0  # draws no random numbers in the training loop
    y = oracle_labels(x, w) if noiseless else noisy_labels(key_noise, x, w, sigma)
    return Prompt(x=x, y=y, query=query), oracle_labels(query, w)
