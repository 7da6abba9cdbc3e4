"""Datasets read from disk, verified against the manifest. Needs no pyarrow.

The manifest carries a checksum of itself, and the SHA-256 of every other file.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lindm.datasets.columns import Episode, Kind, Task, task_of
from lindm.datasets.config import DatasetConfig
from lindm.errors import DataError
from lindm.io import files, inputs, limits
from lindm.io.verification import MANIFEST
from lindm.types import Problem

FORMAT = "lindm-dataset-3"
CONFIG = "config.json"
ENDINGS = (".jsonl", ".parquet")


class Dataset:
    """A finished dataset. Its manifest is read once; tasks are read and verified when they are reached.

        for task in Dataset(directory):       # one shard in memory at a time
            task.problem(), task.demonstrations, task.queries
        tasks = dataset.load()                # all tasks in memory, read once

    Raises:
      DataError: the dataset is not finished; a file is missing or is not what was written. The message names the file.
    """

    def __init__(self, directory: Path):
        self.manifest = read_manifest(directory)
        self._set_description(directory, self.manifest["config"], self.manifest["checksum"])

    def _set_description(self, directory: Path, config: dict[str, Any], checksum: str) -> None:
        """Sets the attributes. config: of the manifest."""
        self.directory, self.description, self.checksum = directory, config, checksum
        self._tasks: list[Task] | None = None
        self.config = DatasetConfig(**config["dataset"])
        self.suite: dict[str, Any] | None = config["source"].get("suite")  # None: all tasks are one fixed problem
        self.names: dict[str, list[str]] = config["names"]  # of states, actions, observations, models; empty where there are none
        self.discount: float = config["rewards"]["discount"]
        sizes = config["source"]["sizes"]
        self.kind: Kind = sizes["kind"]
        self.horizon: int = sizes["horizon"]
        self.num_states: int = sizes["num_states"]
        self.num_actions: int = sizes["num_actions"]
        self.num_observations: int = sizes.get("num_observations", 0)
        self.num_models: int = sizes.get("num_models", 0)
        self.illegal_actions: bool = config["source"].get("illegal_actions", False)  # whether some states do not allow some

    def __len__(self) -> int:
        """Number of tasks."""
        return self.config.tasks

    def __iter__(self) -> Iterator[Task]:
        """Every task, in order; floats are those that were written, to the last bit."""
        return self._read() if self._tasks is None else iter(self._tasks)

    def load(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Task]:
        """All tasks, kept in memory: the first call reads the files. `progress` is called with (tasks read, tasks in all)."""
        if self._tasks is None:
            tasks = []
            for task in self._read():
                tasks.append(task)
                progress(len(tasks), len(self))
            self._tasks = tasks
        return self._tasks

    def problems(self) -> list[Problem]:
        """The problem of every task, in the precision that JAX has now; one object where all tasks are one problem."""
        if self.suite is not None:
            return [task.problem() for task in self]
        return [next(iter(self)).problem()] * len(self)

    def _read(self) -> Iterator[Task]:
        common: dict = {}
        for record in self.manifest["shards"]:
            if (name := record["point"]["shard"]) == "problem":
                (common,) = self._rows("problem", record)
                continue
            episodes = [Episode(**row) for row in self._rows(f"episodes-{name}", record)]
            each = len(episodes) // record["tasks"]
            for i, row in enumerate(self._rows(f"tasks-{name}", record)):
                yield task_of(row | common, episodes[i * each : (i + 1) * each])

    def _rows(self, stem: str, record: dict) -> Iterator[dict]:
        path = self.directory / (name := f"{stem}{ENDINGS[0]}")
        with inputs.open_file(path, limits.LINES_FILE) as lines:
            if files.sha256_of(lines) != record["files"][name]["sha256"]:
                raise DataError(
                    f"{path} is damaged: its SHA-256 is not that of {MANIFEST}; make the dataset again and it is repaired"
                )
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                yield inputs.parse_json_line(line, f"{path}:{number}")


class DescribedTasks(Dataset):
    """What a run of `lindm sft` knows of tasks that were drawn for it: all but the tasks, which are on no disk.

    Args:
      name: of the tasks, in messages.
      description: `config` of the manifest that a dataset of them would have.
    """

    def __init__(self, name: str, description: dict[str, Any]):
        self._set_description(Path(name), description, "")

    def _read(self) -> Iterator[Task]:
        raise DataError(
            f"{self.directory}: these tasks were drawn and not kept; `lindm data make` with these options writes them"
        )


def is_dataset(path: Path) -> bool:
    """Whether a path is a directory that could hold a dataset, finished or not."""
    return path.is_dir() and any((path / name).exists() for name in (CONFIG, MANIFEST))


def read_manifest(directory: Path) -> dict:
    """The manifest of a finished dataset; DataError where there is none."""
    path = directory / MANIFEST
    if not path.exists() and (directory / CONFIG).exists():
        read_description(directory / CONFIG)
        raise DataError(f"{directory} is not finished: make it again with the same options, and it resumes")
    if directory.is_dir() and not path.exists():
        raise DataError(f"{directory} is not a dataset of `lindm data make`: it has no {MANIFEST}")
    manifest = read_description(path)
    if files.verified(manifest) is None:
        raise DataError(f"{path} is damaged: its checksum is wrong; make the dataset again and it is repaired")
    return manifest


def read_config(path: Path) -> dict:
    """The config of a dataset, finished or not. DataError where it is missing or damaged, or of another version."""
    config = read_description(path)
    if files.verified(config) is None:
        raise DataError(f"{path} is damaged: its checksum is wrong; remove the directory and make the dataset again")
    return config


def read_description(path: Path) -> dict:
    """A config or manifest of a dataset. DataError where it is none, or one in the format of another version."""
    content = files.read_json(path)
    config = content.get("config")
    format = config.get("format") if isinstance(config, dict) else None
    if not isinstance(format, str) or not format.startswith("lindm-dataset-"):
        raise DataError(f"{path}: not the {path.stem} of a dataset in the format {FORMAT}")
    files.check_format(path, format, FORMAT)
    return content
