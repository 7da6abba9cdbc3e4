r"""The decoder of the Llama family in Flax NNX; the table of `lindm.llm.model_families` has what differs between families.

    x = embedding[input_ids]
    for each layer:   x += O attention(rope(Q norm(x)), rope(K norm(x)), V norm(x))
                      x += Down (silu(Gate norm(x)) * (Up norm(x)))
    logits = lm_head norm(x)

Switches of `ModelConfig` move or add norms, scale the embedding, the two sums, the scores and the logits, and leave layers
without rotary embedding.

All layers are one `DecoderLayer` whose weights have a leading axis of layers, [num_layers, in, out], and one `lax.scan` runs over
it: compile time does not grow with the number of layers. `unroll` unrolls the scan, which is faster where one token is decoded
at a time. `remat` selects what the backward pass recomputes. Weights are multiplied as x @ W, so a kernel is [in, out], the
transpose of a torch weight.

Precision: weights are cast to the dtype of the activations where they are used, so float32 master weights can compute in
bfloat16. Norms, rotary angles, the softmax and the logits are always in float32.

Shapes: B rows, T tokens, S slots of a key-value cache, D hidden_size, N query heads, K key-value heads, H head_dim, V vocab_size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from lindm.llm.attention import (
    AttentionMask,
    KVCache,
    apply_rope,
    cached_attention,
    softcapped,
)
from lindm.llm.attention_kernels import CausalAttention, causal_attention
from lindm.llm.config import ModelConfig, Remat
from lindm.llm.rope_tables import in_long_document, rope_tables

ShardingConstraint = Callable[[Array], Array]
"""Constrains the sharding of an array; the identity on one device."""

Attend = Callable[[Array, Array, Array], tuple[Array, KVCache | None]]
"""Queries [B, T, N, H], keys and values [B, T, K, H] of one layer -> attended values [B, T, N, H], and the layer's cache."""

LayerAttention = Callable[[Array, KVCache | None, KVCache | None], Attend]
"""Sliding window [] of a layer (0: none), its keys and values [B, S, K, H], and those of P prefixes [P, S', K, H], each shared by
B/P consecutive rows -> the layer's attention."""

MATMUL = "matmul"  # checkpoint name of the products with weights, which are most of the arithmetic


class FrozenParam(nnx.Variable):
    """A weight that is not trained."""


class Linear(nnx.Module):
    """y = x W + b, plus lora_scale (x A) B if an adapter was added (`lindm.llm.lora`); every weight is [num_layers, ...].

    With `dropout_keys` [num_layers], the adapter's x has dropout.
    """

    def __init__(self, num_layers: int, n_in: int, n_out: int, bias: bool, init_std: float, rngs: nnx.Rngs, dtype: DTypeLike):
        self.kernel: Any = nnx.data(nnx.Param(init_std * jax.random.normal(rngs.params(), (num_layers, n_in, n_out), dtype)))
        self.bias = nnx.data(nnx.Param(jnp.zeros((num_layers, n_out), dtype)) if bias else None)
        self.lora_a: Any = nnx.data(None)  # [num_layers, in, rank]
        self.lora_b: Any = nnx.data(None)  # [num_layers, rank, out]
        self.lora_scale = 1.0
        self.lora_dropout = 0.0  # probability
        self.dropout_keys: Any = nnx.data(None)  # set in training steps alone
        self.shape = (num_layers, n_in, n_out)  # of the kernel, quantized or not

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel
        if isinstance(kernel, nnx.Param):
            y = trained_matmul(x, kernel[...].astype(x.dtype))
        else:
            y = x @ (kernel[...].astype(x.dtype) if isinstance(kernel, nnx.Variable) else kernel.dequantize(x.dtype))
        if self.bias is not None:
            y = y + _align_last(self.bias[...].astype(x.dtype), y)
        if self.lora_a is not None and self.lora_b is not None:
            if self.dropout_keys is not None:
                kept = jax.random.bernoulli(self.dropout_keys[...], 1 - self.lora_dropout, x.shape)
                x = jnp.where(kept, x / (1 - self.lora_dropout), 0)
            low_rank = trained_matmul(x, self.lora_a[...].astype(x.dtype)) * self.lora_scale  # scaled where it is narrow
            y = y + trained_matmul(low_rank, self.lora_b[...].astype(x.dtype))
        return checkpoint_name(y, MATMUL)


class RMSNorm(nnx.Module):
    """(offset + weight) * x / sqrt(mean(x^2) + eps) over the last axis, in float32."""

    def __init__(self, shape: tuple[int, ...], eps: float, dtype: DTypeLike, offset: float = 0.0):
        self.weight = nnx.Param(jnp.full(shape, 1 - offset, dtype))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Array) -> Array:
        normalized = x.astype(jnp.float32)
        normalized = normalized * jax.lax.rsqrt(jnp.mean(normalized * normalized, axis=-1, keepdims=True) + self.eps)
        if self.offset:  # the sum would lose digits in the dtype of the activations
            weight = _align_last(self.weight[...].astype(jnp.float32) + self.offset, x)
            return (weight * normalized).astype(x.dtype)
        return _align_last(self.weight[...].astype(x.dtype), x) * normalized.astype(x.dtype)


class DecoderLayer(nnx.Module):
    """Attention and the gated MLP; the weights of all layers are stacked."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        layers, hidden, head_dim = config.num_layers, config.hidden_size, config.head_dim
        queries, keys, inner = config.num_heads * head_dim, config.num_kv_heads * head_dim, config.intermediate_size

        def linear(n_in: int, n_out: int, bias: bool) -> Linear:
            return Linear(layers, n_in, n_out, bias, config.init_std, rngs, dtype)

        def norm(size: int, wanted: bool = True) -> Any:
            return nnx.data(RMSNorm((layers, size), config.rms_norm_eps, dtype, config.norm_offset) if wanted else None)

        before, after = config.norm_order != "after", config.norm_order != "before"
        self.norm_attention, self.norm_attention_out = norm(hidden, before), norm(hidden, after)
        self.q = linear(hidden, queries, config.qkv_bias)
        self.k = linear(hidden, keys, config.qkv_bias)
        self.v = linear(hidden, keys, config.qkv_bias)
        self.o = linear(queries, hidden, config.o_bias)
        all_heads = config.qk_norm == "all"
        self.norm_q = norm(queries if all_heads else head_dim, config.qk_norm != "none")
        self.norm_k = norm(keys if all_heads else head_dim, config.qk_norm != "none")
        self.norm_mlp, self.norm_mlp_out = norm(hidden, before), norm(hidden, after)
        self.gate = linear(hidden, inner, config.mlp_bias)
        self.up = linear(hidden, inner, config.mlp_bias)
        self.down = linear(inner, hidden, config.mlp_bias)
        self.config = config

    def __call__(self, x: Array, rope: tuple[Array, Array], attend: Attend) -> tuple[Array, KVCache | None]:
        """One layer (its weights without the axis of layers): x [B, T, D] -> the same shape, and the layer's cache.

        Args:
          rope: cosines and sines [B, T, R/2].
          attend: attention over the keys of this call, or over a cache to which it adds them.
        """
        config = self.config
        h = _optional(self.norm_attention)(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if config.qk_norm == "all":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (y.reshape(*h.shape[:2], -1, config.head_dim) for y in (q, k, v))
        if config.qk_norm == "heads":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        attended, cache = attend(q, k, v)
        attended = _optional(self.norm_attention_out)(self.o(attended.reshape(*h.shape[:2], -1)))
        x = x + _scaled(attended, config.residual_scale)
        h = _optional(self.norm_mlp)(x)
        activation = jax.nn.silu if config.activation == "silu" else jax.nn.gelu  # gelu is by tanh
        h = _optional(self.norm_mlp_out)(self.down(activation(self.gate(h)) * self.up(h)))
        return x + _scaled(h, config.residual_scale), cache


def _optional(module: RMSNorm | None) -> Callable[[Array], Array]:
    return module or _identity


def _scaled(x: Array, scale: float) -> Array:
    return x if scale == 1 else x * scale


def _identity(x: Array) -> Array:
    return x


class Decoder(nnx.Module):
    """Token ids -> hidden states -> logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        def matrix(*shape: int) -> nnx.Param:
            return nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape, dtype))

        self.config = config
        self.embedding = matrix(config.vocab_size, config.hidden_size)
        self.blocks = DecoderLayer(config, rngs, dtype)
        self.norm = RMSNorm((config.hidden_size,), config.rms_norm_eps, dtype, config.norm_offset)
        self.lm_head = nnx.data(None if config.tie_word_embeddings else matrix(config.hidden_size, config.vocab_size))

    def last_hidden_state(
        self,
        input_ids: Array,
        positions: Array,
        segment_ids: Array | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: Remat = "none",
        unroll: bool = False,
        attention: CausalAttention = causal_attention,
        constrain: ShardingConstraint = _identity,
        constrain_embedded: ShardingConstraint = _identity,
    ) -> Array:
        """Hidden states [B, T, D] after the final norm; a token attends to itself and to the tokens before it in its segment.

        Args:
          input_ids: [B, T]; positions: [B, T] within the document.
          segment_ids: [B, T] document that a token of a packed row belongs to; None: one document per row.
          dtype: of the activations.
          attention: the kernel (`lindm.llm.attention_kernels`).
          constrain: applied to the activations between layers; constrain_embedded: to the embedded tokens, before that.
        """
        x = constrain(constrain_embedded(self._embed(input_ids, dtype)))
        long = in_long_document(self.config, positions, segment_ids)
        attend = self._causal_attention(x.shape[1], segment_ids, attention)
        x, _, _ = self._apply_layers(x, positions, attend, long=long, remat=remat, unroll=unroll, constrain=constrain)
        return self.norm(x)

    def hidden_states(self, input_ids: Array, positions: Array, *, dtype: DTypeLike = jnp.float32) -> Array:
        """The residual stream [num_layers + 1, B, T, D]: the embedded tokens and the output of each layer, before the final norm.

        Args: input_ids, positions: [B, T].
        """
        x, long = self._embed(input_ids, dtype), in_long_document(self.config, positions, None)
        attend = self._causal_attention(x.shape[1], None, causal_attention)
        _, _, outputs = self._apply_layers(x, positions, attend, long=long, output_hidden_states=True)
        return jnp.concatenate([x[None], outputs])

    def forward_with_cache(
        self,
        input_ids: Array,
        start: Array,
        cache: KVCache,
        prefix: tuple[KVCache, Array] | None = None,
        *,
        long: Array | bool = False,
        dtype: DTypeLike = jnp.float32,
        unroll: bool = True,
    ) -> tuple[Array, KVCache]:
        """Hidden states [B, T, D] of T further tokens after the final norm, and the cache with their keys and values.

        Args:
          input_ids: [B, T]; rows of different lengths are padded at the end with any tokens, which the next call overwrites.
          start: [B] number of tokens of each row in the cache, at most S - T.
          prefix: what precedes the rows: the caches of P prefixes [num_layers, P, ...] and their lengths [P]. The first B/P rows
            continue the first prefix, and so on. A prefix is read, not copied.
          long: [B, 1] rows whose text becomes longer than `original_max_position_embeddings` of longrope, in any call: keys in
            the cache keep their rotation.
        """
        chex.assert_rank([input_ids, start, cache.keys], [2, 1, 5])
        slots = jnp.arange(cache.keys.shape[2])
        own = start[:, None] + jnp.arange(input_ids.shape[1])[None]  # [B, T]
        distance = own[:, :, None] - slots[None, None, :]
        masks, positions, prefix_cache = [AttentionMask(distance >= 0, distance)], own, None
        if prefix is not None:
            prefix_cache, lengths = prefix
            length = jnp.repeat(lengths, input_ids.shape[0] // lengths.shape[0])
            positions = own + length[:, None]
            before = jnp.arange(prefix_cache.keys.shape[2])
            visible = jnp.broadcast_to((before[None] < length[:, None])[:, None], (*input_ids.shape, len(before)))
            masks.append(AttentionMask(visible, positions[:, :, None] - before[None, None, :]))
        x = self._embed(input_ids, dtype)
        caches = {"cache": cache, "prefix": prefix_cache}
        attend = self._cached_attention(start, masks)
        x, cache, _ = self._apply_layers(x, positions, attend, **caches, long=long, unroll=unroll)
        return self.norm(x), cache

    def init_cache(self, rows: int, slots: int, dtype: DTypeLike = jnp.float32) -> KVCache:
        """An empty cache with `slots` tokens for each of `rows` rows."""
        shape = (self.config.num_layers, rows, slots, self.config.num_kv_heads, self.config.head_dim)
        return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    def logits(self, hidden: Array, constrain: ShardingConstraint = _identity) -> Array:
        """[..., D] -> [..., V] in float32; `constrain` is applied to the output matrix [D, V]."""
        kernel = self.embedding[...].T if self.lm_head is None else self.lm_head[...]
        logits = jnp.matmul(hidden, constrain(kernel.astype(hidden.dtype)), preferred_element_type=jnp.float32)
        return softcapped(_scaled(logits, self.config.logits_scale), self.config.logits_softcap)

    def _embed(self, input_ids: Array, dtype: DTypeLike) -> Array:
        return _scaled(self.embedding[...][input_ids].astype(dtype), self.config.embedding_scale)

    def _causal_attention(self, T: int, segment_ids: Array | None, attention: CausalAttention) -> LayerAttention:
        """Attention over the keys of a call with T tokens per row."""
        config = self.config
        windows = sorted({window if window < T else 0 for window in config.sliding_windows} or {0})
        shared = {"segment_ids": segment_ids, "scale": config.attention_scale, "softcap": config.attention_softcap}
        kernels = [functools.partial(attention, window=window, **shared) for window in windows]

        def of_layer(window: Array, cache: KVCache | None, prefix: KVCache | None) -> Attend:
            if len(kernels) == 1:
                return lambda q, k, v: (kernels[0](q, k, v), None)
            number = jnp.argmax(jnp.array(windows) == jnp.where(window < T, window, 0))
            return lambda q, k, v: (jax.lax.switch(number, kernels, q, k, v), None)

        return of_layer

    def _cached_attention(self, start: Array, masks: Sequence[AttentionMask]) -> LayerAttention:
        """Attention over the slots of a cache, in which the first token has the slot `start` [B], and of a prefix.

        masks: of the cache and, with a prefix, of the prefix.
        """
        config = self.config
        write = jax.vmap(lambda slots, new, at: jax.lax.dynamic_update_slice_in_dim(slots, new, at, axis=0))

        def of_layer(window: Array, cache: KVCache | None, prefix: KVCache | None) -> Attend:
            visible = [
                mask.visible & ((window == 0) | (mask.distance < window)) if config.sliding_windows else mask.visible
                for mask in masks
            ]

            def attend(q: Array, k: Array, v: Array) -> tuple[Array, KVCache]:
                assert cache is not None
                extended = KVCache(
                    keys=write(cache.keys, k.astype(cache.keys.dtype), start),
                    values=write(cache.values, v.astype(cache.values.dtype), start),
                )
                parts = list(zip([extended] if prefix is None else [extended, prefix], visible, strict=True))
                return cached_attention(q, parts, config.attention_scale, config.attention_softcap), extended

            return attend

        return of_layer

    def _apply_layers(
        self,
        x: Array,
        positions: Array,
        attention_of_layer: LayerAttention,
        *,
        cache: KVCache | None = None,
        prefix: KVCache | None = None,
        long: Array | bool = False,
        remat: Remat = "none",
        unroll: bool = False,
        constrain: ShardingConstraint = _identity,
        output_hidden_states: bool = False,
    ) -> tuple[Array, Any, Any]:
        """The output of the last layer [B, T, D], the cache, and, if wanted, the outputs of all layers [num_layers, B, T, D]."""
        config = self.config
        ropes, rope_of_layer = rope_tables(config, positions, long)
        windows = jnp.array(config.sliding_windows or [0] * config.num_layers, jnp.int32)
        graphdef, weights = nnx.split(self.blocks)

        def layer(x: Array, inputs):
            weights, window, kind, layer_cache, layer_prefix = inputs
            cosines, sines = (table[kind if len(table) > 1 else 0] for table in ropes)
            attend = attention_of_layer(window, layer_cache, layer_prefix)
            x, layer_cache = nnx.merge(graphdef, weights)(x, (cosines, sines), attend)
            return constrain(x), (layer_cache, x if output_hidden_states else None)

        saved = jax.checkpoint_policies.save_only_these_names(*((MATMUL,) if remat == "selective" else ()))
        body = layer if remat == "none" else jax.checkpoint(layer, prevent_cse=False, policy=saved)
        inputs = (weights, windows, jnp.array(rope_of_layer), cache, prefix)
        x, (cache, outputs) = jax.lax.scan(body, x, inputs, unroll=config.num_layers if unroll else 1)
        return x, cache, outputs


@jax.custom_vjp
def trained_matmul(x: Array, kernel: Array) -> Array:
    """x @ kernel: [..., in], [in, out] -> [..., out], with the gradient of the kernel as one contraction of x with g.

    Automatic differentiation gives the transpose of g x instead, for which XLA on CPUs first copies g into another layout and
    then multiplies in a slow one. Kernels that are not trained use a plain product, because this one keeps x for the backward
    pass.
    """
    return x @ kernel


def _trained_matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _trained_matmul_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    if x.shape[-1] > 8 * g.shape[-1]:  # few output columns: XLA copies the left factor into another layout, and g is the smaller
        return g @ kernel.T, jnp.tensordot(g, x, axes=(rows, rows)).T
    return g @ kernel.T, jnp.tensordot(x, g, axes=(rows, rows))


trained_matmul.defvjp(_trained_matmul_forward, _trained_matmul_backward)


def _align_last(weight: Array, like: Array) -> Array:
    """[n] reshaped to broadcast against [..., n] without implicit rank promotion."""
    return weight.reshape(*(1,) * (like.ndim - 1), -1)


def abstract_decoder(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Decoder:
    """The decoder with shapes in place of weights: nothing is allocated."""
    return nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), dtype))
