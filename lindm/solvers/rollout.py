"""Rollouts of behavior policies in batch. Every index is drawn by inverse CDF from one uniform number."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from lindm import validate
from lindm.problems.apomdp import as_apomdp
from lindm.random import flat
from lindm.solvers.belief import advance
from lindm.solvers.dp import uniform_policy
from lindm.solvers.solve import Solution, label, labels, q_bounds
from lindm.solvers.ties import greedy
from lindm.types import APOMDP, MDP, POMDP, Episodes, Labels, Plan, at_stage


def cumulative(p: Array) -> Array:
    """Cumulative sums of weights p[..., n] that never rise at an index of weight zero, for any order of summation.

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
    # with a row for each number, counting comparisons is faster than a search by gathers
    return jnp.sum(cdf <= (u * cdf[..., -1])[..., None], axis=-1, dtype=jnp.int32)


def act(pi: Array, s: Array, u: Array) -> Array:
    """Actions [...] in states s[...] under a stage's policy: int [S], or [S, A] probabilities."""
    return pi[s].astype(jnp.int32) if pi.ndim == 1 else invert(cumulative(pi)[s], u)


def step(P: Array, s: Array, a: Array, u: Array) -> Array:
    """Next states [...] from a stage's kernel P[S, A, S]; sums the rows needed, or the whole table once if it is smaller."""
    rows = cumulative(P[s, a]) if s.size < P.shape[0] * P.shape[1] else cumulative(P)[s, a]
    return invert(rows, u)


def rollout(key: Array, mdp: MDP, pi: Array, n: int) -> Episodes:
    """n independent episodes of a behavior policy.

    Args:
        pi: [H, S] int actions, or [H, S, A] probabilities.
    Returns: Episodes with s, a [n, H] int32, mean rewards r [n, H], and the rewards [n, H] that the environment paid.
    """
    validate.count(n, "n")
    H = mdp.horizon
    key_start, key_rest = jax.random.split(key)
    start = invert(cumulative(mdp.rho), jax.random.uniform(key_start, (n,), mdp.rho.dtype))
    u = flat(jax.random.uniform, key_rest, (2, H, n), mdp.P.dtype)

    def stage(s, at):
        h, r, policy, u_act, u_step = at
        a = act(policy, s, u_act)
        following = step(at_stage(mdp.P, h), s, a, u_step)
        return following, (s, a, r[s, a], mdp.pay(h, s, a, following))

    _, (s, a, r, paid) = jax.lax.scan(stage, start, (jnp.arange(H), mdp.r, pi, u[0], u[1]))
    return Episodes(s=s.T, a=a.T, r=r.T, paid=paid.T)


# --- demonstrations -------------------------------------------------------------------------------------------------------


def demonstrate(
    key: Array, solution: Solution, n: int, epsilon: ArrayLike, nature: ArrayLike | None = None
) -> tuple[Episodes, Labels]:
    """n labeled episodes of an epsilon-greedy behavior policy around the optimal policy.

    At each step the behavior policy takes a uniformly random legal action with probability `epsilon` and the solution's action
    otherwise: 0 is the optimal policy, 1 the uniform one.

    Args:
      epsilon: in [0, 1].
      nature: the model [] that makes every step of an APOMDP. If None, nature plays the game of the APOMDP: against the action
        taken it picks the worst model, under optimal continuation, with probability alpha, and the best one otherwise.

    Returns:
      Episodes [n, H] (an MDP has no m and o, a POMDP no m) and their Labels.

    Raises:
      ValueError: a number is out of its range (traced ones are not checked), or `nature` is given for a problem with one model.
    """
    problem = solution.problem
    validate.count(n, "n")
    validate.fraction(epsilon, "epsilon")
    if nature is not None:
        if not isinstance(problem, APOMDP):
            raise ValueError("nature must be left out for a problem with one model")
        M = problem.num_models
        if not isinstance(nature, Tracer) and not 0 <= int(jnp.asarray(nature)) < M:
            raise ValueError(f"nature must be a model from 0 to {M - 1}; got {nature}")
    if isinstance(problem, MDP):
        assert isinstance(solution.tables, Plan)
        best = jax.nn.one_hot(greedy(solution.tables.Q), problem.num_actions, dtype=problem.r.dtype)
        mixed = best + jnp.asarray(epsilon, best.dtype) * (uniform_policy(problem) - best)
        episodes = rollout(key, problem, mixed, n)
        return episodes, labels(solution, episodes)
    episodes, labeled = _demonstrate(key, as_apomdp(problem), solution, n, epsilon, nature)
    return (replace(episodes, m=None) if isinstance(problem, POMDP) else episodes), labeled


def _demonstrate(key: Array, problem: APOMDP, solution: Solution, n: int, epsilon, nature) -> tuple[Episodes, Labels]:
    H, A = problem.horizon, problem.num_actions
    u = flat(jax.random.uniform, key, (n, H, 6), problem.models.rho.dtype)

    def one(u: Array):
        def step(carry, at):
            history, beliefs, s = carry
            t, (u_mix, u_act, u_model, u_start, u_next, u_seen) = at
            lower, upper, G = q_bounds(problem, solution.tables, t, history, beliefs)
            labeled = label(lower, upper, solution.exact, problem.models.legal is None)
            drawn = jnp.minimum((u_act * A).astype(jnp.int32), A - 1)
            if labeled.legal is not None:
                drawn = invert(jnp.cumsum(labeled.legal.astype(u_act.dtype)), u_act)
            a = jnp.where(u_mix < epsilon, drawn, labeled.action)
            if nature is None:
                m = jnp.where(u_model < problem.alpha, G[a].argmin(), G[a].argmax()).astype(jnp.int32)
            else:
                m = jnp.asarray(nature, jnp.int32)
            # the first state is drawn after nature's first choice: from rho of that model
            s = jnp.where(t == 0, invert(cumulative(problem.models.rho[m]), u_start), s)
            models = problem.models
            following = invert(cumulative(at_stage(models.P[m], t)[s, a]), u_next)
            o = invert(cumulative(at_stage(models.O[m], t)[a, following]), u_seen)
            taken = Episodes(s=s, a=a, r=models.r[m, t, s, a], m=m, o=o, paid=models.pay(t, s, a, following, o, (m,)))
            return (*advance(problem, t, history, beliefs, a, m, o), following), (taken, labeled)

        zero = jnp.zeros((), jnp.int32)
        stages = (jnp.arange(H), tuple(u.T))
        return jax.lax.scan(step, (zero, problem.models.rho, zero), stages)[1]

    return jax.vmap(one)(u)
