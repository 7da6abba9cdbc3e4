"""Means over tasks with 95 % intervals by a t-distribution."""

from collections.abc import Sequence

import numpy as np

VARIES = 1e-9  # standard errors below this fraction of the mean, or of one, are rounding


def mean_interval(values: Sequence[float], least: float = -np.inf) -> tuple[float, list[float] | None]:
    """The mean, and its interval; None for a single value, and where nothing varies.

    Args:
      least: no value can be below; so no end of the interval is, and it still covers the truth as often.
    """
    from scipy import stats

    mean, n = float(np.mean(values)), len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    if error <= VARIES * max(1.0, abs(mean)):
        return mean, None
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return mean, [max(mean - half, least), mean + half]
