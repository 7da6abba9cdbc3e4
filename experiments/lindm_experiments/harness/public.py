"""Experiments and verdicts from Python: what `import lindm as ld` offers of this package, and what the commands call.

Signal handlers, the precision of jax and the environment are afterwards as they were.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lindm.io import signals
from lindm.io.executor import Executor
from lindm_experiments.harness import report as reports
from lindm_experiments.harness import summary
from lindm_experiments.harness import verify as harness
from lindm_experiments.harness.experiments import find_experiment
from lindm_experiments.harness.verify import Verification


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """Experiments switch 64-bit floats on and set flags of XLA; both are put back."""
    environment = dict(os.environ)
    jax = sys.modules.get("jax")
    double = jax is not None and jax.config.jax_enable_x64
    try:
        with signals.restored():
            yield
    finally:
        for name in ("XLA_FLAGS", "JAX_ENABLE_X64"):
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
        if "jax" in sys.modules:
            double = double or (jax is None and environment.get("JAX_ENABLE_X64", "0").lower() in ("1", "true"))
            config = sys.modules["jax"].config
            if (
                config.jax_enable_x64 != double
            ):  # the value of a `with jax.enable_x64(...)` around this call must not become the global one
                config.update("jax_enable_x64", double)


def verify(
    preset: str = "quick",
    out: str | Path | None = None,
    *,
    experiments: Sequence[str] = (),
    only: Sequence[str] = (),
    seeds: int | None = None,
    fresh: bool = False,
    workers: int | None = None,
    executor: Executor = "local",
) -> Verification:
    """Run experiments and give every claim a verdict; write verdicts.json and report.html. A call that is interrupted resumes.

    Args:
      preset: quick (minutes), full (the ranges that a paper would show) or smoke (seconds; decides nothing).
      out: directory of the results. [default: results/PRESET]
      experiments: names, or Python files with their claims beside them. [default: all of lindm's]
      only: ids of claims; a main id includes its sub-claims, EXPERIMENT/ID is an id of one experiment. [default: all]
      seeds: number of seeds, in place of the preset's.
      fresh: remove what earlier runs of these experiments wrote to the same directory.
      workers: number of worker processes. [default: one per core]
      executor: local or ray.

    Returns:
      The content of verdicts.json in `.summary`, its directory, and how each experiment ended.

    Raises:
      UsageError: an unknown preset, claim or experiment, or a directory of another run.
      Preempted: after a signal.

    >>> result = ld.verify("smoke", "verified", only=["controls/swap"], workers=1)
    >>> [(claim["id"], claim["verdict"]) for claim in result.summary["claims"]]
    [('controls/swap', 'INCONCLUSIVE')]
    """
    directory = Path("results") / preset if out is None else Path(out)
    with _settings_kept():
        return harness.verify(
            preset,
            directory,
            experiments=experiments,
            only=only,
            seeds=seeds,
            fresh=fresh,
            workers=workers,
            executor=executor,
        )


def run_experiment(
    experiment: str, preset: str = "quick", out: str | Path | None = None, *, fresh: bool = False, **config: Any
) -> Verification:
    """Run one experiment in this process and decide its claims. A call that is interrupted resumes.

    Args:
      experiment: a name, or a Python file with its claims in a TOML file beside it.
      preset: quick, full or smoke.
      out: directory of the run. [default: results/EXPERIMENT-PRESET]
      fresh: remove what an earlier run wrote to the same directory.
      config: fields of the experiment's `Config` that differ from the preset's.

    Raises:
      UsageError: an unknown experiment, preset or field, or a directory of another run.
      LindmError: the error that ended the run.

    >>> result = ld.run_experiment("controls", "smoke", "controls", seeds=1)
    >>> result.summary["claims"][0]["experiment"]
    'controls'
    """
    selected = find_experiment(experiment)
    directory = Path("results") / f"{selected.name}-{preset}" if out is None else Path(out)
    with _settings_kept():
        return harness.run_experiment(selected, preset, directory, config, fresh)


def redraw(directory: str | Path) -> list[Path]:
    """Draw the figures and the report of a run directory again, from its records alone; the files. DataError without records.

    >>> result = ld.run_experiment("controls", "smoke", "controls", seeds=1)
    >>> "report.html" in [path.name for path in ld.redraw("controls")]
    True
    """
    with _settings_kept():
        return reports.redraw(Path(directory))


def report(directories: Sequence[str | Path], out: str | Path = "report") -> list[Path]:
    """Write one page about verifications, evaluations and training runs, with its tables as CSV and LaTeX; the files.

    Args:
      directories: of `verify`, `evaluate(..., out=...)` or `finetune`, or directories that contain such directories.

    Raises:
      DataError: a directory holds none of these.

    >>> sorted(path.name for path in ld.report(["run"], "report"))
    ['index.html', 'training.csv', 'training.tex']
    """
    return summary.write_summary([Path(directory) for directory in directories], Path(out))
