r"""Causal attention in blocks of queries and keys: the memory of both passes grows linearly with the number of tokens.

    p_ts = exp(s_ts - m_t),   l_t = sum_s p_ts,   out_t = sum_s p_ts v_s / l_t,   m_t = max_s s_ts

A query block meets one key block at a time; m, l and the sum of p v are corrected whenever the maximum grows (Milakov and
Gimelshein 2018; Dao et al. 2022, FlashAttention, algorithms 1 and 4). The backward pass computes the scores again from q, k and
log l + m. Pairs of blocks in which no query sees a key, because of the order, the window or the segments, cost nothing.

Shapes: B rows, T tokens, N query heads, K key-value heads, G = N / K, H head_dim; n blocks of b = BLOCK tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.llm.attention import softcapped

BLOCK = 128  # tokens of a block of queries or keys
HIDDEN = float(jnp.finfo(jnp.float32).min)  # score of a key that a query does not see


def blockwise_attention(
    q: Array, k: Array, v: Array, segment_ids: Array | None, window: int = 0, scale: float = 0.0, softcap: float = 0.0
) -> Array:
    """The same as `lindm.llm.attention.dense_attention`, in memory that is linear in T."""
    T = q.shape[1]
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    return _attend(q, k, v, segment_ids, 0 if window >= T else window, scale or q.shape[-1] ** -0.5, softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q: Array, k: Array, v: Array, segment_ids: Array, window: int, scale: float, softcap: float) -> Array:
    return _forward(q, k, v, segment_ids, window, scale, softcap)[0]


def _forward(q: Array, k: Array, v: Array, segment_ids: Array, window: int, scale: float, softcap: float) -> tuple[Array, Any]:
    blocks = _query_blocks(q, k.shape[2]), _key_blocks(k), _key_blocks(v)
    segments = _token_blocks(segment_ids)
    n, B, K, G, b, H = blocks[0].shape

    def meet(sums: tuple[Array, ...], pair: tuple[Any, Any]) -> tuple[tuple[Array, ...], None]:
        i, j = pair
        visible = _visible(segments, i, j, window)

        def add(sums: tuple[Array, ...]) -> tuple[Array, ...]:
            largest, total, out = sums
            scores = softcapped(_products(blocks[0][i], blocks[1][j]) * scale, softcap)
            scores = jnp.where(visible[:, None, None], scores, HIDDEN)
            new = jnp.maximum(largest, scores.max(-1))
            weights = jnp.where(visible[:, None, None], jnp.exp(scores - new[..., None]), 0)
            kept = jnp.exp(largest - new)
            values = _weighted(weights.astype(v.dtype), blocks[2][j])
            return new, total * kept + weights.sum(-1), out * kept[..., None] + values

        block = jax.lax.cond(visible.any(), add, lambda sums: sums, tuple(x[i] for x in sums))
        return tuple(x.at[i].set(y) for x, y in zip(sums, block, strict=True)), None

    rows = (n, B, K, G, b)
    start = (jnp.full(rows, HIDDEN, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, H), jnp.float32))
    (largest, total, out), _ = jax.lax.scan(meet, start, _block_pairs(n, window))
    out = _unblocked(out / total[..., None], q.shape[1]).astype(q.dtype)
    return out, (q, k, v, segment_ids, out, largest + jnp.log(total))


def _backward(window: int, scale: float, softcap: float, saved: Any, g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segment_ids, out, log_total = saved
    K, T = k.shape[2], q.shape[1]
    queries, keys, values, grads = _query_blocks(q, K), _key_blocks(k), _key_blocks(v), _query_blocks(g, K)
    segments = _token_blocks(segment_ids)
    mean_grad = _query_blocks((out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1, keepdims=True), K)  # [n, B, K, G, b, 1]

    def meet(sums: tuple[Array, ...], pair: tuple[Any, Any]) -> tuple[tuple[Array, ...], None]:
        i, j = pair
        visible = _visible(segments, i, j, window)

        def add(sums: tuple[Array, ...]) -> tuple[Array, ...]:
            scores = softcapped(_products(queries[i], keys[j]) * scale, softcap)
            weights = jnp.where(visible[:, None, None], jnp.exp(scores - log_total[i][..., None]), 0)
            score_grads = weights * (_products(grads[i], values[j]) - mean_grad[i])
            if softcap:
                score_grads = score_grads * (1 - (scores / softcap) ** 2)
            score_grads = (score_grads * scale).astype(q.dtype)
            dq, dk, dv = sums
            dq = dq + _weighted(score_grads, keys[j])
            return dq, dk + _collected(score_grads, queries[i]), dv + _collected(weights.astype(v.dtype), grads[i])

        at = (i, j, j)
        block = jax.lax.cond(visible.any(), add, lambda sums: sums, tuple(x[a] for x, a in zip(sums, at, strict=True)))
        return tuple(x.at[a].set(y) for x, a, y in zip(sums, at, block, strict=True)), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries, keys, values))
    (dq, dk, dv), _ = jax.lax.scan(meet, start, _block_pairs(len(queries), window))
    dk, dv = (_unblocked(x[:, :, :, None], T) for x in (dk, dv))
    return _unblocked(dq, T).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _block_pairs(n: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a query block and a key block that the order of the tokens and the window leave."""
    first = [max(0, i * BLOCK - window + 1) // BLOCK if window else 0 for i in range(n)]
    pairs = np.array([(i, j) for i in range(n) for j in range(first[i], i + 1)], np.int32)
    return pairs[:, 0], pairs[:, 1]


def _visible(segments: Array, i: Array, j: Array, window: int) -> Array:
    """Which keys of block j each query of block i sees: [B, b, b] bool."""
    order = jnp.arange(BLOCK)
    distance = (i - j) * BLOCK + order[:, None] - order[None, :]
    inside = (distance >= 0) & (distance < window) if window else distance >= 0
    return inside[None] & (segments[i][:, :, None] == segments[j][:, None, :])


# --- layouts and products -------------------------------------------------------------------------------------------------


def _query_blocks(x: Array, K: int) -> Array:
    """[B, T, N, H] -> [n, B, K, G, b, H]"""
    B, T, N, H = x.shape
    padded = jnp.pad(x, [(0, 0), (0, -T % BLOCK), (0, 0), (0, 0)])
    return padded.reshape(B, -1, BLOCK, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)


def _key_blocks(x: Array) -> Array:
    """[B, T, K, H] -> [n, B, K, b, H]"""
    return _query_blocks(x, x.shape[2])[:, :, :, 0]


def _token_blocks(segment_ids: Array) -> Array:
    """[B, T] -> [n, B, b]; padding belongs to segment -1, but stands behind every token."""
    B, T = segment_ids.shape
    padded = jnp.pad(segment_ids, [(0, 0), (0, -T % BLOCK)], constant_values=-1)
    return padded.reshape(B, -1, BLOCK).transpose(1, 0, 2)


def _unblocked(blocks: Array, T: int) -> Array:
    """[n, B, K, G, b, H] -> [B, T, N, H]"""
    n, B, K, G, b, H = blocks.shape
    return blocks.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * b, K * G, H)[:, :T]


def _products(rows: Array, keys: Array) -> Array:
    """[B, K, G, b, H], [B, K, b, H] -> scores [B, K, G, b, b] in float32"""
    return jnp.einsum("bkgth,bksh->bkgts", rows, keys, preferred_element_type=jnp.float32)


def _weighted(weights: Array, values: Array) -> Array:
    """[B, K, G, b, b], [B, K, b, H] -> sums over the keys [B, K, G, b, H] in float32"""
    return jnp.einsum("bkgts,bksh->bkgth", weights, values, preferred_element_type=jnp.float32)


def _collected(weights: Array, rows: Array) -> Array:
    """[B, K, G, b, b], [B, K, G, b, H] -> sums over the queries and heads of each key [B, K, b, H] in float32"""
    return jnp.einsum("bkgts,bkgth->bksh", weights, rows, preferred_element_type=jnp.float32)
