"""Temporary files and directories: a hidden name, a lock while they are written, and one rule for what a killed writer leaves.

What will be NAME is written as `.NAME.lindm-tmp` in the same directory. Its writer locks it with `flock`, and the lock ends with
the writer. So one without a lock is a leftover, and the next writer removes it, be it a file or a directory. Permissions follow
the user's umask.
"""

import contextlib
import fcntl
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lindm.errors import UsageError
from lindm.io.signals import at_stop

TEMPORARY_SUFFIX = ".lindm-tmp"
LOCK_PATIENCE = 2  # seconds that a process which was just killed may take to release its lock


def temporary_path(path: Path) -> Path:
    """The hidden name under which `path` is written."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[int]:
    """A new, locked file with the name `temporary_path(path)`, open for writing; removed at the end if it still has this name.

    Raises:
      UsageError: another process is writing `path`.
      OSError: the file cannot be created.
    """
    with _created(path, is_directory=False) as fd:
        yield fd


@contextlib.contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """A new, locked directory with the name `temporary_path(path)`; otherwise as `temporary_file`."""
    with _created(path, is_directory=True):
        yield temporary_path(path)


@contextlib.contextmanager
def stays_removed(directory: Path) -> Iterator[None]:
    """Where `directory` or the one above it is removed meanwhile, no temporary directory below it makes it anew.

    A library that writes many files makes the directories that it misses. At the end, the ones that it made are removed again,
    as far as they hold nothing but temporary files and directories without a writer.
    """
    with contextlib.ExitStack() as stack:
        kept = {path: _open_directory(path, stack) for path in (directory, directory.parent)}  # open: no other gets its number
        try:
            yield
        finally:
            for path, fd in kept.items():
                if path.is_dir() and not _has_name(fd, path):
                    remove_leftovers(path)
                    with contextlib.suppress(OSError):  # it holds something else
                        path.rmdir()


def _open_directory(path: Path, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY)
    stack.callback(os.close, fd)
    return fd


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A private directory where the system has temporary files, removed at the end; what killed ones left is removed first."""
    import tempfile

    root = Path(tempfile.gettempdir())
    remove_leftovers(root, prefix="lindm-")
    while True:
        scratch = Path(tempfile.mkdtemp(dir=root, prefix=".lindm-", suffix=TEMPORARY_SUFFIX))
        fd = os.open(scratch, os.O_RDONLY)
        if try_lock(fd) and _has_name(fd, scratch):
            break
        os.close(fd)  # another process took it for a leftover
    try:
        with at_stop(partial(_remove, scratch)):
            yield scratch
    finally:
        _remove(scratch)
        os.close(fd)


def remove_leftovers(directory: Path, prefix: str = "") -> None:
    """Remove the temporary files and directories of killed writers from a directory; those of live writers stay."""
    for path in directory.glob(f".{prefix}*{TEMPORARY_SUFFIX}"):
        remove_leftover(path)


def remove_leftover(path: Path) -> None:
    """Remove a temporary file or directory, if there is one and its writer does not live."""
    kind = os.O_RDONLY if path.is_dir() else os.O_RDWR  # a network file system locks only a file that is open for writing
    try:
        fd = os.open(path, kind | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        if path.is_symlink():
            _remove(path)
        return
    try:
        if try_lock(fd) and _has_name(fd, path):
            _remove(path)
    finally:
        os.close(fd)


def wait_for_lock(fd: int, path: Path, waiting: Callable[[], object] | None = None) -> None:
    """Lock an open directory. Where another process keeps the lock, call `waiting` until it is free; UsageError without it."""
    limit = math.inf if waiting else time.monotonic() + LOCK_PATIENCE
    while not try_lock(fd):
        if waiting is not None:
            waiting()
        _wait(limit, path)


def try_lock(fd: int) -> bool:
    """Lock an open file or directory; False where another process has the lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _created(path: Path, is_directory: bool) -> Iterator[int]:
    temporary, limit = temporary_path(path), time.monotonic() + LOCK_PATIENCE
    flags = os.O_RDONLY if is_directory else os.O_WRONLY | os.O_CREAT | os.O_EXCL
    while True:
        remove_leftover(temporary)
        try:
            if is_directory:
                os.mkdir(temporary)
            fd = os.open(temporary, flags, 0o666)
        except FileExistsError:  # of a live writer
            _wait(limit, path)
            continue
        if try_lock(fd) and _has_name(fd, temporary):
            break
        os.close(fd)  # another process took it for a leftover

    def remove() -> None:
        if _has_name(fd, temporary):
            _remove(temporary)

    def remove_at_stop() -> None:
        """The writer may be a thread that is about to give a directory its name: then it gets the whole directory, or none."""
        aside = temporary_path(path.with_name(f"{path.name}.unfinished"))
        if is_directory and _has_name(fd, temporary):
            remove_leftover(aside)
            os.rename(temporary, aside)
            _remove(aside)
        remove()

    try:
        with at_stop(remove_at_stop):
            yield fd
    finally:
        remove()
        os.close(fd)


def _wait(limit: float, path: Path) -> None:
    if time.monotonic() > limit:
        raise UsageError(f"{path} is being written by another process: wait for it, or choose another path")
    time.sleep(0.05)


def _has_name(fd: int, path: Path) -> bool:
    """Whether an open file or directory still has the name `path`."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _remove(path: Path) -> None:
    """Remove a file or a directory, as far as possible: what stays is a leftover still."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
