"""`lindm verify`: every experiment, one verdict for every claim."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lindm.cli.arguments import Command


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Run the experiments and give every claim a verdict. Writes verdicts.json and report.html; a run that is killed resumes."""

    preset: Literal["quick", "full", "smoke"] = "quick"
    """quick (minutes), full (the ranges that a paper would show) or smoke (seconds, decides nothing)."""
    out: Path | None = None
    """Directory of the results. [default: results/PRESET]"""
    only: tuple[str, ...] = ()
    """Claims to decide, by id; a main id includes its sub-claims. [default: all]"""
    seeds: int | None = None
    """Number of seeds, in place of the preset's."""
    fresh: bool = False
    """Remove what earlier runs of these experiments wrote to the same directory."""
    workers: int | None = None
    """Number of worker processes. [default: one per core]"""


def run(options: Verify) -> int:
    from lindm_experiments.harness.verify import verify

    out = Path("results") / options.preset if options.out is None else options.out
    return verify(options.preset, out, options.only, options.seeds, options.fresh, options.workers)


COMMAND = Command(
    name="verify",
    options=Verify,
    run=run,
    examples=("lindm verify", "lindm verify --only estimation-slope ladder", "lindm verify --preset full --workers 8"),
)
