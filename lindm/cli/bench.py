"""`lindm bench`: speed and memory compared with other implementations; `accelerator`: whether training works on the device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lindm.choices import Benchmark
from lindm.cli.option_parser import Command, Positional
from lindm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed and memory in comparison with other implementations."""

    name: Annotated[Benchmark, Positional("BENCH")]
    """attention, solvers, sft, decisions, or accelerator, which also checks whether training works on the device of this
    machine."""
    json: bool = False
    """Print one JSON list; accelerator always prints one JSON object."""
    model: Path | None = None
    """accelerator: directory of SmolLM2 or another Llama. [default: models/SmolLM2-135M-Instruct, if it exists]"""
    out: Path | None = None
    """accelerator: also write the JSON object to this file."""


def run(options: Bench) -> int:
    if options.name == "accelerator":
        return _check_accelerator(options)
    for name in ("model", "out"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} is an option of `lindm bench accelerator`; got it with {options.name}")
    from lindm.api.benchmarks import benchmark
    from lindm.bench.timing import show

    show(benchmark(options.name), options.json)
    return 0


def _check_accelerator(options: Bench) -> int:
    """1 where a part failed."""
    from lindm.bench import accelerator
    from lindm.io.files import make_parent, strict_json, write_json

    if options.model is not None and not (options.model / "config.json").is_file():
        raise UsageError(f"--model must be the directory of a model; {options.model} has no config.json")
    if options.out is not None:
        make_parent(options.out)  # an error comes before the check, which takes minutes
    document = accelerator.check(options.model)
    print(strict_json(document, indent=1))
    if options.out is not None:
        write_json(options.out, document)
    return int(any(part["status"] == "failed" for part in document["parts"]))


COMMAND = Command(
    name="bench",
    options=Bench,
    run=run,
    examples=("lindm bench solvers", "lindm bench sft --json", "lindm bench accelerator --out accelerator.json"),
)
