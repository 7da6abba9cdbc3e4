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
    from collections.abc import Sequence

    from lindm.evaluation.calibration import Scores
    from lindm.evaluation.compare import PolicyResult
    from lindm.families.registry import NamedProblem
    from lindm.families.suites import Suite


@dataclass(frozen=True, kw_only=True)
class Eval(ProblemOptions):
    """Evaluate policies on the same new tasks by their normalized optimality gap, which is exact where possible."""

    policy: Annotated[tuple[str, ...], Repeated("POLICY")] = ()
    """A policy from the list below; repeat the option for several. [default: all policies that apply to the problem and are
    cheap]"""
    tasks: int = 50
    """Number of tasks."""
    demos: int = 5
    """Number of demonstrations of each task."""
    episodes: int = 8
    """Number of sampled episodes for a task with too many histories for an exact evaluation."""
    max_histories: int = 2048
    """Maximum number of histories per stage for an exact evaluation. If a policy reaches more, episodes are sampled; in an
    ambiguous problem, the policy then has no value."""
    effort: int | None = None
    """Effort of the bounds of V*, as in `lindm solve`, for a POMDP that is too large for an exact solution; a larger effort
    narrows them."""
    posterior_seeds: int | None = None
    """Number of posterior samples of a Bayes policy, from which the standard error of its gap is computed; none with 1.
    [default: 3]"""
    template: str | None = None
    """Text template for language models, as in `lindm sft`. [default: that of the training]"""
    rewards: Rewards | None = None
    """Rewards in the texts for language models. [default: as in the training]"""
    seed: int = 1_000_000
    """Seed of the tasks. It must differ from the seed of the data that a model was trained on."""
    data: Path | None = None
    """Directory of the tasks; they are made there if they are missing. It also keeps the losses of policies that are not
    language models, so that another evaluation on these tasks does not compute them again. [default: data in --out]"""
    out: Path | None = None
    """Directory for the tasks, eval.json and the calibration figure. [default: nothing is kept]"""
    json: bool = False
    """Print one JSON list."""


def run(options: Eval) -> int:
    from lindm.api.evaluation import evaluate
    from lindm.evaluation.compare import PolicyResult, describe

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

    warn_of_training(options.policy, problem, options.template, options.rewards)
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
            max_histories=options.max_histories,
            posterior_seeds=options.posterior_seeds,
            template=options.template,
            rewards=options.rewards,
            data=options.data,
            out=options.out,
            progress=progress,
            on_result=show,
        )
    if options.json:
        rows = [asdict(result) for result in results.values()]
        print(strict_json([{key: value for key, value in row.items() if key != "gaps"} for row in rows]))
        return 0
    found = list(results.values())
    for line in [*_differences(found), *_splits(found), *_calibrations(found), *_notes(found)]:
        print(line)
    if options.out is not None:
        print(options.out / "eval.json", file=sys.stderr)
    return 0


def warn_of_training(
    policies: "Sequence[str]", problem: "Suite | NamedProblem", template: str | None, rewards: str | None
) -> None:
    """Print in what the problem and the texts differ from those of the training of a language model."""
    models = [name for name in policies if name.startswith("sft:")]
    if not models:
        return
    from lindm.llm.named_policies import text_notes, training_notes
    from lindm.llm.policy import training_data
    from lindm.llm.sft.options import run_options

    for name in models:
        trained = training_data(run := Path(name.removeprefix("sft:")), run_options(run) or {})
        for note in [*training_notes(name, trained, problem), *text_notes(name, template, rewards)]:
            print(f"lindm: warning: {note}", file=sys.stderr)


HEAD = ("policy", "normalized gap", "95 %", "V* - V^pi", "of V*", "agreement", "invalid", "n", "method", "decisions/s")
WIDTHS = (40, 14, 18, 9, 8, 9, 7, 4, 8, 12)


def _values(result: "PolicyResult") -> list[str]:
    """A line with V* and V^random, which are the same for all policies."""
    if result.optimal_lower is None or result.optimal_upper is None:
        return []
    optimal = f"V* = {result.optimal_lower:.6g}"
    if result.optimal_upper > result.optimal_lower:
        optimal = f"V* between {result.optimal_lower:.6g} and {result.optimal_upper:.6g} (certified)"
    uniform = "not known" if result.uniform_value is None else f"{result.uniform_value:.6g}"
    return [f"{optimal}, V^random = {uniform}" + (", means over tasks" if result.split else "")]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def interval(ends: list[float] | None, form: str = ".4f") -> str:
    return "-" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def _cells(result: "PolicyResult") -> tuple[str, ...]:
    return (
        result.policy,
        number(result.gap, ".4f"),
        interval(result.ci),
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
    if any(result.ci is not None and result.ci[0] == 0 for result in results):
        lines.append("an interval that begins at 0 was cut there: no gap is below 0")
    if any(result.method == "bounds" for result in results):
        lines.append("gaps: the middle of their range over the bounds of V*; the intervals hold for every V* between them")
    lines += [
        f"{result.policy}: {result.masked:.2%} of its probability was on actions that are not legal; it was removed"
        for result in results
        if result.masked > 0
    ]
    lines += [
        f"{result.policy}: effective sample size of its posterior {median:,.0f} in the median over tasks, {lowest:,.1f} at least"
        + _sampling_error(result)
        for result in results
        if result.effective_samples
        for lowest, median in [result.effective_samples]
    ]
    return lines + _yardstick_notes(results) + list(dict.fromkeys(result.note for result in results if result.note))


def _sampling_error(result: "PolicyResult") -> str:
    if result.posterior_error is None:
        return ""
    return f"; standard error of its gap by the sample {result.posterior_error:.4f}, from {result.posterior_seeds} samples"


def _differences(results: "list[PolicyResult]") -> list[str]:
    """The difference of each policy from the first one. To the oracle the difference is the gap itself, which stands above."""
    found = {result.policy: one for result in results if (one := result.difference) is not None and one.baseline != "oracle"}
    if not found:
        return []
    baseline = next(iter(found.values())).baseline
    rows = [(f"difference from {baseline}", "normalized gap", "95 %", "V^pi", "95 %")]
    for name, one in found.items():
        rows.append((name, number(one.gap, ".4f"), interval(one.gap_ci), f"{one.value:.4g}", interval(one.value_ci, ".4g")))
    return ["", *(format_row(row, (WIDTHS[0], 14, 18, 9, 18)) for row in rows)]


def _splits(results: "list[PolicyResult]") -> list[str]:
    """The parts of the losses: what the context does not tell, and what the policies lost beyond it."""
    found = {result.policy: one for result in results if (one := result.loss_split) is not None}
    if not found:
        return []
    yardstick = next(iter(found.values())).yardstick
    rows = [(f"parts of the gap, by {yardstick}", "normalized gap", "not in the context", "lost by the reader", "95 %")]
    for name, one in found.items():
        parts = (f"{one.gap:.4f}", f"{one.not_in_context:.4f}", f"{one.lost_by_reader:.4f}", interval(one.lost_by_reader_ci))
        rows.append((name, *parts))
    return ["", *(format_row(row, (WIDTHS[0], 14, 18, 18, 18)) for row in rows)]


def _yardstick_notes(results: "list[PolicyResult]") -> list[str]:
    """Which policies lost less than the yardstick, and the limit of all readers."""
    lines = []
    for result in results:
        if (one := result.loss_split) is not None and one.lost_by_reader < 0:
            ends = one.lost_by_reader_ci
            chance = " (the interval contains 0)" if ends is not None and ends[1] >= 0 else ""
            lines.append(f"{result.policy}: lost less than {one.yardstick}{chance}; a yardstick is an estimate, not a bound")
        if (limit := result.context_limit) is None:
            continue
        most = "most that a policy can earn that knows the suite and the context alone (the Bayes-adaptive value)"
        if limit.value is None:
            lines.append(f"{most}: not computed; {limit.note}")
            continue
        share = "" if limit.gap is None else f", {limit.gap:.4f} of the mean of V* - V^random"
        lines.append(f"{most}: {limit.value:.6g} {interval(limit.value_ci, '.4g')};")
        lines.append(
            f"the mean of V* - V^pi is at least {limit.suboptimality:.4g} {interval(limit.suboptimality_ci, '.4g')}{share}"
        )
    return lines


def _calibrations(results: "list[PolicyResult]") -> list[str]:
    """The probabilities of policies that are not deterministic, before and after temperature scaling."""
    found = {result.policy: one for result in results if (one := result.calibration) is not None and not one.deterministic}
    scores = ("log-loss", "95 %", "Brier", "calibration error")
    scaled = ("scaled log-loss", "95 %", "Brier", "calibration error")
    rows: list[tuple[str, ...]] = [("probabilities of optimal actions", *scores, "temperature", *scaled)]
    for name, one in found.items():
        before, after = (_scores(part) for part in (one.scores, one.scaled))
        rows.append((name, *before, number(one.temperature, ".3g"), *after))
    return ["", *(format_row(row, (WIDTHS[0], 9, 18, 7, 18, 11, 15, 18, 7, 18)) for row in rows)] if found else []


def _scores(scores: "Scores | None") -> tuple[str, ...]:
    if scores is None:
        return ("-",) * 4
    log_loss = "infinite" if scores.log_loss is None else f"{scores.log_loss:.4f}"
    return (log_loss, interval(scores.log_loss_ci), f"{scores.brier:.4f}", f"{scores.calibration_error:.4f}")


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
