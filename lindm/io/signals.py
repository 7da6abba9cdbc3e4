"""SIGTERM and SIGINT: how a process ends that is asked to stop.

A process of the command line calls `watch`. A thread then ends the process as soon as a signal arrives, whatever the main thread
does. No exception is raised in the middle of a library, which could take it for bad data, lose it in a callback, or crash in the
threads of a device; and native code, in which Python runs no handler, delays nothing: a compilation can take minutes. All that is
finished is on disk at any moment, since a process may also be killed.

In a block of `unsaved_work` the signal sets a flag, and the main thread saves before it raises `Preempted`. The thread ends the
process only if the main thread does not look at the flag in time, or when a second signal arrives.

A process without `watch`, such as a notebook, keeps its own handlers, except in a block of `unsaved_work`.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

from lindm.errors import Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 20.0  # seconds after which a main thread counts as busy that does not look at the flag
AGAIN = 1.0  # seconds after which another signal is a second request: launchers pass on what the terminal has sent already
CLEAN_UP_SECONDS = 5.0

_stop_requested = False
_noticed = threading.Event()  # the main thread knows that it has to save
_unsaved: "_UnsavedWork | None" = None
_clean_ups: list[Callable[[], object]] = []
_uninterruptible = threading.Lock()  # held by the main thread where it must not be frozen
_watcher: "_Watcher | None" = None


class Ending(NamedTuple):
    """How a process ends: its exit code and the line that it prints."""

    code: int
    message: str


class _Closed(Exception):
    """`unwatch` was called."""


class _UnsavedWork:
    def __init__(self, kept: Callable[[], str]):
        self.kept, self.grace = kept, GRACE


# --- the command line --------------------------------------------------------------------------------------------------------


def watch(ending: Callable[[int, str], Ending]) -> None:
    """SIGTERM and SIGINT end this process from now on. Call it once, in the main thread.

    Args:
      ending: from the number of the signal, and what is kept of unsaved work (empty outside of `unsaved_work`).
    """
    global _watcher
    _watcher = _Watcher(ending)


def is_watching() -> bool:
    """Whether `watch` was called in this process."""
    return _watcher is not None


def release() -> None:
    """Let SIGTERM and SIGINT arrive in this thread, where they were blocked until something answers them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def unwatch() -> Callable[[int, str], Ending] | None:
    """Undo `watch`; the ending that it had. For a process that is about to fork."""
    global _watcher
    watcher, _watcher = _watcher, None
    if watcher is None:
        return None
    watcher.close()
    return watcher.ending


def ignore() -> None:
    """Ignore SIGTERM and SIGINT from now on: this process has done its work and is about to exit."""
    unwatch()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Watcher:
    """The thread that ends the process. Python's own C handler writes the number of a signal to a pipe, in any thread."""

    def __init__(self, ending: Callable[[int, str], Ending]):
        self.ending, self.arrived, self.saving = ending, False, False
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.old_fd = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.old_handlers = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        self.thread = threading.Thread(target=self.run, name="stop signals", daemon=True)
        self.thread.start()
        release()

    def close(self) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self.old_fd)
        os.write(self.write_end, b"\0")
        self.thread.join()
        os.close(self.read_end)
        os.close(self.write_end)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread."""
        self.arrived = True
        if not _uninterruptible.locked():
            self.freeze()

    def freeze(self) -> None:
        """Do nothing more, in the main thread, where this process is about to end: no file is written and nothing printed."""
        if self.arrived and _unsaved is None and not self.saving:
            threading.Event().wait()

    def run(self) -> None:
        release()
        if not (number := self.next_signal(None)):
            return
        code = 128 + number
        try:
            kept = self.wait_for_saving()
        except _Closed:
            return
        try:
            end = self.ending(number, kept)
            code = end.code
            _clean_up()
            os.write(2, f"lindm: {end.message}\n".encode())
        finally:
            os._exit(code)

    def next_signal(self, seconds: float | None) -> int | None:
        """The next of the signals, 0 after `close`, None where none came within `seconds`."""
        while select.select([self.read_end], [], [], seconds)[0]:
            number = os.read(self.read_end, 1)[0]
            if number == 0 or number in STOP_SIGNALS:
                return number
        return None

    def wait_for_saving(self) -> str:
        """Wait while the main thread saves; returns where it does not, with what is kept nevertheless.  Raises: _Closed."""
        global _stop_requested
        begun, locked = time.monotonic(), _uninterruptible.acquire(timeout=CLEAN_UP_SECONDS)
        work, _stop_requested = _unsaved, True
        self.saving = work is not None
        if locked:
            _uninterruptible.release()
        if work is None:
            return ""
        while _noticed.is_set() or time.monotonic() - begun < work.grace:
            number = self.next_signal(0.1)
            if number == 0:
                raise _Closed
            if number is not None and time.monotonic() - begun > AGAIN:
                break
        return work.kept()


def _clean_up() -> None:
    """Call what `at_stop` registered, in threads of their own: one that hangs holds up neither the others nor the end."""
    deadline = time.monotonic() + CLEAN_UP_SECONDS
    threads = [threading.Thread(target=_quietly, args=(c,), daemon=True) for c in (*reversed(_clean_ups), _flush)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor


def _quietly(clean_up: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        clean_up()


def _flush() -> None:
    sys.stdout.flush()


# --- work that a stop concerns -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_stop(clean_up: Callable[[], object]) -> Iterator[None]:
    """Call `clean_up`, in another thread, if a signal ends the process in this block: `finally` is not reached then."""
    _clean_ups.append(clean_up)
    try:
        yield
    finally:
        _clean_ups.remove(clean_up)


@contextlib.contextmanager
def unsaved_work(kept: Callable[[], str]) -> Iterator[None]:
    """A block whose work is lost unless it is saved: a signal sets the flag of `stop_requested`.

    Args:
      kept: what is on disk when the process ends without saving, for its last message.

    Raises:
      Preempted: at the end of the block, after a signal.
    """
    global _unsaved, _stop_requested
    _noticed.clear()
    _unsaved, requested = _UnsavedWork(kept), False
    try:
        with contextlib.nullcontext() if is_watching() else _flag_handlers():
            yield
    finally:
        with _uninterruptible:  # a signal comes before this, and is noticed, or after it, and ends the process
            _noticed.set()
            _unsaved, requested, _stop_requested = None, _stop_requested, False
    if requested:
        raise Preempted(f"stopped by a signal: {kept()}; the same command resumes")


def stop_requested() -> bool:
    """Whether unsaved work has to be saved now. Whoever asks in time is given the time that saving takes."""
    if _stop_requested:
        _noticed.set()
    return _stop_requested


def allow_seconds(seconds: float) -> None:
    """In a block of `unsaved_work`: the main thread looks at the flag only after so many seconds, such as those of a step."""
    if _unsaved is not None:
        _unsaved.grace = max(GRACE, seconds)


@contextlib.contextmanager
def _flag_handlers() -> Iterator[None]:
    """SIGTERM and SIGINT set the flag; a second signal does what it did before this block. A signal that is ignored stays so."""
    global _stop_requested
    _stop_requested = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: handler for n in STOP_SIGNALS if (handler := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    first: list[float] = []

    def set_flag(number: int, frame: FrameType | None) -> None:
        global _stop_requested
        _stop_requested = True
        first.append(time.monotonic())
        if first[-1] - first[0] > AGAIN:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, set_flag)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """SIGTERM and SIGINT that arrive in this block are handled at its end: a half-started process would print a traceback.

    A process that is started in this block gets neither of them, not even before it can set its own handlers.
    """
    arrived: list[int] = []
    before: dict[signal.Signals, Any] = {}
    with _uninterruptible:
        if threading.current_thread() is threading.main_thread() and not is_watching():
            before = {n: signal.signal(n, lambda number, frame: arrived.append(number)) for n in STOP_SIGNALS}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if arrived:
        signal.raise_signal(arrived[0])
    if _watcher is not None:
        _watcher.freeze()
