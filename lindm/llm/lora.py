r"""Low-rank adapters (LoRA; Hu et al., 2021) on the linear layers of the decoder, and quantization of the frozen kernels below.

    y = x W + scale (x A) B,    scale = alpha / rank, or alpha / sqrt(rank) (rsLoRA; Kalajdzievski, 2023),
    A ~ U(-1/sqrt(in), 1/sqrt(in)) [in, rank],    B = 0 [rank, out]

In training x may have dropout in front of A. Each module, layer, step and micro-batch has a mask of its own, which depends on the
seed and not on the devices.

With adapters everything else is frozen: embedding, norms, biases, output layer. The frozen kernels may be quantized (QLoRA;
Dettmers et al., 2023): int8 with one scale per output, or nf4, four bits that index quantiles of a normal distribution, with one
scale per 64 inputs of an output. They are dequantized to the dtype of the activations where they are used.
"""

import math
from collections.abc import Iterator
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lindm.llm.config import BaseFormat, LoraScaling
from lindm.llm.model import Decoder, FrozenParam, Linear
from lindm.llm.model_families import TARGET_MODULES

NF4_BLOCK = 64  # inputs that share a scale
# quantiles of N(0, 1), zero among them, scaled to [-1, 1] (Dettmers et al., 2023, appendix E)
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


class Int8Kernel(nnx.Module):
    """A kernel [..., in, out] as int8 codes times one scale per output."""

    def __init__(self, kernel: Array):
        largest = jnp.abs(kernel).max(axis=-2, keepdims=True).astype(jnp.float32)
        scale = jnp.where(largest > 0, largest / 127, 1)
        self.codes = FrozenParam(jnp.round(kernel / scale).astype(jnp.int8))  # [..., in, out]
        self.scale = FrozenParam(scale)  # [..., 1, out]

    def dequantize(self, dtype: DTypeLike) -> Array:
        """The kernel [..., in, out]."""
        return (self.codes[...].astype(jnp.float32) * self.scale[...]).astype(dtype)


class NF4Kernel(nnx.Module):
    """A kernel [..., in, out] as indices of `NF4_LEVELS`, two per byte, and one scale per `NF4_BLOCK` inputs of an output."""

    def __init__(self, kernel: Array):
        *lead, n_in, n_out = kernel.shape
        if n_in % NF4_BLOCK:
            raise ValueError(f"nf4 needs kernels whose inputs are a multiple of {NF4_BLOCK}; got {n_in}")
        blocks = kernel.astype(jnp.float32).reshape(*lead, n_in // NF4_BLOCK, NF4_BLOCK, n_out)
        largest = jnp.abs(blocks).max(axis=-2, keepdims=True)
        scale = jnp.where(largest > 0, largest, 1)
        midpoints = jnp.asarray((NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2)
        index = jnp.searchsorted(midpoints, blocks / scale).astype(jnp.uint8).reshape(*lead, n_in // 2, 2, n_out)
        self.codes = FrozenParam(index[..., 0, :] | (index[..., 1, :] << 4))  # [..., in / 2, out], even input in the low bits
        self.scale = FrozenParam(scale[..., 0, :])  # [..., in / NF4_BLOCK, out]

    def dequantize(self, dtype: DTypeLike) -> Array:
        """The kernel [..., in, out]."""
        codes, scale = self.codes[...], self.scale[...]
        *lead, half, n_out = codes.shape
        chex.assert_shape(scale, (*lead, 2 * half // NF4_BLOCK, n_out))

        def values(index: Array) -> Array:
            blocks = _nf4_level(index).reshape(*lead, 2 * half // NF4_BLOCK, NF4_BLOCK // 2, n_out) * scale[..., None, :]
            return blocks.astype(dtype).reshape(codes.shape)

        # even and odd inputs stay apart as long as possible: XLA:TPU makes one pass of that, and several if they are interleaved
        # first
        return jnp.stack([values(codes & 15), values(codes >> 4)], axis=-2).reshape(*lead, 2 * half, n_out)


def _nf4_level(index: Array) -> Array:
    """NF4_LEVELS[index], selected bit by bit: a TPU reads a table one element at a time."""
    levels = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):
        odd = (index >> bit) & 1 == 1
        levels = [jnp.where(odd, high, low) for low, high in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


FrozenKernel = nnx.Variable | Int8Kernel | NF4Kernel


def quantize_kernel(kernel: Array, base: BaseFormat) -> FrozenKernel:
    """A frozen kernel [..., in, out] in the format `base`. Raises: ValueError if the format does not fit the kernel."""
    if base not in get_args(BaseFormat):
        raise ValueError(f"base must be one of {', '.join(get_args(BaseFormat))}; got {base!r}")
    if base in ("int8", "nf4"):
        return Int8Kernel(kernel) if base == "int8" else NF4Kernel(kernel)
    return FrozenParam(kernel.astype(jnp.bfloat16 if base == "bf16" else jnp.float32))


def dense_kernel(linear: Linear) -> Array:
    """The kernel of a linear layer in float32, dequantized if it is quantized; without the adapter."""
    kernel = linear.kernel
    return kernel[...].astype(jnp.float32) if isinstance(kernel, nnx.Variable) else kernel.dequantize(jnp.float32)


def linear_layers(model: Decoder) -> Iterator[tuple[str, Linear]]:
    """The linear layers that can have adapters, by name."""
    for name in TARGET_MODULES:
        yield name, getattr(model.blocks, name)


def add_lora(
    model: Decoder,
    rank: int,
    alpha: float,
    key: Array,
    targets: tuple[str, ...] = TARGET_MODULES,
    scaling: LoraScaling = "standard",
) -> Decoder:
    """Freeze the model in place and give every target module an adapter, whose update is zero at first.

    Raises: ValueError, for a rank below one or an unknown target.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}")
    if not targets or set(targets) - set(TARGET_MODULES):
        raise ValueError(f"targets must be some of {', '.join(TARGET_MODULES)}; got {', '.join(targets) or 'none'}")
    freeze(model)
    for i, (name, linear) in enumerate(linear_layers(model)):
        if name in targets:
            num_layers, n_in, n_out = linear.shape
            bound = 1 / math.sqrt(n_in)
            a = jax.random.uniform(jax.random.fold_in(key, i), (num_layers, n_in, rank), jnp.float32, -bound, bound)
            linear.lora_a = nnx.data(nnx.Param(a))
            linear.lora_b = nnx.data(nnx.Param(jnp.zeros((num_layers, rank, n_out), jnp.float32)))
            linear.lora_scale = alpha / (math.sqrt(rank) if scaling == "rslora" else rank)
    return model


class DropoutKey(nnx.Variable):
    """Random keys [num_layers] of the dropout in front of an adapter."""


def set_dropout(model: Decoder, rate: float) -> Decoder:
    """Give all adapters this probability of dropout, in place; it applies once a step has called `draw_dropout`."""
    for _, linear in linear_layers(model):
        linear.lora_dropout = rate if linear.lora_a is not None else 0.0
    return model


def draw_dropout(model: Decoder, key: Array) -> Decoder:
    """From now on, the adapters' inputs have dropout with this key, in place."""
    for i, (_, linear) in enumerate(linear_layers(model)):
        if linear.lora_dropout:
            linear.dropout_keys = nnx.data(DropoutKey(jax.random.split(jax.random.fold_in(key, i), linear.shape[0])))
    return model


def quantize(model: Decoder, base: BaseFormat) -> Decoder:
    """Convert every kernel of the layers to the format `base`, in place; the kernels are frozen from then on."""
    for _, linear in linear_layers(model):
        linear.kernel = nnx.data(quantize_kernel(linear.kernel[...], base))
    return model


def freeze(model: nnx.Module) -> None:
    """Turn every `Param` into a `FrozenParam`, in place."""
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                setattr(module, name, nnx.data(FrozenParam(value[...])))
