"""`lindm solve` and `lindm data`: decision problems, their exact answers, and labelled episodes on disk."""

import contextlib
import json as json_module
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lindm.io.progress import progress_bar

if TYPE_CHECKING:
    from lindm.families.registry import Source
    from lindm.families.suites import Suite


@dataclass(frozen=True, kw_only=True)
class Solve:
    """The value of a decision problem, with bounds, and the best first action. Several files form a cloud of models."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """.pomdp files, or the name of a problem that ships with lindm: prostate"""
    horizon: int
    """number of stages"""
    discount: float | None = None
    """in place of the file's own"""
    alpha: float | None = None
    """attitude to the models of a cloud: 1 is the worst case, 0 the best"""
    method: str = "auto"
    """auto (exact if it fits in 2 GiB, certified otherwise), tree, hsvi or net"""
    effort: int | None = None
    """of a certified method: trials of hsvi [default: 256] or points of the net [default: 20000]"""
    json: bool = False
    """print one JSON object"""


@dataclass(frozen=True, kw_only=True)
class Make:
    """Labelled episodes on disk: Parquet and JSONL with a data card and a manifest. A killed run resumes."""

    source: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SUITE")]
    """mdp, pomdp or apomdp; or prostate, or .pomdp files (several form a cloud)"""
    tasks: int
    """number of task instances"""
    demos: int
    """demonstrations of each"""
    out: Path
    """where the data go"""
    queries: int = 1
    """query episodes of each task"""
    horizon: int | None = None
    """number of stages [default: the middle one of a suite's three; needed by a file]"""
    split: str = "id"
    """of a suite: id or ood"""
    seed: int = 0
    """the same seed gives the same bytes"""
    behaviour: str = "oracle"
    """of the demonstrations: oracle, epsilon or uniform"""
    query_behaviour: str = "epsilon"
    """of the queries: oracle, epsilon or uniform"""
    epsilon: float = 0.2
    """share of random actions of the behaviour epsilon"""
    discount: float | None = None
    """of a file, in place of its own"""
    alpha: float | None = None
    """of a cloud: 1 is the worst case, 0 the best"""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Data made by `lindm data make`, for other tools."""

    directory: tyro.conf.Positional[Path]
    """a directory written by `lindm data make`"""
    to: str
    """trl (prompt/completion and messages, as SFTTrainer takes them) or minari"""
    out: Path
    """where the export goes"""
    template: str | None = None
    """of the text (trl): compact, readable, or a JSON or TOML file [default: compact, readable with --names]"""
    names: bool = False
    """use the problem's own names in the text (trl)"""
    without_rewards: bool = False
    """leave the rewards out of the text (trl)"""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Offline data with the oracle's labels."""

    command: Annotated[Make, tyro.conf.subcommand("make")] | Annotated[Export, tyro.conf.subcommand("export")]


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What a reader of files warns of, one line each on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"lindm: warning: {warning.message}", file=sys.stderr)


def _double_precision() -> None:
    import jax

    jax.config.update("jax_enable_x64", True)


def run_solve(command: Solve) -> int:
    from lindm.families.registry import named
    from lindm.io.signals import stop_on_signals

    start = time.perf_counter()
    stop_on_signals()
    _double_precision()
    with _warnings_as_lines():
        source = named(command.files, command.horizon, command.discount, command.alpha)
    from lindm.solvers.solve import first_action, solve

    solution = solve(source.problem, command.method, effort=command.effort)
    action = source.actions[int(first_action(source.problem, solution))]
    value, lower, upper = (float(x) for x in (solution.value, solution.lower, solution.upper))
    seconds = time.perf_counter() - start
    if command.json:
        answer = {"value": value, "lower": lower, "upper": upper, "method": solution.method}
        print(json_module.dumps({**answer, "seconds": round(seconds, 3), "first_action": action}))
        return 0
    bounds = "exact" if solution.exact else f"certified to lie in [{lower:.10g}, {upper:.10g}]"
    print(f"value         {value:.10g}  ({bounds})")
    print(f"first action  {action}")
    print(f"method        {solution.method}, {seconds:.1f} s")
    return 0


def source_of(
    words: Sequence[str], horizon: int | None, split: str, discount: float | None, alpha: float | None
) -> "Suite | Source":
    """A suite by its name, or one problem: a name that ships, or .pomdp files. ValueError for what is neither."""
    from lindm.families import registry, suites

    if len(words) == 1 and words[0] in suites.NAMES and not Path(words[0]).is_file():
        if discount is not None or alpha is not None:
            raise ValueError("discount and alpha must be left out for a suite, which has its own")
        return suites.suite(words[0], horizon, split)
    known = (*suites.NAMES, *registry.SHIPPED)
    for word in words or ("nothing",):
        if not Path(word).suffix and not Path(word).is_file() and (word not in registry.SHIPPED or len(words) > 1):
            raise ValueError(f"SUITE must be one of {', '.join(known)}, or .pomdp files; got {word!r}")
    if split != "id":
        raise ValueError(f"split must be left out for a problem of your own, which has one law; got {split!r}")
    if horizon is None:
        raise ValueError("horizon must be given for a problem that is not a suite")
    with _warnings_as_lines():
        return registry.named(words, horizon, discount, alpha)


def run_make(command: Make) -> int:
    from lindm.io import signals

    signals.stop_on_signals()
    _double_precision()
    from lindm import datasets

    recipe = datasets.Recipe(
        tasks=command.tasks,
        demos=command.demos,
        queries=command.queries,
        behaviour=command.behaviour,
        epsilon=command.epsilon,
        query_behaviour=command.query_behaviour,
        query_epsilon=command.epsilon,
        seed=command.seed,
    )
    source = source_of(command.source, command.horizon, command.split, command.discount, command.alpha)
    with progress_bar("tasks") as progress:
        made = datasets.make(command.out, source, recipe, progress=progress)
    for name in made.damaged:
        print(f"lindm: warning: {name} was not as it had been written and was made again", file=sys.stderr)
    print(f"{command.tasks} tasks in {command.out}: {made.made} shards made, {made.kept} kept")
    return 0


def run_export(command: Export) -> int:
    from lindm import datasets, text
    from lindm.io import signals

    signals.stop_on_signals()
    shipped = {"compact": text.COMPACT, "readable": text.READABLE}
    name = command.template
    template = None if name is None else shipped.get(name) or text.load_template(name)
    with progress_bar("tasks") as progress:
        written = datasets.export(
            command.directory,
            command.to,
            command.out,
            template=template,
            rewards=not command.without_rewards,
            names=command.names,
            progress=progress,
        )
    for path in written:
        print(path)
    return 0
