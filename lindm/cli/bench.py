"""`lindm bench`: speed and memory beside other implementations."""

from dataclasses import dataclass
from typing import Annotated

from lindm.choices import Benchmark
from lindm.cli.option_parser import Command, Positional


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed and memory beside other implementations."""

    name: Annotated[Benchmark, Positional("BENCH")]
    """attention, solvers, sft or decisions."""
    json: bool = False
    """Print one JSON list."""


def run(options: Bench) -> int:
    from lindm.api.benchmarks import benchmark
    from lindm.bench.timing import show

    show(benchmark(options.name), options.json)
    return 0


COMMAND = Command(name="bench", options=Bench, run=run, examples=("lindm bench solvers", "lindm bench sft --json"))
