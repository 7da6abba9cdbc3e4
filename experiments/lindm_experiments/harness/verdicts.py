"""Verdicts on claims: what an experiment's `check` returns, and Holm's correction over all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lindm_experiments.harness.claims import INCONCLUSIVE, OPEN, get_claim
from lindm_experiments.harness.statistics import LEVEL, Decision, all_of, equivalence, holm, no_violations, rate_at_most

EFFECTIVE = 10  # smallest median effective sample size of a yardstick that decides a claim


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One row of the report: a claim id with what was measured and what follows."""

    id: str
    measured: float | None
    ci: tuple[float, float]
    n: int
    verdict: str
    p: float
    predicted: float | str | None = None
    figure: str | None = None  # name of the figure that shows it, a key of `plot(records)`
    note: str = ""
    slack: tuple[float, float] | None = None  # of an inequality: smallest and median, see `to_verdict`
    limits: tuple[float, float] = (-inf, inf)  # lower and upper, one-sided, 95 % each
    band: tuple[float, float] | None = None  # of the decision that is shown; None: that of the claim
    exact: bool = False  # that decision is a count for a statement that one violation refutes
    parts: int = 1  # of the criterion; one of them fails at 5 % / parts


def as_expected(row: Mapping[str, Any]) -> bool:
    """Whether a row of verdicts.json has the verdict that its claim expects; an open one has it always."""
    return row["expected"] in (OPEN, row["verdict"])


def is_listed(row: Mapping[str, Any], preset: str) -> bool:
    """Whether the screen and the report list a row of verdicts.json under the claims that are not as expected.

    The smoke preset has too few seeds to decide, so its undecided claims are not listed.
    """
    return not as_expected(row) and not (preset == "smoke" and row["verdict"] == INCONCLUSIVE)


def to_verdict(
    id: str,
    *decisions: Decision,
    predicted: float | str | None = None,
    figure: str | None = None,
    note: str = "",
    slack: ArrayLike | None = None,
) -> Verdict:
    """Decisions -> Verdict of claim `id`; several decisions are several parts, and all must hold.

    Args:
      slack: of an inequality, how far apart its two sides are on what was tested: the side that it says is the larger one, over
        the other. So bound / truth of an upper bound and truth / bound of a lower one: 1 where the bound is attained, below 1
        where it is broken.
    """
    d = all_of(decisions)
    return Verdict(
        id=id,
        measured=d.measured,
        ci=d.ci,
        limits=d.limits,
        band=d.band,
        exact=d.exact,
        parts=len(decisions),
        n=d.n,
        verdict=d.verdict,
        p=d.p,
        predicted=predicted,
        figure=figure,
        note=note,
        slack=None if slack is None else (float(np.min(slack)), float(np.median(np.asarray(slack)))),
    )


def of_seeds(records: Sequence[dict]) -> list[dict]:
    """The records of points with a seed, without those that the experiment measures once."""
    return [r for r in records if "seed" in r["point"]]


def undecided(id: str, why: str) -> Verdict:
    """The verdict on claim `id` if a run does not measure its quantity."""
    return Verdict(
        id=id, measured=None, ci=(-inf, inf), n=0, verdict=INCONCLUSIVE, p=1.0, predicted=get_claim(id).predicted, note=why
    )


def mean_verdict(
    id: str,
    *values: ArrayLike,
    also: Sequence[Decision] = (),
    predicted: float | str | None = None,
    figure: str | None = None,
    note: str = "",
    slack: ArrayLike | None = None,
) -> Verdict:
    """Test per-seed values against the band of claim `id`. Several arrays are several parts (laws, families): all must hold,
    and so must the decisions `also`."""
    c = get_claim(id)
    parts = [equivalence(v, c.lo, c.hi, min_seeds=c.min_seeds) for v in values]
    said = c.predicted if predicted is None else predicted
    return to_verdict(id, *parts, *also, predicted=said, figure=figure, note=note, slack=slack)


def count_verdict(
    id: str,
    count: int,
    n: int,
    *,
    seeds: int,
    exact: bool = True,
    also: Sequence[Decision] = (),
    predicted: float | str | None = None,
    figure: str | None = None,
    note: str = "",
    slack: ArrayLike | None = None,
) -> Verdict:
    """Test `count` violations among `n` instances over `seeds` seeds against the largest admissible rate, `hi` of claim `id`.
    `exact`: the statement admits no exception; otherwise `hi` is the fraction that it admits. The decisions `also` must hold."""
    c = get_claim(id)
    test = no_violations if exact else rate_at_most
    decision: Decision = test(count, n, c.hi, seeds=seeds, min_seeds=c.min_seeds)
    said = c.predicted if predicted is None else predicted
    return to_verdict(id, decision, *also, predicted=said, figure=figure, note=note, slack=slack)


def adjust(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Holm over all claims: a verdict that does not survive at 5 % becomes INCONCLUSIVE; p becomes the adjusted p. A claim
    without data was not tested and does not count."""
    tested = iter(holm([v.p for v in verdicts if v.n]))
    out = []
    for v in verdicts:
        p = next(tested) if v.n else v.p
        if v.verdict != INCONCLUSIVE and p > LEVEL:
            lost = f"{v.verdict} alone (p = {v.p:.2g}), not after Holm"
            v = replace(v, verdict=INCONCLUSIVE, note="; ".join(filter(None, [v.note, lost])))
        out.append(replace(v, p=float(p)))
    return out
