"""A language model as a policy: it is asked at all histories of a stage at once, and actions are scored, not sampled.

The demonstrations of a task are read once; every history that is asked about shares their keys and values and carries only those
of its own steps, which it takes over from the history that it continues. The action is the one whose tokens are likeliest; an
action of one token needs no more than the logits at the end of the history. How often the likeliest of all tokens would have
been no action is counted beside it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from lindm.evaluation.losses import Asked, Policy
from lindm.llm.attention import KVCache
from lindm.llm.model import Decoder
from lindm.llm.tokens import action_tokens, document_prefix, encode
from lindm.text import Document, Step, Template, render

BUCKET = 4  # tokens of a call are a multiple of this, so that few programs are compiled


class Reader:
    """Histories as tokens, and what a model makes of them."""

    def __init__(self, model: Decoder, tokenizer: Any, template: Template, A: int, dtype: DTypeLike = jnp.float32):
        self.graphdef, self.weights = nnx.split(model)
        self.tokenizer, self.template, self.dtype = tokenizer, template, dtype
        self.actions = action_tokens(tokenizer, template, A)
        self.answered = self.invalid = 0  # how often it was asked, and how often its unconstrained answer was no action

    def policy(self, demonstrations: Sequence[Sequence[Sequence[Step]]], horizon: int) -> Policy:
        """The model's answers on tasks with these demonstrations (tasks, episodes, steps), all of them asked together."""
        fronts = [self._front(episodes) for episodes in demonstrations]
        longest = _rounded(max(map(len, fronts)))
        lengths = np.array([len(front) for front in fronts], np.int32)
        ids = np.zeros((len(fronts), longest), np.int32)
        for row, front in zip(ids, fronts, strict=True):
            row[: len(front)] = front
        shared = _read(self.graphdef, self.weights, ids, self.dtype), lengths
        told: list[list[list[int]]] = []  # per task, what each history of the last stage has told so far
        held: list[Any] = [None, 0]  # the caches of the last stage, and histories a task

        def answer(stage: int, level: list[list[Asked]]) -> list[list[int]]:
            nonlocal told
            texts = [[self._query(asked.steps) for asked in asks] for asks in level]
            before = [[told[i][a.parent] if a.parent >= 0 else [] for a in asks] for i, asks in enumerate(level)]
            for asks, olds in zip(texts, before, strict=True):
                for text, old in zip(asks, olds, strict=True):
                    assert text[: len(old)] == old  # pieces of a history begin those of its continuations
            each = _power(max(1, max(map(len, level))))
            new = [[text[len(old) :] for text, old in zip(t, b, strict=True)] for t, b in zip(texts, before, strict=True)]
            width = _rounded(max((len(x) for rows in new for x in rows), default=1))
            rows = np.zeros((len(level), each, width), np.int32)
            counts, starts, parents = (np.zeros((len(level), each), np.int32) for _ in range(3))
            for i, task in enumerate(new):
                for j, tokens in enumerate(task):
                    rows[i, j, : len(tokens)] = tokens
                    counts[i, j], starts[i, j] = len(tokens), len(before[i][j])
                    parents[i, j] = i * held[1] + max(level[i][j].parent, 0)
            if held[0] is None:
                room = _rounded(self._room(horizon, texts) + BUCKET)
                cache = _empty(self.graphdef, self.weights, len(level) * each, room, self.dtype)
            else:
                cache = _grown(jax.tree.map(lambda x: x[:, parents.reshape(-1)], held[0]), int((starts + width).max()))
            flat = (rows.reshape(-1, width), starts.reshape(-1), counts.reshape(-1))
            hidden, cache = _extend(self.graphdef, self.weights, *flat, cache, shared, self.dtype)
            scores, free = self._scores(hidden, cache, shared, flat[1] + flat[2])
            best, valid = (_on_host(x).reshape(len(level), each) for x in (scores.argmax(-1), free))
            for i, asks in enumerate(level):
                self.answered, self.invalid = self.answered + len(asks), self.invalid + int((~valid[i, : len(asks)]).sum())
            told, held[:] = texts, [cache, each]
            return [best[i, : len(asks)].tolist() for i, asks in enumerate(level)]

        return answer

    def longest(self, demonstrations: Sequence[Sequence[Sequence[Step]]]) -> int:
        """Tokens of the longest text, about: of each task's demonstrations, and of one more episode like them."""
        return max(-(-len(self._front(episodes)) * (len(episodes) + 1) // len(episodes)) for episodes in demonstrations)

    def _front(self, episodes: Sequence[Sequence[Step]]) -> list[int]:
        pieces = [piece.text for piece in render(Document(tuple(map(tuple, episodes))), self.template)]
        return [*document_prefix(self.tokenizer), *_joined(encode(self.tokenizer, pieces))]

    def _query(self, steps: Sequence[Step]) -> list[int]:
        """The tokens of an episode in progress, behind what opens it (which the demonstrations' text holds)."""
        pieces = [piece.text for piece in render(Document((), tuple(steps)), self.template) if piece.step is not None]
        return _joined(encode(self.tokenizer, pieces))

    def _room(self, horizon: int, texts: list[list[list[int]]]) -> int:
        """Tokens of a whole episode, judged by its first step; the cache grows where that is too few."""
        first = max((len(text) for asks in texts for text in asks), default=1)
        return horizon * (3 * first + max(map(len, self.actions)) + BUCKET)

    def _scores(self, hidden: Array, cache: KVCache, shared: tuple[KVCache, np.ndarray], ends: np.ndarray) -> tuple[Array, Array]:
        """log p of each action [rows, A], and whether the likeliest tokens spell one [rows]; hidden: the state in front of it."""
        log_p = _log_p(self.graphdef, self.weights, hidden)
        firsts = np.array([tokens[0] for tokens in self.actions])
        scores, spelt = log_p[:, firsts], log_p.argmax(-1)[:, None] == firsts[None]
        if max(map(len, self.actions)) == 1:
            return scores, spelt.any(-1)
        columns, spells = [], []
        for a, tokens in enumerate(self.actions):
            score, spell = scores[:, a], spelt[:, a]
            if len(tokens) > 1:
                width = _rounded(len(tokens) - 1)
                ids = np.zeros((hidden.shape[0], width), np.int32)
                ids[:, : len(tokens) - 1] = tokens[:-1]
                room = _grown(cache, int(ends.max()) + width)
                after = np.array([*tokens[1:], *[0] * (width - len(tokens) + 1)], np.int32)
                rest, likeliest = _log_p_of(
                    self.graphdef, self.weights, ids, ends, room, shared, after, len(tokens) - 1, self.dtype
                )
                score, spell = score + rest, spell & likeliest
            columns.append(score)
            spells.append(spell)
        return jnp.stack(columns, axis=-1), jnp.stack(spells, axis=-1).any(-1)


def _on_host(x: Array) -> np.ndarray:
    """All of an array, in every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def _joined(lists: Sequence[Sequence[int]]) -> list[int]:
    return [token for tokens in lists for token in tokens]


def _rounded(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _grown(cache: KVCache, slots: int) -> KVCache:
    """With room for at least so many tokens."""
    short = _rounded(max(slots - cache.keys.shape[2], 0))
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0), (0, 0))), cache) if short else cache


def _empty(graphdef, weights, rows: int, room: int, dtype: DTypeLike) -> KVCache:
    return nnx.merge(graphdef, weights).init_cache(rows, room, dtype)


@partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _read(graphdef, weights, ids: Array, dtype: DTypeLike) -> KVCache:
    """The cache of whole prefixes [N, P]."""
    model = nnx.merge(graphdef, weights)
    start = jnp.zeros(ids.shape[0], jnp.int32)
    return model.forward_with_cache(ids, start, model.init_cache(*ids.shape, dtype), dtype=dtype, unroll=False)[1]


@partial(jax.jit, static_argnames=("graphdef", "dtype"), donate_argnames="cache")
def _extend(graphdef, weights, ids, starts, counts, cache: KVCache, shared, dtype: DTypeLike) -> tuple[Array, KVCache]:
    """Hidden states [rows, D] at the last of the `counts` new tokens of each row, and the cache."""
    model = nnx.merge(graphdef, weights)
    hidden, cache = model.forward_with_cache(ids, starts, cache, shared, dtype=dtype, unroll=False)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], cache


@partial(jax.jit, static_argnames="graphdef")
def _log_p(graphdef, weights, hidden: Array) -> Array:
    return jax.nn.log_softmax(nnx.merge(graphdef, weights).logits(hidden))


@partial(jax.jit, static_argnames=("graphdef", "n", "dtype"))
def _log_p_of(
    graphdef, weights, ids, starts, cache: KVCache, shared, after: Array, n: int, dtype: DTypeLike
) -> tuple[Array, Array]:
    """log p [rows] of after[:n], each token given the ids before it, and whether each is the likeliest."""
    model = nnx.merge(graphdef, weights)
    hidden, _ = model.forward_with_cache(ids, starts, cache, shared, dtype=dtype, unroll=False)
    log_p = jax.nn.log_softmax(model.logits(hidden[:, :n]))
    chosen = jnp.take_along_axis(log_p, jnp.broadcast_to(after[None, :n, None], (*log_p.shape[:2], 1)), axis=-1)
    return chosen.sum((1, 2)), (log_p.argmax(-1) == after[None, :n]).all(-1)
