"""Softmax, depth and positions: records and verdicts."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from lindm_experiments import softmax
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(softmax)


def _many(records: list[dict], risks: dict[str, list[float]]) -> list[dict]:
    noise = np.random.default_rng(0).normal(1, 1e-3, 6)
    out = [copy.deepcopy(records[0]) for _ in noise]
    for r, e in zip(out, noise, strict=True):
        r["risk"] |= {name: [values[0], values[1] * e] for name, values in risks.items()}
        r["exact softmax"] = [2.0, 1.0]
    return out


def test_the_verdicts_follow_the_risks(records):
    good = {
        "linear": [1.0, 0.5],
        "softmax": [2.0, 1.0],
        "softmax, learned positions": [2.0, 1.5],
        "softmax, fixed positions": [2.0, 4.0],
    }
    wanted = dict.fromkeys(claim_ids("softmax"), PASS) | {"softmax/learned-positions-break": FAIL}
    assert {v.id: v.verdict for v in softmax.check(_many(records, good))} == wanted
    bad = {
        "linear": [2.0, 0.5],
        "softmax": [2.0, 3.0],
        "softmax, learned positions": [2.0, 2.5],
        "softmax, fixed positions": [2.0, 1.0],
    }
    turned = {claim: FAIL if verdict == PASS else PASS for claim, verdict in wanted.items()}
    assert {v.id: v.verdict for v in softmax.check(_many(records, bad))} == turned


def test_the_exact_line_is_the_risk_of_the_closed_form(records):
    r = records[0]
    d, N = r["d"], r["N"]
    gamma = (1 + 1 / N) + d / N
    for M, exact in zip(r["M"], r["exact"], strict=True):
        by_hand = d * ((1 + 1 / M) + d / M - 1) / gamma**2 + d * (gamma - 1) ** 2 / gamma**2
        assert exact == pytest.approx(by_hand, rel=1e-9)


def test_smoke_records_and_figure(records):
    assert all(np.isfinite(v).all() and min(v) > 0 for r in records for v in r["risk"].values())
    assert set(softmax.plot(records)) == {"softmax"}


def test_a_config_out_of_range_names_its_field():
    for field, value in (("times", (2, 4)), ("N", 0), ("steps", 0), ("tests", -1)):
        with pytest.raises(ValueError, match=field):
            replace(softmax.SMOKE, **{field: value})


def test_the_exact_line_of_softmax_is_the_best_head_and_falls_beyond_the_training_length(records):
    r = records[0]
    near, far = r["exact softmax"]
    assert r["exact"][0] < near < r["d"]  # behind the linear layer, ahead of zero
    assert far < near
