"""Reading files of others: regular files only, of bounded size, with one kind of error.

A FIFO blocks whoever opens it, a device may never end, and a directory is no file, so each path is examined before it is opened.
Links are followed: a cache of models consists of them.
"""

import gzip
import json
import math
import os
import stat
import tokenize
import zlib
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lindm.errors import DataError
from lindm.io import limits

if TYPE_CHECKING:
    import numpy as np

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
)


def check_file(path: Path, limit: int | None = None) -> int:
    """The size of a regular file. Raises: DataError where it is something else, missing, or larger than `limit` bytes."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as e:  # ValueError: a null character
        raise DataError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for matches, name in _KINDS if matches(status.st_mode)), "something else")
        raise DataError(f"{path} must be a regular file; it is {kind}")
    if limit is not None and status.st_size > limit:
        raise DataError(f"{path} must have at most {limit:,} bytes; it has {status.st_size:,}")
    return status.st_size


def check_directory(directory: Path) -> None:
    """Raise DataError unless each entry is a regular file or a directory. For libraries that open what they find."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        for entry in entries:
            if not entry.is_dir() and os.path.exists(entry.path):  # a link to nothing is never opened
                check_file(Path(entry.path))
    except OSError as e:
        raise DataError(f"cannot read {directory}: {e.strerror}") from e


def open_file(path: Path, limit: int | None = None) -> BufferedReader:
    """A regular file of at most `limit` bytes, open for reading. Raises: DataError."""
    check_file(path, limit)
    try:
        return path.open("rb")
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises: DataError."""
    with open_file(path, limit) as f:
        try:
            return f.read(min(limit, os.fstat(f.fileno()).st_size))  # the call reserves as much memory
        except OSError as e:
            raise DataError(f"cannot read {path}: {e.strerror}") from e


def read_gzip(path: Path, limit: int) -> bytes:
    """The content of a .gz file, packed and unpacked at most `limit` bytes. Raises: DataError."""
    try:
        with open_file(path, limit) as packed, gzip.GzipFile(fileobj=packed) as f:
            parts, size = [], 0
            while part := f.read(1 << 20):  # a part at a time: a call for `limit` bytes may reserve them
                parts.append(part)
                if (size := size + len(part)) > limit:
                    raise DataError(f"{path} must unpack to at most {limit:,} bytes; it has more")
            return b"".join(parts)
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot unpack: {e}") from e


def read_text(path: Path, limit: int) -> str:
    """The content of a text file in UTF-8, with or without a mark at its start; a name in .gz is unpacked.

    Raises:
      DataError: with path:line where the text is not UTF-8.
    """
    data = read_gzip(path, limit) if path.suffix == ".gz" else read_bytes(path, limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path}:{line}: expected text in UTF-8; got the byte 0x{data[e.start]:02x}") from e


def parse_json(data: bytes | str, source: object, one_line: bool = False) -> Any:
    """A JSON value, of bytes in UTF-8. Raises: DataError, naming the source, for anything else and for values nested too deep.

    one_line: the source names the line, so an error has the column alone.
    """
    try:
        return json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)
    except UnicodeDecodeError as e:
        raise DataError(f"{source}: expected text in UTF-8; got the byte 0x{e.object[e.start]:02x}") from e
    except (ValueError, RecursionError) as e:
        if one_line and isinstance(e, json.JSONDecodeError):
            raise DataError(f"{source}: not JSON: {e.msg} at column {e.colno}") from e
        raise DataError(f"{source}: not JSON: {e}") from e


def parse_json_line(line: bytes, source: object) -> Any:
    """The JSON value of one line of a file. Raises: DataError, also for a line that is too long."""
    if len(line) > limits.LINE:
        raise DataError(f"{source}: a line must have at most {limits.LINE:,} bytes; it has {len(line):,}")
    return parse_json(line.rstrip(b"\r\n"), source, one_line=True)


def parse_npy(data: bytes, source: str) -> "np.ndarray":
    """The array of a .npy file, whose size must be that of its header. Raises: DataError, also for objects, which are pickles."""
    import numpy as np

    stream = BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version must be 1.0 or 2.0; got {version[0]}.{version[1]}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read(stream)
        if dtype.hasobject:
            raise ValueError("it holds objects, which are pickles and never read")
        count, left = math.prod(shape), len(data) - stream.tell()
        if min(shape, default=0) < 0 or dtype.itemsize < 1 or count * dtype.itemsize != left:
            raise ValueError(f"its header describes {dtype} {list(shape)}; it holds {left} bytes")
        array = np.frombuffer(data, dtype, count, stream.tell())
        return array.reshape(shape, order="F" if columns_first else "C")
    except (ValueError, TypeError, LookupError, SyntaxError, OverflowError, RecursionError, EOFError, tokenize.TokenError) as e:
        raise DataError(f"{source}: not an array of numpy: {e}") from e
