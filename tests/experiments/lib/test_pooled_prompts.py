"""Shared prompts: what is drawn has the exact moments, and training finds the readers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.icl.attention import ReducedAttention, query_columns
from lindm.icl.trainer import train
from lindm.problems.linear_mdp import second_moment
from lindm.solvers.rollout import rollout
from lindm.types import Prompt
from lindm_experiments.lib import linear_mdps, pooled_prompts


def test_shifted_contexts_come_from_different_prompts():
    prompt = np.arange(64.0)
    sums = np.broadcast_to(prompt[:, None, None, None], (64, pooled_prompts.H, pooled_prompts.H, pooled_prompts.D))
    assert np.all(pooled_prompts.with_dependence(sums, "shared") == sums)
    markov = pooled_prompts.with_dependence(sums, "markov")[0, :, :, 0]
    assert all(len(set(stage)) == 1 for stage in markov) and len(set(markov[:, 0])) == pooled_prompts.H
    assert len(set(pooled_prompts.with_dependence(sums, "pairs")[0, :, :, 0].ravel())) == pooled_prompts.H**2


@pytest.mark.slow
def test_drawn_prompts_have_the_exact_moments():
    key = jax.random.key(5)
    family = pooled_prompts.draw_family(key)
    tasks = pooled_prompts.draw_tasks(key, family, 0.5, 2)
    sums = pooled_prompts.draw_sums(key, family, tasks, 20000, (1,))[:, :, 0].reshape(2, 4, 20000, pooled_prompts.H, -1)
    mean, covariance = np.asarray(tasks.mean), np.asarray(tasks.covariance)
    for task, law, h in np.ndindex(2, 4, pooled_prompts.H):
        drawn = sums[task, law, :, h]
        size = np.sqrt(np.trace(covariance[task, law, h]))
        np.testing.assert_allclose(drawn.mean(0), mean[task, law, h], atol=0.04 * size)
        np.testing.assert_allclose(np.cov(drawn.T), covariance[task, law, h], atol=0.06 * size**2)


@pytest.mark.slow
def test_training_on_shared_prompts_finds_the_augmented_reader_with_its_blocks_between_stages():
    H, D, N = pooled_prompts.H, pooled_prompts.D, 8
    family = pooled_prompts.draw_family(jax.random.key(77001))
    pool = pooled_prompts.draw_tasks(jax.random.key(77001), family, 0.5, pooled_prompts.POOL)
    columns = query_columns(jnp.kron(jnp.eye(H), second_moment(family)))

    def draw(key, mdps, behavior, w, flat, columns):
        which, k = jax.random.split(key)
        task = jax.random.randint(which, (256,), 0, len(w))

        def one(k, i):
            episodes = rollout(k, jax.tree.map(lambda x: x[i], mdps), behavior[i], N)
            x = flat[episodes.s * pooled_prompts.A + episodes.a]
            y = jnp.einsum("nhd,hd->nh", x, w[i])
            augmented = jnp.einsum("nhd,hg->nhgd", x, jnp.eye(H, dtype=x.dtype)).reshape(N * H, H * D)
            return Prompt(x=augmented, y=y.reshape(-1), query=columns), columns @ w[i].reshape(-1)

        return jax.vmap(one)(jax.random.split(k, 256), task)

    data = linear_mdps.single_precision((pool.mdp, pool.behavior, pool.w, linear_mdps.pairs_table(family), columns))
    layer, _ = train(ReducedAttention(H * D), draw, jax.random.key(1), steps=2000, data=data, learning_rate=0.3)
    trained = np.asarray(layer.A[...])[0]
    readers = pooled_prompts.layers(jax.tree.map(np.asarray, pool), N) * H  # the prompt averages over N H pairs
    best, blocks = (readers[pooled_prompts.READERS.index((x, "oracle"))].reshape(H * D, H * D) for x in ("augmented", "stage"))
    assert np.linalg.norm(trained - best) < 0.02 * np.linalg.norm(best)
    assert np.linalg.norm(trained - blocks) > 0.08 * np.linalg.norm(best)
