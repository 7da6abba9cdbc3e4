"""Reports from Python: what `import lindm as ld` offers of this package, with `verify` and `run_experiment`.

Signal handlers, the precision of jax and the environment are afterwards as they were.
"""

from collections.abc import Sequence
from pathlib import Path

from lindm.errors import UsageError
from lindm_experiments.harness import report as reports
from lindm_experiments.harness import summary
from lindm_experiments.harness.xla import settings_kept


@settings_kept()
def redraw(directory: str | Path, experiments: Sequence[str | Path] = ()) -> list[Path]:
    """Draw the figures and the report of a run directory again, from its records alone; the files. DataError without records.

    Args:
      experiments: the Python files of experiments outside the package. Their code runs; no file of the directory can name code.

    >>> result = ld.run_experiment("controls", "smoke", "controls", seeds=1)
    >>> "report.html" in [path.name for path in ld.redraw("controls")]
    True
    """
    if isinstance(experiments, str | Path):
        raise UsageError(f"experiments must be a list; got {str(experiments)!r}")
    return reports.redraw(Path(directory), [str(path) for path in experiments])


def report(directories: Sequence[str | Path], out: str | Path = "report") -> list[Path]:
    """Write one page about verifications, evaluations and training runs, with tables as CSV and LaTeX, figures as PNG and PDF.

    Args:
      directories: of `verify`, `evaluate(..., out=...)` or `finetune`, or directories that contain such directories.

    Returns:
      The files.

    Raises:
      UsageError: `directories` is no list, or empty. DataError: a directory holds none of these.

    >>> sorted(path.name for path in ld.report(["run"], "report"))
    ['curves.pdf', 'curves.png', 'curves.svg', 'index.html', 'training.csv', 'training.tex']
    """
    if isinstance(directories, str | Path):
        raise UsageError(f"directories must be a list; got {str(directories)!r}")
    if not directories:
        raise UsageError("directories must have at least one directory; got none")
    return summary.write_summary([Path(directory) for directory in directories], Path(out))
