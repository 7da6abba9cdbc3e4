r"""The probabilities of a policy against the oracle's optimal actions: log-loss, Brier score, calibration, temperature scaling.

At a history let p be the policy's probabilities, A* the optimal actions (ties are optimal together: `lindm.solvers.ties`), and
m = sum_{a in A*} p(a) the probability of an optimal action. Then

    log-loss           -ln m
    Brier score        min_y |p - y|^2 over distributions y on A*  =  sum_{a not in A*} p(a)^2 + (1 - m)^2 / |A*|
    confidence         max_a p(a), the probability of the likeliest action
    calibration error  sum_b w_b |share of likeliest actions that are optimal - mean confidence|, over bins b of the confidence

Of several likeliest actions the share that is optimal counts. With one optimal action these are the usual scores of a classifier
(Brier, 1950; the expected calibration error of Guo, Pleiss, Sun and Weinberger, ICML 2017). The histories of all stages have the
weights with which the policy reaches them, and each task has the same weight.

Temperature scaling (the same paper) makes p_T(a) proportional to p(a)^(1/T), with the T of the smallest log-loss. A temperature
is never scored on the tasks on which it was fitted: that of the even tasks is scored on the odd ones, and the reverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lindm.evaluation.intervals import mean_interval

NUM_BINS = 10  # of the confidence, of equal width
TEMPERATURES = (0.01, 100.0)  # the range of the fit


@dataclass(frozen=True, kw_only=True)
class ScoredHistories:
    """The histories of one task that a policy reaches; those with the same numbers are one row."""

    weight: np.ndarray  # [n] sums to 1
    log_p: np.ndarray  # [n, A] logarithms of the policy's probabilities
    optimal: np.ndarray  # [n, A] which actions are optimal


def merge(weight: np.ndarray, log_p: np.ndarray, optimal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same rows [n], [n, A], [n, A] with equal ones merged and their weights added."""
    if not len(weight):
        return weight, log_p, optimal
    rows = np.ascontiguousarray(np.concatenate([log_p, optimal], axis=1))
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.bincount(inverse, weight), log_p[first], optimal[first]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The histories whose confidence is in (low, high]."""

    low: float
    high: float
    weight: float  # share of all
    confidence: float  # mean
    optimal: float  # share whose likeliest action is optimal


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Means over tasks, with 95 % intervals by a t-distribution over tasks; None where nothing varies."""

    log_loss: float | None  # in nats; None: infinite, since every optimal action has the probability 0 somewhere
    log_loss_ci: list[float] | None
    brier: float
    brier_ci: list[float] | None
    calibration_error: float
    bins: list[Bin] = field(default_factory=list)  # without empty ones


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The probabilities of a policy: their scores, and those after temperature scaling."""

    scores: Scores
    temperature: float | None = None  # fitted on all tasks, for new ones; None where scaling changes nothing
    scaled: Scores | None = None  # each task at the temperature of tasks that it is not among; None for a single task

    @property
    def deterministic(self) -> bool:
        """Whether every probability is 0 or 1."""
        return all(one.confidence == 1 for one in self.scores.bins)


def calibrate(tasks: Sequence[ScoredHistories]) -> Calibration:
    """The scores of a policy on tasks, before and after temperature scaling."""
    halves = [fit_temperature(tasks[i::2]) for i in (0, 1)]
    scaled, others = None, [temperature for temperature in reversed(halves) if temperature is not None]
    if len(others) == 2:
        scaled = score([scale(task, others[i % 2]) for i, task in enumerate(tasks)])
    return Calibration(scores=score(tasks), temperature=fit_temperature(tasks), scaled=scaled)


def score(tasks: Sequence[ScoredHistories]) -> Scores:
    """The scores of probabilities as they are."""
    log_mass = [_log_sum(np.where(task.optimal, task.log_p, -np.inf)) for task in tasks]
    losses = [float(task.weight @ -x) for task, x in zip(tasks, log_mass, strict=True)]
    briers = []
    for task in tasks:
        p = np.exp(task.log_p)
        mass = np.where(task.optimal, p, 0).sum(-1)
        briers.append(float(task.weight @ (np.where(task.optimal, 0, p**2).sum(-1) + (1 - mass) ** 2 / task.optimal.sum(-1))))
    log_loss, log_loss_ci = mean_interval(losses, 0.0) if np.isfinite(losses).all() else (None, None)
    brier, brier_ci = mean_interval(briers, 0.0)
    bins = _bins(tasks)
    error = sum(one.weight * abs(one.optimal - one.confidence) for one in bins)
    return Scores(
        log_loss=log_loss, log_loss_ci=log_loss_ci, brier=brier, brier_ci=brier_ci, calibration_error=float(error), bins=bins
    )


def _bins(tasks: Sequence[ScoredHistories]) -> list[Bin]:
    weight = np.concatenate([task.weight for task in tasks]) / len(tasks)
    log_p, optimal = (np.concatenate([getattr(task, name) for task in tasks]) for name in ("log_p", "optimal"))
    confidence, likeliest = np.exp(log_p.max(-1)), log_p == log_p.max(-1, keepdims=True)
    right = (likeliest & optimal).sum(-1) / likeliest.sum(-1)
    number = np.clip(np.ceil(confidence * NUM_BINS) - 1, 0, NUM_BINS - 1).astype(int)
    total, sure, agreed = (np.bincount(number, weight * x, NUM_BINS) for x in (1.0, confidence, right))
    return [
        Bin(
            low=b / NUM_BINS,
            high=(b + 1) / NUM_BINS,
            weight=float(total[b]),
            confidence=float(sure[b] / total[b]),
            optimal=float(agreed[b] / total[b]),
        )
        for b in np.flatnonzero(total > 0).tolist()
    ]


def scale(task: ScoredHistories, temperature: float) -> ScoredHistories:
    """The same histories with probabilities proportional to p^(1/temperature)."""
    log_p = task.log_p / temperature
    return ScoredHistories(weight=task.weight, log_p=log_p - _log_sum(log_p)[:, None], optimal=task.optimal)


def fit_temperature(tasks: Sequence[ScoredHistories]) -> float | None:
    """The temperature of the smallest log-loss, within `TEMPERATURES`.

    Returns: None where there is no task, where the log-loss is infinite at every temperature, or where no temperature changes
      a probability.
    """
    from scipy.optimize import minimize_scalar

    if not tasks:
        return None
    weight = np.concatenate([task.weight for task in tasks]) / len(tasks)
    log_p, optimal = (np.concatenate([getattr(task, name) for task in tasks]) for name in ("log_p", "optimal"))
    possible = np.isfinite(log_p)
    even = np.where(possible, log_p, log_p.max(-1, keepdims=True)).min(-1) == log_p.max(-1)
    if even.all() or not (possible & optimal).any(-1).all():
        return None

    def loss(log_temperature: float) -> float:
        x = log_p / np.exp(log_temperature)
        return float(weight @ (_log_sum(x) - _log_sum(np.where(optimal, x, -np.inf))))

    low, high = np.log(TEMPERATURES)
    grid = np.linspace(low, high, 41)  # of several optimal actions the loss may have several minima
    best = int(np.argmin([loss(x) for x in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    minimum: Any = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-8})
    return float(np.exp(minimum.x))


def _log_sum(x: np.ndarray) -> np.ndarray:
    """ln sum_a exp x(a) [n] of x [n, A]; -inf where every x is."""
    largest = x.max(-1)
    shift = np.where(np.isfinite(largest), largest, 0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - shift[:, None]).sum(-1)) + shift
