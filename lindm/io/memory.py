"""Limits on the memory of this process, and a parent process that reports what a child cannot.

C++ code that cannot allocate, such as XLA's, aborts its process: no handler in it can turn that into an exit code.
"""

import contextlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable

from lindm.errors import MEMORY_ADVICE, LindmError, OutOfMemoryError
from lindm.io.signals import STOP_SIGNALS, release


class WorkerDied(LindmError):
    """The process of a task was killed, or crashed below Python."""


class WorkerOutOfMemory(WorkerDied, OutOfMemoryError):
    """The process of a task crashed where memory is limited, as C++ code does that cannot allocate."""


NATIVE_CODES = (1, 127)  # with which native code ends a process that cannot allocate
ALLOCATION_SIGNALS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGTRAP)  # that end a process which cannot allocate


def memory_limit() -> int | None:
    """The limit on the address space of this process in bytes (`ulimit -v`); None where there is none."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def end_with_parent(pipe: int) -> None:
    """Kill this process when the other end of a pipe closes, because the parent process that holds it has ended."""

    def watch() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def report_lack_of_memory(exit_code: int) -> Callable[[int], None]:
    """Where memory is limited, fork: this returns in the child, and the parent ends as the child does, or with `exit_code`.

    Call it before any thread is started. The child calls the result with the exit code that it means: a library or the
    interpreter that cannot allocate may end the process with the code 1, and the dynamic linker with 127.
    """
    limit = memory_limit()
    if limit is None:
        return lambda code: None
    sys.stdout.flush()
    sys.stderr.flush()
    child_end, parent_end = os.pipe()
    meant, means = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(parent_end)
        os.close(meant)
        end_with_parent(child_end)
        return lambda code: (os.write(means, bytes([code])), None)[1]
    os.close(child_end)
    os.close(means)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: os.kill(child, number))
    release()
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        code = os.WEXITSTATUS(status)
        os.set_blocking(meant, False)  # a process that the child has started may hold the other end
        with contextlib.suppress(BlockingIOError):
            if code not in NATIVE_CODES or os.read(meant, 1):
                os._exit(code)
    number = 0 if os.WIFEXITED(status) else os.WTERMSIG(status)
    if number in (0, *ALLOCATION_SIGNALS):
        name = signal.Signals(number).name if number else "a library"
        print(f"lindm: error: ended by {name} under a memory limit of {limit >> 20} MiB: try {MEMORY_ADVICE}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(exit_code)
    os._exit(128 + number)
