"""Mesh and shardings: one table maps the axes of every weight to the axes of the mesh.

Mesh axes: `data` (replicas of the model), `fsdp` (weights are sharded and gathered where they are used; batches are sharded too)
and `tensor` (attention heads and hidden units of the MLP are sharded). The rows of a batch are sharded over `data` and `fsdp`
together. Weights that are not in the table (norms, biases of the residual stream) are replicated.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))  # rows of a batch or of activations

# kernels [num_layers, in, out]: the first shards its outputs over `tensor`, the second its inputs
COLUMN_PARALLEL, ROW_PARALLEL = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")
WEIGHT_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", "fsdp"),
    "lm_head": ("fsdp", "tensor"),
    **{f"blocks.{name}.kernel": COLUMN_PARALLEL for name in ("q", "k", "v", "gate", "up")},
    **{f"blocks.{name}.kernel": ROW_PARALLEL for name in ("o", "down")},
    **{f"blocks.{name}.bias": (None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"blocks.{name}.lora_a": (None, "fsdp", None) for name in ("q", "k", "v", "gate", "up")},
    **{f"blocks.{name}.lora_b": (None, None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"blocks.{name}.lora_a": (None, "tensor", None) for name in ("o", "down")},
    **{f"blocks.{name}.lora_b": (None, None, "fsdp") for name in ("o", "down")},
}


def parse_mesh(text: str) -> dict[str, int]:
    """The axis sizes of "fsdp=8,tensor=2"; axes that are not named have size 1.

    Raises:
      ValueError: another form, an unknown axis, or a size below 1.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name.strip() not in AXES or not size.strip().isdigit() or int(size) < 1:
            raise ValueError(f"mesh must be of the form fsdp=8,tensor=2 with axes {', '.join(AXES)}; got {part!r} in {text!r}")
        sizes[name.strip()] = int(size)
    return sizes


def check_mesh_size(sizes: dict[str, int], devices: int) -> None:
    """Raise ValueError unless the product of the sizes is the number of devices."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    if math.prod(shape) != devices:
        text = ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        rule = f"all {devices} devices" if devices > 1 else "the one device"
        raise ValueError(f"mesh must use {rule}; {text} uses {math.prod(shape)}")


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the devices [default: all devices].

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    check_mesh_size(sizes, len(devices))
    shape = [sizes.get(axis, 1) for axis in AXES]
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def weight_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition spec of the weight at a path such as blocks.q.kernel.

    Raises:
      ValueError: a mesh axis does not divide the axis of the weight that is sharded over it.
    """
    parts = path.split(".")
    quantized = parts[-1] if parts[-2:-1] == ["kernel"] else None  # codes or scale of a quantized kernel
    rule = WEIGHT_AXES.get(".".join(parts[:-1]) if quantized else path, ())
    axes: list[str | None] = []
    for size, axis in zip(shape, rule, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            if quantized == "scale":  # small, and its input axis counts blocks
                axis = None
            else:
                raise ValueError(f"mesh must divide {path} {list(shape)}: {axis}={mesh.shape[axis]} does not divide {size}")
        axes.append(axis)
    return PartitionSpec(*axes)


def weight_path(keys: Sequence[Any]) -> str:
    """The path (blocks.q.kernel) of a leaf of an nnx state, or of an optimizer state that mirrors it, from its tree keys."""
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in keys]
    return ".".join(name for name in names if name != "value")


def weight_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """A `NamedSharding` for each weight."""

    def sharding(keys, leaf):
        return NamedSharding(mesh, weight_spec(weight_path(keys), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def check_batch_size(rows: int, mesh: Mesh) -> None:
    """Check that the rows of a batch can be sharded over data and fsdp.

    Raises:
      ValueError: `rows` is no multiple of data x fsdp.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise ValueError(f"batch must be a multiple of data x fsdp = {shards}; got {rows}")


def shard_rows(shape: tuple[int, ...], sharding: NamedSharding, make_rows: Callable[[np.ndarray], Any]) -> Any:
    """Arrays [*shape, ...] on the mesh, of which each process makes the rows that lie on its own devices and no others.

    Args:
      shape: of the numbers of the rows, in the order in which they are counted; sharding: of its axes, and of no axis after them.
      make_rows: numbers [n] of rows, ascending -> a tree of host arrays [n, ...].
    """
    numbers = np.arange(math.prod(shape)).reshape(shape)
    indices = sharding.addressable_devices_indices_map(shape).values()
    own = np.unique(np.concatenate([numbers[index].ravel() for index in indices]))

    def place(array: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:  # a slice of each axis
            return array[np.searchsorted(own, numbers[index[: len(shape)]])]

        return jax.make_array_from_callback((*shape, *array.shape[1:]), sharding, shard)

    return jax.tree.map(place, make_rows(own))


def shard_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array on the mesh. Every process passes the whole array and keeps its own shards."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
