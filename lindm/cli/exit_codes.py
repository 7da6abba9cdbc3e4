"""Exit codes of the command line: one number for each class of error.

0 success              4 no usable checkpoint     8 another process of the run was lost
1 a claim failed, or   5 NaN or infinity          75 stopped by a signal, saved: the same command resumes
  an unknown error     6 out of memory
2 usage                7 disk full or not writable
3 data
"""

from lindm import errors

FAILED = 1
EXIT_CODES: dict[type[Exception], int] = {
    errors.UsageError: 2,
    errors.DataError: 3,
    errors.CheckpointError: 4,
    errors.NonFiniteError: 5,
    errors.OutOfMemoryError: 6,
    errors.StorageError: 7,
    errors.LostPeerError: 8,
    errors.Preempted: 75,
    ValueError: 2,
}


def exit_code(error: BaseException) -> int:
    """The exit code of an error; `FAILED` for an error that has no code of its own."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), FAILED)
