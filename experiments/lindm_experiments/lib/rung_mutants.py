"""Mutants of the rungs and of the bounds without an oracle: wrong forms of the bound on the instances that attain it.

A mistake is a function of an instance. It returns the wrong bound, which replaces the right one in records. Formulas are written
out in numpy: only what the mistake does not concern comes from the theory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindm_experiments.harness.claims import Mutant
from lindm_experiments.lib import attained, attained_offline
from lindm_experiments.lib.attained import Flipped, Radius, Signs
from lindm_experiments.lib.attained_offline import Bootstrapped
from lindm_theory import mean_policy

Floats = NDArray[np.float64]


def _change(records: list[dict], names: tuple[str, ...], instances: Callable, where: dict, formula: Callable[[Any], float]):
    for record in records:
        drawn = instances(record["instances"])
        for name in names:
            record["attained"][name][1] = float(formula(drawn[where[name][0]]))


def instance_mutant(
    instances: Callable, where: dict, claim: str, mistake: str, names: str | tuple[str, ...], formula: Callable[[Any], float]
) -> Mutant:
    """The pairs `names` with the bound of a wrong formula."""
    names = (names,) if isinstance(names, str) else names
    return Mutant(
        claim=claim, mistake=mistake, change=partial(_change, names=names, instances=instances, where=where, formula=formula)
    )


_rung = partial(instance_mutant, attained.ladder_instances, attained.LADDER)
_offline = partial(instance_mutant, attained_offline.instances, attained_offline.BOUNDS)


# --- rungs 1, 1b, 2, 3 -------------------------------------------------------------------------------------------------------


def _sum(i: Flipped, values: Floats, d: Floats | None = None) -> float:
    """sum_h E_d of values [H, S]; d is that of the greedy policy."""
    return float(np.sum((i.occupancy if d is None else d) * values))


def _sup(x: Floats) -> Floats:
    return np.abs(x).max(-1)


def _by_margin(i: Flipped, gap: Floats) -> float:
    spans = np.ptp(i.D, axis=-1)
    return _sum(i, np.where(spans >= gap, spans, 0.0))


def _without_part(part: int, i: Flipped) -> float:
    return 2 * sum(_sum(i, _sup(p)) for k, p in enumerate(i.parts) if k != part)


PER_POLICY = (
    _rung(
        "ladder", "rung 1: half of the span", ("span_per_stage", "span_per_state"), lambda i: _sum(i, np.ptp(i.D, axis=-1)) / 2
    ),
    _rung(
        "ladder",
        "rung 1: span over the states in place of the actions",
        "span_per_stage",
        lambda i: float(np.ptp(i.D, axis=1).mean(-1).sum()),
    ),
    _rung("ladder", "rung 1b: the gap to the worst action", "margin", lambda i: _by_margin(i, np.ptp(i.Qstar, axis=-1))),
    _rung("ladder", "rung 1b: the span must exceed twice the gap", "margin", lambda i: _by_margin(i, 2 * _gap(i.Qstar))),
    _rung("ladder", "rung 2: without the factor 2", "sup_norm", lambda i: _sum(i, _sup(i.D))),
    _rung("ladder", "rung 2: mean over the actions", "sup_norm", lambda i: 2 * _sum(i, np.abs(i.D).mean(-1))),
    _rung("ladder", "rung 2: states of the optimal policy", "sup_norm", lambda i: 2 * _sum(i, _sup(i.D), i.occupancy_star)),
    _rung(
        "ladder",
        "rung 2: states of the stage before",
        "sup_norm",
        lambda i: 2 * _sum(i, _sup(i.D), np.roll(i.occupancy, 1, axis=0)),
    ),
    _rung("ladder", "rung 2: the last stage left out", "sup_norm", lambda i: 2 * _sum(i, _sup(i.D)[:-1], i.occupancy[:-1])),
    _rung("ladder", "rung 3: without the factor 2", "error_parts", lambda i: sum(_sum(i, _sup(p)) for p in i.parts)),
    _rung("ladder", "rung 3: without the bias", "error_parts", partial(_without_part, 0)),
    _rung("ladder", "rung 3: without the estimation error", "error_parts", partial(_without_part, 1)),
    _rung("ladder", "rung 3: without the optimization error", "error_parts", partial(_without_part, 2)),
)


def _gap(Q: Floats) -> Floats:
    top = np.sort(Q, axis=-1)
    return top[..., -1] - top[..., -2]


# --- rungs 4, 5, 6 -----------------------------------------------------------------------------------------------------------


def _rung_4(i: Signs, factor: float = 2.0, L: float | None = None, estimation: float = 1.0, bias: float = 1.0) -> float:
    p = attained.bounds_of_signs(i)
    norm = p["L"] if L is None else L
    return float(factor * norm * (estimation * np.sqrt(p["estimation"]) + bias * np.sqrt(p["bias"])).sum())


def _smallest(i: Signs) -> float:
    """The norm of the smallest features in the place of the largest."""
    return float(np.sqrt(np.einsum("nd,de,ne->n", i.flat, np.linalg.inv(i.W), i.flat).min()))


def _rung_5(i: Signs, factor: float = 2.0, L: float | None = None, b: float = 2.0, v: float = 2.0, bias: float = 1.0) -> float:
    p = attained.bounds_of_signs(i)
    level = np.log(2 * len(i.g) / i.delta)
    radius = b * p["b"] * level / i.M + np.sqrt(v * p["v"] * level / i.M)
    return float(factor * (bias * p["sup_bias"] + (p["L"] if L is None else L) * radius).sum())


def _radius(i: Radius, b: float = 2.0, v: float = 2.0) -> float:
    level = np.log(2 / i.delta)
    return b * i.e * level / i.M + np.sqrt(v * i.e**2 * i.p * level / i.M)


def _rung_6(i: Signs, caps: Callable[[Floats], Floats], order: float = 1.0, stages: slice = slice(None)) -> float:
    """Dynamic programming over policies capped by `caps` of the probabilities of a flip [H, S, A, A]; order -1 fills the least
    harmful action first."""
    kernel, gap, cap = i.kernel[stages], i.gap[stages], caps(attained.bounds_of_signs(i)["flip"])[stages]
    U = np.zeros(len(i.phi))
    for P, g, c in zip(kernel[::-1], gap[::-1], cap[::-1], strict=True):
        v = g + P @ U
        rank = np.argsort(-order * v, axis=-1)
        value, room = np.take_along_axis(v, rank, -1), np.take_along_axis(c, rank, -1)
        mass = np.clip(1 - (np.cumsum(room, -1) - room), 0, room)
        U = (mass * value).sum(-1)
    return float(U[-1])


def _caps(flip: Floats, axis: int = -1) -> Floats:
    own = np.eye(flip.shape[-1], dtype=bool)
    return np.minimum(np.where(own, 1.0, flip).min(axis), 1.0)


def _caps_of(tail: Callable[..., Any], i: Signs) -> Callable[[Floats], Floats]:
    """Caps by a wrong tail bound."""
    noise = i.noise_bound, np.broadcast_to(i.noise_variance, len(i.g))[:, None]
    moments = [np.asarray(x) for x in mean_policy.difference_moments(i.phi, i.A, i.w, i.design, *noise)]
    with np.errstate(invalid="ignore"):
        chance = np.where(moments[0] > 0, tail(*moments, i.M), 1.0)
    return lambda flip: _caps(chance)


BIAS, NOISE = attained.EXPECTED_BIAS, attained.EXPECTED_NOISE
AVERAGES = (
    _rung("expected-bound", "rung 4: without L, the factor 2 halved", BIAS, partial(_rung_4, factor=1.0, L=1.0)),
    _rung("expected-bound", "rung 4: the factor 2 halved", BIAS, partial(_rung_4, factor=1.0)),
    _rung("expected-bound", "rung 4: without L", BIAS, partial(_rung_4, L=1.0)),
    _rung("expected-bound", "rung 4: L of the smallest features", BIAS, lambda i: _rung_4(i, L=_smallest(i))),
    _rung("expected-bound", "rung 4: without the bias", BIAS, partial(_rung_4, bias=0.0)),
    _rung("expected-bound", "rung 4: without the estimation error", NOISE, partial(_rung_4, estimation=0.0)),
    _rung(
        "high-probability-bound",
        "rung 5: sqrt(0.2 v log / M)",
        ("high_probability, noise", "radius"),
        lambda i: _rung_5_or_radius(i, v=0.2),
    ),
    _rung("high-probability-bound", "rung 5: without 2 b log / M", "radius, rare", partial(_radius, b=0.0)),
    _rung("high-probability-bound", "rung 5: without the factor 2", "high_probability, noise", partial(_rung_5, factor=1.0)),
    _rung("high-probability-bound", "rung 5: without L", "high_probability, noise", partial(_rung_5, L=1.0)),
    _rung("high-probability-bound", "rung 5: without the bias", "high_probability, bias", partial(_rung_5, bias=0.0)),
    _rung("high-probability-bound/radius", "sqrt(0.2 v log / M)", "radius", partial(_radius, v=0.2)),
    _rung("ladder/attained", "rung 6: caps over the wrong axis", "mean_policy", lambda i: _rung_6(i, partial(_caps, axis=-2))),
    _rung(
        "expected-bound/mean-policy",
        "rung 6: actions filled in rising order",
        "mean_policy",
        lambda i: _rung_6(i, _caps, order=-1.0),
    ),
    _rung(
        "expected-bound/mean-policy",
        "rung 6: the first stage left out",
        "mean_policy",
        lambda i: _rung_6(i, _caps, stages=slice(1, None)),
    ),
    _rung(
        "expected-bound/mean-policy",
        "rung 6: Cantelli with half of the variance",
        "mean_policy",
        lambda i: _rung_6(i, _caps_of(lambda m, v, b, M: v / 2 / M / (v / 2 / M + m**2), i)),
    ),
    _rung(
        "expected-bound/mean-policy",
        "rung 6: Bernstein without the range",
        "mean_policy",
        lambda i: _rung_6(i, _caps_of(lambda m, v, b, M: np.exp(-M * m**2 / (2 * v)), i)),
    ),
)


def _rung_5_or_radius(i: Signs | Radius, **terms: float) -> float:
    return _radius(i, **terms) if isinstance(i, Radius) else _rung_5(i, **terms)


# --- without an oracle -------------------------------------------------------------------------------------------------------


def _residual(i: Bootstrapped, later: int = 1) -> Floats:
    """r + P Vhat_{h+later} - Qhat."""
    V = np.concatenate([i.Qhat.max(-1), np.zeros((later, i.r.shape[1]))])[later : later + len(i.r)]
    return i.r + np.einsum("hsat,ht->hsa", i.P, V) - i.Qhat


def _errors(i: Bootstrapped, later: int = 1) -> Floats:
    return np.abs(_residual(i, later)).max((1, 2))


def _pessimism(i: Bootstrapped, factor: float, d: Floats, action: int) -> float:
    return float(factor * (d * i.uncertainty[..., action]).sum())


ALL_OFFLINE = ("linear", "span", "span, two roads", "quadratic, inside")
WITHOUT_ORACLE = (
    _offline("bellman-horizon", "linear bound: without the factor 2", "linear", lambda i: _errors(i).sum()),
    _offline(
        "bellman-horizon",
        "linear bound: mean of the residuals in place of the largest",
        "linear",
        lambda i: 2 * _residual(i).mean((1, 2)).sum(),
    ),
    _offline("bellman-horizon", "linear bound: the last stage left out", "linear", lambda i: 2 * _errors(i)[:-1].sum()),
    _offline(
        "bellman-horizon/attained",
        "linear bound: residual with the value of the same stage",
        "linear",
        lambda i: 2 * _errors(i, 0).sum(),
    ),
    _offline(
        "bellman-horizon/attained",
        "linear bound: residual with the value of two stages on",
        "linear",
        lambda i: 2 * _errors(i, 2).sum(),
    ),
    _offline(
        "bellman-horizon",
        "span bound: over the actions of a state alone",
        "span, two roads",
        lambda i: np.ptp(_residual(i), axis=-1).max(-1).sum(),
    ),
    _offline(
        "bellman-horizon",
        "quadratic bound: only later stages",
        "quadratic, inside",
        lambda i: 2 * (_errors(i) * np.arange(len(i.r))).sum(),
    ),
    _offline("bellman-horizon/pessimism", "without the factor 2", "pessimism", lambda i: _pessimism(i, 1.0, i.occupancy_star, 0)),
    _offline("bellman-horizon/pessimism", "along the learned policy", "pessimism", lambda i: _pessimism(i, 2.0, i.occupancy, 1)),
)
