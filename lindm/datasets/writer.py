"""Shards of labelled episodes: written, found intact, or made again.

    OUT/tasks-00000.parquet, .jsonl       a row per task: the whole problem as arrays, its value and bounds
    OUT/episodes-00000.parquet, .jsonl    a row per episode: task after task, its demonstrations and then its queries
    OUT/problem.parquet, .jsonl           where all tasks are one fixed problem: its arrays, once
    OUT/config.json, manifest.json, README.md

One shard is in memory at a time. When it is finished its SHA-256 goes to a journal; what is not in the journal, or not intact,
is made again. At the end the journal becomes the manifest. On one machine with one set of versions the bytes depend on the source
and the recipe alone, not on how often the run was interrupted: no file names a time, a place or a machine.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lindm import __version__
from lindm.datasets.card import card
from lindm.datasets.generate import DatasetConfig, Draws, TaskGenerator
from lindm.datasets.reader import CONFIG, ENDINGS, FORMAT, MANIFEST, ORACLE, STEPS, read_manifest, sealed, unsealed
from lindm.errors import DataError, LindmError, UsageError
from lindm.families.registry import Source
from lindm.families.suites import Suite
from lindm.io import directories, files
from lindm.types import APOMDP, CERTIFICATES, MDP, Problem

ROLES = ("demo", "query")
JOURNAL, CARD = "progress.jsonl", "README.md"
WORTH = ("value", "lower", "upper", "uniform_value")
PARTS = {"states": "n_states", "actions": "n_actions", "observations": "n_observations", "models": "n_models"}

Table = dict[str, Any]
"""Columns by name, all of one length n: a list of n strings, or an array [n], [n, k] or [n, k, l]."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What `make` did."""

    manifest: dict
    kept: int  # shards that were there, intact
    made: int
    damaged: tuple[str, ...]  # files that had been finished but were not what they had been; they are made again


def make(
    out: Path,
    source: Suite | Source | Problem,
    recipe: DatasetConfig,
    *,
    license: str = "apache-2.0",
    progress: Callable[[int, int], None] | None = None,
) -> Made:
    """Write the dataset to the directory `out`, or finish or repair the one that is there.

    Args:
      source: a suite, whose every task is another problem; or one problem, which is then every task, with or without names.
      license: of the data, as the data card states it.
      progress: hears (tasks done, tasks in all).

    Raises:
      ValueError: names that do not fit the problem; a suite whose gap no task has; a method that does not fit.
      LindmError: `out` holds something else or is being written (2), cannot be written (7); a needed package is missing (2).
    """
    _arrow()
    drawing = TaskGenerator(source.problem if isinstance(source, Source) else source, recipe)
    names = {part: list(getattr(source, part)) for part in PARTS} if isinstance(source, Source) else {}
    config = _config(drawing, {part: given for part, given in names.items() if given}, license)
    with directories.sole_writer(out):
        versions, made_before = _opened(out, config), _journal(out)
        plan = _plan(drawing)
        damaged = tuple(n for record in made_before.values() for n, file in record["files"].items() if not _intact(out / n, file))
        records = {name: record for name, record in made_before.items() if not record["files"].keys() & set(damaged)}
        missing = {name: tasks for name, tasks in plan.items() if name not in records}
        if missing and versions != (here := _versions()):
            raise UsageError(f"{out} was begun by other versions: {_difference(versions, here)}; use those, or another --out")
        done = sum(record["tasks"] for record in records.values())
        tell = progress or (lambda done, total: None)
        tell(done, recipe.tasks)
        for name, (first, last) in missing.items():
            records[name] = _write_shard(out, name, drawing, first, last, lambda at, n=done - first: tell(n + at, recipe.tasks))
            files.append_line(out / JOURNAL, files.canonical_json(sealed(records[name])))
            done += last - first
        manifest = _manifest(config, versions, [records[name] for name in plan])
        _settle(out / CONFIG, _pretty({"config": config, "versions": versions}))
        _settle(out / CARD, card(manifest))
        _settle(out / MANIFEST, _pretty(manifest))
        with files.storage_errors(out / JOURNAL):
            (out / JOURNAL).unlink(missing_ok=True)
    made = len(missing.keys() - {"problem"})
    return Made(manifest=manifest, kept=len(plan.keys() - {"problem"}) - made, made=made, damaged=damaged)


# --- what a run is ---------------------------------------------------------------------------------------------------------


def _config(drawing: TaskGenerator, names: dict[str, list[str]], license: str) -> dict:
    sizes = _sizes(drawing.like)
    for part, given in names.items():
        wanted = sizes.get(PARTS[part], 0)
        if len(given) != wanted or len(set(given)) != wanted:
            raise ValueError(f"names of {part} must be {wanted} that differ; got {given}")
    if isinstance(drawing.source, Suite):
        source = {"suite": asdict(drawing.source)}
    else:
        bytes_of = b"".join(np.asarray(x, np.float64).tobytes() for x in jax.tree.leaves(drawing.source))
        source = {"problem": {"sha256": hashlib.sha256(bytes_of).hexdigest()}}
    return {
        "format": FORMAT,
        "source": source | {"sizes": sizes},
        "recipe": asdict(drawing.recipe),
        "oracle": drawing.method,
        "shard": drawing.shard,
        "precision": str(jnp.result_type(float)),
        "names": names,
        "license": license,
    }


def _sizes(problem: Problem) -> dict[str, Any]:
    """Kind, horizon and sizes, as they stand in a row of a task."""
    sizes = {"horizon": problem.horizon, "n_states": problem.num_states, "n_actions": problem.num_actions}
    if not isinstance(problem, MDP):
        sizes["n_observations"] = problem.num_observations
    if isinstance(problem, APOMDP):
        sizes["n_models"] = problem.num_models
    return {"kind": type(problem).__name__.lower()} | sizes


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "pyarrow")}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"lindm": __version__, "python": python, "backend": jax.default_backend()} | found


def _opened(out: Path, config: dict) -> dict[str, str]:
    """The versions that began the run in `out`, which begins now if nothing is there. UsageError if something else is."""
    path = out / CONFIG
    if not path.exists() and not (out / MANIFEST).exists():
        if foreign := sorted(p.name for p in out.iterdir() if not p.name.startswith(".")):
            raise UsageError(f"{out} is not empty and holds no dataset ({', '.join(foreign[:3])}); choose another --out")
        versions = _versions()
        files.write_atomic(path, _pretty({"config": config, "versions": versions}))
        return versions
    there = _if_good(lambda: read_manifest(out)) or _if_good(lambda: files.read_json(path)) or {}
    if not isinstance(there.get("config"), dict) or there["config"].get("format") != FORMAT:
        why = f"its {CONFIG} is missing or not in the format {FORMAT}"
        raise UsageError(f"{out} holds something that is not a dataset and is not touched: {why}; choose another --out")
    if there["config"] != config:
        raise UsageError(f"{out} holds another dataset: {_difference(there['config'], config)}; choose another --out")
    return there.get("versions", {})


def _if_good(read: Callable[[], Any]) -> Any:
    """What is read; None where it is missing or damaged. The Stop of a signal, which may come anywhere, is not caught."""
    try:
        return read()
    except LindmError as e:
        if not isinstance(e, DataError):
            raise
        return None


def _difference(there: Any, asked: Any, at: str = "") -> str:
    """Every leaf in which two JSON values differ."""
    if isinstance(there, dict) and isinstance(asked, dict):
        keys = [k for k in there | asked if there.get(k) != asked.get(k)]
        return ", ".join(_difference(there.get(k), asked.get(k), f"{at}.{k}".lstrip(".")) for k in keys)
    return f"{at} is {json.dumps(there)} there and {json.dumps(asked)} here"


def _plan(drawing: TaskGenerator) -> dict[str, tuple[int, int]]:
    """The pieces of a dataset, by name, and their tasks."""
    n, size = drawing.recipe.tasks, drawing.shard
    shards = {f"{k:05d}": (first, min(first + size, n)) for k, first in enumerate(range(0, n, size))}
    return shards if isinstance(drawing.source, Suite) else {"problem": (0, 0)} | shards


def _journal(out: Path) -> dict[str, dict]:
    """Everything that is known to have been finished, by name. What cannot be read or has no valid seal does not count."""
    manifest = _if_good(lambda: read_manifest(out))
    lines = _if_good(lambda: files.read_json_lines(out / JOURNAL, repair=True))
    if lines is None:
        lines = []
        with files.storage_errors(out / JOURNAL):
            (out / JOURNAL).unlink(missing_ok=True)
    records: list[dict] = [*(manifest["shards"] if manifest else ()), *(record for line in lines if (record := unsealed(line)))]
    return {record["point"]["shard"]: record for record in records}


def _intact(path: Path, file: dict) -> bool:
    return path.is_file() and path.stat().st_size == file["bytes"] and files.sha256(path) == file["sha256"]


# --- writing ---------------------------------------------------------------------------------------------------------------


def _write_shard(out: Path, name: str, drawing: TaskGenerator, first: int, last: int, tick: Callable[[int], None]) -> dict:
    """Write the files of a piece; its record."""
    record: dict[str, Any] = {"point": {"shard": name}, "tasks": last - first}
    if name == "problem":
        one = jax.tree.map(lambda x: np.asarray(x)[None], drawing.source)
        return record | {"files": _write(out, "problem", _arrays(one))}
    drawn = drawing.draw(first, last, tick)
    problems, worth, (_, found) = drawn
    n, worth = last - first, {k: worth[k] for k in WORTH if k in worth}
    tasks: Table = {"task": np.arange(first, last)}
    tasks |= {k: [v] * n if k == "kind" else np.full(n, v) for k, v in _sizes(drawing.like).items()}
    tasks |= worth | {"method": [drawing.method] * n} | ({} if problems is None else _arrays(problems))
    record["certificates"] = [int((found.certificate == c).sum()) for c in range(len(CERTIFICATES))]
    record["sums"] = {k: float(x.sum()) for k, x in worth.items()}
    written = _write(out, f"tasks-{name}", tasks) | _write(out, f"episodes-{name}", _rows(drawing, first, drawn))
    return record | {"files": written}


def _arrays(problems: Problem) -> Table:
    """The arrays of problems [n, ...], flattened, each with its shape."""
    one = problems.models if isinstance(problems, APOMDP) else problems
    parts: Table = {}
    for field in fields(one):
        x = np.asarray(getattr(one, field.name), np.float64)
        parts[field.name] = x.reshape(len(x), -1)
        parts[f"{field.name}_shape"] = np.tile(x.shape[1:], (len(x), 1))
    return parts | ({"alpha": np.asarray(problems.alpha, np.float64)} if isinstance(problems, APOMDP) else {})


def _rows(drawing: TaskGenerator, first: int, drawn: Draws) -> Table:
    """A row per episode."""
    _, _, (episodes, found) = drawn
    n, counts = len(episodes.a), (drawing.recipe.demos, drawing.recipe.queries)
    rows: Table = {
        "task": np.repeat(np.arange(first, first + n), drawing.episodes),
        "episode": np.tile(np.concatenate([np.arange(k) for k in counts]), n),
        "role": [role for role, k in zip(ROLES, counts, strict=True) for _ in range(k)] * n,
    }
    for of, columns in ((episodes, STEPS), (found, ORACLE)):
        for column, field in columns.items():
            if (x := getattr(of, field)) is not None:
                rows[column] = x.reshape(-1, *x.shape[2:])
    return rows


def _write(out: Path, stem: str, table: Table) -> dict[str, dict]:
    """A table as JSON lines and as Parquet, under their names."""
    columns = [x if isinstance(x, list) else x.tolist() for x in table.values()]
    rows = [dict(zip(table, values, strict=True)) for values in zip(*columns, strict=True)]
    written = {}
    lines = "".join(json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n" for row in rows).encode()
    for ending, data in zip(ENDINGS, (lines, _parquet(table)), strict=True):
        files.write_atomic(out / f"{stem}{ending}", data)
        written[f"{stem}{ending}"] = {"rows": len(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return written


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise UsageError(f"Parquet files need pyarrow: pip install 'lindm[data]' ({e})") from e
    return pyarrow


def _parquet(table: Table) -> bytes:
    pa = _arrow()

    def nested(x: Any) -> Any:
        if isinstance(x, list) or x.ndim == 1:
            return pa.array(x)
        starts = pa.array(np.arange(0, len(x) * x.shape[1] + 1, x.shape[1], dtype=np.int32))
        return pa.ListArray.from_arrays(starts, nested(np.ascontiguousarray(x).reshape(-1, *x.shape[2:])))

    sink = pa.BufferOutputStream()
    whole = pa.table({name: nested(x) for name, x in table.items()})
    pa.parquet.write_table(whole, sink, compression="zstd", version="2.6", row_group_size=len(whole))
    return sink.getvalue().to_pybytes()


def _manifest(config: dict, versions: dict, records: list[dict]) -> dict:
    shards = [record for record in records if record["point"]["shard"] != "problem"]
    steps = {name: sum(r["certificates"][c] for r in shards) for c, name in enumerate(CERTIFICATES)}
    n, each = config["recipe"]["tasks"], config["recipe"]["demos"] + config["recipe"]["queries"]
    means = {f"mean_{k}": sum(record["sums"][k] for record in shards) / n for k in shards[0]["sums"]}
    totals = {"tasks": n, "episodes": n * each, "steps": sum(steps.values()), "certificates": steps} | means
    return sealed({"config": config, "versions": versions, "totals": totals, "shards": records})


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _settle(path: Path, content: str) -> None:
    """Written where it is not there already: a finished dataset may lie where nothing can be written."""
    if not path.is_file() or path.read_bytes() != content.encode():
        files.write_atomic(path, content)
