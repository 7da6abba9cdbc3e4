"""Errors with a message that a user can act on. The class is the kind of failure; the message names what and where.

The command line turns each class into an exit code (`lindm.cli.exit_codes`).

>>> try:
...     ld.read_pomdp("missing.pomdp", horizon=4)
... except ld.errors.DataError as error:
...     print(error)
cannot read missing.pomdp: No such file or directory
"""

import contextlib
import difflib
import os
import traceback
from collections.abc import Iterable, Iterator, Sequence

MEMORY_ADVICE = "a smaller problem, model or batch, fewer --workers, or a machine with more memory (`lindm plan` shows what fits)"
SHOWN = 12  # a longer list of choices is cut, and left out of a message that has a suggestion


class LindmError(Exception):
    """Base class of all of them; by itself, a failure of no other kind."""

    def __init__(self, message: str = ""):
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class UsageError(LindmError, ValueError):
    """An argument is wrong, or does not fit the content of the output directory."""


class OccupiedError(UsageError):
    """An output directory holds other work, which this command does not continue."""


class DataError(LindmError):
    """An input file is missing, damaged or invalid; the message names the file and, where there is one, the line."""


class CheckpointError(LindmError):
    """A run has checkpoints, but none of them can be used."""


class NonFiniteError(LindmError):
    """A loss, a gradient, a weight or a record is NaN or infinite."""


class OutOfMemoryError(LindmError):
    """A program does not fit in the memory of the device or of the host."""


class StorageError(LindmError):
    """The disk is full or not writable."""


class LostPeerError(LindmError):
    """Another process of the same run was lost."""


class Preempted(BaseException):
    """A signal stopped the run. What was finished is on disk, and the same command resumes.

    Like KeyboardInterrupt it is no `Exception`: code that goes on after an error does not go on after a stop.
    """


def failed_to_allocate(error: BaseException) -> bool:
    """Whether an exception is a failed allocation: of Python or numpy, or of XLA, which has a status in place of a class.

    A full disk has the same status in TensorStore, which adds the error code of the operating system.
    """
    return isinstance(error, MemoryError) or ("RESOURCE_EXHAUSTED" in str(error) and "os_error_code" not in str(error))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to end a message with: the known words that are nearest to a misspelled one; empty where none is near."""
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def unknown(name: str, got: str, known: Sequence[str]) -> str:
    """The message for a word that is none of those known."""
    near = did_you_mean(got, known)
    if near and len(known) > SHOWN:
        return f"{name} {got!r} is not known{near}"
    rest = f", ... ({len(known)} in all)" if len(known) > SHOWN else ""
    return f"{name} must be one of {', '.join(known[:SHOWN])}{rest}; got {got!r}{near}"


def from_library(error: Exception, what: str = "the work", advice: str = MEMORY_ADVICE) -> Exception:
    """The error of this package that an exception of JAX or Python stands for, or the exception itself.

    A failed allocation, of this machine or of a device, is an `OutOfMemoryError`; a platform without a device is a `UsageError`;
    no directory for temporary files, which libraries look for when they are imported, is a `StorageError`.

    Args:
      what: what does not fit in memory.
      advice: what may help then, to follow "try".
    """
    if isinstance(error, LindmError):
        return error
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
    if failed_to_allocate(error):
        return OutOfMemoryError(f"{what} does not fit in memory: {reason}; try {advice}")
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in reason:  # of `tempfile`: it tries to write
        return StorageError(f"cannot write temporary files ({reason}): the disk is full, or TMPDIR must name another directory")
    frames = traceback.extract_tb(error.__traceback__)
    if (platforms := os.environ.get("JAX_PLATFORMS")) and frames and frames[-1].filename.endswith("xla_bridge.py"):
        return UsageError(
            f"JAX_PLATFORMS must name a platform whose devices jax can use here; got {platforms!r} ({reason}): unset it, or "
            "install what the platform needs, such as lindm[cuda] or lindm[tpu]"
        )
    return error


@contextlib.contextmanager
def library_errors(what: str = "the work", advice: str = MEMORY_ADVICE) -> Iterator[None]:
    """Raise `from_library` of an exception in this block.

    >>> with library_errors("the dataset", "fewer --tasks"):
    ...     raise MemoryError("Unable to allocate 8.00 PiB")
    Traceback (most recent call last):
    lindm.errors.OutOfMemoryError: the dataset does not fit in memory: Unable to allocate 8.00 PiB; try fewer --tasks
    """
    try:
        yield
    except Exception as e:
        if (known := from_library(e, what, advice)) is e:
            raise
        raise known from e


KINDS: tuple[type[LindmError], ...] = (
    LindmError,
    UsageError,
    DataError,
    CheckpointError,
    NonFiniteError,
    OutOfMemoryError,
    StorageError,
    LostPeerError,
)
"""The classes by number, for processes that can send only a number to each other."""


def kind_number(error: BaseException) -> int:
    """The number of an error's class in `KINDS`; a plain ValueError is a `UsageError`, any other exception a `LindmError`."""
    if isinstance(error, LindmError):
        return max(number for number, kind in enumerate(KINDS) if isinstance(error, kind))
    return KINDS.index(UsageError) if isinstance(error, ValueError) else 0
