"""`lindm eval`: policies on the same held-out tasks."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lindm.choices import Rewards
from lindm.cli.option_parser import Command, Repeated
from lindm.cli.problems import ProblemOptions, problem_or_suite
from lindm.evaluation.policies.registry import help_table
from lindm.io.files import strict_json
from lindm.io.progress import progress_bar
from lindm.io.tables import format_row

if TYPE_CHECKING:
    from lindm.evaluation.compare import PolicyResult


@dataclass(frozen=True, kw_only=True)
class Eval(ProblemOptions):
    """Evaluate policies on the same held-out tasks: the normalized optimality gap, exact where that can be computed."""

    policy: Annotated[tuple[str, ...], Repeated("POLICY")] = ()
    """A policy of the list below; may be given several times. [default: all that the problem has and that are cheap]"""
    tasks: int = 50
    """Number of tasks."""
    demos: int = 5
    """Number of demonstrations of each task."""
    episodes: int = 8
    """Number of sampled episodes of a task that has too many histories to evaluate them all."""
    effort: int | None = None
    """Effort of the bounds of V* where a POMDP is too large for an exact solution, as in `lindm solve`: more narrows them."""
    template: str | None = None
    """Template of the texts of language models, as in `lindm sft`. [default: as the model was trained]"""
    rewards: Rewards | None = None
    """Rewards in the texts of language models. [default: as the model was trained]"""
    seed: int = 1_000_000
    """Seed of the tasks; it must differ from the seed of the data that a model was trained on."""
    out: Path | None = None
    """Directory of the tasks and eval.json. [default: nothing is kept]"""
    json: bool = False
    """Print one JSON list."""


def run(options: Eval) -> int:
    from lindm import validate
    from lindm.api.evaluation import evaluate
    from lindm.evaluation.compare import PolicyResult, describe

    validate.count(options.episodes, "episodes")
    if options.effort is not None:
        validate.count(options.effort, "effort")
    problem = problem_or_suite(options)
    about = describe(problem)
    what = [" ".join(options.problem), f"horizon {about['horizon']}", *filter(None, [about["split"]])]
    head = [f"{', '.join(what)}; {options.tasks} tasks, {options.demos} demonstrations each"]

    def show(result: PolicyResult) -> None:
        if options.json:
            return
        if head:
            head.extend([*_values(result), format_row(HEAD, WIDTHS)])
        print("\n".join([*head, format_row(_cells(result), WIDTHS)]), flush=True)
        head.clear()

    with progress_bar("tasks") as progress:
        results = evaluate(
            problem,
            options.policy,
            tasks=options.tasks,
            demos=options.demos,
            behavior=options.behavior,
            epsilon=options.epsilon,
            seed=options.seed,
            episodes=options.episodes,
            effort=options.effort,
            template=options.template,
            rewards=options.rewards,
            out=options.out,
            progress=progress,
            on_result=show,
        )
    if options.json:
        rows = [asdict(result) for result in results.values()]
        print(strict_json([{key: value for key, value in row.items() if key != "gaps"} for row in rows]))
        return 0
    for line in _notes(list(results.values())):
        print(line)
    if options.out is not None:
        print(options.out / "eval.json", file=sys.stderr)
    return 0


HEAD = ("policy", "normalized gap", "95 %", "V* - V^pi", "of V*", "agreement", "invalid", "n", "method", "decisions/s")
WIDTHS = (40, 14, 18, 9, 8, 9, 7, 4, 8, 12)


def _values(result: "PolicyResult") -> list[str]:
    """A line with V* and V^random, which are the same for all policies."""
    if result.optimal_lower is None or result.optimal_upper is None:
        return []
    optimal = f"V* = {result.optimal_lower:.6g}"
    if result.optimal_upper > result.optimal_lower:
        optimal = f"V* between {result.optimal_lower:.6g} and {result.optimal_upper:.6g} (certified)"
    return [f"{optimal}, V^random = {result.uniform_value:.6g}" + (", means over tasks" if result.split else "")]


def _cells(result: "PolicyResult") -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        result.policy,
        number(result.gap, ".4f"),
        "-" if result.ci is None else "[{:.4f}, {:.4f}]".format(*result.ci),
        number(result.suboptimality, ".4g"),
        number(result.gap_of_value, ".2%"),
        number(result.action_agreement, ".1%"),
        number(result.invalid, ".1%"),
        str(result.n),
        result.method,
        number(result.decisions_per_s if result.n else None, ",.1f"),
    )


def _notes(results: "list[PolicyResult]") -> list[str]:
    """What the intervals are over, and what is undefined."""
    lines = [f"intervals: over {units}" for units in dict.fromkeys(result.interval_over for result in results) if units]
    if any(result.method == "bounds" for result in results):
        lines.append("gaps: the middle of their range over the bounds of V*; the intervals hold for every V* between them")
    return lines + list(dict.fromkeys(result.note for result in results if result.note))


COMMAND = Command(
    name="eval",
    options=Eval,
    run=run,
    examples=(
        "lindm eval pomdp --policy oracle --policy qmdp --policy random",
        "lindm eval mdp --split ood --policy sft:runs/tiny --policy bc --out results/eval",
        "lindm eval tiger.pomdp --horizon 6 --policy qmdp",
    ),
    sections={"split": "Options of a family", "horizon": "Problem and demonstrations"},
    table=("Policies", help_table()),
)
