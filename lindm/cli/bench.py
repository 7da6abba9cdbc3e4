"""`lindm bench`: speed and memory beside other implementations."""

import importlib
from dataclasses import dataclass
from typing import Annotated, Literal

from lindm.cli.option_parser import Command, Positional


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed and memory beside other implementations."""

    name: Annotated[Literal["attention", "solvers", "sft", "decisions"], Positional("BENCH")]
    """attention, solvers, sft or decisions."""
    json: bool = False
    """Print one JSON list."""


def run(options: Bench) -> int:
    bench = importlib.import_module(f"lindm.bench.{options.name}")
    return int(bench.main(options.json) or 0)


COMMAND = Command(name="bench", options=Bench, run=run, examples=("lindm bench solvers", "lindm bench sft --json"))
