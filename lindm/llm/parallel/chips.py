"""One table of accelerator chips: speed, memory, bandwidth, and for TPUs the available slices and their names.

The figures are those of the makers' data sheets. Nothing heavy is imported here: the command line reads this module.
"""

import math
import re
from dataclasses import dataclass

GIB = 1 << 30
# slices of v5e and v6e, and of v5p, in chips
SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SLICES_3D = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    *("8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24"),
)


@dataclass(frozen=True, kw_only=True)
class TPUGeneration:
    """How a generation of TPUs is offered. Hosts have four chips; a slice of at most `single_host` chips is one host."""

    slices: tuple[str, ...]
    """shapes of a slice, in chips"""
    single_host: int
    gke_accelerator: str
    """label of GKE's nodes"""
    runtime: str
    """runtime version of Cloud TPU machines"""
    accelerator_prefix: str
    """prefix of the accelerator type of Cloud TPU, followed by a count"""
    counts_per_chip: int = 1
    """counts per chip in the accelerator type: Cloud TPU counts the cores of v5p"""
    ray_type: str
    """accelerator type of Ray"""

    @property
    def dimensions(self) -> int:
        return self.slices[0].count("x") + 1


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device, as jax counts devices: a v4 or v5p device is a whole chip of two cores."""

    name: str
    device_kinds: tuple[str, ...]
    """jax's names begin with one of these"""
    memory: int
    """bytes"""
    peak_flops: float
    """bf16 floating-point operations per second"""
    memory_bandwidth: float
    """bytes per second"""
    link_bandwidth: float | None = None
    """bytes per second that a chip can send over all its links together; None: not known"""
    tpu: TPUGeneration | None = None
    """None: no TPU, or one for which no slices are offered here"""


CHIPS = (
    Chip(
        name="v4",
        device_kinds=("TPU v4",),
        memory=32 * GIB,
        peak_flops=275e12,
        memory_bandwidth=1.2e12,
        link_bandwidth=300e9,
    ),
    Chip(
        name="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        memory=16 * GIB,
        peak_flops=197e12,
        memory_bandwidth=0.82e12,
        link_bandwidth=200e9,
        tpu=TPUGeneration(
            slices=SLICES_2D,
            single_host=8,
            gke_accelerator="tpu-v5-lite-podslice",
            runtime="v2-alpha-tpuv5-lite",
            accelerator_prefix="v5litepod",
            ray_type="TPU-V5LITEPOD",
        ),
    ),
    Chip(
        name="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        memory=32 * GIB,
        peak_flops=918e12,
        memory_bandwidth=1.64e12,
        link_bandwidth=400e9,
        tpu=TPUGeneration(
            slices=SLICES_2D,
            single_host=8,
            gke_accelerator="tpu-v6e-slice",
            runtime="v2-alpha-tpuv6e",
            accelerator_prefix="v6e",
            ray_type="TPU-V6E",
        ),
    ),
    Chip(
        name="v5p",
        device_kinds=("TPU v5p", "TPU v5"),
        memory=95 * GIB,
        peak_flops=459e12,
        memory_bandwidth=2.77e12,
        link_bandwidth=600e9,
        tpu=TPUGeneration(
            slices=SLICES_3D,
            single_host=4,
            gke_accelerator="tpu-v5p-slice",
            runtime="v2-alpha-tpuv5",
            accelerator_prefix="v5p",
            counts_per_chip=2,
            ray_type="TPU-V5P",
        ),
    ),
    Chip(name="A100", device_kinds=("NVIDIA A100",), memory=80 * GIB, peak_flops=312e12, memory_bandwidth=2.0e12),
    Chip(name="H100", device_kinds=("NVIDIA H100",), memory=80 * GIB, peak_flops=989e12, memory_bandwidth=3.35e12),
    Chip(name="H200", device_kinds=("NVIDIA H200",), memory=141 * GIB, peak_flops=989e12, memory_bandwidth=4.8e12),
)
TPU_GENERATIONS = {chip.name: chip.tpu for chip in CHIPS if chip.tpu is not None}


def find_chip(device_kind: str) -> Chip | None:
    """The chip with this jax device kind, by the longest prefix; None for CPUs and for chips that are not in the table."""
    matches = [
        (len(prefix), i)
        for i, chip in enumerate(CHIPS)
        for prefix in chip.device_kinds
        if device_kind.lower().startswith(prefix.lower())
    ]
    return CHIPS[max(matches)[1]] if matches else None


@dataclass(frozen=True, kw_only=True)
class TPUSlice:
    """Connected TPU chips and the hosts that they belong to."""

    generation: TPUGeneration
    shape: str
    """such as 4x4"""
    num_chips: int
    num_hosts: int

    @property
    def chips_per_host(self) -> int:
        return self.num_chips // self.num_hosts

    @property
    def accelerator_type(self) -> str:
        """Accelerator type of Cloud TPU, such as v5litepod-16."""
        return f"{self.generation.accelerator_prefix}-{self.generation.counts_per_chip * self.num_chips}"


def parse_topology(topology: str) -> TPUSlice:
    """The slice of a topology such as v5e:4x4.

    Raises:
      ValueError: no such slice; lists those that there are.
    """
    name, _, shape = topology.partition(":")
    generation = TPU_GENERATIONS.get(name)
    if generation is None or shape not in generation.slices:
        known = "; ".join(f"{name}:{', '.join(g.slices)}" for name, g in TPU_GENERATIONS.items())
        raise ValueError(f"topology must be one of {known}; got {topology!r}")
    chips = math.prod(map(int, shape.split("x")))
    return TPUSlice(
        generation=generation, shape=shape, num_chips=chips, num_hosts=1 if chips <= generation.single_host else chips // 4
    )


def topology_sizes(topology: str) -> tuple[int, ...]:
    """The sizes of the sides of a topology such as v5e:4x4. Any sizes are accepted: the TPU compiler knows which exist.

    Raises:
      ValueError: an unknown generation, or another number of sides than its slices have.
    """
    name, _, shape = topology.partition(":")
    generation = TPU_GENERATIONS.get(name)
    if generation is None or not re.fullmatch(r"\d+(x\d+)" + "{" + str(generation.dimensions - 1) + "}", shape):
        raise ValueError(
            "topology must be host, or a slice such as v5e:4x4, v6e:2x4 (chips along two sides) or v5p:2x2x4 (three); "
            f"got {topology!r}"
        )
    return tuple(map(int, shape.split("x")))
