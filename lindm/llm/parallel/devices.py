"""What the devices of this process can do: peak speed and free memory."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lindm.llm.parallel.chips import find_chip


def measured_peak_flops(n: int = 1536, seconds: float = 0.3, clock: Callable[[], float] = time.perf_counter) -> float:
    """f32 operations per second of n x n matrix products on the default device, the best of several.

    For CPUs, which the table of chips does not have.

    Args:
      clock: `time.process_time` measures CPU-seconds of all cores in place of wall-clock seconds.
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


def peak_flops(devices: list[Any]) -> float:
    """Peak operations per second of all these devices together; virtual CPU devices share one machine."""
    chip = find_chip(devices[0].device_kind)
    return len(devices) * chip.peak_flops if chip else measured_peak_flops()


def memory_limit(device: Any) -> int | None:
    """Bytes that this process may take of a device; None where jax does not say, as for CPUs and devices that are not here."""
    try:
        stats = device.memory_stats() if device.platform != "cpu" else None
    except RuntimeError:  # a device of a topology, which the compiler alone knows
        return None
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def available_memory(device: Any) -> int | None:
    """Free bytes on a device; None where it is not known."""
    if (limit := memory_limit(device)) is not None:
        return limit - int(device.memory_stats().get("bytes_in_use", 0))
    if device.platform == "cpu":
        return available_host_memory()
    return chip.memory if (chip := find_chip(device.device_kind)) else None


def available_host_memory() -> int | None:
    """Free bytes of this machine (Linux); None where it is not known."""
    try:
        with open("/proc/meminfo") as f:
            line = next(line for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
