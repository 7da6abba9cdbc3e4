"""`lindm data`: labeled episodes on disk, and their exports."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lindm.choices import Behavior, ExportFormat, Rewards
from lindm.cli.option_parser import Command, Positional, parse
from lindm.cli.problems import ProblemOptions, problem_or_suite
from lindm.errors import UsageError
from lindm.io.progress import progress_bar

if TYPE_CHECKING:
    from lindm.llm.sft.drawn_tasks import DrawnTasks

SUMMARY = "Make labeled episodes, or export them for other tools"


@dataclass(frozen=True, kw_only=True)
class Tasks(ProblemOptions):
    """Labeled tasks."""

    tasks: int
    """Number of tasks."""
    demos: int
    """Number of demonstrations of each task."""
    queries: int = 1
    """Number of query episodes of each task."""
    seed: int = 0
    """Seed of the tasks; the same seed gives the same bytes."""
    query_behavior: Behavior = "epsilon"
    """Policy that makes the queries; epsilon is the oracle with some random actions."""

    @property
    def config(self) -> dict[str, Any]:
        """The fields of `DatasetConfig`."""
        names = ("tasks", "demos", "queries", "behavior", "epsilon", "query_behavior", "seed")
        return {name: getattr(self, name) for name in names} | {"query_epsilon": self.epsilon}


@dataclass(frozen=True, kw_only=True)
class Make(Tasks):
    """Write labeled episodes: Parquet and JSONL with a data card and a manifest. A run that was killed resumes."""

    out: Path
    """Directory of the data."""
    executor: Literal["local", "ray"] = "local"
    """Where the workers run: on this machine, or in the Ray cluster at RAY_ADDRESS (a local cluster if it is not set)."""
    workers: int | None = None
    """Number of worker processes. [default: one per core; a small dataset is made in one process]"""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a dataset for other tools."""

    directory: Annotated[Path, Positional("DIR")]
    """A directory of `lindm data make`."""
    to: ExportFormat
    """trl writes prompts with completions, and messages, for SFTTrainer. minari writes an offline RL dataset."""
    out: Path
    """Directory of the export."""
    template: str | None = None
    """Text template (trl): compact, readable, the name of a family (implies --names), or a JSON or TOML file. [default:
    compact; readable with --names]"""
    names: bool = False
    """Use the problem's own names in the text (trl)."""
    rewards: Rewards = "shown"
    """Rewards in the text (trl): shown, hidden, or auto (shown if the state is observed)."""


def run_make(options: Make) -> int:
    from lindm.api.data import make_dataset

    problem = problem_or_suite(options)
    with progress_bar("tasks") as progress:
        made = make_dataset(
            problem,
            options.out,
            **options.config,
            executor=options.executor,
            workers=options.workers,
            progress=progress,
        )
    for name in made.damaged:
        print(f"lindm: warning: {name} was damaged and was made again", file=sys.stderr)
    print(f"{options.tasks} tasks in {options.out}: {made.made} shard{'s' * (made.made != 1)} made, {made.kept} kept")
    return 0


def words_of_tasks(text: str) -> "Callable[[], DrawnTasks]":
    """The tasks that words of `lindm data make` describe; the words are checked now, and the problem is made when it is called.

    Raises: UsageError for wrong words.
    """
    try:
        options: Tasks = parse(TASKS, shlex.split(text))
    except ValueError as e:
        raise UsageError(f"draw must be a problem and options of `lindm data make`: {e}; got {text!r}") from e

    def draw() -> "DrawnTasks":
        from lindm.api.data import draw_tasks

        return draw_tasks(problem_or_suite(options), name=text, **options.config)

    return draw


def run_export(options: Export) -> int:
    from lindm.api.data import export_dataset

    with progress_bar("tasks") as progress:
        written = export_dataset(
            options.directory,
            options.out,
            to=options.to,
            template=options.template,
            names=options.names,
            rewards=options.rewards,
            progress=progress,
        )
    for path in written:
        print(path)
    return 0


TASKS = Command(name="data make", options=Tasks, run=lambda options: 0)  # is parsed, never run
COMMANDS = {
    "make": Command(
        name="data make",
        options=Make,
        run=run_make,
        examples=(
            "lindm data make pomdp --tasks 1000 --demos 5 --out data/pomdp",
            "lindm data make tiger.pomdp --horizon 6 --tasks 200 --demos 5 --out data/tiger",
        ),
        sections={"split": "Options of a family", "horizon": "Problem and demonstrations"},
    ),
    "export": Command(
        name="data export",
        options=Export,
        run=run_export,
        examples=("lindm data export data/pomdp --to trl --out data/trl",),
    ),
}
