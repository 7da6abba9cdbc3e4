"""A few worker processes, each of which takes whole experiments: compiling is single-threaded, so two cores want two processes.

A worker that dies takes only its own experiment with it: the others go on, a fresh worker takes the next one.
"""

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lindm.errors import LindmError, OutOfMemoryError, Preempted, UsageError
from lindm.io import files, manifest, signals
from lindm_experiments.harness import runner
from lindm_experiments.harness.verdicts import Verdict


@dataclass(frozen=True, kw_only=True)
class Job:
    """One experiment to run."""

    experiment: str
    preset: str
    directory: Path
    seeds: int | None = None
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


def configure(module: Any, preset: str, seeds: int | None) -> Any:
    """The Config of a preset, with another number of seeds when asked for; UsageError when out of range."""
    presets = {"quick": module.QUICK, "full": module.FULL, "smoke": module.SMOKE}
    if preset not in presets:
        raise UsageError(f"--preset must be one of {', '.join(presets)}; got {preset!r}")
    try:
        return presets[preset] if seeds is None else replace(presets[preset], seeds=seeds)
    except ValueError as e:
        raise UsageError(str(e)) from e


def perform(job: Job, progress: Callable[[int, int], None], cfg: Any = None) -> Outcome:
    """Run, check and draw one experiment in this process; errors become an Outcome, with the traceback in error.log."""
    started = time.perf_counter()
    error: LindmError | None = None
    verdicts: list[Verdict] = []
    try:
        module = runner.load(job.experiment)
        cfg = configure(module, job.preset, job.seeds) if cfg is None else cfg
        if job.fresh:
            runner.start_over(job.directory)
        records = runner.run(module, cfg, job.directory, preset=job.preset, progress=progress)
        verdicts = runner.decide(module, records)
        runner.draw(module, records, job.directory)
        (job.directory / "error.log").unlink(missing_ok=True)
        manifest.write_manifest(job.directory, experiment=job.experiment, preset=job.preset, config=asdict(cfg))
    except LindmError as e:
        error = e
    except MemoryError:
        error = OutOfMemoryError(f"{job.experiment}: out of memory")
    except Exception as e:
        if signals.stop_requested():
            error = Preempted("stopped; the same command resumes")
        else:
            kind = OutOfMemoryError if "RESOURCE_EXHAUSTED" in str(e) else LindmError
            where = job.directory / "error.log"
            try:
                files.write_atomic(where, traceback.format_exc())
            except LindmError as unwritable:
                return Outcome(experiment=job.experiment, error=unwritable)
            first = (str(e).splitlines() or [""])[0]
            error = kind(f"{job.experiment}: {type(e).__name__}: {first} (traceback in {where})")
    return Outcome(experiment=job.experiment, verdicts=verdicts, seconds=time.perf_counter() - started, error=error)


def _follow_parent() -> None:
    """A worker whose parent was killed must not go on writing: the next run could not take over."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(pipe: Connection) -> None:
    runner.settle_xla()
    signals.stop_on_signals()
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        while (job := pipe.recv()) is not None:
            outcome = perform(job, lambda done, total: pipe.send((done, total)))
            pipe.send(outcome)
            if isinstance(outcome.error, Preempted):
                return
    except (EOFError, BrokenPipeError, LindmError):  # the parent is gone, or asked to stop between two jobs
        pass
    finally:
        os._exit(0)  # everything is on disk; the clean-up of jax at exit takes time and can be interrupted


def run_all(
    jobs: Sequence[Job], workers: int, started: Callable[[Job], None], progress: Callable[[str, int, int], None], ended: Callable
) -> list[Outcome]:
    """Run the jobs, first come first served; outcomes in the order of the jobs.

    `started(job)`, `progress(experiment, points done, points)` and `ended(outcome)` are called in this process.
    """
    context = multiprocessing.get_context("spawn")
    waiting, outcomes = list(jobs), {}
    busy: dict[Connection, tuple[Any, Job]] = {}

    def give(pipe: Connection | None, process: Any) -> None:
        if not waiting:
            if pipe is not None:
                pipe.send(None)
            return
        if pipe is None:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
        job = waiting.pop(0)
        started(job)
        busy[pipe] = (process, job)
        pipe.send(job)

    def finish(outcome: Outcome) -> None:
        outcomes[outcome.experiment] = outcome
        ended(outcome)

    try:
        for _ in range(min(workers, len(jobs))):
            give(None, None)
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                process, job = busy[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionResetError):  # the process died without a word: killed, or crashed below Python
                    del busy[pipe]
                    process.join()
                    how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit {process.exitcode}"
                    finish(Outcome(experiment=job.experiment, error=LindmError(f"{job.experiment}: worker died ({how})")))
                    give(None, None)
                    continue
                if isinstance(message, Outcome):
                    del busy[pipe]
                    finish(message)
                    give(pipe, process)
                else:
                    progress(job.experiment, *message)
    finally:  # on SIGTERM or an error here: the workers finish their line and stop
        for process, _ in busy.values():
            process.terminate()
        for process, _ in busy.values():
            process.join(20)
            if process.is_alive():
                process.kill()
    return [outcomes[job.experiment] for job in jobs]
