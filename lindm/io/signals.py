"""SIGTERM and SIGINT: runs that get a signal end cleanly."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from lindm.errors import Preempted

_stop_requested = False


def stop_requested() -> bool:
    """Whether SIGTERM or SIGINT has arrived. The exception of the handler can be lost in a callback; this flag cannot."""
    return _stop_requested


def stop_on_signals() -> None:
    """SIGTERM and SIGINT raise `Preempted` from now on. For work whose finished parts are on disk already."""
    _set_handlers(_raise_preempted)


def note_signals() -> None:
    """SIGTERM and SIGINT only set the flag of `stop_requested` from now on. For work that has to be saved first."""
    _set_handlers(_set_flag)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Put the handlers back at the end and forget a signal that arrived, so that a notebook can go on after a run was stopped."""
    global _stop_requested
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        _stop_requested = False
        if threading.current_thread() is threading.main_thread():
            for number, handler in before:
                signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """SIGTERM and SIGINT that arrive in this block are handled at its end: a half-started process would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: arrived.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if arrived:
            signal.raise_signal(arrived[0])


def raise_if_stopped() -> None:
    """Raise `Preempted` if a stop was requested."""
    if _stop_requested:
        raise Preempted("stopped; the same command resumes")


def _raise_preempted(signum: int, frame: FrameType | None) -> None:
    _set_flag(signum, frame)
    raise Preempted(f"stopped by {signal.Signals(signum).name}; the same command resumes")


def _set_flag(signum: int, frame: FrameType | None) -> None:
    global _stop_requested
    _stop_requested = True


def _set_handlers(handler: Callable[[int, FrameType | None], None]) -> None:
    if threading.current_thread() is threading.main_thread():  # in another thread the starter of that thread handles signals
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, handler)
