"""`lindm eval`: policies on the same held-out tasks."""

import json as json_module
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from lindm.choices import Behavior, Rewards, Split
from lindm.cli.arguments import Command, Positional, Repeated
from lindm.io.progress import progress_bar
from lindm.io.tables import format_row

SEED = 1_000_000  # far from what training data are made with, so that tasks are new


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate policies on the same held-out tasks: the normalized optimality gap, exact where that can be computed."""

    problem: Annotated[tuple[str, ...], Positional("PROBLEM")]
    """A suite (mdp, pomdp or apomdp), prostate, or a .pomdp file. Several files are the models of an ambiguous POMDP."""
    policy: Annotated[tuple[str, ...], Repeated("POLICY")]
    """oracle, random, behavior, bc, certainty-equivalence, lsvi, pevi, qmdp, layer, icl:MODELDIR or sft:RUNDIR; may be
    given several times."""
    tasks: int = 50
    """Number of tasks."""
    demos: int = 5
    """Number of demonstrations of each task."""
    horizon: int | None = None
    """Number of stages; required for a file. [default: the middle one of a suite's three]"""
    split: Split = "id"
    """Split of a suite: in distribution or out of distribution."""
    discount: float | None = None
    """Discount factor, in place of the file's."""
    alpha: float | None = None
    """Attitude to ambiguity: 1 is the worst case over the models, 0 the best."""
    behavior: Behavior = "oracle"
    """Behavior policy of the demonstrations; epsilon is the oracle with random actions."""
    epsilon: float = 0.2
    """Probability of a random action of the behavior policy epsilon."""
    episodes: int = 8
    """Number of sampled episodes of a task that has too many histories to evaluate them all."""
    template: str | None = None
    """Template of the texts of language models, as in `lindm sft`. [default: as the model was trained]"""
    rewards: Rewards | None = None
    """Rewards in the texts of language models. [default: as the model was trained]"""
    seed: int = SEED
    """Seed of the tasks; it must differ from the seed of the data that a model was trained on."""
    out: Path | None = None
    """Directory of the tasks and eval.json. [default: nothing is kept]"""
    json: bool = False
    """Print one JSON list."""


def run(options: Eval) -> int:
    from lindm.io import files, signals

    signals.stop_on_signals()
    from lindm import validate
    from lindm.cli.problems import problem_or_suite
    from lindm.datasets import DatasetConfig
    from lindm.evaluation import compare
    from lindm.evaluation.losses import double_precision
    from lindm.io import manifest

    validate.count(options.episodes, "episodes")
    with double_precision():
        source = problem_or_suite(options.problem, options.horizon, options.split, options.discount, options.alpha)
    recipe = DatasetConfig(
        tasks=options.tasks, demos=options.demos, behavior=options.behavior, epsilon=options.epsilon, seed=options.seed
    )

    about = compare.described(source)
    what = [" ".join(options.problem), f"horizon {about['horizon']}", *filter(None, [about["split"]])]
    head = [f"{', '.join(what)}; {recipe.tasks} tasks, {recipe.demos} demonstrations each", format_row(HEAD, WIDTHS)]

    def finished(row: dict) -> None:
        if not options.json:
            print("\n".join([*head, format_row(_cells(row), WIDTHS)]), flush=True)
            head.clear()

    kept = tempfile.TemporaryDirectory() if options.out is None else nullcontext(str(options.out))
    with kept as directory, progress_bar("tasks") as tell:
        how: dict[str, Any] = {"template": options.template, "rewards": options.rewards}
        how |= {"episodes": options.episodes, "tell": tell, "finished": finished}
        rows = compare.compare(Path(directory) / "data", source, recipe, options.policy, **how)
    if options.out is not None:
        files.write_json(options.out / "eval.json", {"rows": rows}, format="lindm-eval-1")
        manifest.write_manifest(options.out, options={k: str(v) for k, v in asdict(options).items()})
    if options.json:
        print(json_module.dumps([{key: value for key, value in row.items() if key != "gaps"} for row in rows]))
    elif options.out is not None:
        print(options.out / "eval.json", file=sys.stderr)
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


COMMAND = Command(
    name="eval",
    options=Eval,
    run=run,
    examples=(
        "lindm eval pomdp --policy oracle --policy qmdp --policy random",
        "lindm eval mdp --split ood --policy sft:runs/tiny --policy bc --out results/eval",
        "lindm eval tiger.pomdp --horizon 6 --policy qmdp",
    ),
    sections={"horizon": "Problem and demonstrations", "episodes": "Evaluation"},
)
