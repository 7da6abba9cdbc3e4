"""Behaviour policies at work: rollouts in batch, every index drawn by inverse CDF from one uniform number."""

import jax
import jax.numpy as jnp
from jax import Array

from lindm.draws import flat
from lindm.problems import checks
from lindm.types import MDP, Episodes, at_stage


def cumulative(p: Array) -> Array:
    """Running sums of weights p[..., n] that never rise at an index of weight zero, whatever the order of summation.

    XLA associates long cumulative sums (from a few hundred entries on) as a tree, so that sums over the same entries differ in
    the last bit from one index to the next; a draw could then fall on an impossible index. The running maximum repairs it.
    Negative weights (rounding in <phi, mu>) count as zero. The last entry need not be one: draws are scaled by it.
    """
    sums = jnp.cumsum(jnp.maximum(p, 0), axis=-1)
    return jax.lax.cummax(jnp.where(p > 0, sums, 0), axis=p.ndim - 1)


def invert(cdf: Array, u: Array) -> Array:
    """Indices with cdf[i-1] <= u * cdf[-1] < cdf[i], one for each uniform number u in [0, 1).

    Args:
        cdf: [n] shared by all u, or [..., n] one for each; u: [...].
    Returns: int32 [...].
    """
    if cdf.ndim == 1:
        return jnp.searchsorted(cdf, u * cdf[-1], side="right", method="scan_unrolled").astype(jnp.int32)
    # with a row for each number, counting comparisons beats a search made of gathers
    return jnp.sum(cdf <= (u * cdf[..., -1])[..., None], axis=-1, dtype=jnp.int32)


def act(pi: Array, s: Array, u: Array) -> Array:
    """Actions [...] in states s[...] under a stage's policy: int [S], or [S, A] probabilities."""
    return pi[s].astype(jnp.int32) if pi.ndim == 1 else invert(cumulative(pi)[s], u)


def step(P: Array, s: Array, a: Array, u: Array) -> Array:
    """Next states [...] from a stage's kernel P[S, A, S]; sums the rows needed, or the whole table once if it is smaller."""
    rows = cumulative(P[s, a]) if s.size < P.shape[0] * P.shape[1] else cumulative(P)[s, a]
    return invert(rows, u)


def rollout(key: Array, mdp: MDP, pi: Array, n: int) -> Episodes:
    """n independent episodes of a behaviour policy.

    Args:
        pi: [H, S] int actions, or [H, S, A] probabilities.
    Returns: Episodes with s, a [n, H] int32 and mean rewards r [n, H].
    """
    checks.count(n, "n")
    H = mdp.r.shape[0]
    key_start, key_rest = jax.random.split(key)
    start = invert(cumulative(mdp.rho), jax.random.uniform(key_start, (n,), mdp.rho.dtype))
    u = flat(jax.random.uniform, key_rest, (2, H, n), mdp.P.dtype)

    def stage(s, at):
        h, r, policy, u_act, u_step = at
        a = act(policy, s, u_act)
        return step(at_stage(mdp.P, h), s, a, u_step), (s, a, r[s, a])

    _, (s, a, r) = jax.lax.scan(stage, start, (jnp.arange(H), mdp.r, pi, u[0], u[1]))
    return Episodes(s=s.T, a=a.T, r=r.T)
