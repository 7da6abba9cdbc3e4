"""The attention kernels of each platform against the dense form: values and gradients."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.llm.attention import dense_attention
from lindm.llm.attention_kernels import (
    CUDNN_TOKENS,
    DENSE_TOKENS,
    attention_for,
    causal_attention,
    cudnn_attention,
    splash_attention,
)
from lindm.llm.blockwise_attention import BLOCK, blockwise_attention
from lindm.llm.parallel.sharding import make_mesh

RNG = np.random.default_rng(1)
PLAIN = {"window": 0, "scale": 0.0, "softcap": 0.0}
GEMMA = {"window": 70, "scale": 0.3, "softcap": 2.0}


def inputs(T, heads=4, kv_heads=2, head_dim=8, rows=2, dtype=jnp.float32):
    """Queries, keys, values, weights of the outputs, and segments: documents of any lengths with padding, and a long one."""
    sizes = [(rows, T, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    arrays = [jnp.asarray(RNG.normal(size=size), dtype) for size in sizes]
    segments = np.sort(RNG.integers(0, 4, (rows, T)), axis=1)
    segments[0, -T // 5 :] = -1
    segments[-1] = np.arange(T) >= T - 3  # a document longer than every window
    return *arrays, jnp.asarray(segments, jnp.int32)


def value_and_grads(attention, q, k, v, weights, segments, **options):
    """The output, and the gradients of its weighted sum."""

    def loss(q, k, v):
        out = attention(q, k, v, segments, **options)
        return (out.astype(jnp.float32) * weights.astype(jnp.float32)).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads


def assert_like_dense(attention, arrays, atol, **options):
    ours, wanted = value_and_grads(attention, *arrays, **options), value_and_grads(dense_attention, *arrays, **options)
    for mine, dense in zip(ours, wanted, strict=True):
        assert mine.dtype == dense.dtype
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(dense, np.float32), atol=atol)


@pytest.mark.parametrize(
    ("T", "options"),
    [
        (2 * BLOCK + 37, PLAIN),
        (2 * BLOCK + 37, GEMMA),
        (3 * BLOCK, PLAIN | {"window": BLOCK + 1}),  # the window ends in a block before the one before
        (5, PLAIN),
    ],
)
def test_blockwise_attention_equals_dense_attention(T, options):
    assert_like_dense(blockwise_attention, inputs(T), 1e-5, **options)


def test_blockwise_attention_of_whole_rows_in_bfloat16():
    *arrays, _ = inputs(BLOCK + 9, dtype=jnp.bfloat16)
    assert_like_dense(blockwise_attention, (*arrays, None), 0.06, **PLAIN)


def test_blockwise_attention_survives_scores_far_apart():
    q, k, v, weights, segments = inputs(BLOCK + 50)
    assert_like_dense(blockwise_attention, (100 * q, k, v, weights, segments), 2e-3, **PLAIN)


def test_memory_of_blockwise_attention_is_linear_in_the_tokens():
    def temporaries(T):
        program = jax.jit(functools.partial(value_and_grads, blockwise_attention))
        return program.lower(*inputs(T, rows=1)).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16 * BLOCK) < 2.1 * temporaries(8 * BLOCK)


@pytest.mark.parametrize(("T", "options"), [(200, PLAIN), (200, GEMMA), (600, PLAIN | {"window": 530})])
def test_the_splash_kernel_equals_dense_attention(T, options):
    with jax.enable_x64(False):  # as training runs; the kernel's indices have 32 bits
        arrays = inputs(T, heads=2, kv_heads=1, head_dim=64, rows=2)
        assert_like_dense(functools.partial(splash_attention, interpret=True), arrays, 2e-5, **options)


def test_cudnn_receives_what_means_dense_attention():
    kernel = functools.partial(cudnn_attention, implementation="xla")
    arrays = inputs(60, dtype=jnp.bfloat16)
    assert_like_dense(kernel, arrays, 0.06, **PLAIN)
    assert_like_dense(kernel, arrays, 0.06, **PLAIN | {"window": 11, "scale": 0.3})
    assert_like_dense(kernel, (*arrays[:-1], None), 0.06, **PLAIN)


@pytest.mark.parametrize(
    ("T", "head_dim", "dtype", "softcap"),
    [
        (60, 8, jnp.float32, 0.0),
        (60, 8, jnp.bfloat16, 2.0),
        (60, 12, jnp.bfloat16, 0.0),
        (60, 136, jnp.bfloat16, 0.0),
        (61, 8, jnp.bfloat16, 0.0),
        (CUDNN_TOKENS + 2, 8, jnp.bfloat16, 0.0),
    ],
)
def test_what_cudnn_does_not_support_is_computed_without_it(T, head_dim, dtype, softcap, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **options: calls.append(options) or q)

    def trace(T, head_dim, dtype, softcap):
        q, segments = jax.ShapeDtypeStruct((1, T, 1, head_dim), dtype), jax.ShapeDtypeStruct((1, T), jnp.int32)
        jax.eval_shape(lambda q, segments: cudnn_attention(q, q, q, segments, softcap=softcap), q, segments)

    trace(T, head_dim, dtype, softcap)
    assert not calls
    trace(60, 8, jnp.bfloat16, 0.0)
    assert [options["implementation"] for options in calls] == ["cudnn"]


def test_the_kernel_follows_the_devices_of_the_mesh():
    def mesh(platform):
        return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]), size=1)

    assert attention_for(mesh("tpu")) is splash_attention
    assert attention_for(mesh("gpu")) is cudnn_attention
    assert attention_for(mesh("cpu")) is attention_for(None) is causal_attention


@pytest.mark.parametrize(("sizes", "kv_heads"), [({"fsdp": 2, "tensor": 2}, 2), ({"data": 2, "tensor": 2}, 1)])
def test_attention_on_several_devices_equals_dense_attention(sizes, kv_heads):
    mesh = make_mesh(sizes, jax.devices()[:4])
    assert_like_dense(attention_for(mesh), inputs(DENSE_TOKENS + 20, kv_heads=kv_heads), 1e-5, **PLAIN | {"window": 300})
