"""Files that survive an interruption: atomic writes, synced appends, JSON, JSON lines and checksums.

A file is either replaced as a whole or appended to line by line, and synced. Directories and locks: `lindm.io.directories`.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lindm.errors import DataError, StorageError
from lindm.io.temporaries import temporary_file, temporary_path


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a `StorageError` with the path and the reason: the disk is full or not writable."""
    try:
        yield
    except OSError as e:
        raise StorageError(f"cannot write {path}: {e.strerror or e}") from e


# --- writing ---------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file: it has its old or its new content, never a part, and no temporary file is left behind.

    Raises:
      UsageError: another process is writing the file.
      StorageError: the disk is full or not writable.
    """
    data = content.encode() if isinstance(content, str) else content
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path) as fd:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
            os.replace(temporary_path(path), path)


def write_json(path: Path, value: Any, format: str | None = None) -> None:
    """Replace a file by indented JSON with sorted keys; `format` is the version of its format, such as lindm-manifest-1."""
    value = value if format is None else {"format": format} | value
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append one line and sync.

    It is written with a single call, so a kill leaves at worst an incomplete last line, which `read_json_lines` cuts off.
    """
    with storage_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(fd).st_size
            data = (line + "\n").encode()
            if os.write(fd, data) != len(data):
                os.ftruncate(fd, size)
                raise OSError("disk full")
            os.fsync(fd)
        finally:
            os.close(fd)


# --- reading ---------------------------------------------------------------------------------------------------------------


def read_json(path: Path, format: str | None = None) -> dict:
    """A file that holds one JSON object. DataError where it does not, or where it has another `format`."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise DataError(f"{path}: not JSON: {e}") from e
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    if format is not None:
        check_format(path, value.get("format"), format)
    return value


def check_format(path: Path, got: Any, format: str) -> None:
    """DataError where a file has another format than `format`, the one that this version reads and writes."""
    if got != format:
        raise DataError(f"{path}: must have the format {format!r}; got {got!r}: another version of lindm wrote it; make it again")


def read_json_lines(path: Path, repair: bool = False) -> list[dict]:
    """The records of a JSON-lines file; an empty list where there is no file.

    An incomplete last line is ignored, and cut off with `repair`. Any other bad line is a DataError with file:line.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    whole = data.rfind(b"\n") + 1
    if repair and whole < len(data):
        with storage_errors(path):
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
    records = read_json_lines(directory / "records.jsonl")
    if not records:
        raise DataError(f"no records in {directory / 'records.jsonl'}")
    return records


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. The file is read in blocks: a shard may be larger than memory."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- JSON values -----------------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: equal values give equal strings. ValueError when a number is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def to_jsonable(value: Any) -> Any:
    """Arrays and array scalars of any library as lists and numbers."""
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(v) for v in value]
    return to_jsonable(value.tolist()) if hasattr(value, "tolist") else value


def find_non_finite(value: Any, path: str = "") -> str | None:
    """Where the first NaN or infinity of a JSON-like value is; None when all numbers are finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path.lstrip('.')} = {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next(filter(None, (find_non_finite(v, f"{path}.{k}") for k, v in items)), None)
