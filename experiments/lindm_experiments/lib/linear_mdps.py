"""What the MDP experiments share: the moments of a family, its layers (closed form and trained), contexts turned into Qhat.

This module combines measurements (`lindm`) and predictions (`theory`). The functions are jitted once and reused by every seed:
families of equal shape are the same compiled program.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.icl.attention import ReducedAttention
from lindm.icl.label_laws import bounded_labels, oracle_labels
from lindm.icl.prompts import draw_pairs, training_prompt
from lindm.icl.trainer import train_many
from lindm.problems.linear_mdp import MDPFamily, draw_task, second_moment
from lindm.solvers.dp import plan_linear
from lindm.solvers.rollout import cumulative
from lindm.types import LinearMDP, Plan
from lindm_theory.in_context import optimal_weights
from lindm_theory.moments import design_fourth

BLOCK = 1024  # tasks solved at once: more would leave the cache


def family_key(seed: int) -> Array:
    """The key from which a seed draws its feature map: no two seeds share one, so that a claim about a law of features is tested
    on a sample of it."""
    return jax.random.fold_in(jax.random.key(seed), 1 << 20)


def single_precision(tree):
    """The pytree with its floating arrays in float32, for training; in numpy, where a conversion needs no compiler."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def draw_oracle(key: Array, family: MDPFamily) -> tuple[LinearMDP, Plan, Array]:
    """One task with its plan and w [H, d]."""
    task = draw_task(key, family)
    plan, w = plan_linear(task)
    return task, plan, w


@partial(jax.jit, static_argnames="tasks")
def task_pool(key: Array, family: MDPFamily, tasks: int = 32 * BLOCK) -> Array:
    """The vectors w [H, tasks, d] of fresh tasks; `tasks` a multiple of BLOCK."""
    if tasks % BLOCK:
        raise ValueError(f"tasks must be a multiple of {BLOCK}; got {tasks}")

    def block(k: Array) -> Array:
        return jax.vmap(lambda q: draw_oracle(q, family)[2])(jax.random.split(k, BLOCK))

    w = jax.lax.map(block, jax.random.split(key, tasks // BLOCK))
    return jnp.moveaxis(w.reshape(tasks, *w.shape[2:]), 1, 0)


@jax.jit
def pool_moment(pool: Array) -> Array:
    """Psi [H, d, d] = E[w w'] over a pool [H, tasks, d], not centered."""
    return jnp.einsum("hnd,hne->hde", pool, pool) / pool.shape[1]


def pairs_table(family: MDPFamily) -> Array:
    """The features [S*A, d] of all state-action pairs, in the order of `family.design`."""
    return family.phi.reshape(-1, family.phi.shape[-1])


@jax.jit
def fourth_moments(family: MDPFamily, Psi: Array) -> Array:
    """K(Psi_h) [H, d, d] = E[x x' Psi_h x x'] for every stage, exact over the design."""
    return jax.vmap(lambda stage: design_fourth(pairs_table(family), family.design, stage))(Psi)


@jax.jit
def closed_form_layers(family: MDPFamily, Psi: Array, N: float | Array, sigma: float | Array = 0.0) -> Array:
    """A_N [H, d, d] for every stage (theory.md section 3), label noise of standard deviation sigma."""
    Lambda = second_moment(family)
    noise = sigma**2 * Lambda
    return jax.vmap(lambda P, K: optimal_weights(Lambda, P, K, N, noise))(Psi, fourth_moments(family, Psi))


def context_sums(
    key: Array, family: MDPFamily, w: Array, M: int | Array, half_width: float | Array = 0.0, longest: int | None = None
) -> Array:
    """S_M [H, d] = (1/M) sum y x: for every stage an independent context of M i.i.d. pairs, labels <x, w_h> + U(+-half_width).

    With `longest` given, M may be traced (M <= longest): one compiled program then serves every length.
    """
    drawn = int(M) if longest is None else longest
    which, label = jax.random.split(key)
    x = pairs_table(family)[draw_pairs(which, cumulative(family.design), (w.shape[0], drawn))]
    used = (jnp.arange(drawn) < M).astype(w.dtype) / M
    without_noise = isinstance(half_width, float) and half_width == 0
    y = oracle_labels(x, w) if without_noise else bounded_labels(label, x, w, half_width)
    return jnp.einsum("m,hm,hmd->hd", used, y, x)


def action_values(family: MDPFamily, A: Array, S: Array) -> Array:
    """Qhat [H, S, A] = phi(s, a)' A_h S_h from layers A [H, d, d] and context sums S [H, d]."""
    return jnp.einsum("sai,hij,hj->hsa", family.phi, A, S)


@lru_cache
def pool_draw(n: int, batch: int, queries: int) -> Callable:
    """The draw function of one set of sizes: the same object on every call, so that nothing compiles twice."""

    def draw(key: Array, family: MDPFamily, pool: Array, sigma: Array):
        which, prompts = jax.random.split(key)
        w = pool[jax.random.randint(which, (batch,), 0, pool.shape[0])]
        cdf = cumulative(family.design)
        one = partial(training_prompt, phi=family.phi, cdf=cdf, n=n, queries=queries, sigma=sigma)
        return jax.vmap(lambda k, w: one(k, w=w))(jax.random.split(prompts, batch), w)

    return draw


def trained_layers(
    key: Array,
    family: MDPFamily,
    pool: Array,
    N: int,
    sigma: float,
    *,
    steps: int,
    learning_rate: float,
    batch: int = 256,
    queries: int = 8,
) -> Array:
    """Reduced layers Ahat [H, d, d], one for every stage, trained in float32 on tasks drawn from `pool` [H, tasks, d]."""
    H, _, d = pool.shape
    family_, pool_, sigma_ = single_precision((family, pool, jnp.asarray(sigma)))
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (H, *x.shape)), (family_, sigma_))
    layers, _ = train_many(
        ReducedAttention(d),
        pool_draw(N, batch, queries),
        jax.random.split(key, H),
        steps=steps,
        data=(repeated[0], pool_, repeated[1]),
        learning_rate=learning_rate,
    )
    return layers.A[...][:, 0].astype(pool.dtype)
