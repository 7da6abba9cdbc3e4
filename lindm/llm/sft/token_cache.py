"""Files of rows as tokens on disk: tokenized once, by all cores of all processes, and then read by number.

    DIR/hashes.json                    SHA-256 of files of rows, with the size and time for which they hold
    DIR/KEY/part-00007.safetensors     the examples of one part of the rows

KEY is a hash of the content of the files, the tokenizer with its chat template, the options on which the examples depend, and the
code that makes them: the modules of `MAKERS` and the versions of `LIBRARIES`. A part is written as a whole under its name, so
what a killed run has finished stays, and the same command goes on with the rest. A process that is one of n tokenizes every n-th
part. All processes then have the same examples, whoever wrote them, and each reads those of its own devices. Where another run is
writing, a run waits until that one has ended, and writes the parts that are missing then.

    ids [tokens], positions, labels, weights [labels]        of all examples, one after the other; positions within the example
    lengths, num_labels, rows, groups, digests [examples]    rows: number within the part; digests: of ids, labels and weights

The files are mapped into memory. A run holds the lengths and numbers of labels, and reads an example where it is needed; its
digest is compared then, and that of the numbers of a part when the part is opened.
"""

import bisect
import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import save

from lindm.errors import DataError, LindmError
from lindm.io import directories, files
from lindm.io.executor import TaskEvent, TaskPool, available_cores
from lindm.llm.io import safetensors_files
from lindm.llm.parallel import processes
from lindm.llm.sft.example_table import ExampleTable, empty_example, example_digest, last_trained
from lindm.llm.sft.examples import LengthLimit, part_examples
from lindm.llm.sft.row_files import Part, RowPlace, find_parts
from lindm.llm.tokens import Example, Tokenizer

FORMAT = "lindm-tokens-1"
HASHES, HASHES_FORMAT = "hashes.json", "lindm-hashes-1"
INDEX = ("lengths", "num_labels", "rows", "groups", "digests")
LLM = Path(__file__).parents[1]
# what a row's tokens and labels depend on
MAKERS = (
    *("tokens.py", "chats.py", "chat_template.py", "chat_renderer.py"),
    *(f"sft/{name}.py" for name in ("rows", "row_files", "examples", "example_table", "token_cache")),
)
LIBRARIES = ("tokenizers", "transformers", "jinja2")
MAX_WORKERS = 16  # of one process: a host may have several
PARTS_PER_WORKER = 3  # another worker imports its libraries for as long as it needs for about so many parts
MESSAGE_BYTES = 4096  # of an error that processes tell each other

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """How rows become examples."""

    tokenizer: Tokenizer
    limit: LengthLimit
    chat_template_kwargs: dict[str, Any]
    held_out_key: str | None

    def key(self, hashes: Sequence[str], parts: Sequence[Part]) -> str:
        """Names the examples of files with these hashes."""
        tokenizer = self.tokenizer
        names = tokenizer.special_tokens_map, tokenizer.chat_template, type(tokenizer).__name__
        bounds = [(part.start, part.stop) for part in parts]
        options = self.limit.max_length, self.limit.overlong, self.chat_template_kwargs, self.held_out_key
        text = json.dumps([FORMAT, code_hash(), hashes, bounds, names, options], sort_keys=True, default=str)
        return hashlib.sha256((text + tokenizer.backend_tokenizer.to_str()).encode()).hexdigest()[:20]


@functools.cache
def code_hash() -> str:
    """SHA-256 of the code that makes examples: the sources of `MAKERS` and the versions of `LIBRARIES`."""
    sources = [[name, files.sha256(LLM / name)] for name in MAKERS]
    return hashlib.sha256(
        files.canonical_json([sources, [importlib.metadata.version(x) for x in LIBRARIES]]).encode()
    ).hexdigest()


def tokenized(paths: Sequence[Path], how: Tokenizing, directory: Path, progress: Progress) -> tuple["CachedExamples", str]:
    """(examples, SHA-256) of files of rows; the examples are in the cache in a directory, and added to it if they are missing.

    Every process of a run calls it. Raises: DataError for a bad row, in all processes; StorageError.
    """
    is_main = jax.process_index() == 0
    parts, stats = find_parts(paths), [_stat(path) for path in paths]
    if is_main:
        _file_hashes(paths, directory)
    processes.barrier("hashes of rows")
    hashes = _file_hashes(paths, directory)
    names = [f"part-{i:05d}.safetensors" for i in range(len(parts))]
    target = directory / how.key(hashes, parts)
    opened = [_open_part(target / name) for name in names]
    missing = [i for i, part in enumerate(opened) if part is None]
    processes.barrier("missing parts")  # every process has the same list
    if missing:
        with _writer(target, is_main, lambda: progress(sum((target / name).exists() for name in names), len(parts))):
            left = [i for i in missing if _open_part(target / names[i]) is None]  # another run may have written some
            processes.barrier("parts that are left")
            _write_missing([(parts[i], target / names[i]) for i in left], how, len(parts), progress)
    for i in missing:
        opened[i] = _open_part(target / names[i])
    if changed := [path for path, stat in zip(paths, stats, strict=True) if _stat(path) != stat]:
        raise DataError(f"{changed[0]} changed while it was read")
    examples = CachedExamples(parts, [target / name for name in names], opened)
    if not examples.num_rows:
        raise DataError(f"{paths[0]} has no rows")
    if not len(examples):
        limit = replace(how.limit, dropped=examples.counts["dropped"], unlabeled=examples.unlabeled)
        raise DataError(f"{paths[0]}: {limit.nothing_left}")
    content = [[path.name, digest] for path, digest in zip(paths, hashes, strict=True)]
    whole = hashlib.sha256(files.canonical_json(content).encode()).hexdigest()
    return examples, hashes[0] if len(paths) == 1 else whole


def remove_other_entries(directory: Path, tables: Collection[ExampleTable]) -> None:
    """Remove what a cache has of other files, tokenizers or options than those of the examples of these tables.

    Raises: StorageError.
    """
    kept = {path.parent for table in tables if isinstance(table, CachedExamples) for path in table.paths}
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        if entry.is_dir() and entry not in kept:
            directories.remove(entry)


# --- hashes of files ---------------------------------------------------------------------------------------------------------


def _stat(path: Path) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def _file_hashes(paths: Sequence[Path], directory: Path) -> list[str]:
    """SHA-256 of the files. Of a file that has the size and the time of its last hash, that hash is taken."""
    path, known = directory / HASHES, {}
    if path.exists():
        try:
            known = files.read_json(path, format=HASHES_FORMAT)
        except DataError:
            known = {}  # damaged: everything is hashed again
    hashes = dict(known)
    for source in paths:
        name, stat = str(source.resolve()), _stat(source)
        if hashes.get(name, [None])[0] != stat:
            digest = files.sha256(source)
            hashes[name] = [stat, digest]
            if time.time_ns() - stat[1] < files.SETTLED_SECONDS * 1e9:
                hashes[name] = [None, digest]  # it may change again without a new time
    if hashes != known and jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        files.write_json(path, hashes, format=HASHES_FORMAT)
    return [hashes[str(source.resolve())][1] for source in paths]


# --- writing -----------------------------------------------------------------------------------------------------------------

_WORK: list[Tokenizing] = []  # of a worker process


def _start(how: Tokenizing) -> None:
    _WORK[:] = [how]


def _write_missing(missing: Sequence[tuple[Part, Path]], how: Tokenizing, total: int, progress: Progress) -> None:
    """Write the parts that are missing; those of this process are every n-th one. All processes call it."""
    own = missing[jax.process_index() :: jax.process_count()]
    error, done = None, itertools.count(total - len(missing))

    def notify(event: TaskEvent) -> None:
        if event.result is None:
            return
        if event.result.error is not None:
            raise event.result.error
        progress(min(next(done) * jax.process_count(), total), total)

    workers = max(1, min(available_cores(), len(own) // PARTS_PER_WORKER, MAX_WORKERS))
    _start(how)
    try:
        with TaskPool("local" if workers > 1 else "serial", workers, partial(_start, how)) as pool:
            pool.run(_write_part, own, on_event=notify)
    except DataError as e:
        error = e
    if (error := _first_error(error)) is not None:
        raise error
    progress(total, total)


@contextlib.contextmanager
def _writer(target: Path, is_main: bool, waiting: Callable[[], object]) -> Iterator[None]:
    """A block in which this run alone writes to a directory. Where another run does, `waiting` is called until it has ended."""
    with directories.sole_writer(target, waiting) if is_main else files.storage_errors(target):
        processes.barrier("the directory of tokens")
        yield


def _first_error(error: DataError | None) -> LindmError | None:
    """The error of the first process that has one; all processes call it after their parts."""
    if jax.process_count() == 1:
        return error
    message = np.zeros(MESSAGE_BYTES, np.uint8)
    content = np.frombuffer((error.message if error else "").encode()[:MESSAGE_BYTES], np.uint8)
    message[: len(content)] = content
    with processes.detect_lost_peer():
        messages = np.asarray(multihost_utils.process_allgather(message)).reshape(-1, MESSAGE_BYTES)
    texts = [bytes(m).rstrip(b"\0").decode(errors="replace") for m in messages]
    return next((DataError(text) for text in texts if text), None)


def _write_part(task: tuple[Part, Path]) -> None:
    """Tokenize one part and write it."""
    (part, path), how = task, _WORK[0]
    limit = replace(how.limit)
    places, examples, num_rows = [], [], 0
    for place, made in part_examples(part, how.tokenizer, limit, how.chat_template_kwargs, how.held_out_key):
        num_rows += 1
        places += [place.index] * len(made)
        examples += made
    labeled = [e.target >= 0 for e in examples]
    empty = np.zeros(0, np.int32)
    tensors = {
        "ids": np.concatenate([empty, *(e.ids for e in examples)]),
        "positions": np.concatenate([empty, *(np.flatnonzero(x).astype(np.int32) for x in labeled)]),
        "labels": np.concatenate([empty, *(e.target[x] for e, x in zip(examples, labeled, strict=True))]),
        "lengths": np.array([len(e.ids) for e in examples], np.int32),
        "num_labels": np.array([x.sum() for x in labeled], np.int32),
        "rows": np.array(places, np.int32),
        "groups": np.array([e.group for e in examples], np.uint64),
        "digests": np.array([example_digest(e) for e in examples], np.uint64),
    }
    if any(e.weights is not None for e in examples):
        weights = (np.ones(x.sum()) if e.weights is None else e.weights for e, x in zip(examples, labeled, strict=True))
        tensors["weights"] = np.concatenate(list(weights), dtype=np.float32)
    ends = Counter(last_trained(examples).tolist())
    about = {"num_rows": num_rows, "ends": list(ends.items())}
    about |= {name: getattr(limit, name) for name in ("truncated", "dropped", "unlabeled", "endless")}
    metadata = files.canonical_json(about | {"format": FORMAT, "checksum": _checksum(tensors, about)})
    files.write_atomic(path, save(tensors, {"about": metadata}))  # one entry: safetensors writes several in any order


def _checksum(tensors: dict[str, np.ndarray], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(files.canonical_json(about).encode())
    for name in INDEX:
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


# --- reading -----------------------------------------------------------------------------------------------------------------


class _OpenPart(NamedTuple):
    file: Any  # of safetensors
    lengths: np.ndarray
    num_labels: np.ndarray
    with_weights: bool
    about: dict[str, Any]


def _open_part(path: Path) -> _OpenPart | None:
    """The open file of a part; None where it is missing or damaged."""
    try:
        if not path.exists():
            return None
        f = safetensors_files.open_file(path)
        about, tensors = json.loads((f.metadata() or {})["about"]), {name: f.get_tensor(name) for name in INDEX}
        if (
            not {"ids", "positions", "labels"} <= set(f.keys())
            or about.pop("format") != FORMAT
            or about.pop("checksum") != _checksum(tensors, about)
        ):
            return None
        return _OpenPart(f, tensors["lengths"], tensors["num_labels"], "weights" in f.keys(), about)  # noqa: SIM118
    except (DataError, SafetensorError, ValueError, KeyError, TypeError):
        return None


class CachedExamples(ExampleTable):
    """The examples of the parts in files, read one at a time.

    Attributes:
      num_rows: of the files; counts: {"truncated", "dropped"} documents, those that are not 0.
      unlabeled, endless: documents, as in `LengthLimit`.
    """

    def __init__(self, parts: Sequence[Part], paths: Sequence[Path], opened: Sequence[_OpenPart | None]):
        self.parts, self.paths = parts, paths
        if None in opened:
            raise self._damage(opened.index(None))
        self.opened = [part for part in opened if part is not None]
        self.lengths = np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in self.opened)])
        self.num_labels = np.concatenate([np.zeros(0, np.int32), *(part.num_labels for part in self.opened)])
        self.first = [0, *itertools.accumulate(len(part.lengths) for part in self.opened)]  # example of each part
        self._token_starts, self._label_starts = (self._starts(sizes) for sizes in (self.lengths, self.num_labels))
        self._with_weights = any(part.with_weights for part in self.opened)
        self.empty = empty_example(np.zeros(0, np.float32) if self._with_weights else None)
        self.num_rows = sum(part.about["num_rows"] for part in self.opened)
        counts = {name: sum(part.about[name] for part in self.opened) for name in ("truncated", "dropped")}
        self.counts = {name: n for name, n in counts.items() if n}
        self.unlabeled, self.endless = (sum(part.about[name] for part in self.opened) for name in ("unlabeled", "endless"))

    def _starts(self, sizes: np.ndarray) -> np.ndarray:
        """Where each example starts in its part."""
        starts = np.zeros(len(sizes), np.uint32)
        for first, last in itertools.pairwise(self.first):
            starts[first:last] = np.cumsum(sizes[first:last], dtype=np.uint32) - sizes[first:last]
        return starts

    def _damage(self, number: int) -> DataError:
        return DataError(f"{self.paths[number]} is damaged; remove it, and the same command makes it again")

    @property
    def groups(self) -> np.ndarray:  # read when the split is made, and not kept
        return np.concatenate([np.zeros(0, np.uint64), *(part.file.get_tensor("groups") for part in self.opened)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        p, own = self._place(index)
        part = self.opened[p]

        def read(name: str, start: int, n: int) -> np.ndarray:
            return part.file.get_slice(name)[start : start + n]

        start, num_labels = int(self._label_starts[index]), int(self.num_labels[index])
        ids = read("ids", int(self._token_starts[index]), int(self.lengths[index]))
        positions, labels = read("positions", start, num_labels), read("labels", start, num_labels)
        target = np.full(len(ids), -1, np.int32)
        target[positions.clip(0, len(ids) - 1)] = labels
        weights = np.ones(num_labels, np.float32) if self._with_weights else None
        if part.with_weights:
            weights = read("weights", start, num_labels)
        place = RowPlace(self.parts[p], int(read("rows", own, 1)[0]))
        example = Example(ids, target, place, int(read("groups", own, 1)[0]), weights=weights)
        if example_digest(example) != self.digest(index):
            raise self._damage(p)
        return example

    def digest(self, index: int) -> int:
        p, own = self._place(range(len(self))[index])
        return int(self.opened[p].file.get_slice("digests")[own : own + 1][0])

    def _place(self, index: int) -> tuple[int, int]:
        """The part of an example, and its number within the part."""
        p = bisect.bisect_right(self.first, index) - 1
        return p, index - self.first[p]

    def end_tokens(self) -> tuple[int, ...]:
        ends = Counter()
        for part in self.opened:
            ends.update(dict(map(tuple, part.about["ends"])))
        return tuple(token for token, _ in sorted(ends.items(), key=lambda end: (-end[1], end[0])))
