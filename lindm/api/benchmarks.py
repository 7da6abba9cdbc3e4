"""Benchmarks: speed and memory beside other implementations."""

import importlib
from typing import get_args

from lindm.bench.timing import Row
from lindm.choices import Benchmark
from lindm.errors import unknown

BENCHMARKS: tuple[Benchmark, ...] = get_args(Benchmark)


def benchmark(name: Benchmark) -> list[Row]:
    """Measure speed and memory of a part of lindm in comparison with another implementation. Takes two to eight minutes.

    Args:
      name: attention, solvers, sft, decisions or accelerator.

    Returns:
      Rows {"work", "ours", "peer", "peer_name", "ratio", "unit"}. A ratio above one means that lindm is better. The peer is
      None if its library is not installed.

    Raises:
      ValueError: an unknown name.

    >>> rows = ld.benchmark("solvers")  # doctest: +SKIP
    >>> ld.benchmark("solver")
    Traceback (most recent call last):
    ValueError: name must be one of attention, solvers, sft, decisions, accelerator; got 'solver'; did you mean solvers?
    """
    if name not in BENCHMARKS:
        raise ValueError(unknown("name", name, BENCHMARKS))
    return importlib.import_module(f"lindm.bench.{name}").benchmark()
