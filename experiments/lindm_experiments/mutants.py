"""The mutants of `lindm verify --mutants`: for each inequality, wrong forms of its bound, which its claim must refute.

Those of the rungs and of the bounds without an oracle are in `lib/rung_mutants.py`; the others change records of an experiment.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lindm_experiments.harness.claims import Mutant
from lindm_experiments.lib import attained_margin
from lindm_experiments.lib import feature_laws as laws
from lindm_experiments.lib.attained import Signs
from lindm_experiments.lib.pooled_prompts import H
from lindm_experiments.lib.rung_mutants import AVERAGES, PER_POLICY, WITHOUT_ORACLE, Floats, instance_mutant

# --- the margin --------------------------------------------------------------------------------------------------------------


def _length(rates: Floats, gap: Floats, least: Callable = np.min) -> float:
    """Pairs for a factor e, from the rates [H, S, A, A] of all pairs of actions."""
    worse = rates.max(-1)[gap > 0]
    return float(1 / least(worse))


def _margin(
    mistake: str, names: tuple[str, ...], formula: Callable[[Floats, Floats, Floats], Floats], least: Callable = np.min
) -> Mutant:
    def bound(i: Signs) -> float:
        p = attained_margin.exponents_of(i)
        positive = np.maximum(p["margin"], 0)
        with np.errstate(invalid="ignore"):
            rates = np.where(positive > 0, formula(positive, p["variance"], p["range"]), 0.0)
        return _length(rates, i.gap, least)

    return instance_mutant(attained_margin.instances, attained_margin.BOUNDS, "margin/exponent", mistake, names, bound)


MARGIN = (
    _margin("without the 2 in the denominator", ("bernstein", "cramer"), lambda m, v, b: m**2 / (v + b * m / 3)),
    _margin("a tenth too large", ("cramer",), lambda m, v, b: 1.1 * m**2 / (2 * v)),
    _margin("the largest exponent of the stages", ("bernstein",), lambda m, v, b: m**2 / (2 * (v + b * m / 3)), np.max),
    _margin("range in place of the variance's root", ("bernstein",), lambda m, v, b: m / (2 * b)),
)


# --- the error of Qhat -------------------------------------------------------------------------------------------------------


def _change_risk(records: list[dict], form: str, part: str, bound: Callable[[Floats, Floats, Floats, Floats], float]) -> None:
    """The constant of a part of a bound, as `bound` makes it of Lambda, Psi, K and noise, in the limit of long prompts."""
    for record in records:
        for law in laws.MATCHED if form == "eq. (6)" else laws.LAWS:
            moments = np.array(record["cells"][law]["moments"])
            record["attained"][f"{form}, {part}, {law}"][1] = float(bound(*moments))


def _risk(claim: str, mistake: str, form: str, part: str, bound: Callable[[Floats, Floats, Floats, Floats], float]) -> Mutant:
    return Mutant(claim=claim, mistake=mistake, change=partial(_change_risk, form=form, part=part, bound=bound))


def _kappa(Lambda: Floats) -> float:
    return float(np.linalg.cond(Lambda))


def _general(L: Floats, Psi: Floats, K: Floats, noise: Floats, C: Floats | None = None, between: Floats | None = None) -> float:
    """tr(Lq C Psi^-1 C), with C or Psi^-1 replaced."""
    C = _C(L, Psi, K, noise) if C is None else C
    return float(np.trace(L @ C @ (np.linalg.inv(Psi) if between is None else between) @ C))


def _C(L: Floats, Psi: Floats, K: Floats, noise: Floats) -> Floats:
    return np.linalg.inv(L) @ (K - L @ Psi @ L + noise) @ np.linalg.inv(L)


def _gaussian_K(L: Floats, Psi: Floats) -> Floats:
    return 2 * L @ Psi @ L + np.trace(Psi @ L) * L


d = laws.D
RISK = (
    _risk("paper-bound", "eq. (6): d in place of d + 1", "eq. (6)", "estimation", lambda L, P, K, V: d * np.trace(L)),
    _risk("paper-bound", "eq. (6): without tr(Lambda) in the estimation", "eq. (6)", "estimation", lambda L, P, K, V: d + 1),
    _risk(
        "paper-bound", "eq. (6): estimation / M^2 (M = 2)", "eq. (6)", "estimation", lambda L, P, K, V: (d + 1) * np.trace(L) / 2
    ),
    _risk("paper-bound", "eq. (6): without 2 d", "eq. (6)", "bias", lambda L, P, K, V: (1 + d**2 * _kappa(L)) * np.trace(L)),
    _risk("paper-bound", "eq. (6): without kappa", "eq. (6)", "bias", lambda L, P, K, V: (1 + d) ** 2 * np.trace(L)),
    _risk(
        "paper-bound",
        "eq. (6): d in place of d^2",
        "eq. (6)",
        "bias",
        lambda L, P, K, V: (1 + 2 * d + d * _kappa(L)) * np.trace(L),
    ),
    _risk(
        "paper-bound",
        "eq. (6): bias / N^3 (N = 2)",
        "eq. (6)",
        "bias",
        lambda L, P, K, V: (1 + 2 * d + d**2 * _kappa(L)) * np.trace(L) / 2,
    ),
    _risk("paper-bound/every-law", "a tenth too small", "every law", "estimation", lambda *m: 0.9 * np.trace(m[0] @ _C(*m))),
    _risk(
        "paper-bound/every-law",
        "K of Gaussian features",
        "every law",
        "estimation",
        lambda L, P, K, V: np.trace(L @ _C(L, P, _gaussian_K(L, P), V)),
    ),
    _risk(
        "paper-bound/every-law",
        "without the noise",
        "every law",
        "estimation",
        lambda L, P, K, V: np.trace(L @ _C(L, P, K, 0 * V)),
    ),
    _risk("paper-bound/every-law", "bias: without the noise", "every law", "bias", lambda L, P, K, V: _general(L, P, K, 0 * V)),
    _risk("paper-bound/every-law", "bias: without Psi^-1", "every law", "bias", lambda *m: _general(*m, between=np.eye(d))),
    _risk("paper-bound/every-law", "bias: C to the first power", "every law", "bias", lambda *m: np.trace(m[0] @ _C(*m))),
)


# --- Bayes ---------------------------------------------------------------------------------------------------------------------


def _ridge(factor: float) -> Callable[[dict], None]:
    """A ridge regression with a wrong penalty in the place of Bayes, on the context of `against_statistics.bayes_context`."""

    def change(record: dict) -> None:
        d, (M, sigma) = record["d"], record["small"]
        g, penalty = M + d + 1, factor * sigma**2
        record["attained"]["Bayes"][0] = float(d * (penalty**2 + sigma**2 * g) / (g + penalty) ** 2)

    return change


# --- ambiguity and certified bounds ------------------------------------------------------------------------------------------


def _seeded(claim: str, mistake: str, change: Callable[[dict], None]) -> Mutant:
    """A change of the counts in the record of every seed."""

    def change_all(records: list[dict]) -> None:
        for record in records:
            if "seed" in record["point"]:
                change(record)

    return Mutant(claim=claim, mistake=mistake, change=change_all)


def _count(field: str, value: Callable[[dict], int]) -> Callable[[dict], None]:
    return lambda record: record.update({field: value(record)})


def _each_method(field: str, source: str, wrong: Callable[[Floats], NDArray[np.bool_]]) -> Callable[[dict], None]:
    """Counts of violations [problems, efforts] of every method, 1 where `source` says that the wrong bound is violated."""

    def change(record: dict) -> None:
        for method in record["methods"].values():
            method[field] = wrong(np.array(method[source])).astype(int).tolist()

    return change


AGAINST_BAYES = (
    _seeded("against-statistics/bayes", "least squares in the place of Bayes", _ridge(0.0)),
    _seeded("against-statistics/bayes", "four times the penalty", _ridge(4.0)),
)
AMBIGUOUS = (
    _seeded("ambiguity/monotone", "min and max exchanged", _count("rises", lambda r: r["falls"])),
    _seeded("ambiguity/stagewise", "worst and best case exchanged", _count("wrong_way", lambda r: r["right_way"])),
    _seeded("ambiguity/convex", "for every attitude", _count("concave_triples", lambda r: r["concave_anywhere"][0])),
    _seeded("ambiguity/convex", "for three models", _count("concave_triples", lambda r: r["concave_anywhere"][1])),
    _seeded("ambiguity/convex", "strictly convex", _count("concave_triples", lambda r: r["straight_triples"])),
    _seeded("belief-bounds", "upper bounds a tenth of the width lower", _each_method("violated", "above", lambda x: x < 0.1)),
    _seeded("belief-bounds", "lower bounds a tenth of the width higher", _each_method("violated", "below", lambda x: x < 0.1)),
    _seeded("belief-bounds/labels", "half of the stated loss", _each_method("misled", "share", lambda x: x > 0.5)),
)


# --- one prompt for all stages -------------------------------------------------------------------------------------------------


def _change_shared(records: list[dict], name: str, formula: Callable[[float, float], float]) -> None:
    """The bound of a policy that copies its trajectory, by a formula in p and gap."""
    for record in records:
        record["attained"][name][1] = float(formula(record["copied"]["p"], record["copied"]["gap"]))


def _shared(claim: str, mistake: str, name: str, formula: Callable[[float, float], float]) -> Mutant:
    return Mutant(claim=claim, mistake=mistake, change=partial(_change_shared, name=name, formula=formula))


SHARED = (
    _shared("pooled/shared-rung", "rung 6 of independent stages", "shared rung", lambda p, gap: gap * p ** (H * (H + 1) // 2)),
    _shared(
        "pooled/shared-rung",
        "states as the mean policy visits them",
        "shared rung",
        lambda p, gap: gap * p ** (H * (H - 1) // 2) * p**H,
    ),
    _shared("pooled/shared-rung", "half of the bound", "shared rung", lambda p, gap: gap * p**H / 2),
    _shared("pooled/attained", "without the caps", "shared rung", lambda p, gap: gap),
    _shared("pooled/attained", "price: without the factor 1/2", "price", lambda p, gap: 2 * gap * p * (1 - p)),
    _shared("pooled/price-bound", "the first stage in place of the later ones", "price", lambda p, gap: gap * p**2 * (1 - p)),
    _shared("pooled/price-bound", "the square of the doubt", "price", lambda p, gap: gap * (p * (1 - p)) ** 2),
)


# --- imitation with the log-loss -----------------------------------------------------------------------------------------------


def _change_cliff(records: list[dict], name: str, formula: Callable[[float, Floats, float], float]) -> None:
    """A bound on an attained instance, by a formula in the log-loss, the deviations e_h of the stages, and the share of doubt."""
    for record in records:
        i = record["instance"]
        record["attained"][name][1] = float(formula(i["log-loss"], np.array(i["stages"]), i["share"]))


def _cliff(claim: str, mistake: str, name: str, formula: Callable[[float, Floats, float], float]) -> Mutant:
    return Mutant(claim=claim, mistake=mistake, change=partial(_change_cliff, name=name, formula=formula))


IMITATION = (
    _cliff("log-loss/bound", "four fifths of the bound", "log-loss", lambda loss, e, s: 0.8 * -np.expm1(-loss)),
    _cliff("log-loss/bound", "the mean over stages", "log-loss", lambda loss, e, s: -np.expm1(-loss / len(e))),
    _cliff("log-loss/bound", "half of the log-loss", "log-loss", lambda loss, e, s: -np.expm1(-loss / 2)),
    _cliff("log-loss/bound", "the range of one reward", "log-loss", lambda loss, e, s: -np.expm1(-loss) / len(e)),
    _cliff("log-loss/bound", "the stage of the largest error alone", "log-loss", lambda loss, e, s: e.max()),
    _cliff("log-loss/bound", "half of the squared Hellinger distance", "hellinger", lambda loss, e, s: -np.expm1(-loss / 2)),
    _cliff("log-loss/bound", "greedy: without log 2", "greedy", lambda loss, e, s: s * np.log(2)),
    _cliff("log-loss/attained", "without the exponential", "log-loss", lambda loss, e, s: loss),
    _cliff("log-loss/attained", "the classical bound", "log-loss", lambda loss, e, s: e @ np.arange(len(e), 0, -1)),
)


# --- the floor of the maximum --------------------------------------------------------------------------------------------------


def _change_maximum(records: list[dict], formula: Callable[[dict], float]) -> None:
    for record in records:
        record["floor"] = float(formula(record))


def _maximum(claim: str, mistake: str, formula: Callable[[dict], float]) -> Mutant:
    return Mutant(claim=claim, mistake=mistake, change=partial(_change_maximum, formula=formula))


MAXIMUM = (
    _maximum("in-context-td/maximum", "twice the floor", lambda r: 2 * r["floor"]),
    _maximum("in-context-td/maximum", "without the mean over tasks taken off", lambda r: r["wrong floors"]["uncentered"]),
    _maximum("in-context-td/maximum", "rewards not negated", lambda r: r["wrong floors"]["not negated"]),
    _maximum("in-context-td/attained", "half of the floor", lambda r: r["floor"] / 2),
)


# --- pretraining and lower bounds -----------------------------------------------------------------------------------------------


def _change_all(records: list[dict], change: Callable[[dict], None]) -> None:
    for record in records:
        change(record)


def _each(claim: str, mistake: str, change: Callable[[dict], None]) -> Mutant:
    """A mistake that is made in every record on its own."""
    return Mutant(claim=claim, mistake=mistake, change=partial(_change_all, change=change))


def _constants(r: dict, of: Callable[[dict, int], float]) -> None:
    """The constants of one query on Gaussian features, as `of` makes them of what was computed and of d."""
    for f in r["first_order"]:
        if f["law"] == "Gaussian":
            f["C_one"] = of(f, f["d"])


def _infinite(r: dict) -> None:
    r["predicted"][0] = [[r["least"] for _ in row] for row in r["predicted"][0]]


def _matched(r: dict) -> None:
    r["predicted"][1] = r["predicted"][0]


def _smaller_price(r: dict) -> None:
    """What was measured for one query against d times that of all queries: the ratio is (d + 2)/d times larger."""
    for f in r["first_order"]:
        f["one"] *= (f["d"] + 2) / f["d"] if f["law"] == "Gaussian" else 1.0


PRETRAINING = (
    _each("pretraining", "the risk of A_N: T = infinity", _infinite),
    _each("pretraining/mismatch", "the Psi of training at the test", _matched),
    _each("pretraining/first-order", "d in place of d + 2", lambda r: _constants(r, lambda f, d: f["C_one"] * d / (d + 2))),
    _each(
        "pretraining/first-order",
        "the risk of A_N in place of fourth moments",
        lambda r: _constants(r, lambda f, d: f["C_residual"]),
    ),
    _each("pretraining/first-order", "T tasks with fresh contexts", lambda r: _constants(r, lambda f, d: f["C_tasks"])),
    _each("pretraining/all-queries", "d in place of d + 2", _smaller_price),
    _each(
        "pretraining/published",
        "without the noise of the query's label",
        lambda r: r.update(published=[v - 0.1 for v in r["published"]]),
    ),
)


def _floor(r: dict, floor: Callable[[dict], float]) -> None:
    r["kernels"]["floor"] = floor(r["kernels"])


def _scale_floor(r: dict, floor: Callable[[float, float, float], float]) -> None:
    scales = r["kernels"]["scales"]
    scales["floor"] = floor(scales["power"], scales["mean"], scales["square"])


def _full_bound(r: dict, bound: float) -> None:
    r["twins"]["below"] = [int(share < bound) for share in r["twins"]["full"]]


def _test_bound(r: dict, factor: float) -> None:
    r["twins"]["test"] = [factor * bound for bound in r["twins"]["test"]]


LOWER = (
    _each("lower-bound/floor", "a twentieth too large", lambda r: _floor(r, lambda k: 1.05 * k["floor"])),
    _each("lower-bound/floor", "not minimized: A = (mean covariance)^-1", lambda r: _floor(r, lambda k: k["unminimized"])),
    _each("lower-bound/floor", "the power of the tasks: A = 0", lambda r: _floor(r, lambda k: k["power"])),
    _each(
        "lower-bound/attained",
        "the scales of the covariances alone",
        lambda r: _floor(r, lambda k: k["power"] * k["scale_share"]),
    ),
    _each("lower-bound/attained", "a tenth too small", lambda r: _floor(r, lambda k: 0.9 * k["floor"])),
    _each("lower-bound/scale", "E[c]^2 in place of E[c^2]", lambda r: _scale_floor(r, lambda P, m, s: P * (s - m**2) / m**2)),
    _each(
        "lower-bound/scale",
        "standard deviation in place of variance",
        lambda r: _scale_floor(r, lambda P, m, s: P * np.sqrt(1 - m**2 / s)),
    ),
    _each("lower-bound/policy", "gap in place of gap/2", lambda r: _test_bound(r, 2.0)),
    _each("lower-bound/policy", "gap/4 in place of gap/2", lambda r: _test_bound(r, 0.5)),
    _each("lower-bound/policy-full", "one half, as for the reduced layer", lambda r: _full_bound(r, 0.5)),
    _each("lower-bound/policy-full", "one third in place of a quarter", lambda r: _full_bound(r, 1 / 3)),
)


# --- fine-tuning and softmax attention -----------------------------------------------------------------------------------------


def _frontier(r: dict, change: Callable[[Floats], Floats]) -> None:
    """A wrong frontier: of its risks [law, share]."""
    r["frontier"] = change(np.array(r["frontier"])).tolist()


def _all_weights(r: dict) -> None:
    for law in ("old", "new"):
        r["policy"][law]["weight_changes"] = r["policy"][law]["all_changes"]


TUNING = (
    _each("fine-tuning/frontier", "5 % too high", lambda r: _frontier(r, lambda risks: 1.05 * risks)),
    _each("fine-tuning/frontier", "shares of old and new tasks exchanged", lambda r: _frontier(r, lambda risks: risks[:, ::-1])),
    _each("fine-tuning/frontier", "risks on old and new tasks exchanged", lambda r: _frontier(r, lambda risks: risks[::-1])),
    _each("fine-tuning/value-only", "all weights in place of the value weight", _all_weights),
    _each("softmax-limit/price-floor", "the price at r = 0 for all r", lambda r: r.update(floor=np.e)),
    _each("softmax-limit/price-floor", "e^s / s^2, without the factor 1 + r", lambda r: r.update(floor=2 * r["floor"])),
)


MUTANTS: tuple[Mutant, ...] = (
    *PER_POLICY,
    *AVERAGES,
    *WITHOUT_ORACLE,
    *MARGIN,
    *RISK,
    *AGAINST_BAYES,
    *AMBIGUOUS,
    *SHARED,
    *IMITATION,
    *MAXIMUM,
    *PRETRAINING,
    *LOWER,
    *TUNING,
)
