"""Runs experiments in worker processes (`tasks.py`). This process alone writes records (`run_directory.py`)."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lindm.errors import LindmError, UsageError
from lindm.io.directories import sole_writer
from lindm.io.executor import Executor, TaskEvent, TaskPool, TaskResult
from lindm.io.files import write_atomic
from lindm.io.huge_pages import huge_page_environment
from lindm_experiments.harness.run_directory import RunDirectory
from lindm_experiments.harness.tasks import Job, Point, conclude, measure, plan
from lindm_experiments.harness.verdicts import Verdict
from lindm_experiments.harness.xla import configure_xla


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
    os.environ.update(huge_page_environment())  # a process reads it when it starts; experiments train models
    with TaskPool(executor, workers, configure_xla) as pool:
        for job, result in zip(jobs, pool.run(plan, jobs), strict=True):
            state.open(job, result, locks)
        if refused := [error for error in state.errors.values() if isinstance(error, UsageError)]:
            raise refused[0]
        tasks = [(name, point) for name, run in state.runs.items() for point in run.missing]
        points = [
            Point(
                reference=state.runs[name].job.experiment.reference,
                config=state.runs[name].plan.config,
                point=point,
                directory=None if executor == "ray" else state.runs[name].directory_of(point),  # workers may be elsewhere
            )
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
        if result.error is not None:
            return self.fail(name, result.error, result.traceback)
        try:
            self.runs[name].finish(result.value)
        except LindmError as e:
            return self.fail(name, e)
        self.verdicts[name] = result.value.verdicts
        self.on_end(self.outcome(name))
