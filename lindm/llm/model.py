r"""The decoder of the Llama family: Llama 3, SmolLM2, Mistral, Qwen2, Qwen3, in one file.

    x = embedding[ids]
    depth times:   x += O attention(rope(Q norm(x)), rope(K norm(x)), V norm(x))
                   x += D (silu(G norm(x)) * (U norm(x)))
    logits = head norm(x)

The blocks are one `Block` whose every weight has an axis of layers in front, [depth, in, out], and one `lax.scan` over it: it
compiles in a time that does not grow with the depth. `remat` says what the backward pass computes again: "full" all but one
activation a layer, "selective" attention, norms and nonlinearities but no product with weights, "none" nothing. `unroll` takes
the scan apart again, which is faster where one token is decoded at a time. Weights are multiplied as x @ W, so a kernel is
[in, out], the transpose of what torch holds.

Precision: weights are cast to the dtype of the activations where they are used, so f32 master weights compute in bf16 if asked
to; norms, rotary angles, the softmax and the log-likelihoods are in f32 always.

Sizes here: B rows, T tokens, C slots of a cache, D width, K query heads, G groups (key and value heads), E size of a head, V
vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from lindm.llm.config import Architecture, scaled_frequencies

Constrain = Callable[[Array], Array]
"""What pins activations [B, T, ...] to a sharding; the identity on one device."""


REMATS = ("full", "selective", "none")
PRODUCT = "product"  # of activations with a layer's weights: most of its arithmetic
STRIPES, NARROWEST = 4, 128  # of queries, when a whole sequence attends to itself: how many at most, and how wide at least


class Frozen(nnx.Variable):
    """A weight that is not trained."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of the tokens so far; slot j holds position j. What lies beyond a row's tokens is never attended to."""

    k: Array  # [depth, B, C, G, E]
    v: Array  # [depth, B, C, G, E]


class Linear(nnx.Module):
    """y = x W + b, and + scale (x A) B where a low-rank update was added (`lindm.llm.lora`); every weight [depth, ...]."""

    def __init__(self, depth: int, n_in: int, n_out: int, bias: bool, spread: float, rngs: nnx.Rngs, dtype: DTypeLike):
        self.kernel: Any = nnx.data(nnx.Param(spread * jax.random.normal(rngs.params(), (depth, n_in, n_out), dtype)))
        self.bias = nnx.data(nnx.Param(jnp.zeros((depth, n_out), dtype)) if bias else None)
        self.a: Any = nnx.data(None)  # [depth, in, rank]
        self.b: Any = nnx.data(None)  # [depth, rank, out]
        self.scale = 1.0
        self.shape = (depth, n_in, n_out)  # of the kernel, whatever it is held in

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel
        if isinstance(kernel, nnx.Param):
            y = trained_product(x, kernel[...].astype(x.dtype))
        else:
            y = x @ (kernel[...].astype(x.dtype) if isinstance(kernel, nnx.Variable) else kernel.dense(x.dtype))
        if self.bias is not None:
            y = y + _along_last(self.bias[...].astype(x.dtype), y)
        if self.a is not None and self.b is not None:
            low = trained_product(x, self.a[...].astype(x.dtype)) * self.scale  # where it is narrow
            y = y + trained_product(low, self.b[...].astype(x.dtype))
        return checkpoint_name(y, PRODUCT)


class Norm(nnx.Module):
    """Root mean square norm, in f32."""

    def __init__(self, shape: tuple[int, ...], epsilon: float, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones(shape, dtype))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return _along_last(self.weight[...].astype(x.dtype), x) * wide.astype(x.dtype)


class Block(nnx.Module):
    """Attention and the gated perceptron, all layers of them stacked."""

    def __init__(self, a: Architecture, rngs: nnx.Rngs, dtype: DTypeLike):
        def linear(n_in: int, n_out: int, bias: bool) -> Linear:
            return Linear(a.depth, n_in, n_out, bias, a.spread, rngs, dtype)

        self.norm_attention = Norm((a.depth, a.width), a.epsilon, dtype)
        self.q = linear(a.width, a.K * a.head, a.qkv_bias)
        self.k = linear(a.width, a.groups * a.head, a.qkv_bias)
        self.v = linear(a.width, a.groups * a.head, a.qkv_bias)
        self.o = linear(a.K * a.head, a.width, a.o_bias)
        self.norm_q = nnx.data(Norm((a.depth, a.head), a.epsilon, dtype) if a.qk_norm else None)
        self.norm_k = nnx.data(Norm((a.depth, a.head), a.epsilon, dtype) if a.qk_norm else None)
        self.norm_mlp = Norm((a.depth, a.width), a.epsilon, dtype)
        self.gate = linear(a.width, a.mlp, a.mlp_bias)
        self.up = linear(a.width, a.mlp, a.mlp_bias)
        self.down = linear(a.mlp, a.width, a.mlp_bias)
        self.head = a.head

    def __call__(
        self,
        x: Array,
        turn: tuple[Array, Array],
        masks: tuple[Array, ...],
        cache: Cache | None,
        shared: Cache | None,
        start: Array | None,
    ) -> tuple[Array, Cache | None]:
        """One layer (its weights without the axis of layers): x [B, T, D] -> the same, and the layer's keys and values.

        Args:
          turn: cosines and sines [B, T, E/2];
          masks: which keys a query sees: [B, T, T]; or with a cache [B, T, C], and with a shared one [B, T, P] too;
          cache: this layer's keys and values [B, C, G, E], or None; shared: [N, P, G, E] of what B/N rows each have in front;
          start: [B] the slot of the first token, with a cache.
        """
        h = self.norm_attention(x)
        q, k, v = (f(h).reshape(*h.shape[:2], -1, self.head) for f in (self.q, self.k, self.v))
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = rotated(q, turn), rotated(k, turn)
        if cache is None:
            attended, kept = causal_attention(q, k, v, masks[0]), None
        else:
            assert start is not None
            write = jax.vmap(lambda held, new, at: jax.lax.dynamic_update_slice_in_dim(held, new, at, axis=0))
            kept = Cache(k=write(cache.k, k.astype(cache.k.dtype), start), v=write(cache.v, v.astype(cache.v.dtype), start))
            attended = attention(q, [(kept, masks[0])] if shared is None else [(kept, masks[0]), (shared, masks[1])])
        x = x + self.o(attended.reshape(*h.shape[:2], -1))
        h = self.norm_mlp(x)
        x = x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))
        return x, kept


class Decoder(nnx.Module):
    """Token ids -> hidden states -> logits."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        a = architecture
        self.architecture = a
        self.embedding = nnx.Param(a.spread * jax.random.normal(rngs.params(), (a.vocabulary, a.width), dtype))
        self.blocks = Block(a, rngs, dtype)
        self.norm = Norm((a.width,), a.epsilon, dtype)
        head = None if a.tied else nnx.Param(a.spread * jax.random.normal(rngs.params(), (a.width, a.vocabulary), dtype))
        self.head = nnx.data(head)

    def hidden(
        self,
        ids: Array,
        positions: Array,
        segments: Array | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        unroll: bool = False,
        constrain: Constrain = lambda x: x,
        found: Constrain = lambda x: x,
    ) -> Array:
        """Hidden states [B, T, D] after the last norm; token t sees the tokens before it of its own segment, and itself.

        Args:
          ids: [B, T] token numbers; positions: [B, T] within the document;
          segments: [B, T] which document of its row a token belongs to (packing); None: one document a row.
          dtype: of the activations; remat: one of `REMATS`.
          constrain: applied to the activations between layers; found: to the rows of the embedding, before that.
        """
        x = constrain(found(self.embedding[...][ids].astype(dtype)))
        sight = [_causal(positions, segments)]
        x, _ = self._through(x, positions, sight, None, None, None, remat, unroll, constrain)
        return self.norm(x)

    def stream(self, ids: Array, positions: Array, *, dtype: DTypeLike = jnp.float32) -> Array:
        """The residual stream [depth + 1, B, T, D]: the embeddings, and what each layer makes of them before the last norm.

        Args: ids, positions: [B, T], as of `hidden`.
        """
        x = self.embedding[...][ids].astype(dtype)
        sight = [_causal(positions, None)]
        _, (_, after) = self._through(x, positions, sight, None, None, None, "none", False, lambda x: x, traced=True)
        return jnp.concatenate([x[None], after])

    def extend(
        self,
        ids: Array,
        start: Array,
        cache: Cache,
        shared: tuple[Cache, Array] | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        unroll: bool = True,
    ) -> tuple[Array, Cache]:
        """Hidden states [B, T, D] of T more tokens, and the cache with them.

        Args:
          ids: [B, T]; rows of different lengths end in any tokens, which the next call overwrites.
          start: [B] tokens that the cache holds of each row, at most C - T.
          shared: what rows have in front of that: the caches of N prefixes [depth, N, P, ...] and their lengths [N]; the first
            B/N rows continue the first prefix, and so on. They are read, not copied.
        """
        slots = jnp.arange(cache.k.shape[2])
        own = start[:, None] + jnp.arange(ids.shape[1])[None]  # [B, T]
        distance = own[:, :, None] - slots[None, None, :]
        sight, positions, held = [(distance >= 0, distance)], own, None
        if shared is not None:
            held, lengths = shared
            length = jnp.repeat(lengths, ids.shape[0] // lengths.shape[0])
            positions = own + length[:, None]
            before = jnp.arange(held.k.shape[2])
            mask = jnp.broadcast_to((before[None] < length[:, None])[:, None], (*ids.shape, len(before)))
            sight.append((mask, positions[:, :, None] - before[None, None, :]))
        x = self.embedding[...][ids].astype(dtype)
        x, (cache, _) = self._through(x, positions, sight, cache, held, start, "none", unroll, lambda x: x)
        return self.norm(x), cache

    def empty_cache(self, rows: int, slots: int, dtype: DTypeLike = jnp.float32) -> Cache:
        """Room for `slots` tokens in each of `rows` rows."""
        a = self.architecture
        shape = (a.depth, rows, slots, a.groups, a.head)
        return Cache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    def logits(self, hidden: Array, constrain: Constrain = lambda x: x) -> Array:
        """[..., D] -> [..., V] in f32; `constrain` pins the head [D, V]."""
        head = self.embedding[...].T if self.head is None else self.head[...]
        return jnp.matmul(hidden, constrain(head.astype(hidden.dtype)), preferred_element_type=jnp.float32)

    def _through(
        self, x, positions, sight, cache, shared, start, remat, unroll, constrain, traced=False
    ) -> tuple[Array, tuple[Any, Any]]:
        """All layers: the last one's output, and of each its cache and, if traced, its output.

        `sight`: for the keys of this call or of the cache, and of the shared cache, the mask and the distance.
        """
        a = self.architecture
        angles = positions[..., None].astype(jnp.float32)
        angles = angles * _along_last(jnp.array(scaled_frequencies(a.rope, a.head), jnp.float32), angles)
        turn = jnp.cos(angles), jnp.sin(angles)
        windows = jnp.array(a.windows or [0] * a.depth, jnp.int32)
        graphdef, weights = nnx.split(self.blocks)

        def layer(x: Array, at):
            weights, window, held, common = at
            seen = tuple(mask & ((window == 0) | (far < window)) if a.windows else mask for mask, far in sight)
            x, kept = nnx.merge(graphdef, weights)(x, turn, seen, held, common, start)
            return constrain(x), (kept, x if traced else None)

        kept = jax.checkpoint_policies.save_only_these_names(*((PRODUCT,) if remat == "selective" else ()))
        body = layer if remat == "none" else jax.checkpoint(layer, prevent_cse=False, policy=kept)
        return jax.lax.scan(body, x, (weights, windows, cache, shared), unroll=a.depth if unroll else 1)


def _causal(positions: Array, segments: Array | None) -> tuple[Array, Array]:
    """Of tokens that attend among themselves: whether one sees the other, and how far it is [B, T, T]."""
    order = jnp.arange(positions.shape[1])
    mask = (order[None, :] <= order[:, None])[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    mask = jnp.broadcast_to(mask, (positions.shape[0], *mask.shape[1:]))
    return mask, positions[:, :, None] - positions[:, None, :]


@jax.custom_vjp
def trained_product(x: Array, kernel: Array) -> Array:
    """x @ kernel: [..., in], [in, out] -> [..., out], with the kernel's gradient written as one contraction of x with g.

    What differentiation makes of it by itself is the transpose of g x, for which XLA on CPUs first copies g into another order
    and then multiplies in a slow one. A kernel that is not trained does without: this keeps x for the backward pass.
    """
    return x @ kernel


def _product_kept(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _product_gradients(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rows = tuple(range(x.ndim - 1))
    if x.shape[-1] > 8 * g.shape[-1]:  # into few columns: XLA copies its left factor into another order, so let that be g
        return g @ kernel.T, jnp.tensordot(g, x, axes=(rows, rows)).T
    return g @ kernel.T, jnp.tensordot(x, g, axes=(rows, rows))


trained_product.defvjp(_product_kept, _product_gradients)


def causal_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """softmax(q k / sqrt(E)) v where no token sees a later one: q [B, T, K, E], k, v [B, T, G, E], mask [B, T, T] -> as q.

    The queries go in up to `STRIPES` stripes, and a stripe meets the keys up to its own end alone. The heads of a group are
    rows of one product, with the keys and values that they share.
    """
    T = q.shape[1]
    size = max(NARROWEST, -(-T // STRIPES))
    stripes = []
    for start in range(0, T, size):
        end = min(start + size, T)
        stripes.append(_stripe(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end]))
    return jnp.concatenate(stripes, axis=1)


def _stripe(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """T queries [B, T, K, E] over C keys [B, C, G, E], as the mask [B, T, C] lets them."""
    (B, T, K, E), (C, G) = q.shape, k.shape[1:3]
    rows = q.reshape(B, T, G, K // G, E).transpose(0, 2, 3, 1, 4).reshape(B, G, K // G * T, E)
    scores = jnp.einsum("bgre,bcge->bgrc", rows, k, preferred_element_type=jnp.float32) * E**-0.5
    scores = jnp.where(mask[:, None, None], scores.reshape(B, G, K // G, T, C), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, G, K // G * T, C)
    out = jnp.einsum("bgrc,bcge->bgre", weights, v)
    return out.reshape(B, G, K // G, T, E).transpose(0, 3, 1, 2, 4).reshape(B, T, K, E)


def attention(q: Array, parts: Sequence[tuple[Cache, Array]]) -> Array:
    """softmax(q k / sqrt(E)) v over the keys of all parts together: q [B, T, K, E] -> the same.

    A part is one layer's keys and values [N, C, G, E], shared by B/N rows each, and its mask [B, T, C].
    """
    (B, T, K, E), dtype = q.shape, q.dtype
    q = q.astype(jnp.float32) * E**-0.5
    scores, sizes = [], []
    for cache, mask in parts:
        N, C, G, _ = cache.k.shape
        rows = q.reshape(N, B // N * T, G, K // G, E)
        score = jnp.einsum("nrgie,ncge->nrgic", rows, cache.k.astype(jnp.float32))
        score = jnp.where(mask.reshape(N, B // N * T, 1, 1, C), score, jnp.finfo(jnp.float32).min)
        scores.append(score.reshape(B, T, K, C))
        sizes.append(C)
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    total = jnp.zeros((B, T, K, E), jnp.float32)
    for (cache, _), weight in zip(parts, jnp.split(weights, np.cumsum(sizes)[:-1].tolist(), axis=-1), strict=True):
        N, C, G, _ = cache.v.shape
        rows = weight.reshape(N, B // N * T, G, K // G, C)
        total = total + jnp.einsum("nrgic,ncge->nrgie", rows, cache.v.astype(jnp.float32)).reshape(B, T, K, E)
    return total.astype(dtype)


def rotated(x: Array, turn: tuple[Array, Array]) -> Array:
    """Coordinate i and i + E/2 of x [B, T, heads, E] turned by the i-th angle of the token's position."""
    cos, sin = (t[:, :, None, :] for t in turn)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def _along_last(weight: Array, like: Array) -> Array:
    """[n] against [..., n], without implicit rank promotion."""
    return weight.reshape(*(1,) * (like.ndim - 1), -1)


def abstract(architecture: Architecture, dtype: DTypeLike = jnp.float32) -> Decoder:
    """The decoder with shapes in the place of weights: nothing is allocated."""
    return nnx.eval_shape(lambda: Decoder(architecture, nnx.Rngs(0), dtype))
