"""A directory that appears whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lindm.errors import UsageError
from lindm.io.files import TEMPORARY, storage


@contextlib.contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A temporary directory on the same disk, which is renamed to `directory` at the end and removed if anything fails.

    Raises:
      LindmError: 2 where something is there already (an empty directory may be), 7 where the disk refuses.
    """
    final = Path(os.path.realpath(directory))  # a link to an empty directory stays a link
    if os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
        raise UsageError(f"{directory} is there already and is not touched; choose another --out")
    with storage(directory):
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final)
        temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=TEMPORARY))
    try:
        with _locked(temporary):
            yield temporary
            with storage(directory):
                temporary.chmod(0o755)
                sync(temporary)
                os.rename(temporary, final)
                sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Held while it is written, so that nobody takes it for one that was left behind; the lock dies with its process."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _sweep(final: Path) -> None:
    """Remove what a writer of the same directory that was killed left behind."""
    for leftover in final.parent.glob(f".{final.name}.*{TEMPORARY}"):
        with contextlib.suppress(BlockingIOError, NotADirectoryError), _locked(leftover):
            if leftover.is_dir():
                shutil.rmtree(leftover)


def sync(path: Path) -> None:
    """A file or a directory is on the disk when this returns."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copy(source: Path, target: Path) -> None:
    """A file's content, synced."""
    with storage(target):
        shutil.copyfile(source, target)
        sync(target)
