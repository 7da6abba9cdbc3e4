"""`lindm report`: one page of several runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lindm.cli.option_parser import Command, Positional


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one page about verifications, evaluations and training runs. The command also writes the tables as CSV and LaTeX,
    and the figures as PNG, PDF and SVG."""

    directories: Annotated[tuple[Path, ...], Positional("DIR")]
    """Directories of `lindm verify`, `lindm eval --out` or `lindm sft`, or directories that contain them."""
    out: Path = Path("report")
    """Directory for the page."""


def run(options: Report) -> int:
    from lindm_experiments.harness.summary import write_summary

    for path in write_summary(options.directories, options.out):
        print(path)
    return 0


COMMAND = Command(name="report", options=Report, run=run, examples=("lindm report results/quick runs --out report",))
