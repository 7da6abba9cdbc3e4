"""Files that survive being interrupted, and the exit codes of what does not.

Everything is written whole (a new file takes the place of the old one) or appended line by line and synced. A run directory is
locked (`flock` on the directory itself) while it is written: the lock dies with its process, so it cannot go stale.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lindm.errors import DataError, Preempted, StorageError, UsageError

TEMPORARY = ".lindm-tmp"


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """A disk that refuses becomes exit 7 with the path and the reason."""
    try:
        yield
    except OSError as e:
        raise StorageError(f"cannot write {path}: {e.strerror or e}") from e


def write_atomic(path: Path, content: str | bytes) -> None:
    """The file has its old or its new content, never a part; no temporary file is left behind."""
    data = content.encode() if isinstance(content, str) else content
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """One line, synced. Written with a single call: a kill leaves at worst a torn last line, which `read_lines` cuts off."""
    with storage(path):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(fd).st_size
            data = (line + "\n").encode()
            if os.write(fd, data) != len(data):
                os.ftruncate(fd, size)
                raise OSError("disk full")
            os.fsync(fd)
        finally:
            os.close(fd)


def canonical(value: Any) -> str:
    """The one spelling of a JSON value: equal points have equal keys. ValueError when a number is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(value: Any) -> Any:
    """Arrays and array scalars of any library as lists and numbers."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def read_lines(path: Path, repair: bool = False) -> list[dict]:
    """The records of a run. A torn last line is ignored (cut off with `repair`); any other bad line is DataError with file:line."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    whole = data.rfind(b"\n") + 1
    if repair and whole < len(data):
        with storage(path):
            os.truncate(path, whole)
    records: list[dict] = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as e:
            raise DataError(f"{path}:{number}: not a JSON line: {e}") from e
        if not isinstance(record, dict) or not isinstance(record.get("point"), dict):
            raise DataError(f'{path}:{number}: a record must be an object with an object "point"')
        records.append(record)
    return records


def read_records(directory: Path) -> list[dict]:
    """All records of a run directory; DataError when there are none."""
    records = read_lines(directory / "records.jsonl")
    if not records:
        raise DataError(f"no records in {directory / 'records.jsonl'}")
    return records


@contextlib.contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Refuse a second writer of the same run directory, in this or in another process."""
    with storage(directory):
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY)
    try:
        patience = time.monotonic() + 2  # a writer that was just killed takes a moment to go
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > patience:
                    busy = f"{directory} is being written by another process: wait for it, or choose another --out"
                    raise UsageError(busy) from None
                time.sleep(0.05)
        for leftover in directory.glob(f".*{TEMPORARY}"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(fd)


def non_finite(value: Any, path: str = "") -> str | None:
    """Where the first NaN or infinity of a JSON-like value is; None when all is finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path.lstrip('.')} = {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next(filter(None, (non_finite(v, f"{path}.{k}") for k, v in items)), None)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- interruption ----------------------------------------------------------------------------------------------------------

_asked_to_stop = False


def _on_signal(signum: int, frame: FrameType | None) -> None:
    global _asked_to_stop
    _asked_to_stop = True
    raise Preempted(f"stopped by {signal.Signals(signum).name}; the same command resumes")


def _note_signal(signum: int, frame: FrameType | None) -> None:
    global _asked_to_stop
    _asked_to_stop = True


def asked_to_stop() -> bool:
    """Whether a signal came; the exception of its handler can be lost in a callback, this cannot."""
    return _asked_to_stop


def stop_on_signals() -> None:
    """SIGTERM and SIGINT end the run with exit 75. Every finished part is on disk already, so there is nothing left to save."""
    _handle_signals(_on_signal)


def note_signals() -> None:
    """SIGTERM and SIGINT from now on only set what `asked_to_stop` returns: whoever holds unsaved work saves it and stops."""
    _handle_signals(_note_signal)


def _handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    if (
        threading.current_thread() is threading.main_thread()
    ):  # elsewhere signals are not ours: whoever started the thread has them
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, handler)
