"""Writes datasets in shards, and resumes or repairs them.

    OUT/tasks-00000.parquet, .jsonl       a row per task: the problem as arrays, its value and bounds
    OUT/episodes-00000.parquet, .jsonl    a row per episode: task after task, its demonstrations and then its queries
    OUT/problem.parquet, .jsonl           where all tasks are one fixed problem: its arrays, once
    OUT/config.json, manifest.json, README.md
    OUT/provenance.json                   date, command line, versions and commit of the last call that made shards or this file

The SHA-256 of a finished shard goes to a journal; a shard that is not in the journal, or not intact, is made again. At the end
the journal becomes the manifest. On one machine with one set of versions the bytes depend on the source and the config alone, not
on interruptions or on the number of processes: provenance.json alone contains a time, a place and a machine.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lindm import __version__
from lindm.datasets.card import CARD, card
from lindm.datasets.columns import REWARD_CONVENTION, sizes_of
from lindm.datasets.config import DatasetConfig
from lindm.datasets.generate import TaskGenerator
from lindm.datasets.reader import CONFIG, FORMAT, read_config, read_manifest
from lindm.datasets.shards import import_pyarrow, make_shards
from lindm.errors import DataError, LindmError, OccupiedError
from lindm.families.registry import NamedProblem
from lindm.families.suites import Suite
from lindm.io import directories, files
from lindm.io.executor import Executor
from lindm.io.provenance import read_provenance, write_provenance
from lindm.io.verification import MANIFEST, PROVENANCE
from lindm.types import CERTIFICATES, Problem

JOURNAL = "progress.jsonl"


@dataclass(frozen=True, kw_only=True)
class MakeResult:
    """What `make_dataset` did."""

    manifest: dict
    kept: int  # shards that existed and were intact
    made: int
    damaged: tuple[str, ...]  # files that had been finished but had changed; they are made again


def make_dataset(
    out: Path,
    source: Suite | NamedProblem | Problem,
    config: DatasetConfig,
    *,
    executor: Executor = "serial",
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MakeResult:
    """Write a dataset to the directory `out`, or finish or repair the one that is there.

    Args:
      source: a suite, whose every task is another problem; or one problem, which is then every task, with or without names.
      executor, workers: where shards are made: in this process (serial), in workers on this machine (local) or on a Ray cluster.
      progress: called with (tasks done, tasks in all).

    Raises:
      ValueError: names that do not fit the problem; a suite whose gap no task has; a method that does not fit.
      OccupiedError: `out` holds something else, or was begun by other versions.
      UsageError: `out` is being written; a needed package is missing.
      StorageError: `out` cannot be written.
    """
    import_pyarrow()
    generator = TaskGenerator(source.problem if isinstance(source, NamedProblem) else source, config)
    names = source.names if isinstance(source, Suite | NamedProblem) else {}
    described = describe(generator, names)
    with directories.sole_writer(out):
        versions, finished = _open(out, described), _finished_shards(out)
        plan = _plan(generator)
        damaged = [n for record in finished.values() for n, file in record["files"].items() if not _intact(out / n, file)]
        records = {name: record for name, record in finished.items() if not record["files"].keys() & set(damaged)}
        missing = {name: tasks for name, tasks in plan.items() if name not in records}
        if missing and versions != (here := _versions()):
            raise OccupiedError(
                f"{out} was begun by other versions: {_difference(versions, here)}; use those, or another directory"
            )
        if (lost := read_provenance(out) is None) and (out / PROVENANCE).exists():
            damaged.append(PROVENANCE)
        if missing or lost:
            write_provenance(out)
        done = sum(record["tasks"] for record in records.values())
        progress(done, config.tasks)

        def write(record: dict, contents: dict[str, bytes]) -> None:
            records[record["point"]["shard"]] = _write_shard(out, record, contents)

        def report(made: int) -> None:
            progress(done + made, config.tasks)

        make_shards(generator, missing, write, executor=executor, workers=workers, progress=report)
        manifest = _manifest(described, versions, [records[name] for name in plan])
        _write_config(out / CONFIG, described, versions)
        _write_changed(out / CARD, card(manifest))
        _write_changed(out / MANIFEST, _pretty(manifest))
        with files.storage_errors(out / JOURNAL):
            (out / JOURNAL).unlink(missing_ok=True)
    made_shards = len(missing.keys() - {"problem"})
    kept = len(plan.keys() - {"problem"}) - made_shards
    return MakeResult(manifest=manifest, kept=kept, made=made_shards, damaged=tuple(damaged))


# --- what a dataset is -----------------------------------------------------------------------------------------------------


def describe(generator: TaskGenerator, given_names: Mapping[str, Sequence[str]]) -> dict:
    """Everything that the bytes depend on, as config.json and the manifest hold it. ValueError for names that do not fit."""
    names = {part: list(given) for part, given in given_names.items()}
    sizes = sizes_of(generator.example)
    for part, given in names.items():
        wanted = sizes.get(f"num_{part}", 0)
        if len(given) != wanted or len(set(given)) != wanted:
            raise ValueError(f"names of {part} must be {wanted} that differ; got {given}")
    source = source_identity(generator.source)
    example: Any = generator.example
    legal = getattr(example, "models", example).legal
    return {
        "format": FORMAT,
        "source": source | {"sizes": sizes} | ({} if legal is None else {"illegal_actions": True}),
        "rewards": {"discount": generator.discount, "convention": REWARD_CONVENTION},
        "dataset": asdict(generator.config),
        "oracle": generator.method,
        "shard_size": generator.shard_size,
        "precision": str(jnp.result_type(float)),
        "names": names,
    }


def source_identity(source: Suite | Problem) -> dict[str, Any]:
    """By what a dataset knows its source again: the options of a suite, or the SHA-256 of the arrays of one problem."""
    if isinstance(source, Suite):
        return {"suite": asdict(source)}
    arrays = b"".join(np.asarray(x, np.float64).tobytes() for x in jax.tree.leaves(source))
    return {"problem": {"sha256": hashlib.sha256(arrays).hexdigest()}}


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "pyarrow")}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"lindm": __version__, "python": python, "backend": jax.default_backend()} | packages


def _open(out: Path, described: dict) -> dict[str, str]:
    """The versions that began the dataset in `out`, which begins now if `out` is empty.

    Raises:
      OccupiedError: `out` holds something else.
      DataError: neither manifest nor config can be read.
    """
    path = out / CONFIG
    if not path.exists() and not (out / MANIFEST).exists():
        if (out / JOURNAL).exists():
            raise DataError(f"{path} is missing, although {out / JOURNAL} is there: remove {out} and make the dataset again")
        if foreign := sorted(p.name for p in out.iterdir() if not p.name.startswith(".")):
            raise OccupiedError(f"{out} is not empty and holds no dataset ({', '.join(foreign[:3])}); choose another directory")
        versions = _versions()
        _write_config(path, described, versions)
        return versions
    there = _or_none(lambda: read_manifest(out)) or _or_none(lambda: read_config(path))
    if there is None:
        if (out / JOURNAL).exists() or any(out.glob("tasks-*")):
            raise DataError(f"{path} and {out / MANIFEST} are both missing or damaged: remove {out} and make the dataset again")
        why = f"its {CONFIG} is missing or not in the format {FORMAT}"
        what = "something that is not a dataset of this version and is not replaced"
        raise OccupiedError(f"{out} holds {what}: {why}; choose another directory")
    if there["config"] != described:
        raise OccupiedError(f"{out} holds another dataset: {_difference(there['config'], described)}; choose another directory")
    return there.get("versions", {})


def _or_none(read: Callable[[], Any]) -> Any:
    """The value of `read`; None where a file is missing or damaged. Other errors pass: a signal may raise anywhere."""
    try:
        return read()
    except LindmError as e:
        if not isinstance(e, DataError):
            raise
        return None


def _difference(there: Any, here: Any, at: str = "") -> str:
    """Every leaf in which two JSON values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [k for k in there | here if there.get(k) != here.get(k)]
        return ", ".join(_difference(there.get(k), here.get(k), f"{at}.{k}".lstrip(".")) for k in keys)
    return f"{at} is {json.dumps(there)} there and {json.dumps(here)} here"


def _plan(generator: TaskGenerator) -> dict[str, tuple[int, int]]:
    """The tasks of every shard by its name; `problem` holds a fixed problem."""
    n, size = generator.config.tasks, generator.shard_size
    shards = {f"{k:05d}": (first, min(first + size, n)) for k, first in enumerate(range(0, n, size))}
    return shards if isinstance(generator.source, Suite) else {"problem": (0, 0)} | shards


def _finished_shards(out: Path) -> dict[str, dict]:
    """The records of all shards that were finished, by name, without records that are damaged."""
    manifest = _or_none(lambda: read_manifest(out))
    journal = files.read_json_lines(out / JOURNAL, repair=True, skip_damaged=True)
    records: list[dict] = [*(manifest["shards"] if manifest else ()), *journal]
    return {record["point"]["shard"]: record for record in records}


def _intact(path: Path, file: dict) -> bool:
    return path.is_file() and path.stat().st_size == file["bytes"] and files.sha256(path) == file["sha256"]


# --- shards ----------------------------------------------------------------------------------------------------------------


def _write_shard(out: Path, record: dict, contents: dict[str, bytes]) -> dict:
    """Write the files of a shard and then its line of the journal; the record."""
    for name, data in contents.items():
        files.write_atomic(out / name, data)
    files.append_record(out / JOURNAL, record)
    return record


def _manifest(described: dict, versions: dict, records: list[dict]) -> dict:
    shards = [record for record in records if record["point"]["shard"] != "problem"]
    steps = {name: sum(r["certificates"][c] for r in shards) for c, name in enumerate(CERTIFICATES)}
    n, each = described["dataset"]["tasks"], described["dataset"]["demos"] + described["dataset"]["queries"]
    means = {f"mean_{k}": sum(record["sums"][k] for record in shards) / n for k in shards[0]["sums"]}
    totals = {"tasks": n, "episodes": n * each, "steps": sum(steps.values()), "certificates": steps} | means
    manifest = {"config": described, "versions": versions, "totals": totals, "shards": records}
    hashes = {CARD: hashlib.sha256(card(manifest).encode()).hexdigest()}
    return files.with_checksum(manifest | {"outputs": hashes})


def _write_config(path: Path, described: dict, versions: dict) -> None:
    _write_changed(path, _pretty(files.with_checksum({"config": described, "versions": versions})))


def _pretty(value: Any) -> str:
    return files.strict_json(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _write_changed(path: Path, content: str) -> None:
    """Write a file unless it has this content already: a finished dataset may be in a place that is not writable."""
    if not path.is_file() or path.read_bytes() != content.encode():
        files.write_atomic(path, content)
