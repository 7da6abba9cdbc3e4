"""Attention layers for every stage of an MDP, trained on one draw of tasks a step, and the prompts that they are trained on."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lindm.icl.attention import FullAttention, ReducedAttention
from lindm.icl.prompts import draw_pairs
from lindm.icl.trainer import train
from lindm.problems.linear_mdp import MDPFamily
from lindm.solvers.rollout import cumulative
from lindm.types import Prompt
from lindm_experiments.lib import linear_mdps


class StageLayers(nnx.Module):
    """A reduced layer for every stage and a full one beside the first: one draw of tasks a step serves them all.

    A prompt holds the contexts of the H stages one after the other, and the query columns of every layer; the answers
    are those of the full layer, then those of the H reduced ones. H = 1 for the regression.
    """

    def __init__(self, d: int, H: int, seed: int, pairs: int, scale: float):
        self.d, self.H, self.pairs = d, H, pairs  # the full layer sees the first `pairs` pairs only
        self.full = FullAttention(d, rngs=nnx.Rngs(seed), scale=scale)
        self.reduced = nnx.vmap(lambda _: ReducedAttention(d))(jnp.arange(H))  # A [H, 1, d, d]

    def __call__(self, prompt: Prompt) -> Array:
        stages = Prompt(
            x=prompt.x.reshape(self.H, -1, self.d),
            y=prompt.y.reshape(self.H, -1),
            query=jnp.broadcast_to(prompt.query[: self.d], (self.H, self.d, self.d)),
        )
        graph, state = nnx.split(self.reduced)
        answers = jax.vmap(lambda s, p: nnx.merge(graph, s)(p))(state, stages)
        first = Prompt(x=stages.x[0, : self.pairs], y=stages.y[0, : self.pairs], query=stages.query[0])
        return jnp.concatenate([self.full(first), answers.ravel()])

    def weights(self) -> np.ndarray:
        """A [H, d, d] of the reduced layers."""
        return np.asarray(self.reduced.A[...][:, 0], dtype=float)


def make_prompts(x: Array, w: Array, columns: Array) -> tuple[Prompt, Array]:
    """Noiseless prompts from contexts x [B, H, N, d] and tasks w [B, H, d]; the columns stand for random queries exactly."""
    B, H, N, d = x.shape
    y = jnp.einsum("bhnd,bhd->bhn", x, w)
    target = jnp.einsum("qd,bhd->bhq", columns, w)
    prompt = Prompt(
        x=x.reshape(B, H * N, d),
        y=y.reshape(B, H * N),
        query=jnp.broadcast_to(jnp.tile(columns, (H + 1, 1)), (B, (H + 1) * d, d)),
    )
    return prompt, jnp.concatenate([target[:, :1], target], axis=1).reshape(B, -1)


# numbers are drawn as one flat vector and reshaped: the same numbers, compiled several times faster


@lru_cache
def gaussian_prompts(N: int, batch: int) -> Callable:
    """`draw` of regression tasks w ~ N(0, I) with features x ~ N(0, root root')."""

    def draw(key: Array, root: Array, columns: Array):
        features, task = jax.random.split(key)
        d = len(root)
        x = jax.random.normal(features, (batch * N * d,), root.dtype).reshape(batch, 1, N, d) @ root.T
        w = jax.random.normal(task, (batch * d,), root.dtype).reshape(batch, 1, d)
        return make_prompts(x, w, columns)

    return draw


def draw_contexts(key: Array, family: MDPFamily, H: int, n: int, batch: int) -> Array:
    """Features [batch, H, n, d] of i.i.d. pairs."""
    pairs = draw_pairs(key, cumulative(family.design), batch * H * n)
    return linear_mdps.pairs_table(family)[pairs].reshape(batch, H, n, -1)


@lru_cache
def new_task_prompts(N: int, batch: int) -> Callable:
    """`draw` of tasks of a family, new at every step."""

    def draw(key: Array, family: MDPFamily, columns: Array):
        tasks, pairs = jax.random.split(key)
        w = jax.vmap(lambda k: linear_mdps.draw_oracle(k, family)[2])(jax.random.split(tasks, batch))
        return make_prompts(draw_contexts(pairs, family, w.shape[1], N, batch), w, columns)

    return draw


@lru_cache
def pool_prompts(N: int, batch: int) -> Callable:
    """`draw` of tasks from a pool [H, n, d]."""

    def draw(key: Array, family: MDPFamily, columns: Array, pool: Array):
        tasks, pairs = jax.random.split(key)
        w = pool[:, jax.random.randint(tasks, (batch,), 0, pool.shape[1])].swapaxes(0, 1)
        return make_prompts(draw_contexts(pairs, family, w.shape[1], N, batch), w, columns)

    return draw


def train_in_pieces(
    key: Array, layer: StageLayers, draw: Callable, data: tuple, chunk: int, chunks: int, optimizer: Any
) -> tuple[StageLayers, list[np.ndarray]]:
    """Train in pieces (optimizer None: Adam), to look at the weights between them: the layer and A [H, d, d] after each piece.

    Adam's rate falls geometrically from piece to piece; the last piece returns the mean of its iterates.
    """
    path = []
    for i, k in enumerate(jax.random.split(key, chunks)):
        last = i == chunks - 1
        layer, _ = train(
            layer,
            draw,
            k,
            steps=chunk,
            data=data,
            learning_rate=0.5 * 0.02 ** (i / (chunks - 1)),
            warmup=0.02 if i else 0.1,
            average=0.8 if last else 0.25,
            optimizer=optimizer,
        )
        path.append(layer.weights())
    return layer, path
