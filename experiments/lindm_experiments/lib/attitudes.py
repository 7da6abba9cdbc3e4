"""Values of an ambiguous POMDP under several attitudes to ambiguity, by the belief tree; its attitude `alpha` is replaced."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from lindm.problems.apomdp import alpha_maxmin, single
from lindm.random import flat
from lindm.solvers import tree
from lindm.solvers.belief import branching, num_histories
from lindm.solvers.policy_values import fixed_model_value, whole_horizon_value
from lindm.types import APOMDP
from lindm_experiments.lib.apomdps import value_span, with_start

ROUNDING = 1e-10  # relative to the most that two policies can differ by
YEARS_LEFT = (2, 3, 4)  # with one year to go nobody takes a biopsy


@jax.jit
def sweep(problem: APOMDP, alphas: Array, counted: Array | None = None) -> dict[str, Array]:
    """What is optimal stage by stage under each of the attitudes [n], which rise, and what that policy is worth otherwise.

    `counted` [M, H, S, A] is added up over an episode beside the rewards. Returns `value` [n]; `models` [n, M], the policy's
    value where model m is the truth, and `counts` [n, M] likewise; `alone` [M], the best that model m allows; `whole` and `best`
    [n], the policy's whole-horizon value and that of the best pure policy; `rises` and `falls` [n], at how many of the
    `histories` [n] the value is above or below that of the attitude before.
    """
    models, M = problem.models, problem.num_models
    first = jax.vmap(lambda model: tree.tree(single(model)).Q[0])(models)  # [M, A]

    def step(before: Array, alpha: Array) -> tuple[Array, dict[str, Array]]:
        here = replace(problem, alpha=alpha)
        table = tree.tree(here)
        policy, V = tree.optimal_policy(here, table), table.Q.max(-1)

        def by_model(r: Array) -> Array:
            rewarded = replace(here, models=replace(models, r=r))
            return jnp.stack([fixed_model_value(rewarded, policy, m) for m in range(M)])

        model_values, counts = jax.vmap(by_model)(jnp.stack([models.r, jnp.zeros_like(models.r) if counted is None else counted]))
        return V, {
            "value": V[0],
            "models": model_values,
            "counts": counts,
            "whole": alpha_maxmin(alpha, model_values, 0),
            "best": alpha_maxmin(alpha, first, 0).max(),
            "rises": (before + ROUNDING * value_span(problem) < V).sum(),
            "falls": ((before > V + ROUNDING * value_span(problem)) & (before < jnp.inf)).sum(),
            "histories": (V != 0).sum(),  # rewards are positive: only what cannot happen has the value zero
        }

    swept = jax.lax.scan(step, jnp.full(num_histories(problem), jnp.inf), alphas)[1]
    return swept | {"alone": first.max(-1)}


@jax.jit
def sweep_many(problems: APOMDP, alphas: Array) -> dict[str, Array]:
    return jax.lax.map(lambda problem: sweep(problem, alphas), problems)


@partial(jax.jit, static_argnames="policies")
def stagewise_differences(key: Array, problem: APOMDP, policies: int) -> Array:
    """Stage-wise minus whole-horizon value of random policies over histories [policies, 2], in the worst and in the best case.

    A policy's probabilities are far from even: most of its choices are nearly pure.
    """
    B, A = branching(problem), problem.num_actions

    def one(key: Array) -> Array:
        keys = jax.random.split(key, problem.horizon)
        logits = [4.0 * flat(jax.random.normal, k, (B**t, A), problem.alpha.dtype) for t, k in enumerate(keys)]
        policy = tuple(jax.nn.softmax(x) for x in logits)

        def difference(alpha: Array) -> Array:
            here = replace(problem, alpha=alpha)
            return tree.policy_value(here, policy) - whole_horizon_value(here, policy)

        return jax.vmap(difference)(jnp.array([1.0, 0.0]))

    return jax.vmap(one)(jax.random.split(key, policies))


@jax.jit
def along_segments(problem: APOMDP, alphas: Array, beliefs: Array) -> Array:
    """Values [alphas, segments, points] from common beliefs [segments, points, S], relative to the span."""

    def value(alpha: Array, belief: Array) -> Array:
        return tree.value(with_start(replace(problem, alpha=alpha), belief))

    each = jax.vmap(value, (None, 0))
    return jax.lax.map(lambda a: jax.lax.map(lambda line: each(a, line), beliefs), alphas) / value_span(problem)


@jax.jit
def biopsy_advantage(problem: APOMDP, alphas: Array, beliefs: Array) -> Array:
    """Q(biopsy) - Q(defer) [years left, alphas, beliefs] in the first year, all models at one of the beliefs [n, S]."""
    r = problem.models.r

    def advantage(years: Array, alpha: Array, belief: Array) -> Array:
        watched = jnp.where((jnp.arange(r.shape[1]) < years)[None, :, None, None], r, 0.0)
        here = replace(problem, alpha=alpha, models=replace(problem.models, r=watched))
        Q = tree.tree(with_start(here, belief)).Q[0]
        return Q[1] - Q[0]

    over_beliefs = jax.vmap(advantage, (None, None, 0))
    years = jnp.array(YEARS_LEFT)
    return jax.lax.map(lambda K: jax.lax.map(lambda a: over_beliefs(K, a, beliefs), alphas), years)
