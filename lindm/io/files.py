"""Files that survive an interruption: atomic writes, synced appends, JSON, JSON lines and checksums.

A file is either replaced as a whole or appended to line by line, and synced. Directories and locks: `lindm.io.directories`.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from lindm.errors import DataError, NonFiniteError, StorageError
from lindm.io import inputs, limits
from lindm.io.temporaries import temporary_file, temporary_path

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a disk that is full or read-only, wherever it shows


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

    Its directory must exist: one that was removed while it was written does not come back with a part of its files.

    Raises:
      UsageError: another process is writing the file.
      StorageError: the disk is full or not writable.
    """
    data = content.encode() if isinstance(content, str) else content
    with storage_errors(path), temporary_file(path) as fd:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
        os.replace(temporary_path(path), path)


def make_parent(path: Path) -> None:
    """Create the directory of a file whose path a user gives, if it does not exist. StorageError where it cannot be created."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: Any, format: str | None = None) -> None:
    """Replace a file by indented JSON with sorted keys.

    Args:
      format: version of its format, such as lindm-manifest-2. A file with a format carries a checksum of itself, which
        `read_json` verifies.

    Raises:
      NonFiniteError: a number is NaN or infinite. StorageError: the disk is full or not writable.
    """
    value = value if format is None else with_checksum(value | {"format": format})
    write_atomic(path, strict_json(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def append_record(path: Path, record: dict) -> None:
    """Append a record with its checksum as one line of JSON, and sync. NonFiniteError for NaN or infinity."""
    append_line(path, record_line(record))


def record_line(record: dict) -> str:
    """A record as a line of a JSON-lines file, with its checksum."""
    return strict_json(with_checksum(record), sort_keys=True, separators=(",", ":"))


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
    """A file that holds one JSON object.

    Args:
      format: the format that it must have; its checksum is then verified, and is not part of the object.

    Raises:
      DataError: it is missing, no JSON object, of another format or damaged; names the file.
    """
    value = inputs.parse_json(inputs.read_bytes(path, limits.JSON_FILE), str(path))
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    if format is None:
        return value
    check_format(path, value.get("format"), format)
    if (content := verified(value)) is None:
        raise DataError(f"{path} is damaged: its checksum is wrong")
    return content


def check_format(path: Path, got: Any, format: str) -> None:
    """DataError where a file has another format than `format`, the one that this version reads and writes."""
    if got != format:
        raise DataError(f"{path}: must have the format {format!r}; got {got!r}: another version of lindm wrote it; make it again")


def read_json_lines(path: Path, repair: bool = False, skip_damaged: bool = False) -> list[dict]:
    """The records of a file of `append_record`, each compared with its checksum; an empty list where there is no file.

    An incomplete last line is ignored, and cut off with `repair`. Any other damaged line is a DataError with file:line; with
    `skip_damaged` it is left out.
    """
    if not path.exists():
        return []
    data = inputs.read_bytes(path, limits.LINES_FILE)
    whole = data.rfind(b"\n") + 1
    if repair and whole < len(data):
        with storage_errors(path):
            os.truncate(path, whole)
    records = []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            records.append(_parse_record(line, f"{path}:{number}"))
        except DataError:
            if not skip_damaged:
                raise
    return records


def _parse_record(line: bytes, place: str) -> dict:
    """The record of one line without its checksum. DataError, with its place, where the line is damaged."""
    record = inputs.parse_json_line(line, place)
    if not isinstance(record, dict):
        raise DataError(f"{place}: not a JSON object")
    if "checksum" not in record:
        raise DataError(f"{place}: the line has no checksum: another version of lindm wrote it, or it is damaged; make it again")
    if (content := verified(record)) is None:
        raise DataError(f"{place}: the line is damaged: its checksum is wrong")
    return content


_hashes: dict[tuple[Any, ...], str] = {}
SETTLED_SECONDS = 2.0  # a file that changed later than this long ago may change again without a new time stamp


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. It is read in blocks, and once in a process as long as it does not change.

    Raises:
      DataError: it cannot be read.
    """
    with inputs.open_file(path) as f:
        return sha256_of(f)


def sha256_of(f: BufferedReader) -> str:
    """`sha256` of a file that is open, from its start to its end."""
    stat = os.fstat(f.fileno())
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if (known := _hashes.get(key)) is not None:
        return known
    f.seek(0)
    digest = hashlib.file_digest(f, "sha256").hexdigest()
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
        _hashes[key] = digest
    return digest


# --- JSON values -----------------------------------------------------------------------------------------------------------


def strict_json(value: Any, **options: Any) -> str:
    """JSON text; options as of `json.dumps`. NonFiniteError, naming the place, where a number is NaN or infinite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError as e:
        if (place := find_non_finite(value)) is None:
            raise
        raise NonFiniteError(f"a result is not finite and is not written: {place}") from e


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: equal values give equal strings. NonFiniteError when a number is not finite."""
    return strict_json(value, sort_keys=True, separators=(",", ":"))


def with_checksum(value: dict) -> dict:
    """A JSON object with the SHA-256 of itself, in place of one that it may have."""
    content = _without_checksum(value)
    return content | {"checksum": hashlib.sha256(canonical_json(content).encode()).hexdigest()}


def verified(value: dict) -> dict | None:
    """The object without its checksum; None if the checksum is wrong."""
    content = _without_checksum(value)
    try:
        return content if value == with_checksum(content) else None
    except (NonFiniteError, ValueError):  # NaN, or half of a surrogate pair: not what `with_checksum` took
        return None


def _without_checksum(value: dict) -> dict:
    return {key: v for key, v in value.items() if key != "checksum"}


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
