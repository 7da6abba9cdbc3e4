"""Directories that are written as a whole, removed as a whole, and written by one process at a time.

A directory is locked with `flock` on the directory itself while it is written: the lock ends with its process, so it cannot go
stale. What killed writers leave: `lindm.io.temporaries`.
"""

import contextlib
import filecmp
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lindm.errors import OccupiedError, StorageError, UsageError
from lindm.io import inputs
from lindm.io.files import storage_errors
from lindm.io.provenance import is_from_this_command
from lindm.io.temporaries import remove_leftover, remove_leftovers, temporary_directory, temporary_path, wait_for_lock
from lindm.io.verification import MANIFEST, PROVENANCE

NOT_COMPARED = (PROVENANCE, MANIFEST)  # the manifest has the SHA-256 of provenance.json


@contextlib.contextmanager
def atomic_directory(directory: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary directory beside `directory` that gets its name at the end, and is removed if anything fails.

    A directory that the same command line wrote stays if it would be written again with the same bytes: it may have been killed
    when it had written everything.

    Args:
      replace: an existing directory is replaced.

    Raises:
      OccupiedError: `directory` exists and is not empty, without `replace`.
      UsageError: another process is writing it.
      StorageError: the disk is full or not writable.
    """
    final = Path(os.path.realpath(directory))  # a link to an empty directory stays a link
    exists = not replace and os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir()))
    if exists and not is_from_this_command(final):
        raise OccupiedError(f"{directory} already exists and is not replaced; choose another --out")
    with contextlib.ExitStack() as stack:
        with storage_errors(directory):
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(temporary_directory(final))
            created = os.stat(temporary)
        try:
            yield temporary
        except StorageError as e:  # the user knows the name of `directory` alone
            raise StorageError(e.message.replace(str(temporary), str(directory))) from e
        if exists:
            if not _same_files(temporary, final):
                raise OccupiedError(f"{directory} already exists with other content and is not replaced; choose another --out")
            return
        with storage_errors(directory):
            _sync_tree(temporary)
            if not os.path.samestat(os.stat(temporary), created):  # a library made it anew, after a signal removed it
                raise StorageError(f"cannot write {directory}: it was replaced while it was written")
            if replace:
                remove(final)
            os.rename(temporary, final)
            _sync(final.parent)


@contextlib.contextmanager
def sole_writer(directory: Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Lock a directory, which is created if needed; temporary files and directories of killed writers are removed.

    Args:
      waiting: called several times a second while another writer has the lock, however long; without it that is an error.

    Raises:
      UsageError: it is a file; or another writer has the lock, in this or in another process, and `waiting` is not given.
      StorageError: the directory cannot be created, or at the end it is another one or none.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} must be a directory, and is a file; choose another directory")
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY)
    try:
        with storage_errors(directory):
            wait_for_lock(fd, directory, waiting)
        remove_leftovers(directory)
        yield
        with storage_errors(directory):
            if not os.path.samestat(os.stat(directory), os.fstat(fd)):
                raise StorageError(f"cannot write {directory}: it was replaced while it was written")
    finally:
        os.close(fd)


def require_kind(directory: Path, sign: str, kind: str) -> None:
    """Raise OccupiedError where a directory holds something that lindm wrote but not `sign`, the file that such a `kind` has."""
    found = next((name for name in ("manifest.json", "config.json") if (directory / name).exists()), None)
    if found is not None and not (directory / sign).exists():
        raise OccupiedError(f"{directory} holds {found} but no {sign}: it is not {kind}; choose another --out")


def remove(path: Path) -> None:
    """Remove a file or a directory, if it exists. A directory is renamed first: a half-removed one never counts as a whole one.

    Raises:
      StorageError: it cannot be removed.
    """
    aside = temporary_path(path.with_name(f"{path.name}.removed"))  # not the name under which `path` is written
    with storage_errors(path):
        remove_leftover(aside)
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)  # a network file system may keep open files: the next writer removes them


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a regular file. DataError where it cannot be read, StorageError where `target` cannot be written."""
    with inputs.open_file(source), storage_errors(target):
        shutil.copyfile(source, target)


def _same_files(one: Path, other: Path) -> bool:
    """Whether two directories have the same files, apart from what says when they were written."""
    names = [sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.name not in NOT_COMPARED) for d in (one, other)]
    files = [name for name in names[0] if (one / name).is_file()]
    return names[0] == names[1] and filecmp.cmpfiles(one, other, files, shallow=False)[0] == files


def _sync_tree(directory: Path) -> None:
    """Flush a directory and everything in it to the disk."""
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
