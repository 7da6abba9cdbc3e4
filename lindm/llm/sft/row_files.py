"""Files of rows: what `--data` may name beside a dataset, read part by part.

    rows.jsonl, rows.jsonl.gz    a JSON object per line
    rows.json                    a JSON array of objects, or a JSON object per line
    rows.parquet                 a row per row
    rows.arrow                   an Arrow stream or file, as Hugging Face datasets write it
    a directory of these         shards of one kind, in the order of their names
    a directory of `datasets`    as `Dataset.save_to_disk` writes it; of a `DatasetDict`, its split train

Parquet and Arrow are read with pyarrow (extra: data). A table has one type for a column: a field that only some rows have is null
in the others. So nulls of tables are left out, within messages and tools, too.

A part is what one process reads at a time: a range of bytes of a file of lines, a range of rows of a table, or a whole file that
can only be read from its start. Parts follow from the files alone, so they are the same in every process and every run.
"""

import contextlib
import gzip
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from lindm.datasets.shards import import_pyarrow
from lindm.errors import DataError
from lindm.io import files, inputs, limits

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow")
ACCEPTED = f"a file of rows or a directory of such shards ({', '.join(ENDINGS)}), or a directory of Hugging Face datasets"
PART_BYTES, PART_ROWS = 4 * limits.MIB, 5_000  # of a part: a few seconds of tokenizing
MAX_PARTS = 512  # of one file
SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.])")
HUGGING_FACE = ("dataset_dict.json", "state.json")

Row = Any  # what JSON can have; an object, if the file is right


@dataclass(frozen=True)
class RowPlace:
    """Where a row is; its text is FILE:ROW, counted from 1: the line of a file of lines. Counting lines is left to messages."""

    part: "Part"
    index: int  # of the row in its part

    def __str__(self) -> str:
        return f"{self.part.path}:{self.part.first_row() + self.index + 1}"


@dataclass(frozen=True)
class Part:
    """A range of a file: bytes of lines, rows of a table. Lines belong to the part in which they start."""

    path: Path
    start: int = 0
    stop: int | None = None  # None: to the end

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[RowPlace, Row]]:
        """The rows of the part, read as they are asked for; empty lines are skipped.

        columns: those that are read, of a table that has one of them. Raises: DataError, with file and row.
        """
        if self.path.name.endswith((".parquet", ".arrow")):
            return self._table_rows(columns or ())
        return self._array_rows() if _is_array(self.path) else self._line_rows()

    def first_row(self) -> int:
        """Number of rows (lines) of the file before this part."""
        if self.path.suffix in (".parquet", ".arrow") or self.start == 0:
            return self.start
        with _opened(self.path) as f:
            return sum(1 for _ in _lines(f, self.start))

    def _line_rows(self) -> Iterator[tuple[RowPlace, Row]]:
        with _opened(self.path) as f:
            if self.start:  # the line that is being read at the start belongs to the part before
                f.seek(self.start - 1)
                f.readline(limits.LINE + 1)
            for index, line in enumerate(_lines(f, self.stop)):
                if line.strip():
                    place = RowPlace(self, index)
                    yield place, inputs.parse_json_line(line, place)

    def _array_rows(self) -> Iterator[tuple[RowPlace, Row]]:
        for index, row in enumerate(inputs.parse_json(inputs.read_bytes(self.path, limits.ROWS_ARRAY), str(self.path))):
            yield RowPlace(self, index), row

    def _table_rows(self, columns: Sequence[str]) -> Iterator[tuple[RowPlace, Row]]:
        with _table_errors(self.path), _opened_table(self.path) as table:
            names = [name for name in table.names if name in columns] or table.names
            for index, row in enumerate(table.rows(self.start, table.num_rows if self.stop is None else self.stop, names)):
                yield RowPlace(self, index), _without_nulls(row)


def find_files(path: Path, option: str = "data") -> list[Path]:
    """The files of rows that a path names, in order.

    Args:
      option: where the path was given, for errors.

    Raises:
      ValueError: it names none.
      DataError: shards of several kinds or of several splits, or a damaged directory of Hugging Face datasets.
    """
    if not path.is_dir():
        if path.name.endswith(ENDINGS) and path.exists():
            return [path]
        missing = "" if path.exists() else ", which does not exist"
        raise ValueError(f"{option} must be a directory of `lindm data make`, {ACCEPTED}; got {path}{missing}")
    if any((path / name).exists() for name in HUGGING_FACE):
        return _saved_dataset(path)
    shards = sorted(p for p in path.iterdir() if p.name.endswith(ENDINGS) and p.name[0] != "." and not p.is_dir())
    if not shards:
        raise ValueError(f"{option} must be a directory of `lindm data make`, {ACCEPTED}; got {path}")
    for rule, key in (("kind", _ending), ("split", _split)):
        several = {key(shard): shard.name for shard in shards}
        if len(several) > 1:
            raise DataError(f"{path}: the shards must be of one {rule}; got {' and '.join(list(several.values())[:2])}")
    return shards


def find_parts(paths: Sequence[Path]) -> list[Part]:
    """The parts of the files, in the order of their rows."""
    return [part for path in paths for part in _parts(path)]


def _parts(path: Path) -> list[Part]:
    size = inputs.check_file(path)
    if path.suffix in (".parquet", ".arrow"):
        with _table_errors(path), _opened_table(path) as table:
            size, step = table.num_rows, PART_ROWS
    elif path.suffix == ".gz" or _is_array(path):
        return [Part(path)]
    else:
        step = PART_BYTES
    bounds = [*range(0, size, max(step, -(-size // MAX_PARTS))), size]
    return [Part(path, start, stop) for start, stop in itertools.pairwise(bounds)]


def _ending(path: Path) -> str:
    return next(ending for ending in ENDINGS if path.name.endswith(ending))


def _split(path: Path) -> str:
    match = SPLIT_NAME.match(path.name)
    return match[1] if match else ""


def _saved_dataset(directory: Path) -> list[Path]:
    """The Arrow files of a directory of `save_to_disk`."""
    if (directory / HUGGING_FACE[0]).exists():
        splits = files.read_json(directory / HUGGING_FACE[0]).get("splits")
        if not isinstance(splits, list) or "train" not in splits:
            raise DataError(f"{directory}: must have the split train, or name the directory of one split; got {splits}")
        directory = directory / "train"
    path = directory / HUGGING_FACE[1]
    entries = files.read_json(path).get("_data_files")
    names: list[Any] = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries] if entries else []
    for name in names or [None]:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".arrow") or "\0" in name:
            raise DataError(f"{path}: _data_files must name .arrow files of its own directory; got {name!r}")
    return [directory / name for name in names]


# --- lines -------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    """A file of lines, unpacked as it is read. Raises: DataError, also where reading fails."""
    try:
        with inputs.open_file(path) as f:
            if path.suffix != ".gz":
                yield f
                return
            with gzip.GzipFile(fileobj=f) as unpacked:
                yield unpacked
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"cannot read {path}: {e}") from e


def _lines(f: BufferedReader | gzip.GzipFile, stop: int | None) -> Iterator[bytes]:
    """The lines that start before byte `stop`. A line that is too long is given in pieces, of which the first is an error."""
    while (stop is None or f.tell() < stop) and (line := f.readline(limits.LINE + 1)):
        yield line


def _is_array(path: Path) -> bool:
    """Whether a .json file is an array; others are a JSON object per line."""
    if path.suffix != ".json":
        return False
    with _opened(path) as f:
        return f.read(limits.KIB).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


# --- tables ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    num_rows: int
    names: list[str]
    batches: Callable[[int, int, list[str]], Iterator[Any]]
    """Record batches that have the rows from start to stop, of the columns."""

    def rows(self, start: int, stop: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        for batch in self.batches(start, stop, columns):
            yield from batch.to_pylist()


@contextlib.contextmanager
def _opened_table(path: Path) -> Iterator[_Table]:
    """An Arrow file, mapped into memory, or a Parquet file."""
    pa = import_pyarrow()
    inputs.check_file(path)
    with pa.memory_map(str(path)) as source:
        if path.suffix == ".arrow":
            try:
                table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                table = pa.ipc.open_file(source).read_all()

            def slices(start: int, stop: int, columns: list[str]) -> Iterator[Any]:
                for batch in table.select(columns).slice(start, stop - start).to_batches(max_chunksize=1000):
                    batch.validate(full=True)  # offsets of a damaged file would point outside of its memory
                    yield batch

            yield _Table(table.num_rows, table.column_names, slices)
            return
        parquet = pa.parquet.ParquetFile(source)

        def groups(start: int, stop: int, columns: list[str]) -> Iterator[Any]:
            metadata, first = parquet.metadata, 0
            for number in range(parquet.num_row_groups):
                last = first + metadata.row_group(number).num_rows
                if first < stop and last > start:
                    at = first
                    for batch in parquet.iter_batches(1000, row_groups=[number], columns=columns, use_threads=False):
                        low, high = max(start - at, 0), min(stop - at, len(batch))
                        at += len(batch)
                        if low < high:
                            yield batch.slice(low, high - low)
                first = last

        yield _Table(parquet.metadata.num_rows, parquet.schema_arrow.names, groups)


@contextlib.contextmanager
def _table_errors(path: Path) -> Iterator[None]:
    """Turn the errors of pyarrow into a DataError that names the file."""
    pa = import_pyarrow()
    try:
        yield
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"cannot read {path}: {next(iter(str(e).splitlines()), type(e).__name__)}") from e


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
