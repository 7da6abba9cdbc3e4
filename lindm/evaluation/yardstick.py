"""What a context tells of its task: a Bayes policy as the yardstick of others, and the most that any reader can earn.

A normalized optimality gap has two parts. The yardstick, which plans with the posterior over tasks, has a gap of its own,
which is what the context does not tell. The rest is lost by the reader of the context. Both are means over the same tasks.

Where the posterior has a closed form, the Bayes-adaptive value B of a context is the most that a policy can earn in the mean over
the tasks that may have shown it, if it knows the suite and the context alone. Planning with the posterior mean earns V in a task,
and M in the mean over the tasks that may have shown its context. V + B - M has the same mean over tasks as B, and V* less this
number varies less than V* - B. A normalized gap has another unit in every task, so the limit of the gap is one of means: the
least mean of V* - V^pi, divided by the mean of V* - V^random.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lindm.datasets import DatasetConfig
from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.intervals import mean_interval
from lindm.evaluation.optimality_gap import PolicyLoss, evaluate_policy
from lindm.evaluation.paired import paired_difference
from lindm.evaluation.policies.bayes_adaptive import LARGEST, bayes_adaptive_values, num_histories
from lindm.evaluation.policies.bayes_mdp import MeanPlanning, count_transitions, reward_values
from lindm.evaluation.policies.tables import mdp_of
from lindm.families.random_suites import RandomSuite
from lindm.families.suites import Suite

Losses = Sequence[PolicyLoss | None]


@dataclass(frozen=True, kw_only=True)
class LossSplit:
    """A policy's normalized optimality gap, as the sum of the yardstick's own gap and of what the policy lost beyond it."""

    yardstick: str  # the policy
    gap: float  # the sum
    not_in_context: float  # the yardstick's own gap
    lost_by_reader: float  # below 0 where the policy is better than the yardstick, which is an estimate
    lost_by_reader_ci: list[float] | None  # 95 %, Student t over tasks; None where nothing varies
    n: int  # tasks on which both have a gap


def split_loss(losses: Losses, yardstick_losses: Losses, yardstick: str) -> LossSplit | None:
    """The split of a policy's gap; None where no task has a gap of both policies."""
    difference = paired_difference(losses, yardstick_losses, yardstick)
    if difference is None or difference.gap is None:
        return None
    both = zip(losses, yardstick_losses, strict=True)
    own = [gap for one, other in both if one and other and one.spread and (gap := other.normalized_gap) is not None]
    known = float(np.mean(own))
    return LossSplit(
        yardstick=yardstick,
        gap=known + difference.gap,
        not_in_context=known,
        lost_by_reader=difference.gap,
        lost_by_reader_ci=difference.gap_ci,
        n=len(own),
    )


@dataclass(frozen=True, kw_only=True)
class ContextLimit:
    """The most that any reader of the context can earn, mean over tasks; None where it is not computed.

    Intervals: 95 %, Student t over tasks; None where nothing varies.
    """

    value: float | None = None  # upper limit of V^pi
    value_ci: list[float] | None = None
    suboptimality: float | None = None  # V* less the limit: the least that every reader loses, in units of reward
    suboptimality_ci: list[float] | None = None
    gap: float | None = None  # the same divided by the mean of V* - V^random
    note: str | None = None  # why there is no limit


def context_limit(suite: Suite, source: Any, dataset: DatasetConfig, tasks: Sequence[PolicyTask]) -> ContextLimit:
    """The Bayes-adaptive limit of the contexts of tasks, which were drawn from a source as a dataset.

    Args:
      suite: the prior of the yardstick; there is a limit where it is the source.
    """
    if (why := _no_limit(suite, source, dataset, len(tasks))) is not None:
        return ContextLimit(note=why)
    assert isinstance(suite, RandomSuite)
    values = reward_values(suite)
    planned = [loss for loss in evaluate_policy(tasks, MeanPlanning(suite), seed=dataset.seed) if loss is not None]
    optimal, lost = np.array([loss.optimal_value for loss in planned]), np.array([loss.suboptimality for loss in planned])
    for i, (parameters, rewards) in enumerate(zip(*count_transitions(suite, tasks), strict=True)):
        rho = np.asarray(mdp_of(tasks[i]).problem.rho)
        most, mean = bayes_adaptive_values(parameters, rewards, values, rho, suite.horizon)
        lost[i] -= most - mean
    spread = float(np.mean([loss.optimal_value - (loss.uniform_value or 0.0) for loss in planned]))
    (value, value_ci), (least, least_ci) = mean_interval((optimal - lost).tolist()), mean_interval(lost.tolist())
    gap = least / spread if spread > 0 else None
    return ContextLimit(value=value, value_ci=value_ci, suboptimality=least, suboptimality_ci=least_ci, gap=gap)


def _no_limit(suite: Suite, source: Any, dataset: DatasetConfig, num_tasks: int) -> str | None:
    """Why the limit is not computed; None where it is."""
    if not isinstance(suite, RandomSuite) or suite.observations:
        return "it has a closed form for random MDPs alone"
    if suite != source:
        return "the tasks are not drawn from the suite of the policy, and are none that its prior expects"
    if dataset.exploration[0] < 1:
        return "the demonstrators' actions tell of the task, too; with --behavior uniform they do not"
    if suite.gap > 0:
        return f"the suite draws tasks with an action gap of at least {suite.gap:g} alone; with --gap 0 it draws all"
    if suite.step == 0:
        return "rewards are on no grid"
    count = num_histories(suite.states, suite.actions, len(reward_values(suite)), suite.horizon)
    for number, most, of in ((count, LARGEST, "a task"), (num_tasks * count, MOST_HISTORIES, "all tasks")):
        if number > most:
            return f"{of} may have {number:,} histories, and it enumerates {most:,} at most; fewer states or stages have less"
    return None


MOST_HISTORIES = 16 * LARGEST  # of all tasks: about a minute
