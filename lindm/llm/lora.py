r"""Low-rank adapters (Hu et al., 2021) on every linear layer of the blocks, over base weights in f32, bf16, int8 or nf4.

    y = x W + (alpha / rank) (x A) B,        A ~ U(-1/sqrt(in), 1/sqrt(in)) [in, rank],    B = 0 [rank, out]

With adapters everything else is frozen: embedding, norms, biases, head. The base kernels may then be held in fewer bits (QLoRA,
Dettmers et al., 2023): int8 with one scale for each output, or nf4, four bits that index the quantiles of a normal law, with one
scale for each 64 inputs of an output. They are put together again in the dtype of the activations where they are used.
"""

import math
from collections.abc import Iterator
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lindm.llm.config import BaseFormat
from lindm.llm.model import Decoder, FrozenParam, Linear

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
BLOCK = 64  # inputs that share a scale of nf4
# quantiles of N(0, 1), zero among them, scaled to [-1, 1] (Dettmers et al., 2023, appendix E)
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


class Int8Kernel(nnx.Module):
    """A kernel as int8 and a scale for each output: [..., in, out] as q times scale."""

    def __init__(self, kernel: Array):
        largest = jnp.abs(kernel).max(axis=-2, keepdims=True).astype(jnp.float32)
        scale = jnp.where(largest > 0, largest / 127, 1)
        self.codes = FrozenParam(jnp.round(kernel / scale).astype(jnp.int8))
        self.scale = FrozenParam(scale)

    def dequantize(self, dtype: DTypeLike) -> Array:
        return (self.codes[...].astype(jnp.float32) * self.scale[...]).astype(dtype)


class NF4Kernel(nnx.Module):
    """A kernel as numbers of `NF4`, two to a byte (even input low), and a scale for each `BLOCK` inputs of an output."""

    def __init__(self, kernel: Array):
        *lead, n_in, n_out = kernel.shape
        if n_in % BLOCK:
            raise ValueError(f"nf4 needs kernels whose inputs are a multiple of {BLOCK}; got {n_in}")
        blocks = kernel.astype(jnp.float32).reshape(*lead, n_in // BLOCK, BLOCK, n_out)
        largest = jnp.abs(blocks).max(axis=-2, keepdims=True)
        scale = jnp.where(largest > 0, largest, 1)
        middles = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
        index = jnp.searchsorted(middles, blocks / scale).astype(jnp.uint8).reshape(*lead, n_in // 2, 2, n_out)
        self.codes = FrozenParam(index[..., 0, :] | (index[..., 1, :] << 4))
        self.scale = FrozenParam(scale[..., 0, :])

    def dequantize(self, dtype: DTypeLike) -> Array:
        q, scale = self.codes[...], self.scale[...]
        *lead, half, n_out = q.shape

        def values(index: Array) -> Array:
            blocks = _levels(index).reshape(*lead, 2 * half // BLOCK, BLOCK // 2, n_out) * scale[..., None, :]
            return blocks.astype(dtype).reshape(q.shape)

        # even and odd inputs apart, as long as possible: XLA:TPU makes one pass of that, and several of what interleaves first
        return jnp.stack([values(q & 15), values(q >> 4)], axis=-2).reshape(*lead, 2 * half, n_out)


def _levels(index: Array) -> Array:
    """NF4[index] by choosing between neighbours, bit by bit: a TPU looks up a table one element at a time."""
    found = [jnp.float32(level) for level in NF4]
    for bit in range(4):
        odd = (index >> bit) & 1 == 1
        found = [jnp.where(odd, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]


FrozenKernel = nnx.Variable | Int8Kernel | NF4Kernel


def quantize_kernel(kernel: Array, base: BaseFormat) -> FrozenKernel:
    """A frozen kernel [..., in, out] in the given base; ValueError where it cannot be held so."""
    if base not in get_args(BaseFormat):
        raise ValueError(f"base must be one of {', '.join(get_args(BaseFormat))}; got {base!r}")
    if base in ("int8", "nf4"):
        return Int8Kernel(kernel) if base == "int8" else NF4Kernel(kernel)
    return FrozenParam(kernel.astype(jnp.bfloat16 if base == "bf16" else jnp.float32))


def linears(model: Decoder) -> Iterator[tuple[str, Linear]]:
    """The linear layers of the blocks, by name."""
    for name in TARGETS:
        yield name, getattr(model.blocks, name)


def add_lora(model: Decoder, rank: int, alpha: float, key: Array, targets: tuple[str, ...] = TARGETS) -> Decoder:
    """Freeze the model in place, whatever its kernels are held in, and give every target an adapter that changes nothing yet.

    Raises:
      ValueError: a rank below one, an unknown target.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}")
    if not targets or set(targets) - set(TARGETS):
        raise ValueError(f"targets must be some of {', '.join(TARGETS)}; got {', '.join(targets) or 'none'}")
    freeze(model)
    for i, (name, linear) in enumerate(linears(model)):
        if name in targets:
            depth, n_in, n_out = linear.shape
            bound = 1 / math.sqrt(n_in)
            a = jax.random.uniform(jax.random.fold_in(key, i), (depth, n_in, rank), jnp.float32, -bound, bound)
            linear.lora_a = nnx.data(nnx.Param(a))
            linear.lora_b = nnx.data(nnx.Param(jnp.zeros((depth, rank, n_out), jnp.float32)))
            linear.lora_scale = alpha / rank
    return model


def quantize(model: Decoder, base: BaseFormat) -> Decoder:
    """Hold every kernel of the blocks as `base`, in place; frozen from then on."""
    for _, linear in linears(model):
        linear.kernel = nnx.data(quantize_kernel(linear.kernel[...], base))
    return model


def freeze(model: nnx.Module) -> None:
    """Every `Param` becomes `FrozenParam`, in place."""
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                setattr(module, name, nnx.data(FrozenParam(value[...])))


def merge_lora(model: Decoder) -> Decoder:
    """A model without adapters that computes the same: W + (alpha / rank) A B, in f32, everything a `Param` again."""
    merged = nnx.merge(*nnx.split(model))
    for _, linear in linears(merged):
        kernel = linear.kernel
        dense = kernel[...].astype(jnp.float32) if isinstance(kernel, nnx.Variable) else kernel.dequantize(jnp.float32)
        if linear.lora_a is not None and linear.lora_b is not None:
            dense = dense + linear.lora_scale * jnp.matmul(
                linear.lora_a[...], linear.lora_b[...], precision=jax.lax.Precision.HIGHEST
            )
        linear.kernel = nnx.data(nnx.Param(dense))
        linear.lora_a, linear.lora_b, linear.lora_scale = nnx.data(None), nnx.data(None), 1.0
    for _, module in list(nnx.iter_modules(merged)):
        for name, value in list(vars(module).items()):
            if isinstance(value, FrozenParam):
                setattr(module, name, nnx.data(nnx.Param(value[...])))
    return merged
