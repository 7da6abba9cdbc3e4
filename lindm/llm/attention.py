"""Attention of the decoder: rotary position embedding, dense causal attention, and attention over a key-value cache.

Shapes: B rows, T tokens, S slots of a key-value cache, P shared prefixes, N query heads, K key-value heads, H head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK = 4, 128  # of causal attention: largest number of blocks of queries, smallest size of one


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens so far; slot j has position j. Slots behind a row's last token are never attended to."""

    keys: Array  # [num_layers, B, S, K, H]
    values: Array  # [num_layers, B, S, K, H]


class AttentionMask(NamedTuple):
    """Which keys each query may attend to, before a layer's sliding window is applied."""

    visible: Array  # [B, T, S] bool
    distance: Array  # [B, T, S] position of the query minus position of the key


def apply_rope(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotary position embedding: coordinates i and i + R/2 of x [B, T, heads, H] rotated by the i-th angle of the position.

    rope: cosines and sines [B, T, R/2] of the angles; the last H - R coordinates stay.
    """
    B, T, _, H = x.shape
    half = rope[0].shape[-1]
    chex.assert_shape(rope, (B, T, half))
    cos, sin = (t[:, :, None, :] for t in rope)
    left, right, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    rotated = [left * cos - right * sin, right * cos + left * sin]
    return jnp.concatenate([*rotated, rest] if 2 * half < H else rotated, axis=-1).astype(x.dtype)


def dense_attention(
    q: Array, k: Array, v: Array, segment_ids: Array | None, window: int = 0, scale: float = 0.0, softcap: float = 0.0
) -> Array:
    """softmax(scale q k) v over a token and the tokens before it in its segment: q [B, T, N, H], k, v [B, T, K, H] -> as q.

    Args:
      segment_ids: [B, T] document that a token of a packed row belongs to; None: one document per row.
      window: number of tokens that a query sees, itself included; 0: all.
      scale: 0 for 1 / sqrt(H).
      softcap: c > 0 takes c tanh(score / c) as score (Gemma 2).

    The queries are cut into up to `MAX_QUERY_BLOCKS` blocks, and a block meets only the keys up to its own end. The query heads
    that share a key-value head are rows of one product. All scores of a block exist at once: memory grows with T^2.
    """
    B, T, _, H = q.shape
    chex.assert_shape([k, v], (B, T, None, H))
    size, order = max(MIN_QUERY_BLOCK, -(-T // MAX_QUERY_BLOCKS)), jnp.arange(T)
    query_blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        distance = order[start:end, None] - order[None, :end]
        mask = ((distance >= 0) & (distance < window) if window else distance >= 0)[None]
        if segment_ids is not None:
            mask = mask & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
        query_blocks.append(_attend(q[:, start:end], k[:, :end], v[:, :end], mask, scale, softcap))
    return jnp.concatenate(query_blocks, axis=1)


def softcapped(scores: Array, softcap: float) -> Array:
    """softcap * tanh(scores / softcap); the scores where softcap is 0."""
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def _attend(q: Array, k: Array, v: Array, mask: Array, scale: float, softcap: float) -> Array:
    """Queries [B, T, N, H] over keys and values [B, S, K, H] under a mask [B or 1, T, S]."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
    scores = jnp.einsum("bkrh,bskh->bkrs", rows, k, preferred_element_type=jnp.float32) * (scale or H**-0.5)
    scores = jnp.where(mask[:, None, None], softcapped(scores, softcap).reshape(B, K, N // K, T, S), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, N // K * T, S)
    out = jnp.einsum("bkrs,bskh->bkrh", weights, v)
    return out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def cached_attention(q: Array, parts: Sequence[tuple[KVCache, Array]], scale: float = 0.0, softcap: float = 0.0) -> Array:
    """softmax(scale q k) v over the keys of all parts together: q [B, T, N, H] -> the same shape.

    A part is one layer's keys and values [P, S, K, H], each shared by B/P consecutive rows, and its mask [B, T, S]; scale and
    softcap are as in `dense_attention`.
    """
    (B, T, N, H), dtype = q.shape, q.dtype
    q = q.astype(jnp.float32) * (scale or H**-0.5)
    scores, sizes = [], []
    for cache, mask in parts:
        P, S, K, _ = cache.keys.shape
        chex.assert_shape([cache.keys, cache.values], (P, S, K, H))
        chex.assert_shape(mask, (B, T, S))
        rows = q.reshape(P, B // P * T, K, N // K, H)
        score = jnp.einsum("prkgh,pskh->prkgs", rows, cache.keys.astype(jnp.float32))
        score = jnp.where(mask.reshape(P, B // P * T, 1, 1, S), softcapped(score, softcap), jnp.finfo(jnp.float32).min)
        scores.append(score.reshape(B, T, N, S))
        sizes.append(S)
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    total = jnp.zeros((B, T, N, H), jnp.float32)
    for (cache, _), weight in zip(parts, jnp.split(weights, np.cumsum(sizes)[:-1].tolist(), axis=-1), strict=True):
        P, S, K, _ = cache.values.shape
        rows = weight.reshape(P, B // P * T, K, N // K, S)
        total = total + jnp.einsum("prkgs,pskh->prkgh", rows, cache.values.astype(jnp.float32)).reshape(B, T, N, H)
    return total.astype(dtype)
