"""`lindm plot`: the figures of a run directory, drawn again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lindm.cli.option_parser import Command, Positional


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Redraw the figures and the report of a run directory from its records alone."""

    directory: Annotated[Path, Positional("DIR")]
    """A directory written by `lindm run` or `lindm verify`."""
    experiments: tuple[str, ...] = ()
    """Python files of experiments of your own in DIR, with their claims beside them. Their code is executed, so files in DIR
    cannot name it."""


def run(options: Plot) -> int:
    from lindm_experiments.harness.report import redraw

    for path in redraw(options.directory, options.experiments):
        print(path)
    return 0


COMMAND = Command(
    name="plot", options=Plot, run=run, examples=("lindm plot results/quick", "lindm plot verified --experiments mine.py")
)
