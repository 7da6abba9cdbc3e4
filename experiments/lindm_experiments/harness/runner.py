"""Runs experiments in worker processes; this process alone writes their run directories.

A run directory holds

    config.json     the configuration, the preset, hashes of the claims and of the code; a run with other ones is refused
    records.jsonl   the result: one line for each point with its checksum, appended and synced; no time in it, so that a killed
                    and resumed run ends with the same bytes as an uninterrupted one
    metrics.jsonl   the seconds that each point took
    manifest.json   date, command line, versions, git commit, devices, seeds, SHA-256 of the outputs
    *.png, *.pdf    drawn from the records alone; table.csv, where the experiment has a table
"""

import contextlib
import csv
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lindm.errors import DataError, LindmError, NonFiniteError, UsageError, unknown
from lindm.io.directories import sole_writer
from lindm.io.executor import Executor, TaskEvent, TaskPool, TaskResult
from lindm.io.files import (
    append_record,
    canonical_json,
    find_non_finite,
    read_json,
    read_json_lines,
    record_line,
    storage_errors,
    to_jsonable,
    write_atomic,
    write_json,
)
from lindm.io.manifest import write_manifest
from lindm.io.provenance import environment
from lindm_experiments.harness.claims import claim_ids, claims_hash
from lindm_experiments.harness.experiments import Experiment, load, name_of, points_of, preset_config
from lindm_experiments.harness.fingerprint import code_fingerprint
from lindm_experiments.harness.verdicts import Verdict
from lindm_experiments.harness.xla import configure_xla

RUN_FORMAT = "lindm-run-2"  # of config.json
RUN_REPORTS = ("verdicts.json", "report.html")  # of `lindm run`; `lindm verify` has one of each for all experiments
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\n")  # of a cell that a spreadsheet computes
OUTPUTS = ("config.json", "records.jsonl", "metrics.jsonl", "manifest.json", "error.log", "table.csv", *RUN_REPORTS)


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
class Outcome:
    """The result of a job: its verdicts, or the error that ended it."""

    experiment: str
    error: LindmError | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def message(self) -> str:
        return "" if self.error is None else self.error.message


# --- tasks: what workers do. They read and write no file of a run -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What has to be measured for a job."""

    description: dict  # the content of config.json
    config: dict[str, Any]  # the fields of the experiment's Config
    points: list[dict]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement."""

    reference: str
    config: dict[str, Any]
    point: dict


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
    module = load(task.reference)
    record = {"point": task.point} | to_jsonable(module.measure(module.Config(**task.config), task.point))
    if where := find_non_finite(record):
        point = canonical_json(task.point)
        raise NonFiniteError(f"not finite at point {point}: {where}; nothing of this point was written")
    return canonical_json(record)


def conclude(task: tuple[str, list[dict]]) -> Conclusion:
    """Verdicts, figures and table of the records of an experiment."""
    reference, records = task
    module = load(reference)
    return Conclusion(verdicts=verdicts_of(module, records), files=draw(module, records), environment=environment())


def verdicts_of(module: ModuleType, records: list[dict]) -> list[Verdict]:
    """The verdicts of the records, one for each claim of the experiment, before any correction for their number."""
    verdicts = list(module.check(records))
    expected = sorted(claim_ids(name_of(module)))
    if sorted(v.id for v in verdicts) != expected:
        raise ValueError(f"check must decide each of {expected} once; got {sorted(v.id for v in verdicts)}")
    return verdicts


def draw(module: ModuleType, records: list[dict]) -> dict[str, bytes]:
    """File name -> content: figures of the records as PNG and PDF, and table.csv where the experiment has a table."""
    import matplotlib
    from matplotlib import pyplot

    from lindm_experiments.harness.figures import STYLE, file_backend

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it remarks on the missing date of every font it embeds
    files: dict[str, bytes] = {}
    with file_backend(), pyplot.rc_context(STYLE):  # pyright: ignore
        figures = module.plot(records)
        # The layout is computed once, not for each format. `savefig` draws a figure twice as long as it has a layout engine
        # ("none" is one too), and gives it the engine of the style again.
        matplotlib.rcParams["figure.constrained_layout.use"] = False
        for name, figure in figures.items():
            if engine := figure.get_layout_engine():
                engine.execute(figure)
            figure.set_layout_engine(None)
            for ending, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=ending, metadata=metadata)  # no dates: the same records give the same bytes
                files[f"{name}.{ending}"] = buffer.getvalue()
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


# --- run directories ---------------------------------------------------------------------------------------------------------


def differences(old: dict, new: dict) -> list[str]:
    """`field: old -> new` for every field that differs."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{key}.{line}" for line in differences(a, b)]
        elif a != b:
            short = [str(v)[:12] + "..." if key in ("criteria", "code") else json.dumps(v) for v in (a, b)]
            lines.append(f"{key}: {short[0]} -> {short[1]}")
    return lines


class RunDirectory:
    """A run directory that this process has locked.

    Raises:
      UsageError: the directory holds another run.
      DataError: config.json or records.jsonl is damaged.
      StorageError: the disk is full or not writable.
    """

    def __init__(self, job: Job, plan: RunPlan) -> None:
        self.job, self.plan = job, plan
        self.path = job.directory
        self.keys = [canonical_json(p) for p in plan.points]
        if job.fresh:
            remove_outputs(self.path)
        config, records = self.path / "config.json", self.path / "records.jsonl"
        if not config.exists():
            if records.exists():
                raise DataError(f"{config} is missing, although {records} is there: start over with --fresh")
            write_json(config, plan.description, format=RUN_FORMAT)
        elif changed := differences(read_json(config, format=RUN_FORMAT), plan.description):
            raise UsageError(
                f"{self.path} holds another run ({'; '.join(changed)}): choose another --out, or start over with --fresh"
            )
        self.lines: dict[str, str] = {}
        for number, record in enumerate(read_json_lines(records, repair=True), start=1):
            key = canonical_json(record.get("point"))
            if key in self.lines or key not in self.keys:
                what = "there twice" if key in self.lines else "not one of this run"
                raise DataError(f"{records}:{number}: the point {key} is {what}")
            self.lines[key] = canonical_json(record)
        read_json_lines(self.path / "metrics.jsonl", repair=True)  # the manifest at the end vouches for it
        if self.missing:
            with storage_errors(self.path):
                (self.path / "manifest.json").unlink(missing_ok=True)  # the run is not finished any more

    @property
    def missing(self) -> list[dict]:
        """The points without a record."""
        return [p for key, p in zip(self.keys, self.plan.points, strict=True) if key not in self.lines]

    def append(self, point: dict, line: str, seconds: float) -> None:
        """Write the record of a point."""
        append_record(self.path / "records.jsonl", json.loads(line))
        append_record(self.path / "metrics.jsonl", {"point": point, "seconds": round(seconds, 4)})
        self.lines[canonical_json(point)] = line

    def records(self) -> list[dict]:
        """All records, in the order of the points; the file is put into this order too."""
        if list(self.lines) != self.keys:
            lines = (record_line(json.loads(self.lines[key])) for key in self.keys)
            write_atomic(self.path / "records.jsonl", "".join(f"{line}\n" for line in lines))
        return [json.loads(self.lines[key]) for key in self.keys]

    def finish(self, conclusion: Conclusion) -> None:
        """Write figures, table and manifest."""
        for name, content in conclusion.files.items():
            write_atomic(self.path / name, content)
        (self.path / "error.log").unlink(missing_ok=True)
        experiment = self.job.experiment
        outside = {"source": str(experiment.path), "docstring": experiment.docstring} if experiment.outside else {}
        run = {"experiment": experiment.name, "preset": self.job.preset, "config": self.plan.description["config"]} | outside
        kept = [name for name in ("config.json", "records.jsonl", "metrics.jsonl") if (self.path / name).exists()]
        write_manifest(self.path, [*kept, *conclusion.files], **conclusion.environment, **run)


def remove_outputs(directory: Path) -> None:
    """Remove what an earlier run wrote into `directory`, and nothing else."""
    with storage_errors(directory):
        for pattern in (*OUTPUTS, "*.png", "*.pdf"):
            for path in directory.glob(pattern):
                path.unlink()


# --- the run -----------------------------------------------------------------------------------------------------------------


Started = Callable[[str, int, int], None]  # experiment, points with a record, points
Ended = Callable[[Outcome], None]


def run_experiments(
    jobs: Sequence[Job],
    locks: contextlib.ExitStack,
    *,
    executor: Executor = "local",
    workers: int | None = None,
    on_point: Started = lambda name, done, total: None,
    on_end: Ended = lambda outcome: None,
) -> list[Outcome]:
    """Measure the points without a record, decide the claims and draw; the outcomes, in the order of the jobs.

    An error ends its own experiment. A worker that dies costs its point; the other points of the experiment are measured.
    `locks` gets the locks of the run directories, which the caller holds until it has written what follows from the outcomes.
    `on_point` is called when a point starts and when it ends, `on_end` when an experiment has its verdicts or its first error.

    Raises:
      UsageError: a run directory holds another run, or is being written by another process. Nothing is measured then.
    """
    state = _State(jobs, on_point, on_end)
    with TaskPool(executor, workers, configure_xla) as pool:
        for job, result in zip(jobs, pool.run(plan, jobs), strict=True):
            state.open(job, result, locks)
        if refused := [error for error in state.errors.values() if isinstance(error, UsageError)]:
            raise refused[0]
        tasks = [(name, point) for name, run in state.runs.items() for point in run.missing]
        points = [
            Point(reference=state.runs[name].job.experiment.reference, config=state.runs[name].plan.config, point=point)
            for name, point in tasks
        ]

        def on_event(event: TaskEvent) -> None:
            state.measured(*tasks[event.index], event.result)

        pool.run(measure, points, groups=[name for name, _ in tasks], on_event=on_event)
        records = state.complete_records()
        for name, result in zip(records, pool.run(conclude, list(records.values())), strict=True):
            state.concluded(name, result)
    return [state.outcome(job.experiment.name) for job in jobs]


class _State:
    """The runs and errors of one call of `run_experiments`."""

    def __init__(self, jobs: Sequence[Job], on_point: Started, on_end: Ended) -> None:
        self.on_point, self.on_end = on_point, on_end
        self.directories = {job.experiment.name: job.directory for job in jobs}
        self.runs: dict[str, RunDirectory] = {}
        self.errors: dict[str, LindmError] = {}
        self.verdicts: dict[str, list[Verdict]] = {}
        self.seconds = dict.fromkeys(self.directories, 0.0)

    def outcome(self, name: str) -> Outcome:
        return Outcome(
            experiment=name,
            error=self.errors.get(name),
            verdicts=self.verdicts.get(name, []),
            seconds=self.seconds[name],
        )

    def fail(self, name: str, error: LindmError, traceback: str = "") -> None:
        """Note the first error of an experiment; the traceback of an unexpected one goes to error.log."""
        if name in self.errors:
            return
        message = error.message
        if traceback:
            log = self.directories[name] / "error.log"
            try:
                write_atomic(log, traceback)
                message += f" (traceback in {log})"
            except LindmError as unwritable:
                error, message = unwritable, unwritable.message
        self.errors[name] = type(error)(f"{name}: {message}")
        self.on_end(self.outcome(name))

    def open(self, job: Job, result: TaskResult | None, locks: contextlib.ExitStack) -> None:
        name = job.experiment.name
        assert result is not None
        if result.error is not None:
            return self.fail(name, result.error, result.traceback)
        try:
            locks.enter_context(sole_writer(job.directory))
            run = self.runs[name] = RunDirectory(job, result.value)
        except LindmError as e:
            return self.fail(name, e)
        self.on_point(name, len(run.lines), len(run.keys))

    def measured(self, name: str, point: dict, result: TaskResult | None) -> None:
        run = self.runs[name]
        if result is not None:
            self.seconds[name] += result.seconds
            try:
                if result.error is None:
                    run.append(point, result.value, result.seconds)
                else:
                    self.fail(name, result.error, result.traceback)
            except LindmError as e:
                self.fail(name, e)
        self.on_point(name, len(run.lines), len(run.keys))

    def complete_records(self) -> dict[str, tuple[str, list[dict]]]:
        """Experiment -> its reference and its records, for those without an error."""
        complete = {}
        for name, run in self.runs.items():
            if name not in self.errors:
                try:
                    complete[name] = run.job.experiment.reference, run.records()
                except LindmError as e:
                    self.fail(name, e)
        return complete

    def concluded(self, name: str, result: TaskResult | None) -> None:
        assert result is not None
        self.seconds[name] += result.seconds
        try:
            if result.error is None:
                self.runs[name].finish(result.value)
                self.verdicts[name] = result.value.verdicts
            else:
                self.fail(name, result.error, result.traceback)
        except LindmError as e:
            self.fail(name, e)
        self.on_end(self.outcome(name))
