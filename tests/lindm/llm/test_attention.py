"""Dense attention against loops of plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.llm.attention import MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK, dense_attention

RNG = np.random.default_rng(0)


def softmaxed(q, k, v, mask, scale=0.0, softcap=0.0):
    """Attention one query and one head at a time, in double precision."""
    B, T, K, E = q.shape
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(B, T, K):
        sees = np.flatnonzero(mask[b, t])
        group = h * k.shape[2] // K
        scores = k[b, sees, group].astype(float) @ q[b, t, h] * (scale or 1 / np.sqrt(E))
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, sees, group]
    return out


CASES = [
    (5, 0, 0.0, 0.0),
    (MIN_QUERY_BLOCK, 7, 0.0, 0.0),
    (MIN_QUERY_BLOCK + 3, 0, 0.3, 1.5),
    (MAX_QUERY_BLOCKS * MIN_QUERY_BLOCK + 6, 130, 0.0, 0.0),
]


@pytest.mark.parametrize(("T", "window", "scale", "softcap"), CASES)
def test_attention_in_query_blocks_equals_attention(T, window, scale, softcap):
    B, K, G, E = 1, 4, 2, 4
    q, k, v = (RNG.normal(size=(B, T, heads, E)).astype(np.float32) for heads in (K, G, G))
    segments = np.sort(RNG.integers(0, 3, (B, T)), axis=1)  # three documents in a row
    order = np.arange(T)
    mask = (order[None, :] <= order[:, None]) & (segments[:, :, None] == segments[:, None, :])
    mask &= (order[:, None] - order[None, :] < (window or T))[None]
    output = jax.jit(dense_attention, static_argnums=(4, 5, 6))(q, k, v, jnp.asarray(segments), window, scale, softcap)
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output, softmaxed(q, k, v, mask, scale, softcap), atol=2e-6)


def test_attention_in_bfloat16_keeps_its_softmax_in_single_precision():
    T, E = 6, 4
    q, k, v = (jnp.asarray(RNG.normal(size=(1, T, 2, E)), jnp.bfloat16) for _ in range(3))
    output = dense_attention(q, k, v, None)
    assert output.dtype == jnp.bfloat16
    wanted = softmaxed(*(np.asarray(x, np.float32) for x in (q, k, v)), np.tril(np.ones((1, T, T), bool)))
    np.testing.assert_allclose(output, wanted, atol=0.03)
