"""`lindm check`: verify what lindm wrote."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lindm.cli.option_parser import Command, Positional


@dataclass(frozen=True, kw_only=True)
class Check:
    """Verify everything that lindm wrote: runs, checkpoints, models, datasets, results. The command lists what is missing or
    damaged and how to restore it, and writes nothing. The exit code is 3 if something is damaged, and 4 if a training run has
    no usable checkpoint."""

    directories: Annotated[tuple[Path, ...], Positional("DIR")]
    """Directories that lindm wrote, directories that contain them, or files of saved solutions."""


def run(options: Check) -> int:
    from lindm.errors import CheckpointError, DataError
    from lindm_experiments.harness.check import check

    checked, missing = [], []
    for directory in options.directories:
        try:
            checked += check(directory)
        except DataError as e:  # the others are verified all the same
            missing.append(e.message)
            print(f"MISSING {e.message}")
    problems = [problem for one in checked for problem in one.problems]
    for one in checked:
        print(f"{'DAMAGED' if one.problems else 'ok':<8}{one.path}: {one.kind}, {one.state}")
        for problem in one.problems:
            print(f"        {problem.what}\n          -> {problem.repair}")
    if problems:
        kind = CheckpointError if any(problem.no_checkpoint for problem in problems) else DataError
        damaged = [str(one.path) for one in checked if one.problems]
        raise kind(f"missing or damaged, as listed above: {len(problems)} in {', '.join(damaged)}")
    if missing:
        raise DataError("; ".join(missing))
    return 0


COMMAND = Command(name="check", options=Check, run=run, examples=("lindm check runs/tiny", "lindm check data results models"))
