"""How far something long is: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from lindm.errors import Preempted
from lindm.io.files import asked_to_stop


@contextlib.contextmanager
def told(what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total): a bar with rate and time left on a terminal, a line every ten seconds elsewhere, on stderr.

    The rate is that since the first call: what was there before, and compilation, are not counted. The callback stops the run if
    a signal asked for it and the handler's exception was lost.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    def checked(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def callback(done: int, total: int) -> None:
            if asked_to_stop():
                raise Preempted("stopped; the same command resumes")
            tell(done, total)

        return callback

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield checked(lambda done, total: bar.update(task, completed=done, total=total))
        return
    said = time.monotonic()
    first: list[tuple[int, float]] = []

    def tell(done: int, total: int) -> None:
        nonlocal said
        if not first:
            first.append((done, time.monotonic()))
        if time.monotonic() - said > 10:
            said = time.monotonic()
            rate = (done - first[0][0]) / max(said - first[0][1], 1e-9)
            print(f"{what}: {done} of {total}, {rate:.3g} a second", file=sys.stderr)

    yield checked(tell)
