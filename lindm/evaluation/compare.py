"""The comparison behind `lindm eval`: several policies on the same new tasks, one result per policy.

Tasks of a suite are different problems; tasks of a single problem differ in their demonstrations. Each problem is solved once for
all policies.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lindm.datasets import Dataset, DatasetConfig, Task, make_dataset
from lindm.datasets.columns import STEP_FIELDS
from lindm.evaluation.calibration import Calibration, calibrate
from lindm.evaluation.environments import PolicyTask, check_memory, double_precision, make_tasks
from lindm.evaluation.kept_losses import kept_losses
from lindm.evaluation.optimality_gap import MAX_HISTORIES, PolicyLoss, evaluate_policy, summarize
from lindm.evaluation.paired import Difference, paired_difference
from lindm.evaluation.policies.bayes_policies import Bayes
from lindm.evaluation.policies.registry import default_policies, kind_of, make_policy
from lindm.evaluation.yardstick import ContextLimit, Losses, LossSplit, context_limit, split_loss
from lindm.families.registry import NamedProblem
from lindm.families.suites import Suite
from lindm.io.temporaries import scratch_directory
from lindm.text import Step
from lindm.types import Problem

SEED = 1_000_000  # of the tasks; far from the seeds of training data, so that the tasks are new
TASKS = DatasetConfig(tasks=50, seed=SEED)


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """The result of one policy on all tasks; None for values that cannot be computed or are undefined.

    Numbers are means over tasks. Intervals: 95 %, Student t over `interval_over`; None where nothing varies. Where V* has bounds,
    an interval covers every V* between them, and the number before it is the middle of its range.
    """

    suite: str  # name of the suite, or the kind of a single problem: mdp, pomdp or apomdp
    horizon: int
    split: str | None  # of a suite: id or ood
    policy: str
    gap: float | None = None  # normalized optimality gap (V* - V^pi) / (V* - V^random)
    ci: list[float] | None = None
    suboptimality: float | None = None  # V* - V^pi, in units of reward
    suboptimality_ci: list[float] | None = None
    gap_of_value: float | None = None  # (V* - V^pi) / |V*|
    gap_of_value_ci: list[float] | None = None
    interval_over: str | None = None  # tasks, demonstrations, episodes, or demonstrations and episodes
    value: float | None = None  # V^pi
    optimal_lower: float | None = None  # certified bounds of V*; equal where it is exact
    optimal_upper: float | None = None
    uniform_value: float | None = None  # V^random
    n: int = 0  # tasks
    action_agreement: float | None = None  # share of optimal actions; None where Q* is not known
    method: str  # exact, rollout (mean over sampled episodes), bounds (V* has bounds), or why there is no value
    note: str | None = None  # what is undefined, and why
    difference: Difference | None = None  # to the first policy on the same tasks
    loss_split: LossSplit | None = None  # by the yardstick, where one was evaluated and the policy does not know more
    context_limit: ContextLimit | None = None  # of the yardstick: the most that any policy can earn that knows the context alone
    calibration: Calibration | None = None  # of the policy's probabilities against the optimal actions; None: Q* is not known
    gaps: list[float | None]  # normalized optimality gap of each task, or the middle of its range
    masked: float  # mean probability of actions that were not legal, before it was removed
    invalid: float | None  # of a language model: share of decisions whose likeliest token is not an action
    effective_samples: list[float] | None = None  # of a sampled posterior: the lowest and the median of the tasks
    posterior_error: float | None = None  # standard error of `gap` by that sample: its standard deviation over independent ones
    posterior_seeds: int | None = None  # number of those samples
    decisions_per_s: float


def evaluate(
    source: Suite | NamedProblem | Problem,
    policies: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    dataset: DatasetConfig = TASKS,
    data: Path | None = None,
    episodes: int = 8,
    effort: int | None = None,
    max_histories: int = MAX_HISTORIES,
    posterior_seeds: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_result: Callable[[PolicyResult], None] = lambda result: None,
) -> list[PolicyResult]:
    """A result for each policy on the tasks of a dataset.

    Args:
      source: a suite, whose tasks are different problems, or one problem.
      policies: name -> a policy of the protocol of `lindm.evaluation.policy`, or a function of demonstrations and history;
        or names of `lindm.evaluation.policies.registry` [default: the cheap ones]. A mapping is read one policy at a time.
      dataset: numbers of tasks and demonstrations, and the policy of the demonstrations.
      data: directory of the dataset, which is generated there if it is missing [default: a temporary one]. The losses of named
        policies are kept there for other evaluations (`lindm.evaluation.kept_losses`).
      episodes: number sampled for a task where a policy reaches more than `max_histories` histories at the last stage.
      effort: of the bounds of V* in a problem with more histories than fit in memory, as in `lindm.solvers.solve`.
      posterior_seeds: number of independent samples of a sampled posterior, by which the standard error of its gap is known.
      progress: called with (tasks made, tasks in all); on_result: called with every result, without the parts of the yardstick.

    Returns: the results in the order of the policies. The yardstick is the last one of bayes and bayes-demo among them.

    Raises:
      ValueError: a policy that does not apply to these tasks; an ambiguous problem with illegal actions whose histories do not
        fit in memory.
    """
    names = default_policies(source) if policies is None else tuple(policies)
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"policy must be given once; got {twice[0]!r} twice")
    if not isinstance(policies, Mapping):
        policies = {name: make_policy(name, source, dataset) for name in names}
    if not isinstance(source, Suite):
        check_memory(source.problem if isinstance(source, NamedProblem) else source)
    kept = scratch_directory() if data is None else nullcontext(data)
    with kept as parent:
        directory = parent / "data" if data is None else parent  # the scratch directory is locked, and its writer locks it too
        with double_precision():
            make_dataset(directory, source, dataset, progress=progress)
        tasks = read_tasks(Dataset(directory), effort)
    limits = {"episodes": episodes, "seed": dataset.seed, "max_histories": max_histories}

    def losses_of(name: str, policy: Any) -> tuple[list[PolicyLoss | None], float]:
        return kept_losses(data, name, policy, limits | {"effort": effort}, lambda: evaluate_policy(tasks, policy, **limits))

    about, results, first = describe(source), [], None
    readers: dict[str, Losses] = {}  # policies that know no more than the context
    yardstick: tuple[str, Suite] | None = None
    for name in policies:
        policy = policies[name]
        losses, seconds = losses_of(name, policy)
        first = first or (name, losses)
        difference = None if name == first[0] else paired_difference(losses, first[1], first[0])
        result = _result(about | {"difference": difference}, name, losses, max_histories, seconds)
        if isinstance(policy, Bayes) and result.effective_samples and posterior_seeds > 1:
            others = [losses_of(name, policy.with_seed(policy.seed + i))[0] for i in range(1, posterior_seeds)]
            error = _deviation_of_gaps([losses, *others])
            result = replace(result, posterior_error=error, posterior_seeds=posterior_seeds)
        results.append(result)
        on_result(result)
        if kind_of(source) not in getattr(policy, "knows_problem", ()):
            readers[name] = [loss and replace(loss, scored=None) for loss in losses]
        if isinstance(policy, Bayes) and not policy.thompson:
            yardstick = name, policy.suite
    return results if yardstick is None else _with_yardstick(results, readers, *yardstick, source, dataset, tasks)


def _deviation_of_gaps(losses: Sequence[Losses]) -> float | None:
    """The standard deviation of mean gaps over several samples of the posterior; None where no task has a gap."""
    gaps = [[gap for loss in some if loss and (gap := loss.normalized_gap) is not None] for some in losses]
    return float(np.std([np.mean(some) for some in gaps], ddof=1)) if all(gaps) else None


def _with_yardstick(
    results: Sequence[PolicyResult],
    readers: Mapping[str, Losses],
    name: str,
    suite: Suite,
    source: Suite | NamedProblem | Problem,
    dataset: DatasetConfig,
    tasks: Sequence[PolicyTask],
) -> list[PolicyResult]:
    """The results with the parts of the losses of all readers of the context, and the limit of the yardstick `name`."""
    limit, split = context_limit(suite, source, dataset, tasks), []
    for result in results:
        if result.policy == name:
            split.append(replace(result, context_limit=limit))
        elif result.policy in readers:
            split.append(replace(result, loss_split=split_loss(readers[result.policy], readers[name], name)))
        else:
            split.append(result)
    return split


def read_tasks(dataset: Dataset, effort: int | None = None) -> list[PolicyTask]:
    """The tasks of a dataset; their demonstrations contain all observed fields and the rewards. `effort`: as in `environment`."""
    dataset.load()
    with double_precision():
        problems = dataset.problems()
    return make_tasks(problems, [visible_demonstrations(task) for task in dataset], dataset.names, effort=effort)


def visible_demonstrations(task: Task) -> list[tuple[Step, ...]]:
    """The demonstrations of a task of a dataset as policies see them, with all observed fields and the rewards."""
    shown = STEP_FIELDS if task.kind == "mdp" else STEP_FIELDS - {"state"}
    return [episode.steps(shown) for episode in task.demonstrations]


def describe(source: Suite | NamedProblem | Problem) -> dict[str, Any]:
    """Suite (or the kind of a single problem), horizon and split."""
    if isinstance(source, Suite):
        return {"suite": source.name, "horizon": source.horizon, "split": source.split}
    problem = source.problem if isinstance(source, NamedProblem) else source
    return {"suite": kind_of(problem), "horizon": problem.horizon, "split": None}


def _result(
    about: Mapping[str, Any], name: str, losses: Sequence[PolicyLoss | None], max_histories: int, seconds: float
) -> PolicyResult:
    known = [loss for loss in losses if loss is not None]
    decisions = sum(loss.decisions for loss in known)
    summary: dict[str, Any] = {"method": f"none: every task has more than {max_histories} histories"}
    if about.get("suite") == "apomdp":
        rule = "nature answers the values of the policy at all histories, so there is no mean over sampled episodes"
        summary["note"] = f"{rule}: --max-histories takes more"
    if known:
        summary = summarize(known, "tasks" if about["split"] else "demonstrations")
        summary["ci"], summary["action_agreement"] = summary.pop("gap_ci"), summary.pop("agreement")
    counts = [loss.invalid for loss in known if loss.invalid is not None]
    effective = [loss.effective for loss in known if loss.effective is not None]
    scored = [loss.scored for loss in known if loss.scored is not None]
    return PolicyResult(
        **about,
        **summary,
        policy=name,
        calibration=calibrate(scored) if scored else None,
        gaps=[None if loss is None else loss.normalized_gap for loss in losses],
        masked=sum(loss.masked for loss in known) / len(known) if known else 0.0,
        invalid=sum(counts) / max(decisions, 1) if counts else None,
        effective_samples=[float(min(effective)), float(np.median(effective))] if effective else None,
        decisions_per_s=decisions / seconds,
    )
