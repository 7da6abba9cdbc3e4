"""Causal attention on each platform: in blocks on CPUs, the splash kernel on TPUs, cuDNN's flash attention on GPUs.

All of them compute `lindm.llm.attention.dense_attention`: a token attends to itself and to the tokens before it in its segment
and in its sliding window. `attention_for` selects the kernel by the devices that the program is compiled for, which need not be
those of this machine.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh, PartitionSpec

from lindm.llm.attention import dense_attention
from lindm.llm.blockwise_attention import blockwise_attention
from lindm.llm.parallel.sharding import BATCH_SPEC

DENSE_TOKENS = 512  # rows up to this length are attended to densely: that computes the scores once less
SPLASH_BLOCK, SPLASH_LANES = 512, 128  # tokens of a block of the splash kernel, and what T must be a multiple of
WINDOW_SCOPE = "attention_window"  # name scope of the splash kernel, followed by the window; `lindm plan` reads it
CUDNN_HEAD_DIM, CUDNN_TOKENS = 128, 8192  # largest: of every GPU that cuDNN supports; so that the mask stays below 128 MiB a row


class CausalAttention(Protocol):
    """Queries [B, T, N, H], keys and values [B, T, K, H] -> as the queries; the arguments of `dense_attention`."""

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        segment_ids: Array | None,
        window: int = 0,
        scale: float = 0.0,
        softcap: float = 0.0,
    ) -> Array: ...


def attention_for(mesh: Mesh | None) -> CausalAttention:
    """The kernel of the devices of a mesh; without a mesh, of the default device."""
    platform = (jax.devices() if mesh is None else mesh.devices.flat)[0].platform
    kernels: dict[str, CausalAttention] = {"tpu": splash_attention, "gpu": cudnn_attention}
    kernel = kernels.get(platform, causal_attention)
    return kernel if mesh is None or mesh.size == 1 else _on_shards(kernel, mesh)


def causal_attention(
    q: Array, k: Array, v: Array, segment_ids: Array | None, window: int = 0, scale: float = 0.0, softcap: float = 0.0
) -> Array:
    """Dense attention of short rows, blockwise attention of longer ones; runs on every platform."""
    attention = dense_attention if q.shape[1] <= DENSE_TOKENS else blockwise_attention
    return attention(q, k, v, segment_ids, window, scale, softcap)


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    window: int = 0,
    scale: float = 0.0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Array:
    """JAX's splash kernel for TPUs. Rows are padded to a multiple of its blocks; the padding stands behind every token.

    Args: interpret: runs the kernel on any platform, slowly.
    """
    T, N, H = q.shape[1:]
    block = min(SPLASH_BLOCK, -(-T // SPLASH_LANES) * SPLASH_LANES)
    padding = -T % block
    if window >= T:
        window = 0

    def rows(x: Array) -> Array:
        """[B, T, heads, H] -> [B, heads, padded T, H]"""
        return jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)]).transpose(0, 2, 1, 3)

    shape = (T + padding, T + padding)
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    phases = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**dict.fromkeys((*phases, "block_q_dq", "block_kv_dq"), block)),
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    ids = None if segment_ids is None else jnp.pad(segment_ids, [(0, 0), (0, padding)], constant_values=-1)
    segments = None if ids is None else splash.SegmentIds(ids, ids)
    scaled = (q.astype(jnp.float32) * (scale or H**-0.5)).astype(q.dtype)
    with jax.named_scope(f"{WINDOW_SCOPE}{window}"):
        out = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(rows(scaled), rows(k), rows(v), segments)
    assert isinstance(out, Array)  # the kernel has residuals beside it only where it is asked to save them
    return out.transpose(0, 2, 1, 3)[:, :T]


def cudnn_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    window: int = 0,
    scale: float = 0.0,
    softcap: float = 0.0,
    implementation: Any = "cudnn",
) -> Array:
    """cuDNN's flash attention. What it does not support, `causal_attention` computes.

    cuDNN's causal mask knows nothing of segments, and its sequence lengths describe one document per row. So the segments are a
    mask [B, 1, T, T], which all heads and layers share and which cuDNN reads as a bias in the dtype of the queries.

    Args: implementation: of `jax.nn.dot_product_attention`; "xla" computes the same on any platform.
    """
    T, H = q.shape[1], q.shape[-1]
    if softcap or q.dtype.itemsize != 2 or H % 8 or H > CUDNN_HEAD_DIM or T % 2 or T > CUDNN_TOKENS:
        return causal_attention(q, k, v, segment_ids, window, scale, softcap)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None, :],
        scale=scale or H**-0.5,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )


def _on_shards(kernel: CausalAttention, mesh: Mesh) -> CausalAttention:
    """A kernel that every device runs on its own rows and heads: XLA cannot divide a kernel between devices by itself.

    Where `tensor` does not divide the key-value heads, each of its devices computes all heads.
    """

    def attend(
        q: Array,
        k: Array,
        v: Array,
        segment_ids: Array | None,
        window: int = 0,
        scale: float = 0.0,
        softcap: float = 0.0,
    ) -> Array:
        one = functools.partial(kernel, window=window, scale=scale, softcap=softcap)
        if kernel is causal_attention and q.shape[1] <= DENSE_TOKENS:
            return one(q, k, v, segment_ids)
        heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
        spec = PartitionSpec(*BATCH_SPEC, None, heads, None)
        if segment_ids is None:
            segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
        sharded: Callable[..., Array] = jax.shard_map(
            one, mesh=mesh, in_specs=(spec, spec, spec, BATCH_SPEC), out_specs=spec, check_vma=False
        )
        return sharded(q, k, v, segment_ids)

    return attend
