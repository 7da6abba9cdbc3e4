"""Tasks that are drawn and labeled while a run reads them: `lindm sft --draw`, in place of a directory of `lindm data make`.

They are the tasks that `lindm data make` would write with the same words, to the last bit, so batches and weights are the same,
too. Shards are drawn one after the other. The tokens of their documents are kept in memory (about a kilobyte each), the tasks are
not, and nothing is written to disk. Training starts when all are drawn, since an epoch is a permutation of all documents, and the
rows of batches follow from all their lengths. A run that resumes draws them again. Every process draws all tasks, so the batches
do not depend on the number of processes. That is cheap: 65,536 tasks of the suite `mdp` with four stages and five demonstrations
take 34 CPU-seconds and 80 MB, and an epoch of them with the tiny preset takes about 840 CPU-seconds.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from lindm import __version__
from lindm.datasets.columns import Episode, Task, problem_columns, task_of
from lindm.datasets.config import DatasetConfig
from lindm.datasets.generate import TaskGenerator
from lindm.datasets.reader import Dataset
from lindm.datasets.shards import stacked, table_rows, task_tables
from lindm.datasets.writer import describe
from lindm.evaluation.environments import double_precision
from lindm.families.registry import NamedProblem
from lindm.families.suites import Suite
from lindm.io import files
from lindm.types import Problem

LIBRARIES = ("jax", "jaxlib", "numpy")  # on which the bits of a task depend


class DrawnTasks(Dataset):
    """A dataset that is on no disk: its tasks are drawn whenever it is read.

    Args:
      name: in messages and in the options of a run, such as the words of the command line. What the tasks are, config.json of a
        run has beside it (`.description`).

    Raises:
      ValueError: names that do not fit the problem; a method that does not fit.
    """

    def __init__(self, source: Suite | NamedProblem | Problem, config: DatasetConfig, name: str):
        self.name = name
        with double_precision():
            self.generator = TaskGenerator(source.problem if isinstance(source, NamedProblem) else source, config)
            described = describe(self.generator, source.names if isinstance(source, Suite | NamedProblem) else {})
        versions = {"lindm": __version__} | {library: importlib.metadata.version(library) for library in LIBRARIES}
        checksum = hashlib.sha256(files.canonical_json([described, versions]).encode()).hexdigest()
        self._set_description(Path(name), described, checksum)

    def _read(self) -> Iterator[Task]:
        """Every task. ValueError where no task of a suite has its gap."""
        generator, common = self.generator, {}
        if not isinstance(generator.source, Suite):
            (common,) = table_rows(problem_columns(stacked(generator.source)))
        size, each = generator.shard_size, generator.num_episodes
        for first in range(0, len(self), size):
            with double_precision():
                tables = task_tables(generator, first, min(first + size, len(self)))
            tasks, episodes = table_rows(tables.tasks), [Episode(**row) for row in table_rows(tables.episodes)]
            for i, row in enumerate(tasks):
                yield task_of(row | common, episodes[i * each : (i + 1) * each])
