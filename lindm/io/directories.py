"""Directories that are written as a whole, and directories that one process writes at a time.

A directory is locked with `flock` on the directory itself while it is written: the lock ends with its process, so it cannot go
stale.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lindm.errors import UsageError
from lindm.io.files import TEMPORARY_SUFFIX, storage_errors

LOCK_PATIENCE = 2  # seconds that a process which was just killed may take to release its lock


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A temporary directory on the same disk, renamed to `directory` at the end and removed if anything fails.

    Raises:
      UsageError: `directory` exists and is not empty.
      StorageError: the disk is full or not writable.
    """
    final = Path(os.path.realpath(directory))  # a link to an empty directory stays a link
    if os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
        raise UsageError(f"{directory} already exists and is not replaced; choose another --out")
    with storage_errors(directory):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=TEMPORARY_SUFFIX))
    try:
        with _lock(temporary):
            yield temporary
            with storage_errors(directory):
                temporary.chmod(0o755)
                sync(temporary)
                os.rename(temporary, final)
                sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Lock a directory, which is created if needed; temporary files of a killed writer are removed.

    Raises:
      UsageError: another writer has the lock, in this or in another process.
      StorageError: the directory cannot be created.
    """
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY)
    try:
        limit = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > limit:
                    busy = f"{directory} is being written by another process: wait for it, or choose another --out"
                    raise UsageError(busy) from None
                time.sleep(0.05)
        for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file, and sync."""
    with storage_errors(target):
        shutil.copyfile(source, target)
        sync(target)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Lock a temporary directory while it is written: an unlocked one is a leftover. BlockingIOError if it is taken."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _remove_leftovers(final: Path) -> None:
    """Remove the temporary directories of killed writers of the same directory."""
    for leftover in final.parent.glob(f".{final.name}.*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(BlockingIOError, NotADirectoryError), _lock(leftover):
            if leftover.is_dir():
                shutil.rmtree(leftover)
