"""The difference of two policies on the same tasks.

Tasks differ more than policies do, and both policies meet the same tasks and, where episodes are sampled, the same random
numbers. So the interval of the mean of the differences is narrower than the two intervals suggest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lindm.evaluation.intervals import mean_interval
from lindm.evaluation.optimality_gap import PolicyLoss


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A policy less a baseline, mean over tasks. Intervals: 95 %, Student t over tasks; None where nothing varies."""

    baseline: str  # the other policy
    value: float  # V^pi less that of the baseline, in units of reward: above 0 where the policy is better
    value_ci: list[float] | None
    gap: float | None  # normalized optimality gap less that of the baseline: below 0 where the policy is better
    gap_ci: list[float] | None
    n: int  # tasks on which both have a value


def paired_difference(
    losses: Sequence[PolicyLoss | None], others: Sequence[PolicyLoss | None], baseline: str
) -> Difference | None:
    """The difference to a baseline; None where no task has a value of both.

    Bounds of V* cancel out of the difference of values. That of the gaps is the middle of its range over them, and its interval
    covers every V* between them.
    """
    pairs = [(one, other) for one, other in zip(losses, others, strict=True) if one is not None and other is not None]
    if not pairs:
        return None
    value, value_ci = mean_interval([other.suboptimality - one.suboptimality for one, other in pairs])
    ends = []
    for end in (0, 1):
        gaps = [(one.suboptimality - other.suboptimality) / spread[end] for one, other in pairs if (spread := one.spread)]
        ends.append(mean_interval(gaps) if gaps else (None, None))
    (low, low_ci), (high, high_ci) = ends
    gap = gap_ci = None
    if low is not None and high is not None:
        gap, around = (low + high) / 2, (low_ci or [low, low], high_ci or [high, high])
        if low_ci is not None or high_ci is not None or low != high:
            gap_ci = [min(ci[0] for ci in around), max(ci[1] for ci in around)]
    return Difference(baseline=baseline, value=value, value_ci=value_ci, gap=gap, gap_ci=gap_ci, n=len(pairs))
