"""`lindm eval`: policies on the same held-out tasks."""

import json as json_module
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lindm.io.progress import progress_bar
from lindm.io.tables import format_row

SEED = 1_000_000  # far from what training data are made with, so that tasks are new


@dataclass(frozen=True, kw_only=True)
class Eval:
    """What policies lose on held-out tasks of a suite, or on a problem of your own, exactly where that can be."""

    suite: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """mdp, pomdp or apomdp; or prostate, or a .pomdp file (several form a cloud)"""
    policy: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """oracle, random, behaviour, bc, certainty-equivalence, lsvi, pevi, qmdp, layer, icl:MODELDIR or sft:RUNDIR; once or more"""
    tasks: int = 50
    demos: int = 5
    """demonstrations of each task"""
    horizon: int | None = None
    """number of stages [default: the middle one of a suite's three; needed by a file]"""
    split: str = "id"
    """of a suite: id or ood"""
    discount: float | None = None
    """of a file, in place of its own"""
    alpha: float | None = None
    """of a cloud: 1 is the worst case, 0 the best"""
    behaviour: str = "oracle"
    """of the demonstrations: oracle, epsilon or uniform"""
    epsilon: float = 0.2
    """share of random actions of the behaviour epsilon"""
    episodes: int = 8
    """sampled of a task, where a policy's histories are too many"""
    template: str | None = None
    """of language models' texts, as of `lindm sft` [default: as the model was trained]"""
    rewards: str | None = None
    """in language models' texts, as of `lindm sft`: shown, hidden or auto [default: as the model was trained]"""
    seed: int = SEED
    """of the tasks; not that of data that a model was trained on"""
    out: Path | None = None
    """where the tasks and eval.json go [default: nothing is kept]"""
    json: bool = False
    """print one JSON list"""


def run_eval(command: Eval) -> int:
    from lindm.io import files, signals

    signals.stop_on_signals()
    from lindm import validate
    from lindm.cli.problems import source_of
    from lindm.datasets import Recipe
    from lindm.evaluation import compare
    from lindm.evaluation.losses import double_precision
    from lindm.io import manifest

    validate.count(command.episodes, "episodes")
    with double_precision():
        source = source_of(command.suite, command.horizon, command.split, command.discount, command.alpha)
    recipe = Recipe(**{name: getattr(command, name) for name in ("tasks", "demos", "behaviour", "epsilon", "seed")})

    about = compare.described(source)
    what = [" ".join(command.suite), f"horizon {about['horizon']}", *filter(None, [about["split"]])]
    head = [f"{', '.join(what)}; {recipe.tasks} tasks, {recipe.demos} demonstrations each", format_row(HEAD, WIDTHS)]

    def finished(row: dict) -> None:
        if not command.json:
            print("\n".join([*head, format_row(_cells(row), WIDTHS)]), flush=True)
            head.clear()

    kept = tempfile.TemporaryDirectory() if command.out is None else nullcontext(str(command.out))
    with kept as directory, progress_bar("tasks") as tell:
        how: dict[str, Any] = {"template": command.template, "rewards": command.rewards}
        how |= {"episodes": command.episodes, "tell": tell, "finished": finished}
        rows = compare.compare(Path(directory) / "data", source, recipe, command.policy, **how)
    if command.out is not None:
        files.write_json(command.out / "eval.json", rows)
        manifest.write_manifest(command.out, options={k: str(v) for k, v in asdict(command).items()})
    if command.json:
        print(json_module.dumps([{key: value for key, value in row.items() if key != "gaps"} for row in rows]))
    elif command.out is not None:
        print(command.out / "eval.json", file=sys.stderr)
    return 0


HEAD = ("policy", "gap", "95 %", "of V*", "agreement", "invalid", "n", "method", "decisions/s")
WIDTHS = (40, 8, 20, 8, 9, 7, 4, 8, 12)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["gap"] is None:
        return (row["policy"], "-", "-", "-", "-", "-", "0", row["method"], "-")
    low, high = row["ci"]
    return (
        row["policy"],
        f"{row['gap']:.2%}",
        f"[{low:.2%}, {high:.2%}]",
        f"{row['gap_of_value']:.2%}",
        f"{row['action_agreement']:.1%}",
        "-" if row["invalid"] is None else f"{row['invalid']:.1%}",
        str(row["n"]),
        row["method"],
        f"{row['decisions_per_s']:,.1f}",
    )
