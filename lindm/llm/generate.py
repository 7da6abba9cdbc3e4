"""Generation with a key-value cache: many prompts together, or one prompt token by token."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lindm.llm.attention import KVCache
from lindm.llm.io.weights import gather_to_host
from lindm.llm.model import Decoder

SHORTEST = 16  # lengths of prompts and caches are powers of two from here on, so that few programs are compiled


class Sampling(NamedTuple):
    """How a token is chosen.

    Attributes:
      temperature: 0 takes the likeliest token; otherwise probabilities are proportional to p(token)^(1/temperature).
      top_k: only the k likeliest tokens; 0: all.
      top_p: of these, only the likeliest that together have this probability (nucleus sampling; Holtzman et al., 2020).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


class _State(NamedTuple):
    """B texts that are being generated."""

    step: Array  # tokens that each has so far
    hidden: Array  # [B, D] at the last token of each
    cache: KVCache
    done: Array  # [B] whether a text has its last token


class _Inputs(NamedTuple):
    """What the generation of B texts starts from."""

    ids: Array  # [B, P] prompts, padded at the end
    lengths: Array  # [B] of the prompts
    limits: Array  # [B] tokens to generate at most
    stops: Array  # tokens after which a text ends
    keys: Array  # [B] random keys


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    stop_tokens: Sequence[int] = (),
    *,
    sampling: Sampling | None = None,
    keys: Sequence[Array] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> list[list[int]]:
    """The tokens after each prompt, up to a stop token, which is included. A text does not depend on those beside it.

    Args:
      prompts: token ids, at least one each.
      max_new_tokens: for all prompts, or for each.
      sampling: how tokens are chosen [default: the likeliest]; keys: a random key for each prompt, needed with a temperature.
      dtype: of the computation.

    Raises:
      ValueError: an empty prompt, or a prompt and its answer that exceed the model's positions.
    """
    sampling = sampling or Sampling()
    inputs, most = _inputs(model, prompts, max_new_tokens, stop_tokens, sampling, keys)
    if most < 1:
        return [[] for _ in prompts]
    graphdef, weights = nnx.split(model)
    tokens, counts = map(gather_to_host, _generate(graphdef, weights, inputs, _rounded(most), sampling, dtype))
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]


def stream(
    model: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    *,
    sampling: Sampling | None = None,
    key: Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, each as soon as it is there. Arguments and errors are those of `generate`."""
    sampling = sampling or Sampling()
    inputs, _ = _inputs(model, [prompt], max_new_tokens, stop_tokens, sampling, None if key is None else [key])
    graphdef, weights = nnx.split(model)
    slots = inputs.ids.shape[1] + _rounded(max_new_tokens)
    state = _read(graphdef, weights, inputs, slots, dtype)
    for _ in range(max_new_tokens):
        token, state = _advance(graphdef, weights, inputs, state, sampling, dtype)
        yield int(gather_to_host(token)[0])
        if gather_to_host(state.done)[0]:
            return


def _inputs(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    stop_tokens: Sequence[int],
    sampling: Sampling,
    keys: Sequence[Array] | None,
) -> tuple[_Inputs, int]:
    """The arrays that generation starts from, and the largest of `max_new_tokens`."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("each prompt must have at least one token")
    limits = np.broadcast_to(np.asarray(max_new_tokens, np.int32), lengths.shape)
    if (lengths + limits).max() > (most := model.config.max_position_embeddings):
        i = int((lengths + limits).argmax())
        rule = f"a prompt and its answer must have at most the {most} tokens of the model"
        raise ValueError(f"{rule}; got {lengths[i]} and {limits[i]}")
    if keys is None:
        if sampling.temperature > 0:
            raise ValueError("keys must be given with a temperature above 0")
        keys = [jax.random.key(0)] * len(prompts)
    ids = np.zeros((len(prompts), _rounded(int(lengths.max()))), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return _Inputs(ids, lengths, limits, np.array([*stop_tokens], np.int32), jnp.stack(keys)), int(limits.max())  # pyright: ignore


def _rounded(n: int) -> int:
    return max(SHORTEST, 1 << (n - 1).bit_length())


def _start(model: Decoder, inputs: _Inputs, slots: int, dtype: DTypeLike) -> _State:
    """The state after the prompts, with a cache of `slots` tokens for each."""
    rows = inputs.ids.shape[0]
    cache = model.init_cache(rows, slots, dtype)
    hidden, cache = model.forward_with_cache(
        inputs.ids, jnp.zeros(rows, jnp.int32), cache, long=_become_long(model, inputs), dtype=dtype, unroll=False
    )
    last = jnp.take_along_axis(hidden, (inputs.lengths - 1)[:, None, None], axis=1)[:, 0]
    return _State(jnp.int32(0), last, cache, jnp.asarray(inputs.limits) < 1)


def _extend(model: Decoder, inputs: _Inputs, state: _State, sampling: Sampling, dtype: DTypeLike) -> tuple[Array, _State]:
    """The next token of each text [B], and the state after it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(inputs.keys, state.step)
    token = choose(model.logits(state.hidden), keys, sampling)
    step = state.step + 1
    done = state.done | (token[:, None] == inputs.stops[None]).any(-1) | (step >= inputs.limits)
    start = inputs.lengths + state.step
    long = _become_long(model, inputs)
    hidden, cache = model.forward_with_cache(token[:, None], start, state.cache, long=long, dtype=dtype, unroll=False)
    return token, _State(step, hidden[:, 0], cache, done)


def _become_long(model: Decoder, inputs: _Inputs) -> Array:
    """Which texts may become longer than the original length of longrope [B, 1]: they have its long factors from the start, as a
    cache keeps its rotations."""
    return jnp.asarray(inputs.lengths + inputs.limits > model.config.rope_parameters.original_max_position_embeddings)[:, None]


def choose(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """A token [B] for each row of logits [B, V] in float32, drawn with its key [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1] or sampling.top_p < 1:
        likeliest = jax.lax.top_k(logits, min(sampling.top_k or logits.shape[-1], logits.shape[-1]))[0]
        p = jax.nn.softmax(likeliest)
        kept = jnp.cumsum(p, -1) - p < sampling.top_p  # the first one always
        lowest = jnp.where(kept, likeliest, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    cumulative = jnp.cumsum(jax.nn.softmax(logits), -1)
    at = jax.vmap(jax.random.uniform)(keys) * cumulative[:, -1]
    return (cumulative <= at[:, None]).sum(-1).astype(jnp.int32)  # a token without probability adds nothing to the sum


@partial(jax.jit, static_argnames=("graphdef", "slots", "dtype"))
def _read(graphdef, weights, inputs: _Inputs, slots: int, dtype: DTypeLike) -> _State:
    return _start(nnx.merge(graphdef, weights), inputs, slots, dtype)


@partial(jax.jit, static_argnames=("graphdef", "sampling", "dtype"), donate_argnames="state")
def _advance(graphdef, weights, inputs: _Inputs, state: _State, sampling: Sampling, dtype: DTypeLike) -> tuple[Array, _State]:
    return _extend(nnx.merge(graphdef, weights), inputs, state, sampling, dtype)


@partial(jax.jit, static_argnames=("graphdef", "most", "sampling", "dtype"))
def _generate(graphdef, weights, inputs: _Inputs, most: int, sampling: Sampling, dtype: DTypeLike) -> tuple[Array, Array]:
    """Tokens [B, most] of the answers to B prompts, and how many are theirs [B]."""
    model = nnx.merge(graphdef, weights)
    rows, width = inputs.ids.shape

    def going_on(carry: Any) -> Array:
        return ~carry[0].done.all()

    def extend(carry: Any) -> Any:
        state, tokens, counts = carry
        token, after = _extend(model, inputs, state, sampling, dtype)
        return after, tokens.at[:, state.step].set(token), counts + ~state.done

    empty = jnp.zeros((rows, most), jnp.int32), jnp.zeros(rows, jnp.int32)
    _, tokens, counts = jax.lax.while_loop(going_on, extend, (_start(model, inputs, width + most, dtype), *empty))
    return tokens, counts
