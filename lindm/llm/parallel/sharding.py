"""Which axis of which weight lies on which axis of the mesh: one table.

Mesh axes: `data` (whole copies of the model), `fsdp` (weights cut, gathered where they are used; batches cut as well), `tensor`
(heads and the perceptron's hidden units cut). A batch is cut along `data` and `fsdp` together. Everything that is not in the
table (norms, biases of the residual stream) is whole on every device.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # the first axis of a batch, or of activations

INTO, OUT_OF = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")  # kernels [depth, in, out] that begin, and end, a cut part
RULES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", "fsdp"),
    "head": ("fsdp", "tensor"),
    **{f"blocks.{name}.kernel": INTO for name in ("q", "k", "v", "gate", "up")},
    **{f"blocks.{name}.kernel": OUT_OF for name in ("o", "down")},
    **{f"blocks.{name}.bias": (None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"blocks.{name}.a": (None, "fsdp", None) for name in ("q", "k", "v", "gate", "up")},
    **{f"blocks.{name}.b": (None, None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"blocks.{name}.a": (None, "tensor", None) for name in ("o", "down")},
    **{f"blocks.{name}.b": (None, None, "fsdp") for name in ("o", "down")},
}


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of the axes from "fsdp=8,tensor=2"; ValueError for what is not of that form."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name.strip() not in AXES or not size.strip().isdigit() or int(size) < 1:
            raise ValueError(f"mesh must be of the form fsdp=8,tensor=2 with axes {', '.join(AXES)}; got {part!r} in {text!r}")
        sizes[name.strip()] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices; ValueError where their number is not the product of the sizes."""
    devices = jax.devices() if devices is None else devices
    wanted = [sizes.get(axis, 1) for axis in AXES]
    if math.prod(wanted) != len(devices):
        text = ",".join(f"{axis}={size}" for axis, size in zip(AXES, wanted, strict=True))
        raise ValueError(f"mesh must use all {len(devices)} devices; {text} is for {math.prod(wanted)}")
    return jax.make_mesh(tuple(wanted), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the weight at a path such as blocks.q.kernel lies; ValueError where the mesh does not divide it."""
    parts = path.split(".")
    packed = parts[-1] if parts[-2:-1] == ["kernel"] else None  # q or scale of a kernel held in fewer bits
    rule = RULES.get(".".join(parts[:-1]) if packed else path, ())
    axes: list[str | None] = []
    for size, axis in zip(shape, rule, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            if packed == "scale":  # small, and its inputs are counted in blocks
                axis = None
            else:
                raise ValueError(f"mesh must divide {path} {list(shape)}: {axis}={mesh.shape[axis]} does not divide {size}")
        axes.append(axis)
    return PartitionSpec(*axes)


def path_of(keys: Sequence[Any]) -> str:
    """blocks.q.kernel of the keys of a leaf of an nnx state, or of an optimizer's state that mirrors it."""
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in keys]
    return ".".join(name for name in names if name != "value")


def state_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """A `NamedSharding` in the place of each weight."""

    def one(keys, leaf):
        return NamedSharding(mesh, spec_of(path_of(keys), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, state)


def check_batch(rows: int, mesh: Mesh) -> None:
    """ValueError where the rows of a batch cannot be cut along data and fsdp."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise ValueError(f"batch must be a multiple of data x fsdp = {ways}; got {rows}")


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host's array on the mesh; every process has the whole of it and takes its own part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
