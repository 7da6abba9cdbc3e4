"""`lindm report`: one page of several runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lindm.cli.option_parser import Command, Positional


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one page about verifications, evaluations and training runs. Its tables are written as CSV and LaTeX, too, and its
    figures as PNG and PDF."""

    directories: Annotated[tuple[Path, ...], Positional("DIR")]
    """Directories of `lindm verify`, `lindm eval --out` or `lindm sft`, or directories that contain such directories."""
    out: Path = Path("report")
    """Directory of the page."""


def run(options: Report) -> int:
    from lindm_experiments.harness.summary import write_summary

    for path in write_summary(options.directories, options.out):
        print(path)
    return 0


COMMAND = Command(name="report", options=Report, run=run, examples=("lindm report results/quick runs --out report",))
