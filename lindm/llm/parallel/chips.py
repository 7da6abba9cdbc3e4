"""What a chip can do: its memory, and the most floating point operations a second that matrix products reach on it."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Chip(NamedTuple):
    """Public figures of one device, as jax counts devices."""

    kind: str  # as jax names it
    memory: int  # bytes
    peak: float  # bf16 operations a second
    bandwidth: float  # of its memory, bytes a second


GIB = 1 << 30
# from the makers' data sheets; a v5p or v4 device is a whole chip, a v5e or v6e device too
CHIPS = (
    Chip("TPU v4", 32 * GIB, 275e12, 1.2e12),
    Chip("TPU v5 lite", 16 * GIB, 197e12, 0.82e12),
    Chip("TPU v5e", 16 * GIB, 197e12, 0.82e12),
    Chip("TPU v5p", 95 * GIB, 459e12, 2.77e12),
    Chip("TPU v5", 95 * GIB, 459e12, 2.77e12),
    Chip("TPU v6 lite", 32 * GIB, 918e12, 1.64e12),
    Chip("TPU v6e", 32 * GIB, 918e12, 1.64e12),
    Chip("NVIDIA A100", 80 * GIB, 312e12, 2.0e12),
    Chip("NVIDIA H100", 80 * GIB, 989e12, 3.35e12),
    Chip("NVIDIA H200", 141 * GIB, 989e12, 4.8e12),
)


def chip_of(device: Any) -> Chip | None:
    """The chip of a device; None for CPUs and for what is not in the table."""
    kind = str(getattr(device, "device_kind", ""))
    fits = [chip for chip in CHIPS if kind.lower().startswith(chip.kind.lower())]
    return max(fits, key=lambda chip: len(chip.kind), default=None)


def measured_peak(n: int = 1536, seconds: float = 0.3, clock: Callable[[], float] = time.perf_counter) -> float:
    """f32 operations a second of n x n matrix products on the default device, the best of some; for CPUs, which have no table.

    `clock`: whose seconds; `time.process_time` counts those of all cores.
    """
    x = jnp.asarray(np.random.default_rng(0).standard_normal((n, n)), jnp.float32)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = clock()
        product(x, x).block_until_ready()
        best = max(best, 2 * n**3 / (clock() - start))
    return best


def peak_of(devices: list[Any]) -> float:
    """Operations a second of all these devices together; virtual CPU devices share one machine."""
    chip = chip_of(devices[0])
    return len(devices) * chip.peak if chip else measured_peak()


def available_memory(device: Any) -> int | None:
    """Bytes that can still be taken on a device; None where nothing tells."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    if device.platform == "cpu":
        return host_memory()
    return chip.memory if (chip := chip_of(device)) else None


def host_memory() -> int | None:
    """Bytes that this machine's processes can still take (Linux)."""
    try:
        with open("/proc/meminfo") as f:
            line = next(line for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
