"""Progress of long work: bars on a terminal, plain lines elsewhere, nothing for work that takes less than two seconds.

    with progress_bar("tasks") as update:       # one count
        update(done, total)

    with Progress() as progress:                # several counts, details, and lines that stay
        task = progress.add("train", total=500)
        task.update(step, detail=f"loss {loss:.3g}")
        progress.print("saved step 200")

A bar shows the count, the rate, the time elapsed and the time left. Rate and time left are measured from the first advance on,
so neither earlier work that a resumed run finds finished nor compilation counts, and they are shown from the second advance on.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lindm.io.signals import at_stop

if TYPE_CHECKING:
    from rich.console import Console

SILENT_SECONDS = 2.0  # shorter work shows nothing
LINE_SECONDS = 10.0  # between two plain lines


class ProgressTask:
    """One count within a `Progress`."""

    def __init__(self, progress: "Progress", name: str, total: int | None, done: int):
        self.name, self.total, self.done, self.detail = name, total, done, ""
        self.begun = time.monotonic()
        self._progress = progress
        self._initial: int | None = None
        self._origin: tuple[int, float] | None = None  # count and time of the first advance

    def update(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Set the count; `total` stays as it is where none is given."""
        self._initial = done if self._initial is None else self._initial
        if self._origin is None and done > self._initial:
            self._origin = done, time.monotonic()
        self.done, self.detail = done, detail
        self.total = self.total if total is None else total
        self._progress._print_line(self)

    def remove(self) -> None:
        """Take the task out of the display."""
        self._progress.tasks.remove(self)

    @property
    def rate(self) -> float | None:
        """Counts a second; None until it is known."""
        if self._origin is None or self.done <= self._origin[0]:
            return None
        return (self.done - self._origin[0]) / max(time.monotonic() - self._origin[1], 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Estimate; None until it is known."""
        return None if self.rate is None or self.total is None else max(self.total - self.done, 0) / self.rate

    @property
    def status(self) -> str:
        """Detail, rate, time elapsed and time left, as far as they are known."""
        parts = [self.detail] if self.detail else []
        if self.rate is not None:
            parts.append(f"{self.rate:.3g}/s")
        parts.append(f"{format_seconds(time.monotonic() - self.begun)} elapsed")
        if self.seconds_left is not None:
            parts.append(f"{format_seconds(self.seconds_left)} left")
        return ", ".join(parts)


class Progress:
    """A display of tasks, on stderr by default. `quiet` shows nothing, and so does a display within another one."""

    _open = 0  # displays of this process

    def __init__(self, console: "Console | None" = None, quiet: bool = False):
        from rich.console import Console

        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self.tasks: list[ProgressTask] = []
        self._next_line = time.monotonic() + SILENT_SECONDS
        self._closed = False
        self._live: Any = None
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._timer = threading.Timer(SILENT_SECONDS, self._show)
        self._timer.daemon = True

    def __enter__(self) -> "Progress":
        self.quiet = self.quiet or Progress._open > 0
        Progress._open += 1
        if self.console.is_terminal and not self.quiet:
            self._stack.enter_context(at_stop(self._close))
            self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        Progress._open -= 1
        self._stack.close()
        self._close()

    def _close(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._live is not None:
                self._live.stop()
            self._closed = True

    def add(self, name: str, total: int | None = None, done: int = 0) -> ProgressTask:
        """A new task."""
        self.tasks.append(task := ProgressTask(self, name, total, done))
        return task

    @contextlib.contextmanager
    def repeated(self, task: ProgressTask) -> Iterator[ProgressTask]:
        """Print the plain line of a task again while its count stands still, with the time elapsed: compiling takes minutes."""
        ended = threading.Event()

        def repeat() -> None:
            while not ended.wait(min(LINE_SECONDS, 1.0)):
                if task.total is not None:
                    self._print_line(task)

        thread = threading.Thread(target=repeat, name="progress lines", daemon=True)
        thread.start()
        try:
            yield task
        finally:
            ended.set()
            thread.join()

    def print(self, line: str) -> None:
        """A line that stays, above the bars."""
        if not self.quiet:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _print_line(self, task: ProgressTask) -> None:
        if self.console.is_terminal or self.quiet or (now := time.monotonic()) < self._next_line:
            return
        self._next_line = now + LINE_SECONDS
        self.print(f"{task.name}: {task.done} of {task.total or '?'}, {task.status}")

    def _show(self) -> None:
        from rich.live import Live

        with self._lock:
            if not self._closed:
                self._live = Live(console=self.console, get_renderable=self._bars, refresh_per_second=4, transient=True)
                self._live.start()

    def _bars(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        for task in list(self.tasks):
            bar = ProgressBar(total=task.total, completed=task.done, width=30)
            grid.add_row(Text(task.name), bar, Text(f"{task.done}/{task.total or '?'}"), Text(task.status))
        return grid


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A display of one count; the callback takes (done, total)."""
    with Progress() as progress:
        yield progress.add(name).update


def format_seconds(seconds: float) -> str:
    """A duration as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
