"""One table of accelerator chips: speed, memory, bandwidth, and for TPUs the available slices and their names.

The figures are those of the makers' data sheets, dense products in bf16: pages v4, v5e, v5p, v6e and tpu7x of
https://docs.cloud.google.com/tpu/docs, and NVIDIA's data sheets of A100, H100, H200 and HGX B200. The memory of GPUs is what
nvidia-smi reports, rounded; the links of SXM cards are NVLink within a node, in one direction, and those of PCIe and NVL cards
are PCIe: their bridges join two or four cards. Nothing heavy is imported here: the command line reads this module.
"""

import math
import re
from dataclasses import dataclass

from lindm.errors import did_you_mean

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
    accelerator_prefix: str
    """prefix of the accelerator type of Cloud TPU, followed by a count"""
    counts_per_chip: int = 1
    """counts per chip in the accelerator type: Cloud TPU counts the cores of v5p and tpu7x"""
    runtime: str = ""
    """runtime version of Cloud TPU machines; empty: `lindm plan` knows the generation, `lindm launch` does not"""
    gke_accelerator: str = ""
    """label of GKE's nodes"""
    ray_type: str = ""
    """accelerator type of Ray"""

    @property
    def dimensions(self) -> int:
        return self.slices[0].count("x") + 1


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device, as jax counts devices: a v4 or v5p device is a whole chip of two cores, a tpu7x device is one core of two."""

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
    Chip(
        name="tpu7x",
        device_kinds=("TPU7x", "TPU v7x"),
        memory=96 * GIB,
        peak_flops=2307e12 / 2,
        memory_bandwidth=7.38e12 / 2,
        link_bandwidth=600e9 / 2,
        tpu=TPUGeneration(slices=SLICES_3D, single_host=4, accelerator_prefix="tpu7x", counts_per_chip=2),
    ),
    Chip(
        name="A100",
        device_kinds=("NVIDIA A100",),
        memory=80 * GIB,
        peak_flops=312e12,
        memory_bandwidth=2.0e12,
        link_bandwidth=300e9,
    ),
    Chip(
        name="A100-40GB",
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        memory=40 * GIB,
        peak_flops=312e12,
        memory_bandwidth=1.555e12,
        link_bandwidth=300e9,
    ),
    Chip(
        name="A100-PCIe",
        device_kinds=("NVIDIA A100 80GB PCIe",),
        memory=80 * GIB,
        peak_flops=312e12,
        memory_bandwidth=1.935e12,
        link_bandwidth=32e9,
    ),
    Chip(
        name="A100-PCIe-40GB",
        device_kinds=("NVIDIA A100-PCIE-40GB",),
        memory=40 * GIB,
        peak_flops=312e12,
        memory_bandwidth=1.555e12,
        link_bandwidth=32e9,
    ),
    Chip(
        name="H100",
        device_kinds=("NVIDIA H100",),
        memory=80 * GIB,
        peak_flops=989e12,
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
    ),
    Chip(
        name="H100-PCIe",
        device_kinds=("NVIDIA H100 PCIe",),
        memory=80 * GIB,
        peak_flops=756e12,
        memory_bandwidth=2.0e12,
        link_bandwidth=64e9,
    ),
    Chip(
        name="H100-NVL",
        device_kinds=("NVIDIA H100 NVL",),
        memory=93 * GIB,
        peak_flops=835e12,
        memory_bandwidth=3.9e12,
        link_bandwidth=64e9,
    ),
    Chip(
        name="H200",
        device_kinds=("NVIDIA H200",),
        memory=141 * GIB,
        peak_flops=989e12,
        memory_bandwidth=4.8e12,
        link_bandwidth=450e9,
    ),
    Chip(
        name="H200-NVL",
        device_kinds=("NVIDIA H200 NVL",),
        memory=140 * GIB,
        peak_flops=835e12,
        memory_bandwidth=4.8e12,
        link_bandwidth=64e9,
    ),
    Chip(
        name="B200",
        device_kinds=("NVIDIA B200",),
        memory=179 * GIB,
        peak_flops=2250e12,
        memory_bandwidth=8.0e12,
        link_bandwidth=900e9,
    ),
)
GPUS = {chip.name.lower(): chip for chip in CHIPS if chip.device_kinds[0].startswith("NVIDIA")}
GPU_COUNTS = (1, 2, 4, 8)  # of one node
PLANNED = {chip.name: chip.tpu for chip in CHIPS if chip.tpu is not None}
TPU_GENERATIONS = {name: generation for name, generation in PLANNED.items() if generation.runtime}


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


def _num_chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


# accelerator types of Cloud TPU, and the same with the name of the generation: v5litepod-16 and v5e-16 are v5e:4x4
CLOUD_NAMES = {
    f"{prefix}-{generation.counts_per_chip * _num_chips(shape)}": f"{name}:{shape}"
    for name, generation in PLANNED.items()
    for prefix in (name, generation.accelerator_prefix)
    for shape in generation.slices
}
_KNOWN = (
    *(f"{name}:{shape}" for name, generation in PLANNED.items() for shape in generation.slices),
    *CLOUD_NAMES,
    *(f"{name}:{count}" for name in GPUS for count in GPU_COUNTS),
)


def parse_topology(topology: str) -> TPUSlice:
    """The slice of a topology such as v5e:4x4, or v5e-16 as Cloud TPU names it.

    Raises:
      ValueError: no such slice, or none that jobs are offered for; lists those that there are.
    """
    name, _, shape = CLOUD_NAMES.get(topology, topology).partition(":")
    generation = TPU_GENERATIONS.get(name)
    if generation is None or shape not in generation.slices:
        known = "; ".join(f"{name}:{', '.join(g.slices)}" for name, g in TPU_GENERATIONS.items())
        raise ValueError(f"topology must be one of {known}; got {topology!r}")
    chips = _num_chips(shape)
    return TPUSlice(
        generation=generation, shape=shape, num_chips=chips, num_hosts=1 if chips <= generation.single_host else chips // 4
    )


def tpu_topology(topology: str) -> str:
    """The compiler's name of a slice: v5e:4x4 for v5e-16. Sides of any sizes are accepted: the TPU compiler knows which exist.

    Raises:
      ValueError: an unknown name, or another number of sides than the slices of the generation have; names those that are near.
    """
    given = CLOUD_NAMES.get(topology, topology)
    name, _, shape = given.partition(":")
    generation = PLANNED.get(name)
    if generation is None or not re.fullmatch(r"\d+(x\d+)" + "{" + str(generation.dimensions - 1) + "}", shape):
        raise ValueError(
            "topology must be host, a slice by its chips (v5e:4x4, v6e:2x4, v5p:2x2x4, tpu7x:2x2x1) or by its accelerator type "
            "(v5e-16, v6e-8, v5p-32, tpu7x-8; v5p and tpu7x count cores, two a chip), or GPUs of one node (h100:8, h200:8, "
            f"b200:8, a100:8, h100-pcie:2); got {topology!r}{did_you_mean(topology, _KNOWN)}"
        )
    return given


def parse_gpus(topology: str) -> tuple[Chip, int] | None:
    """The chip and the number of GPUs of a name such as h100:8; None for a name that is not of GPUs.

    Raises:
      ValueError: a number that a node does not have.
    """
    name, _, count = topology.lower().partition(":")
    if name not in GPUS:
        return None
    if count not in map(str, GPU_COUNTS):
        raise ValueError(
            f"topology must be 1, 2, 4 or 8 GPUs of one node, such as {name}:8, where the links are known; got {topology!r}"
        )
    return GPUS[name], int(count)
