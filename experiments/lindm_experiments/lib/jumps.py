"""Curves over the number of training sequences: a power law against a jump, and the number at which a level is reached."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar, nnls

MIN_SIDE = 3  # points on each side of a change point


class Fit(NamedTuple):
    """A least-squares fit of a curve."""

    values: np.ndarray  # [n] of the fit
    residual: float  # sum of squares
    parameters: int

    @property
    def bic(self) -> float:
        """The Bayesian information criterion of Gaussian errors with one unknown variance; lower is better."""
        n = len(self.values)
        return n * float(np.log(max(self.residual, 1e-300) / n)) + self.parameters * float(np.log(n))


def power_law(n: ArrayLike, y: ArrayLike) -> Fit:
    """c + a n^-b with a, b, c >= 0: for each b the best a and c, and the best b by a search over its logarithm."""
    n, y = np.asarray(n, float), np.asarray(y, float)
    scale = n / n[0]

    def fit(log_b: float) -> Fit:
        design = np.stack([scale ** -np.exp(log_b), np.ones_like(n)], 1)
        weights, _ = nnls(design, y)
        values = design @ weights
        return Fit(values, float(((y - values) ** 2).sum()), 3)

    grid = np.linspace(-6, 3, 181)
    best = grid[np.argmin([fit(g).residual for g in grid])]
    found = minimize_scalar(lambda g: fit(g).residual, bounds=(best - 0.05, best + 0.05), method="bounded")
    return min(fit(float(found.x)), fit(best), key=lambda f: f.residual)  # pyright: ignore


def change_point(n: ArrayLike, y: ArrayLike) -> tuple[Fit, int]:
    """A line over log n before some point and another one from it on, and the index of that point.

    Raises: ValueError with fewer than 2 `MIN_SIDE` points.
    """
    x, y = np.log(np.asarray(n, float)), np.asarray(y, float)
    if len(x) < 2 * MIN_SIDE:
        raise ValueError(f"n must contain at least {2 * MIN_SIDE} numbers; got {len(x)}")

    def line(part: slice) -> np.ndarray:
        return np.polyval(np.polyfit(x[part], y[part], 1), x[part])

    fits = []
    for k in range(MIN_SIDE, len(x) - MIN_SIDE + 1):
        values = np.concatenate([line(slice(k)), line(slice(k, None))])
        fits.append((Fit(values, float(((y - values) ** 2).sum()), 5), k))
    return min(fits, key=lambda f: f[0].residual)


def stretched_exponential(n: ArrayLike, y: ArrayLike) -> Fit:
    """c + a exp(-(n / k)^b) with a, c >= 0 and 0 < b <= 1, which is convex: the best of a grid over k and b."""
    n, y = np.asarray(n, float), np.asarray(y, float)
    fits = []
    for b in np.linspace(0.1, 1.0, 10):
        for k in np.geomspace(n[0] / 10, n[-1] * 10, 81):
            design = np.stack([np.exp(-((n / k) ** b)), np.ones_like(n)], 1)
            weights, residual = nnls(design, y)
            fits.append(Fit(design @ weights, float(residual) ** 2, 4))
    return min(fits, key=lambda f: f.residual)


def evidence_of_jump(n: ArrayLike, y: ArrayLike) -> float:
    """BIC of the better convex curve, power law or stretched exponential, less that of the change point, for a point.

    Above 0 the change point describes it better.
    """
    rival = min(power_law(n, y).bic, stretched_exponential(n, y).bic)
    return (rival - change_point(n, y)[0].bic) / len(np.asarray(n))


def doublings_of_fall(n: ArrayLike, y: ArrayLike) -> float:
    """How often n doubles while a curve goes from three quarters to one quarter of its whole fall, from its first to its lowest
    value; each is reached where the curve stays below it."""
    y = np.asarray(y, float)
    upper, lower = (y.min() + share * (y[0] - y.min()) for share in (0.75, 0.25))
    at = [sequences_to_reach(n, y, level) for level in (upper, lower)]
    return float(np.log2(at[1] / at[0])) if at[0] and at[1] else float("inf")


def last_not_below(y: ArrayLike, level: float) -> int | None:
    """The number of the last point of a curve that is not below a level; None: all are below it."""
    above = np.flatnonzero(np.asarray(y, float) >= level)
    return int(above[-1]) if len(above) else None


def sequences_to_reach(n: ArrayLike, y: ArrayLike, level: float) -> float | None:
    """The number of sequences from which on a curve stays below a level, between two points by a line over log n; None: never."""
    n, y = np.asarray(n, float), np.asarray(y, float)
    k = last_not_below(y, level)
    if k is None:
        return float(n[0])
    if k == len(y) - 1:
        return None
    share = (y[k] - level) / (y[k] - y[k + 1])
    return float(np.exp(np.log(n[k]) + share * (np.log(n[k + 1]) - np.log(n[k]))))
