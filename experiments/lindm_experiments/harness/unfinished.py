"""Where `measure` keeps what it has finished of a point, so that a killed training continues from its last checkpoint."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from lindm.io import directories
from lindm.io.files import storage_errors
from lindm.io.temporaries import scratch_directory

UNFINISHED = "unfinished"  # in a run directory: a directory for each point that is being measured, or was when the run was killed
OWN = re.compile(r"[0-9a-f]{16}|\.[0-9a-f]{16}\.removed\.lindm-tmp")  # names of such directories, also of half-removed ones
_directory: ContextVar[Path | None] = ContextVar("directory", default=None)


@contextlib.contextmanager
def point_directory() -> Iterator[Path]:
    """A directory for the files of the point that `measure` is measuring.

    A run that was killed in this point finds the files again when it resumes, so what writes them must be able to resume. The run
    removes them when the point has its record. Outside a run, the directory is temporary, and removed at the end.

    Raises:
      StorageError: the disk is full or not writable, or the run directory was removed.
    """
    directory = _directory.get()
    if directory is None:
        with scratch_directory() as scratch:
            yield scratch
    else:
        with storage_errors(directory):
            directory.parent.mkdir(exist_ok=True)
            directory.mkdir(exist_ok=True)
        yield directory


@contextlib.contextmanager
def measuring_in(directory: Path | None) -> Iterator[None]:
    """`point_directory` is this directory in the block, or a temporary one."""
    token = _directory.set(directory)
    try:
        yield
    finally:
        _directory.reset(token)


def directory_of(run: Path, key: str) -> Path:
    """The directory of a point, by the point as JSON.

    Its name depends on the path of the run, too: a training names the paths of its data, and a run that was moved starts its
    point again.
    """
    run = run.resolve()
    return run / UNFINISHED / hashlib.sha256(f"{run}\0{key}".encode()).hexdigest()[:16]


def remove_all_but(run: Path, kept: set[Path]) -> None:
    """Remove the directories of a run's points but `kept`, and nothing that a user has put beside them.

    Raises:
      StorageError: one cannot be removed.
    """
    parent = run.resolve() / UNFINISHED
    for path in sorted(parent.iterdir()) if parent.is_dir() and not parent.is_symlink() else ():
        if OWN.fullmatch(path.name) and path not in kept:
            directories.remove(path)
    with contextlib.suppress(OSError):  # it is not there, or not empty
        parent.rmdir()
