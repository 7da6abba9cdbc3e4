"""Datasets of labeled episodes, and the comparison of policies."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lindm import datasets
from lindm.api.problems import as_source
from lindm.choices import ExportFormat, Rewards, from_options
from lindm.datasets import DatasetConfig, MakeResult
from lindm.evaluation.environments import double_precision
from lindm.families.registry import NamedProblem
from lindm.families.suites import Suite
from lindm.io.executor import Executor
from lindm.types import LinearMDP, Problem

if TYPE_CHECKING:
    from lindm.llm.sft.drawn_tasks import DrawnTasks

Progress = Callable[[int, int], None]  # called with (tasks done, tasks in all)


def make_dataset(
    problem: Suite | NamedProblem | Problem | LinearMDP,
    out: str | Path,
    *,
    tasks: int,
    demos: int,
    executor: Executor = "serial",
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
    **config: Any,
) -> MakeResult:
    """Write labeled episodes to a directory; finish or repair a dataset that it already contains.

    Args:
      problem: a suite, whose tasks are different problems, or one problem.
      tasks, demos: number of tasks, and of demonstrations per task.
      executor, workers: where shards are made: in this process (serial), in several processes on this machine (local) or on a
        Ray cluster (ray), and the number of workers.
      config: other fields of `DatasetConfig`, such as queries, behavior, epsilon and seed.

    Returns:
      The `.manifest`, and the numbers of shards that were made and kept.

    Raises:
      ValueError: an argument is out of range.
      UsageError: the directory holds another dataset.

    >>> made = ld.make_dataset(ld.suite("mdp", horizon=4), "more", tasks=3, demos=2, seed=1)
    >>> made.made, made.kept
    (1, 0)
    """
    with double_precision():
        source = problem if isinstance(problem, Suite) else as_source(problem)
        described = from_options(DatasetConfig, {"tasks": tasks, "demos": demos, **config})
        return datasets.make_dataset(Path(out), source, described, executor=executor, workers=workers, progress=progress)


def draw_tasks(
    problem: Suite | NamedProblem | Problem | LinearMDP, *, tasks: int, demos: int, name: str | None = None, **config: Any
) -> "DrawnTasks":
    """Draw the tasks that `make_dataset` would write, as data for `finetune`. They are drawn when they are read, and never
    written.

    Args:
      problem, tasks, demos, config: as in `make_dataset`.
      name: name of the tasks, in messages and in the config of a run. [default: their source and their number]

    Raises:
      ValueError: an argument is out of range.

    >>> drawn = ld.draw_tasks(ld.suite("mdp", horizon=4), tasks=3, demos=2, seed=1)
    >>> [len(task.demonstrations) for task in drawn]
    [2, 2, 2]
    """
    from lindm.llm.sft.drawn_tasks import DrawnTasks

    with double_precision():
        source = problem if isinstance(problem, Suite) else as_source(problem)
        described = from_options(DatasetConfig, {"tasks": tasks, "demos": demos, **config})
        name = name or f"{tasks} tasks of {source.name if isinstance(source, Suite) else 'one problem'}, seed {described.seed}"
        return DrawnTasks(source, described, name)


def export_dataset(
    directory: str | Path,
    out: str | Path,
    *,
    to: ExportFormat = "trl",
    template: str | None = None,
    names: bool = False,
    rewards: Rewards = "shown",
    progress: Progress = lambda done, total: None,
) -> list[Path]:
    """Write a dataset in the format of another tool.

    Args:
      to: trl (prompt/completion and messages, for SFTTrainer) or minari.
      template: compact, readable, the name of a family (implies names), or a JSON or TOML file. [default: compact; readable
        with `names`]
      names: use the problem's own names in the text.
      rewards: shown, hidden, or auto (shown if the state is observed).

    Returns:
      The files.

    Raises:
      ValueError: an option does not apply to the format or to the dataset.
      DataError: the dataset is not finished or damaged.

    >>> [path.name for path in ld.export_dataset("data", "trl")]
    ['prompt_completion.jsonl', 'messages.jsonl', 'README.md']
    """
    return datasets.export(Path(directory), to, Path(out), template=template, rewards=rewards, names=names, progress=progress)
