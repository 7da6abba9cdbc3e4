"""The directory of a run, which one process at a time writes.

A run directory holds

    config.json     the configuration, the preset, hashes of the claims and of the code; a run with other ones is refused
    records.jsonl   the result: one line for each point with its checksum, appended and synced; no time in it, so that a killed
                    and resumed run ends with the same bytes as an uninterrupted one
    metrics.jsonl   the seconds that each point took
    manifest.json   date, command line, versions, git commit, devices, seeds, SHA-256 of the outputs
    unfinished/     data and checkpoints of the points that have no record yet (`unfinished.py`)
    *.png, *.pdf, *.svg  drawn from the records alone; table.csv, where the experiment has a table
"""

import json
from pathlib import Path

from lindm.errors import DataError, OccupiedError
from lindm.io import directories
from lindm.io.files import (
    append_record,
    canonical_json,
    read_json,
    read_json_lines,
    record_line,
    storage_errors,
    write_atomic,
    write_json,
)
from lindm.io.manifest import write_manifest
from lindm_experiments.harness import unfinished
from lindm_experiments.harness.tasks import RUN_FORMAT, Conclusion, Job, RunPlan

RUN_REPORTS = ("verdicts.json", "report.html")  # of `lindm run`; `lindm verify` has one of each for all experiments
OUTPUTS = ("config.json", "records.jsonl", "metrics.jsonl", "manifest.json", "error.log", "table.csv", *RUN_REPORTS)


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
      OccupiedError: the directory holds another run.
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
            raise OccupiedError(
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
        unfinished.remove_all_but(self.path, {self.directory_of(point) for point in self.missing})
        if self.missing:
            with storage_errors(self.path):
                (self.path / "manifest.json").unlink(missing_ok=True)  # the run is not finished any more

    @property
    def missing(self) -> list[dict]:
        """The points without a record."""
        return [p for key, p in zip(self.keys, self.plan.points, strict=True) if key not in self.lines]

    def directory_of(self, point: dict) -> Path:
        """Where the files of a point are while it is measured."""
        return unfinished.directory_of(self.path, canonical_json(point))

    def append(self, point: dict, line: str, seconds: float) -> None:
        """Write the record of a point, and remove its files."""
        append_record(self.path / "records.jsonl", json.loads(line))
        append_record(self.path / "metrics.jsonl", {"point": point, "seconds": round(seconds, 4)})
        self.lines[canonical_json(point)] = line
        if (directory := self.directory_of(point)).exists():
            directories.remove(directory)

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
        unfinished.remove_all_but(self.path, set())
        (self.path / "error.log").unlink(missing_ok=True)
        experiment = self.job.experiment
        outside = {"source": str(experiment.path), "docstring": experiment.docstring} if experiment.outside else {}
        run = {"experiment": experiment.name, "preset": self.job.preset, "config": self.plan.description["config"]} | outside
        kept = [name for name in ("config.json", "records.jsonl", "metrics.jsonl") if (self.path / name).exists()]
        write_manifest(self.path, [*kept, *conclusion.files], **conclusion.environment, **run)


def remove_outputs(directory: Path) -> None:
    """Remove what an earlier run wrote into `directory`, and nothing else."""
    unfinished.remove_all_but(directory, set())
    with storage_errors(directory):
        for pattern in (*OUTPUTS, "*.png", "*.pdf", "*.svg"):
            for path in directory.glob(pattern):
                path.unlink()
