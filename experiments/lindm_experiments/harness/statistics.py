"""Tests of a mean over seeds against a band, and of a count of violations against a rate.

The seed is the unit: instances, tasks and prompts are averaged inside a seed, and intervals are Student t over seeds. Where the
tasks themselves count, as for a language model, each training is a cluster of tasks (`clustered`) if it has tasks of its own, and
trainings that are tested on the same tasks are crossed with them (`crossed`). (In a simulation of nominal
95 % intervals for a log-log slope over 3, 5, 10 and 20 seeds, t over per-seed slopes covered .95 throughout; a percentile
bootstrap .75 to .92; least squares on seed means .88. `tests/experiments/harness/test_statistics.py` repeats the first.)

A claim is a composite hypothesis "the mean lies in [lo, hi]", and both directions are tested:

    p_pass   evidence against "outside the band"   two one-sided tests (TOST): max( P[T > (m - lo)/se], P[T > (hi - m)/se] )
    p_fail   evidence against "inside the band"    two-sided: 2 min( P[T > (m - hi)/se], P[T > (lo - m)/se] )

A band with one finite end has one test in each direction, and both are one-sided.

PASS when p_pass <= 5 %, FAIL when p_fail <= 5 %, else INCONCLUSIVE. The two one-sided 95 % limits, `Decision.limits`, are the
ends of the two-sided 90 % interval. They are inside the band at a PASS. At a FAIL they are outside a band with one end, and the
two-sided 95 % interval, `Decision.ci`, is outside a band with two ends. (One violation of a statement without exceptions is a
FAIL, wherever the limits are.) Whichever state is the true one, only one of the two directions can be an error, so the error
rate of a verdict is 5 % and Holm's step-down over all claims (`verdicts.adjust`) bounds the chance of any wrong verdict in a
report by 5 %. Fewer than `min_seeds` seeds decide nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from lindm_experiments.harness.claims import FAIL, INCONCLUSIVE, PASS

LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the data say about one hypothesis; `verdict` follows from the two p-values."""

    measured: float
    ci: tuple[float, float]  # two-sided 95 %
    limits: tuple[float, float]  # lower and upper, one-sided, 95 % each
    band: tuple[float, float]  # what the hypothesis says of the mean, or of the rate of violations
    n: int  # seeds (t intervals) or instances (counts)
    p_pass: float
    p_fail: float
    enough: bool = True  # at least the required number of seeds
    exact: bool = False  # a count for a statement without exceptions, which one violation refutes

    @property
    def verdict(self) -> str:
        if not self.enough:
            return INCONCLUSIVE
        return PASS if self.p_pass <= LEVEL else FAIL if self.p_fail <= LEVEL else INCONCLUSIVE

    @property
    def p(self) -> float:
        """p-value of the verdict given; of the nearer one when there is none."""
        return {PASS: self.p_pass, FAIL: self.p_fail}.get(self.verdict, min(self.p_pass, self.p_fail))


def _sample(values: ArrayLike) -> np.ndarray:
    v = np.asarray(values, dtype=float)
    if v.ndim != 1 or v.size == 0 or not np.isfinite(v).all():
        raise ValueError(f"values must be one finite number per seed; got {v!r}")
    return v


def _mean_se(v: np.ndarray) -> tuple[float, float]:
    return float(v.mean()), float(v.std(ddof=1) / np.sqrt(v.size)) if v.size > 1 else float("inf")


def mean_ci(values: ArrayLike, level: float = LEVEL) -> tuple[float, tuple[float, float]]:
    """Mean of per-seed values and its two-sided (1 - level) t-interval; infinite with one seed."""
    v = _sample(values)
    mean, se = _mean_se(v)
    return mean, _interval(mean, se, v.size - 1, level)


def slopes(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Log-log least-squares slope of each seed: x[P] > 0, y[seeds, P] > 0 -> slope[seeds]."""
    lx, ly = np.asarray(x, dtype=float), np.atleast_2d(np.asarray(y, dtype=float))
    if lx.ndim != 1 or lx.size < 2 or ly.shape[1] != lx.size:
        raise ValueError(f"y must have one row per seed and one column per x (at least 2); got x{lx.shape}, y{ly.shape}")
    if not ((lx > 0).all() and (ly > 0).all() and np.isfinite(ly).all()):
        raise ValueError("x and y must be positive and finite: the slope is that of their logarithms")
    lx = np.log(lx) - np.log(lx).mean()
    return (np.log(ly) @ lx) / float(lx @ lx)


def equivalence(values: ArrayLike, lo: float, hi: float, *, min_seeds: int = 5) -> Decision:
    """Does the mean over seeds lie in [lo, hi]? TOST for yes, a two-sided t-test for no; infinite ends give one-sided tests."""
    v = _sample(values)
    mean, se = _mean_se(v)
    return _decide(mean, se, v.size - 1, lo, hi, n=v.size, enough=v.size >= min_seeds)


def _decide(mean: float, se: float, df: float, lo: float, hi: float, *, n: int, enough: bool) -> Decision:
    """The tests of [lo, hi] by Student t with `df` degrees of freedom; an infinite `se` says nothing about the mean."""
    if not lo <= hi:
        raise ValueError(f"lo must not exceed hi; got lo={lo}, hi={hi}")
    if not np.isfinite(se):
        above, below = 1.0, 1.0
        over, under = 1.0, 1.0
    elif se == 0:
        above, below = float(mean < lo), float(mean > hi)
        over, under = float(mean <= hi), float(mean >= lo)
    else:
        tail = stats.t(df).sf
        above, below = float(tail((mean - lo) / se)), float(tail((hi - mean) / se))
        over, under = float(tail((mean - hi) / se)), float(tail((lo - mean) / se))
    two_sided = 2.0 if np.isfinite(lo) and np.isfinite(hi) else 1.0
    return Decision(
        measured=mean,
        ci=_interval(mean, se, df, LEVEL),
        limits=_interval(mean, se, df, 2 * LEVEL),
        band=(lo, hi),
        n=n,
        p_pass=max(above, below),
        p_fail=min(1.0, two_sided * min(over, under)),
        enough=enough,
    )


def _interval(mean: float, se: float, df: float, level: float) -> tuple[float, float]:
    half = float(stats.t.ppf(1 - level / 2, df)) * se if 0 < se < np.inf else se
    return mean - half, mean + half


Strata = Sequence[Sequence[ArrayLike]]
"""Strata of clusters of values: of each cell, for each training of it, one value of each task."""


def clustered_ci(strata: Strata, level: float = LEVEL) -> tuple[float, tuple[float, float]]:
    """The mean of the strata's means and its two-sided (1 - level) t-interval, as in `clustered`."""
    mean, se, df = _clustered(strata, np.ones(len(strata)) / len(strata))
    return mean, _interval(mean, se, df, level)


def clustered(strata: Strata, lo: float, hi: float, *, weights: Sequence[float] | None = None, min_seeds: int = 5) -> Decision:
    """Does a weighted sum of the strata's means lie in [lo, hi]? A stratum's mean is that of its clusters' means.

    Values of one cluster depend on each other (tasks on which one trained model acts), clusters are independent, and strata are
    fixed. The variance of a stratum's mean is s^2 / R from the means of its R clusters, which contains the variance within them.
    A stratum with one cluster says nothing about how clusters vary: there the variance is that of the mean over its values, and
    the interval is one for this cluster. Degrees of freedom are Satterthwaite's. (In simulations with two to six strata of three
    clusters intervals covered 96 to 97 % at equal variances, and 94 % if one standard deviation was ten times the others.)

    Args:
      weights: of the strata, for a contrast [default: equal ones with the sum 1].
      min_seeds: fewer values decide nothing; of a contrast, on either side.
    """
    w = np.ones(len(strata)) / len(strata) if weights is None else np.asarray(weights, dtype=float)
    mean, se, df = _clustered(strata, w)
    sizes = np.array([sum(_sample(cluster).size for cluster in clusters) for clusters in strata])
    n = int(min(sizes[side].sum() for side in (w > 0, w < 0) if side.any()))
    return _decide(mean, se, df, lo, hi, n=n, enough=n >= min_seeds)


def _clustered(strata: Strata, weights: np.ndarray) -> tuple[float, float, float]:
    """Weighted sum of the strata's means, its standard error and degrees of freedom."""
    if len(strata) == 0 or len(weights) != len(strata):
        raise ValueError(f"strata must not be empty and must have one weight each; got {len(strata)} and {len(weights)}")
    samples = [[_sample(cluster) for cluster in clusters] for clusters in strata]
    means = [np.array([v.mean() for v in clusters]) for clusters in samples]
    units = [of_clusters if len(of_clusters) > 1 else clusters[0] for of_clusters, clusters in zip(means, samples, strict=True)]
    mean = float(weights @ [m.mean() for m in means])
    variances = (weights * [_mean_se(v)[1] for v in units]) ** 2
    total, freedom = variances.sum(), np.array([v.size - 1 for v in units])
    if not 0 < total < np.inf:
        return mean, float(np.sqrt(total)), 1.0
    return mean, float(np.sqrt(total)), float(total**2 / (variances**2 / freedom).sum())


def crossed_ci(values: ArrayLike, level: float = LEVEL) -> tuple[float, tuple[float, float]]:
    """The mean of values [R, T] and its two-sided (1 - level) t-interval, as in `crossed`."""
    mean, se, df = _crossed(values)
    return mean, _interval(mean, se, df, level)


def crossed(values: ArrayLike, lo: float, hi: float, *, min_seeds: int = 5) -> Decision:
    """Does the mean of values [R, T] lie in [lo, hi], where R trainings were tested on the same T tasks?

    Trainings and tasks are random and crossed. The variance of the mean is v_R / R + v_T / T + v_RT / (R T); the sum of the
    variances of row means over R and of column means over T has the last part twice, so it is too large rather than too small.
    The half width of the interval is the root of the sum of squares of two half widths, by Student t over trainings and over
    tasks; the degrees of freedom are those with this half width. (Satterthwaite's are too many where trainings vary more than
    tasks: in simulations with three trainings, their intervals covered 93 %.) With one training the interval is over the tasks,
    for this training. Fewer than `min_seeds` trainings decide nothing.
    """
    mean, se, df = _crossed(values)
    trainings = len(np.asarray(values))
    return _decide(mean, se, df, lo, hi, n=trainings, enough=trainings >= min_seeds)


def _crossed(values: ArrayLike) -> tuple[float, float, float]:
    """Mean, standard error and degrees of freedom."""
    v = np.asarray(values, dtype=float)
    if v.ndim != 2 or v.size == 0 or not np.isfinite(v).all():
        raise ValueError(f"values must be finite numbers [trainings, tasks]; got shape {v.shape}")
    R, T = v.shape
    if R == 1 or T == 1:
        return *_mean_se(v.ravel()), max(v.size - 1, 1)
    errors = np.array([_mean_se(v.mean(1))[1], _mean_se(v.mean(0))[1]])
    if not errors.any():
        return float(v.mean()), 0.0, 1.0
    share = errors**2 / (errors**2).sum()
    quantile = 1 - LEVEL / 2
    ratio = np.sqrt(share @ stats.t.ppf(quantile, [R - 1, T - 1]) ** 2)  # of half width and standard error
    low, high = min(R, T) - 1, max(R, T) - 1
    df = low if low == high else optimize.brentq(lambda k: stats.t.ppf(quantile, k) - ratio, low, high)
    return float(v.mean()), float(np.sqrt((errors**2).sum())), float(df)


def at_most(values: ArrayLike, limit: float, *, min_seeds: int = 5) -> Decision:
    """Is the mean over seeds <= limit?"""
    return equivalence(values, -float("inf"), limit, min_seeds=min_seeds)


def clopper_pearson(count: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Exact two-sided (1 - level) interval of a binomial rate."""
    if not 0 <= count <= n or n < 1:
        raise ValueError(f"count must lie in 0..n with n >= 1; got count={count}, n={n}")
    lo = float(stats.beta.ppf(level / 2, count, n - count + 1)) if count > 0 else 0.0
    hi = float(stats.beta.ppf(1 - level / 2, count + 1, n - count)) if count < n else 1.0
    return lo, hi


def rate_at_most(count: int, n: int, rate: float, *, seeds: int = 5, min_seeds: int = 5) -> Decision:
    """Is the probability of a violation <= rate? Exact binomial tails (one-sided Clopper-Pearson) on n instances.

    Exact if these are independent. Instances of one seed or problem are independent only given that seed or problem, and then the
    limit is that of the seeds and problems at hand."""
    return Decision(
        measured=count / n,
        ci=clopper_pearson(count, n),
        limits=clopper_pearson(count, n, 2 * LEVEL),
        band=(-np.inf, rate),
        n=n,
        p_pass=float(stats.binom.cdf(count, n, rate)),
        p_fail=float(stats.binom.sf(count - 1, n, rate)),
        enough=seeds >= min_seeds,
    )


def no_violations(count: int, n: int, rate: float, *, seeds: int = 5, min_seeds: int = 5) -> Decision:
    """Does a statement that admits no exception hold on all n instances? One violation refutes it; with none, the
    Clopper-Pearson upper limit of the violation rate must not exceed `rate` (so n must be large enough to say so)."""
    d = replace(rate_at_most(count, n, rate, seeds=seeds, min_seeds=min_seeds), exact=True)
    return d if count == 0 else replace(d, band=(-np.inf, 0.0), p_pass=1.0, p_fail=0.0, enough=True)


def all_of(decisions: Sequence[Decision]) -> Decision:
    """A claim made of parts: PASS when every part passes (intersection-union: no correction needed), FAIL when some part
    fails (Bonferroni over the parts). Shows the numbers of the part that is least favorable to PASS."""
    if not decisions:
        raise ValueError("decisions must not be empty")
    worst = max(decisions, key=lambda d: (d.p_pass, -d.p_fail))
    return replace(
        worst, p_fail=min(1.0, len(decisions) * min(d.p_fail for d in decisions)), enough=all(d.enough for d in decisions)
    )


def holm(ps: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values (step-down; controls the family-wise error under any dependence)."""
    p = np.asarray(ps, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    adjusted = np.empty_like(p)
    adjusted[order] = stepped
    return adjusted
