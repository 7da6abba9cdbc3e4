"""What a long run says while it runs: bars with rate and time left on a terminal, one plain line per experiment elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lindm_experiments.harness.executor import Job, Outcome

Callbacks = tuple[Callable[[Job], None], Callable[[str, int, int], None], Callable[[Outcome], None]]


@contextlib.contextmanager
def show_progress(console: Console, total: int) -> Iterator[Callbacks]:
    """Callbacks for the start of a job, a finished point and the end of a job."""
    if not console.is_terminal:
        yield _lines(console, total)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        whole = bar.add_task("experiments", total=total, rate="")
        tasks, since = {}, {}

        def start(job: Job) -> None:
            tasks[job.experiment] = bar.add_task(f"  {job.experiment}", total=None, rate="compiling")

        def point(name: str, done: int, of: int) -> None:
            first, t0 = since.setdefault(name, (done, time.monotonic()))
            rate = (done - first) / max(time.monotonic() - t0, 1e-9)
            bar.update(tasks[name], completed=done, total=of, rate=f"{rate:.2g}/s" if done > first else "compiling")

        def end(outcome: Outcome) -> None:
            bar.remove_task(tasks[outcome.experiment])
            bar.advance(whole)
            console.print(_line(outcome), markup=False, highlight=False)

        yield start, point, end


def _line(outcome: Outcome) -> str:
    return f"{outcome.experiment:<24}{outcome.seconds:7.1f} s  {outcome.message or 'done'}"


def _lines(console: Console, total: int) -> Callbacks:
    done = 0

    def end(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        console.print(f"[{done}/{total}] {_line(outcome)}", markup=False, highlight=False)

    return (lambda job: None), (lambda name, points, of: None), end
