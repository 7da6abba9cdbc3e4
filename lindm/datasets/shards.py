"""The shards of a dataset: generated and encoded, in this process or in workers.

Compiling costs a process more than a small dataset costs. So without a given number of workers, shards are made in this process
until those that are left would take longer than a worker needs to start and to compile.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lindm.datasets.columns import LABEL_COLUMNS, REWARD_CONVENTION, ROLES, STEP_COLUMNS, VALUES, problem_columns, sizes_of
from lindm.datasets.config import DatasetConfig
from lindm.datasets.generate import Generated, TaskGenerator
from lindm.datasets.reader import ENDINGS
from lindm.errors import LindmError, UsageError
from lindm.families.suites import Suite
from lindm.io.executor import Executor, TaskEvent, TaskPool, available_cores
from lindm.io.files import strict_json
from lindm.io.task_queue import HELP_AFTER
from lindm.types import CERTIFICATES, Problem

BATCH = 4  # shards for each worker whose bytes may be in memory

Table = dict[str, Any]
"""Columns by name, all of one length n: a list of n strings, or an array [n], [n, k] or [n, k, l]."""


def make_shards(
    generator: TaskGenerator,
    shards: Mapping[str, tuple[int, int]],
    write: Callable[[dict, dict[str, bytes]], None],
    *,
    executor: Executor = "serial",
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Make shards and hand each to `write` when it is finished.

    Args:
      shards: the first task and the last + 1 of every shard, by name.
      write: called in this process with the record of a shard and the contents of its files.
      executor, workers: as in `lindm.io.executor.TaskPool`; without a number of workers a small dataset is made in this process.
      progress: called with the number of tasks done.

    Raises:
      ValueError: no task of the suite has its gap.
      LindmError: a worker died; all other shards were written.
    """
    pool = _worker_pool(generator, executor, workers)
    waiting, done = dict(shards), 0
    in_workers = executor == "ray" or (executor == "local" and workers is not None)
    for name, (first, last) in shards.items():
        if in_workers and name != "problem":
            break
        begun = time.perf_counter()
        write(*make_shard(generator, name, first, last, lambda at, n=done - first: progress(n + at)))
        del waiting[name]
        done += last - first
        seconds_left = (time.perf_counter() - begun) * len(waiting)
        in_workers |= executor == "local" and available_cores() > 1 and seconds_left > 2 * HELP_AFTER
    if not waiting:
        return
    errors: dict[str, LindmError] = {}
    names = list(waiting)
    size = BATCH * (workers or available_cores())
    with pool:
        for batch in (names[at : at + size] for at in range(0, len(names), size)):

            def receive(event: TaskEvent, batch: list[str] = batch) -> None:
                nonlocal done
                name = batch[event.index]
                if event.result is None:
                    return
                if event.result.error is not None:
                    errors[name] = event.result.error
                    return
                write(*event.result.value)
                first, last = waiting[name]
                done += last - first
                progress(done)

            pool.run(_make_in_worker, [(name, *waiting[name]) for name in batch], on_event=receive)
    for name, error in errors.items():
        raise type(error)(f"shard {name}: {error}; the same command makes what is missing")


def _worker_pool(generator: TaskGenerator, executor: Executor, workers: int | None) -> TaskPool:
    """Workers with the same source, config, precision and platform; none is started yet."""
    source = generator.source
    if not isinstance(source, Suite):
        source = jax.tree.map(np.asarray, source)
    double, device = jnp.result_type(float) == jnp.float64, jax.config.jax_default_device  # pyright: ignore
    platform = None if device is None else getattr(device, "platform", device)
    return TaskPool(executor, workers, partial(_start_worker, source, generator.config, double, platform))


_generator: TaskGenerator | None = None


def _start_worker(source: Suite | Problem, config: DatasetConfig, double: bool, platform: str | None) -> None:
    """Called in a worker before its first shard."""
    global _generator
    jax.config.update("jax_enable_x64", double)
    if platform is not None:
        jax.config.update("jax_default_device", jax.local_devices(backend=platform)[0])
    _generator = TaskGenerator(source, config)


def _make_in_worker(task: tuple[str, int, int]) -> tuple[dict, dict[str, bytes]]:
    assert _generator is not None
    try:
        return make_shard(_generator, *task)
    except ValueError as e:
        raise UsageError(str(e)) from e


def make_shard(
    generator: TaskGenerator, name: str, first: int, last: int, progress: Callable[[int], None] = lambda done: None
) -> tuple[dict, dict[str, bytes]]:
    """The record of a shard, and the contents of its files by name; nothing is written."""
    record: dict[str, Any] = {"point": {"shard": name}, "tasks": last - first}
    metadata: dict[str, str] = {}  # of the Parquet files
    if name == "problem":
        tables = {"problem": problem_columns(stacked(generator.source))}
    else:
        made = task_tables(generator, first, last, progress)
        record["certificates"] = [int((made.episodes["certificate"] == c).sum()) for c in range(len(CERTIFICATES))]
        record["sums"] = {value: float(made.tasks[value].sum()) for value in VALUES if value in made.tasks}
        tables = {f"tasks-{name}": made.tasks, f"episodes-{name}": made.episodes}
        metadata = {"discount": repr(generator.discount), "rewards": REWARD_CONVENTION}
    contents: dict[str, bytes] = {}
    record["reward_function"] = any("R" in table for table in tables.values())  # whether there are its columns
    record["files"] = {}
    for stem, table in tables.items():
        rows = table_rows(table)
        lines = "".join(strict_json(row, separators=(",", ":")) + "\n" for row in rows).encode()
        for ending, data in zip(ENDINGS, (lines, _parquet(table, metadata)), strict=True):
            contents[f"{stem}{ending}"] = data
            file = {"rows": len(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            record["files"][f"{stem}{ending}"] = file
    return record, contents


class TaskTables(NamedTuple):
    """The tables of a shard."""

    tasks: Table  # a row per task
    episodes: Table  # a row per episode: of each task its demonstrations, then its queries


def task_tables(
    generator: TaskGenerator, first: int, last: int, progress: Callable[[int], None] = lambda done: None
) -> TaskTables:
    """Tasks first, ..., last - 1, generated. Raises: ValueError where no task of the suite has its gap."""
    generated, n = generator.generate(first, last, progress), last - first
    tasks: Table = {"task": np.arange(first, last)}
    tasks |= {k: [v] * n if k == "kind" else np.full(n, v) for k, v in sizes_of(generator.example).items()}
    tasks["discount"] = np.full(n, generator.discount)
    tasks |= {name: generated.values[name] for name in VALUES if name in generated.values}
    tasks["method"] = [generator.method] * n
    tasks |= {} if generated.problems is None else problem_columns(generated.problems)
    return TaskTables(tasks, _episode_table(generator, first, generated))


def stacked(problem: Any) -> Any:
    """A problem as a stack of one, [1, ...], as numpy arrays."""
    return jax.tree.map(lambda x: np.asarray(x)[None], problem)


def table_rows(table: Table) -> list[dict[str, Any]]:
    """The rows of a table, of Python's own values."""
    columns = [x if isinstance(x, list) else x.tolist() for x in table.values()]
    return [dict(zip(table, values, strict=True)) for values in zip(*columns, strict=True)]


def _episode_table(generator: TaskGenerator, first: int, generated: Generated) -> Table:
    """A row per episode."""
    n, counts = len(generated.episodes.a), (generator.config.demos, generator.config.queries)
    table: Table = {
        "task": np.repeat(np.arange(first, first + n), generator.num_episodes),
        "episode": np.tile(np.concatenate([np.arange(k) for k in counts]), n),
        "role": [role for role, k in zip(ROLES, counts, strict=True) for _ in range(k)] * n,
    }
    for arrays, columns in ((generated.episodes, STEP_COLUMNS), (generated.labels, LABEL_COLUMNS)):
        for name, column in columns.items():
            if (x := getattr(arrays, column.field)) is not None:
                table[name] = x.reshape(-1, *x.shape[2:])
    if generated.labels.legal is not None:  # -inf is no number of JSON
        table["Q"] = np.where(table["legal"], table["Q"].astype(object), None)
    return table


def import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise UsageError(f"Parquet files need pyarrow: pip install -e '.[data]' ({e})") from e
    return pyarrow


def _parquet(table: Table, metadata: Mapping[str, str]) -> bytes:
    pa = import_pyarrow()

    def nested(x: Any) -> Any:
        if isinstance(x, list) or x.ndim == 1:
            return pa.array(x, pa.float64() if isinstance(x, np.ndarray) and x.dtype.kind == "O" else None)
        starts = pa.array(np.arange(0, len(x) * x.shape[1] + 1, x.shape[1], dtype=np.int32))
        return pa.ListArray.from_arrays(starts, nested(np.ascontiguousarray(x).reshape(-1, *x.shape[2:])))

    sink = pa.BufferOutputStream()
    arrow = pa.table({name: nested(x) for name, x in table.items()}, metadata=metadata)
    pa.parquet.write_table(arrow, sink, compression="zstd", version="2.6", row_group_size=len(arrow))
    return sink.getvalue().to_pybytes()
