"""What worker processes do for a run: list the points, measure one, decide the claims, draw.

No function here writes a file, except that `measure` may write to the directory of its point.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lindm.errors import DataError, NonFiniteError, OccupiedError, UsageError, unknown
from lindm.io import directories
from lindm.io.files import canonical_json, find_non_finite, to_jsonable
from lindm.io.provenance import environment
from lindm_experiments.harness.claims import PACKAGE_CLAIMS, UnknownClaimError, claim_ids, claims_hash
from lindm_experiments.harness.experiments import MINUTES, Experiment, load, name_of, points_of, preset_config
from lindm_experiments.harness.fingerprint import code_fingerprint
from lindm_experiments.harness.unfinished import measuring_in
from lindm_experiments.harness.verdicts import Verdict

RUN_FORMAT = "lindm-run-2"  # of config.json
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\n")  # of a cell that a spreadsheet computes


@dataclass(frozen=True, kw_only=True)
class Job:
    """One experiment to run.

    Attributes:
      config: the fields of its Config that differ from the preset's.
      seed_offset: what is added to its base seed, for a run on other seeds than the preset's.
    """

    experiment: Experiment
    preset: str
    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    seed_offset: int = 0
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What has to be measured for a job."""

    description: dict  # the content of config.json
    config: dict[str, Any]  # the fields of the experiment's Config
    points: list[dict]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement; `directory` is kept for it where the run is killed, None: a temporary one."""

    reference: str
    config: dict[str, Any]
    point: dict
    directory: Path | None


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What follows from all records of a run."""

    verdicts: list[Verdict]
    files: dict[str, bytes]
    environment: dict  # of the process that drew the files


def plan(job: Job) -> RunPlan:
    """The configuration and the points of a job. UsageError where an option is out of range."""
    module = load(job.experiment.reference)
    known = [field.name for field in fields(module.Config)]
    if wrong := [name for name in job.config if name not in known]:
        raise UsageError(unknown("option", wrong[0], known))
    try:
        config = replace(preset_config(module, job.preset), **job.config)
        if job.seed_offset:
            config = replace(config, base_seed=config.base_seed + job.seed_offset)
    except ValueError as e:
        raise UsageError(str(e)) from e
    points = points_of(module, config)
    if len({canonical_json(p) for p in points}) != len(points):
        raise DataError(f"{job.experiment.name}: points gives the same point twice")
    return RunPlan(description=describe(job.experiment, config, job.preset), config=dict(vars(config)), points=points)


def describe(experiment: Experiment, config: Any, preset: str) -> dict:
    """The content of config.json."""
    return {
        "format": RUN_FORMAT,
        "experiment": experiment.name,
        "preset": preset,
        "config": json.loads(canonical_json(asdict(config))),
        "criteria": claims_hash(experiment.claims),
        "code": code_fingerprint(experiment),
    }


def measure(task: Point) -> str:
    """The record of a point, as JSON. NonFiniteError where a number is not finite."""
    begun = task.directory is not None and task.directory.exists()
    try:
        return _measure(task)
    except OccupiedError:
        if not begun:
            raise
    directories.remove(task.directory)  # other versions or another device began the point, so it cannot be continued
    return _measure(task)


def _measure(task: Point) -> str:
    module = load(task.reference)
    with measuring_in(task.directory):
        record = {"point": task.point} | to_jsonable(module.measure(module.Config(**task.config), task.point))
    if where := find_non_finite(record):
        point = canonical_json(task.point)
        raise NonFiniteError(f"not finite at point {point}: {where}; it has no record")
    return canonical_json(record)


def conclude(task: tuple[str, list[dict]]) -> Conclusion:
    """Verdicts, figures and table of the records of an experiment. DataError where a verdict names a figure that is not there."""
    reference, records = task
    module = load(reference)
    verdicts, files = verdicts_of(module, records), draw(module, records)
    drawn = [name.removesuffix(".png") for name in files if name.endswith(".png")]
    for v in verdicts:
        if v.figure is not None and v.figure not in drawn:
            there = f"it returns: {', '.join(drawn)}" if drawn else "it returns none"
            raise DataError(f"check gives claim {v.id!r} the figure {v.figure!r}, which plot does not return; {there}")
    return Conclusion(verdicts=verdicts, files=files, environment=environment())


def verdicts_of(module: ModuleType, records: list[dict]) -> list[Verdict]:
    """The verdicts of the records, one for each claim of the experiment, before any correction for their number.

    DataError where `check` decides a claim that the file of claims does not have, or does not decide each of its claims once.
    """
    expected = sorted(claim_ids(name := name_of(module)))
    file = PACKAGE_CLAIMS.name if name in MINUTES else f"{name}.toml"
    try:
        verdicts = list(module.check(records))
    except UnknownClaimError as e:
        raise DataError(f"{file} has no claim {e.id!r}, which check decides; it has: {', '.join(expected)}") from e
    if sorted(v.id for v in verdicts) != expected:
        decided = ", ".join(sorted(v.id for v in verdicts)) or "none"
        raise DataError(f"check must decide each claim of {file} once, {', '.join(expected)}; got {decided}")
    return verdicts


def draw(module: ModuleType, records: list[dict]) -> dict[str, bytes]:
    """File name -> content: figures of the records as PNG, PDF and SVG, and table.csv where the experiment has a table."""
    from matplotlib import pyplot

    from lindm_experiments.harness.figures import STYLE, figure_files, file_backend

    files: dict[str, bytes] = {}
    with file_backend(), pyplot.rc_context(STYLE):  # pyright: ignore
        for name, figure in module.plot(records).items():
            files |= figure_files(name, figure)
            pyplot.close(figure)
    if hasattr(module, "table"):
        files["table.csv"] = as_csv(module.table(records)).encode()
    return files


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with equal keys as CSV with a header. A text that a spreadsheet would compute gets an apostrophe in front."""

    def escape(cell: Any) -> Any:
        if not isinstance(cell, str):
            return cell
        text = cell.replace("\r\n", "\n").replace("\r", "\n")  # csv puts no quotes around a \r, which ends a row in spreadsheets
        return f"'{text}" if text.startswith(FORMULA_STARTS) else text

    stream, names = io.StringIO(), list(rows[0])
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([escape(cell) for cell in cells] for cells in (names, *([row[name] for name in names] for row in rows)))
    return stream.getvalue()
