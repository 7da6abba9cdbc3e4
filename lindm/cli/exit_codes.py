"""Exit codes of the command line: one number for each class of error.

0 success              5 NaN or infinity
1 a claim failed       6 out of memory
2 usage                7 disk full or not writable
3 data                 8 another process of the run was lost
4 no usable           70 an error that lindm did not expect, or a worker process that died
  checkpoint          75 stopped by a signal, saved: the same command resumes
                      130 stopped by SIGINT, 143 by SIGTERM: the same command starts over
"""

from lindm import errors

INTERNAL = 70  # EX_SOFTWARE of sysexits.h
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


def exit_code(error: BaseException) -> int:
    """The exit code of an error; `INTERNAL` for an error that has no code of its own."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), INTERNAL)
