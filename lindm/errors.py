"""Errors that lindm raises on purpose. Each class says what kind of thing went wrong; the message says what and where.

The command line turns each class into an exit code (`lindm.exit_codes`).
"""

import difflib
from collections.abc import Iterable, Sequence


class LindmError(Exception):
    """Base class: a failure with a message that a user can act on."""

    def __init__(self, message: str = ""):
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class UsageError(LindmError, ValueError):
    """An argument is wrong, or does not fit what the output directory holds."""


class DataError(LindmError):
    """An input file is missing, damaged or wrong; the message names the file and, where there is one, the line."""


class CheckpointError(LindmError):
    """A run has checkpoints and none of them can be used."""


class NonFiniteError(LindmError):
    """A loss, a gradient, a weight or a record is NaN or infinite."""


class OutOfMemoryError(LindmError):
    """A program does not fit in the memory of the device or of the host."""


class StorageError(LindmError):
    """The disk is full or not writable."""


class LostPeerError(LindmError):
    """Another process of the same run was lost."""


class Preempted(LindmError):
    """A signal asked the run to stop; everything finished is on disk and the same command resumes."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to end a message with: the known words that are nearest to a misspelled one; empty where none is near."""
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def unknown(name: str, got: str, known: Sequence[str]) -> str:
    """The message for a word that is none of those known."""
    return f"{name} must be one of {', '.join(known)}; got {got!r}{did_you_mean(got, known)}"
