"""Greedy generation with a key-value cache, many prompts together."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lindm.llm.io.weights import gather_to_host
from lindm.llm.model import Decoder

BUCKET = 16  # lengths of prompts are rounded up, so that few programs are compiled


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    *,
    dtype: DTypeLike = jnp.float32,
) -> list[list[int]]:
    """The likeliest token after each prompt, then the likeliest after that, up to a stop token, which is included.

    Args:
      prompts: token ids, at least one each; dtype: of the computation.

    Raises:
      ValueError: an empty prompt, or a prompt and its answer that exceed the model's positions.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("each prompt must have at least one token")
    if lengths.max() + max_new_tokens > (limit := model.config.max_position_embeddings):
        rule = f"a prompt and its answer must have at most the {limit} tokens of the model"
        raise ValueError(f"{rule}; got {lengths.max()} and {max_new_tokens}")
    if max_new_tokens < 1:
        return [[] for _ in prompts]
    ids = np.zeros((len(prompts), -(-int(lengths.max()) // BUCKET) * BUCKET), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    graphdef, weights = nnx.split(model)
    stops = np.array([*stop_tokens], np.int32)
    tokens, counts = map(gather_to_host, _generate(graphdef, weights, ids, lengths, stops, max_new_tokens, dtype))
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "dtype"))
def _generate(
    graphdef, weights, ids: Array, lengths: Array, stops: Array, max_new_tokens: int, dtype: DTypeLike
) -> tuple[Array, Array]:
    """Tokens [B, max_new_tokens] of the answers to B prompts [B, P], and how many are theirs [B]."""
    model = nnx.merge(graphdef, weights)
    rows, width = ids.shape
    cache = model.init_cache(rows, width + max_new_tokens, dtype)
    hidden, cache = model.forward_with_cache(ids, jnp.zeros(rows, jnp.int32), cache, dtype=dtype, unroll=False)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

    def going_on(carry):
        step, _, _, _, done, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def extend(carry):
        step, last, cache, tokens, done, counts = carry
        token = model.logits(last).argmax(-1).astype(jnp.int32)
        tokens = tokens.at[:, step].set(token)
        counts = counts + ~done
        done = done | (token[:, None] == stops[None]).any(-1)
        hidden, cache = model.forward_with_cache(token[:, None], lengths + step, cache, dtype=dtype, unroll=False)
        return step + 1, hidden[:, 0], cache, tokens, done, counts

    empty = jnp.zeros((rows, max_new_tokens), jnp.int32), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)
    _, _, _, tokens, _, counts = jax.lax.while_loop(going_on, extend, (jnp.int32(0), last, cache, *empty))
    return tokens, counts
