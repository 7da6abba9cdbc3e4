"""Policies on the same held-out tasks: what each loses, exactly where it can be (`lindm eval`).

A row of the result is one policy:

    gap            (V* - V^pi) / (V* - V^random), mean over tasks; ci: 95 % by a t-distribution over tasks
    gap_of_value   (V* - V^pi) / |V*|, and its ci
    action_agreement, n, invalid (of a language model: how often its unconstrained answer is no action), decisions_per_s
    method         exact, or rollout: the mean over episodes of exact one-step losses; the same seeds for every policy

What is known as a table is evaluated by dynamic programming. Other policies are asked at the histories that they reach, all of
them where a task has at most `LISTED`. A language model's answer in an MDP depends on the whole episode, so it is a policy over
histories there too, and those are soon too many.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from lindm.choices import Rewards
from lindm.datasets import Dataset, DatasetConfig, make_dataset, text_format
from lindm.errors import DataError, UsageError
from lindm.evaluation import policies
from lindm.evaluation.losses import Played, Policy, double_precision, play_all, quality, tabled, world
from lindm.evaluation.policies import Answers, Tasks
from lindm.families.registry import NamedProblem
from lindm.families.suites import Suite
from lindm.problems.apomdp import as_apomdp
from lindm.solvers import tree
from lindm.solvers.solve import MEMORY_BUDGET
from lindm.types import MDP, Problem

LISTED = 2048  # histories of a stage of a task that a policy is asked at
AT_ONCE = 256  # that a language model is asked in one call, and 16 times as many for the others
MODELS = ("icl", "sft")


def _check(names: Sequence[str], seen: bool) -> None:
    """ValueError for a name that no policy of such tasks has; DataError where a model is not there."""
    for name in names:
        kind, colon, path = name.partition(":")
        if not colon:
            policies.known(name, seen)
            continue
        if kind not in MODELS or not path:
            raise ValueError(f"policy must be icl:MODELDIR or sft:RUNDIR where it has a colon; got {name!r}")
        if kind == "sft" and not (Path(path) / "config.json").is_file():
            raise DataError(f"policy {name}: {path} holds no run of `lindm sft`")
        if not (model := _model(kind, Path(path))).is_dir():
            raise DataError(f"policy {name}: {model} is not there" + (": the run is not finished" if kind == "sft" else ""))
    if double := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"policy must be given once; got {double[0]!r} twice")


def compare(
    data: Path,
    source: Suite | NamedProblem,
    recipe: DatasetConfig,
    names: Sequence[str],
    *,
    episodes: int = 8,
    listed: int = LISTED,
    template: str | None = None,
    rewards: str | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
    finished: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """A row for each policy on the tasks of a recipe; the dataset is made, or found, in `data`.

    Every task of a suite is another problem; of one problem, the tasks differ by their demonstrations.

    Args:
      episodes: of a task, sampled where a policy is asked and a task has more than `listed` histories at its last stage.
      template, rewards: of the texts that language models read, as of `lindm sft` [default: as the model was trained, or as
        `lindm sft` would].
      tell: hears (tasks made, tasks in all); finished: hears every row.

    Raises:
      ValueError: a policy that these tasks do not have; a horizon whose histories do not fit in memory.
      LindmError: bad models or data (3), or a run that was trained on these very tasks (2).
    """
    law = source.problem if isinstance(source, NamedProblem) else source
    _check(names, law.O == 0 if isinstance(law, Suite) else isinstance(law, MDP))
    for name in names:
        if name.startswith("sft:"):
            _held_out(Path(name[4:]), source, recipe)
    if not isinstance(law, Suite):
        _fits(law)
    if rewards is not None and rewards not in get_args(Rewards):
        raise ValueError(f"rewards must be one of {', '.join(get_args(Rewards))}; got {rewards!r}")
    told = {key: value for key, value in (("template", template), ("rewards", rewards)) if value is not None}
    if told and not any(":" in name for name in names):
        raise ValueError(f"{next(iter(told))} must be left out without a language model; got {next(iter(told.values()))!r}")
    with double_precision():
        make_dataset(data, source, recipe, progress=tell)
        dataset = Dataset(data)
        dataset.load()
        problems = dataset.problems()
    demos = [[episode.steps() for episode in task.demonstrations] for task in dataset]
    tasks = Tasks(problems=problems, demonstrations=demos, source=law, recipe=recipe)
    worlds = {False: policies.once_each(problems, world)}
    found, limits = [], {"episodes": episodes, "listed": listed}
    for name in names:
        kind, _, path = name.partition(":")
        begun, asked = time.perf_counter(), [0]
        if path:
            reader, answers, shown = _language_model(kind, Path(path), dataset, told)
            if shown not in worlds:
                worlds[shown] = policies.once_each(problems, lambda problem, shown=shown: world(problem, shown))
            played = _asked(worlds[shown], answers, asked, recipe.seed, AT_ONCE, **limits)
        else:
            reader, policy = None, policies.policy(name, tasks)
            if isinstance(policy, Answers):
                played = _asked(worlds[False], policy, asked, recipe.seed, 16 * AT_ONCE, **limits)
            else:
                played = [tabled(one, table) for one, table in zip(worlds[False], policy, strict=True)]
                asked[0] = sum(_rows(table) for table in policy)
        seconds = time.perf_counter() - begun
        row = described(source) | _row(name, played, listed)
        row["invalid"] = None if reader is None else reader.invalid / max(reader.answered, 1)
        row["decisions_per_s"] = asked[0] / seconds
        found.append(row)
        finished(row)
    return found


def _rows(table: Any) -> int:
    """Decisions that a table holds."""
    return sum(len(stage) for stage in table)


def described(source: Suite | NamedProblem) -> dict[str, Any]:
    """What a row says of its tasks; the suite of a problem of its own is its kind."""
    if isinstance(source, Suite):
        return {"suite": source.name, "horizon": source.horizon, "split": source.split}
    kind, one = type(source.problem).__name__.lower(), source.problem
    return {"suite": kind, "horizon": one.horizon, "split": None}


def _fits(problem: Problem) -> None:
    """ValueError where the table over all histories does not fit."""
    if isinstance(problem, MDP):
        return
    with double_precision():
        needed = tree.memory_bytes(as_apomdp(problem))
    if needed > MEMORY_BUDGET:
        room = f"{MEMORY_BUDGET / 2**30:.0f} GiB; they need {needed / 2**30:,.1f} GiB"
        raise ValueError(f"horizon must be short enough that all histories fit in {room}")


def _row(name: str, played: Sequence[Played | None], listed: int) -> dict[str, Any]:
    known = [one for one in played if one is not None]
    row: dict[str, Any] = {"policy": name}
    if not known:
        return row | {"gap": None, "ci": None, "n": 0, "method": f"none: every task has more than {listed} histories"}
    found = quality(known)
    row |= {"gap": found["gap"], "ci": found["gap_ci"], "gap_of_value": found["gap_of_value"]}
    row |= {"gap_of_value_ci": found["gap_of_value_ci"], "n": found["n"], "action_agreement": found["agreement"]}
    return row | {"method": found["method"], "gaps": [None if one is None else one.relative for one in played]}


def _asked(
    worlds: Sequence[Any], answers: Answers, asked: list[int], seed: int, at_once: int, *, episodes: int, listed: int
) -> list[Played | None]:
    """Played by asking, with the questions counted."""

    def counting(given: Sequence[Any]) -> Policy:
        answer = answers.policy(given)

        def counted(stage: int, level: list[list[Any]]) -> Sequence[Sequence[int]]:
            asked[0] += sum(map(len, level))
            return answer(stage, level)

        return counted

    return play_all(worlds, answers.given, counting, episodes=episodes, seed=seed, listed=listed, at_once=at_once)


# --- language models -------------------------------------------------------------------------------------------------------


def _model(kind: str, path: Path) -> Path:
    return path / "model" if kind == "sft" else path


def _language_model(kind: str, path: Path, dataset: Dataset, told: Mapping[str, Any]) -> tuple[Any, Answers, bool]:
    """The reader of a model, its policy, and whether it is told rewards; `told` goes before what it was trained with."""
    import jax
    import jax.numpy as jnp

    from lindm.llm.io import weights
    from lindm.llm.parallel.sharding import make_mesh
    from lindm.llm.policy import Reader
    from lindm.llm.tokens import load_tokenizer

    options = json.loads((path / "config.json").read_text())["options"] if kind == "sft" else {}
    options |= told
    text = text_format(dataset, options.get("template"), options.get("rewards", "auto"), options.get("names", False))
    directory, device = _model(kind, path), jax.devices()[:1]
    dtype = jnp.float32 if device[0].platform == "cpu" else jnp.bfloat16
    model = weights.load(directory, mesh=make_mesh({"fsdp": 1}, device))
    reader = Reader(model, load_tokenizer(directory), text.template, dataset.num_actions, dtype)
    demonstrations = [text.demonstrations(task) for task in dataset]
    if (needed := reader.longest(demonstrations)) > (room := model.config.max_position_embeddings):
        raise DataError(
            f"policy {kind}:{path}: texts must have at most the {room} tokens of the model; the longest has about {needed}"
        )
    return reader, Answers(demonstrations, lambda some: reader.policy(some, dataset.horizon)), text.shows_rewards


def _held_out(run: Path, source: Suite | NamedProblem, recipe: DatasetConfig) -> None:
    """UsageError where the run was trained on tasks of the same law and seed, which are the same tasks."""
    config = json.loads((run / "config.json").read_text())["options"]
    trained = Path(config["data"])
    if not (trained / "manifest.json").is_file():
        return  # a file, or no longer there: nothing to compare with
    dataset = Dataset(trained)
    same = isinstance(source, Suite) and dataset.suite == json.loads(json.dumps(asdict(source)))
    if same and dataset.config.seed == recipe.seed:
        raise UsageError(f"seed must not be {recipe.seed}: {run} was trained on these tasks ({trained})")
