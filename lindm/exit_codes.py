"""Exit codes of the command line: one number for each class of error."""

from lindm import errors

FAILED = 1
EXIT_CODES: dict[type[BaseException], int] = {
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


def error_of(code: int) -> type[errors.LindmError]:
    """The class of error that has an exit code: how one process tells another what went wrong."""
    return next((kind for kind, n in EXIT_CODES.items() if n == code and issubclass(kind, errors.LindmError)), errors.LindmError)


def exit_code(error: BaseException) -> int:
    """The exit code of an error; `FAILED` for an error that has no code of its own."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), FAILED)
