"""The limit of softmax attention: records by another route, and verdicts that notice another law."""

import copy
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from lindm.types import Prompt
from lindm_experiments import softmax_limit
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(softmax_limit)


def test_the_heads_are_weighted_means_of_the_labels_in_numpy():
    rng = np.random.default_rng(0)
    U, x, y, query = rng.normal(size=(3, 3)), rng.normal(size=(1, 5, 3)), rng.normal(size=(1, 5)), rng.normal(size=(1, 2, 3))
    yhat = softmax_limit.predictions(
        softmax_limit.layers(U), Prompt(x=jnp.asarray(x), y=jnp.asarray(y), query=jnp.asarray(query))
    )

    def mean(scores: np.ndarray) -> np.ndarray:
        p = np.exp(scores)
        return (p / p.sum(0)).T @ y[0]

    scores = x[0] @ U @ query[0].T
    wanted = [mean(scores), scores.T @ y[0] / 5, (mean(scores) - mean(-scores)) / 2]
    np.testing.assert_allclose(yhat[:, 0], wanted, rtol=2e-5)
    attended = softmax_limit.attended_means(softmax_limit.softmax_head(U), jnp.asarray(x), jnp.asarray(query[0]))
    p = np.exp(scores) / np.exp(scores).sum(0)
    np.testing.assert_allclose(attended[0], p.T @ x[0], rtol=2e-5)


def test_the_queries_have_the_score_variances_that_they_should(records):
    g = records[0]["gaussian"]
    s, r = np.array(g["s"]), np.array(g["alignment"])
    np.testing.assert_allclose(s[: len(softmax_limit.SCORES)], softmax_limit.SCORES, rtol=1e-9)
    best = slice(len(softmax_limit.SCORES), None)
    np.testing.assert_allclose(s[best] + r[best] * s[best] ** 2, 1.0, rtol=1e-9)
    assert len(s[best]) == softmax_limit.BEST


def _ideal(records: list[dict], slope: float = -1.0, constant: float = 1.0, price: float = 1.0, bent: float = 0.05) -> list[dict]:
    """Records that follow the asymptotic law, or another slope, constant, price and share that is not linear."""
    out = [copy.deepcopy(records[0]) for _ in range(6)]
    for i, r in enumerate(out):
        noise = 1 + 1e-3 * (-1) ** i
        M, c = np.array(r["M"], float), np.array(r["gaussian"]["constants"])
        law = noise * (M / M[-1])[:, None] ** slope / M[-1] * c[0] * constant
        r["gaussian"]["exact"] = (c[0] / M[:, None]).tolist()
        linear = c[1] / M[:, None] / price
        r["gaussian"]["measured"] = np.stack([law, linear, noise * (c[2] / M[:, None]) * constant], axis=1).tolist()
        r["simplex"] = [{"scaled": noise * constant, "nonlinear": noise * bent, "predicted": 0.05}]
    return out


def test_the_verdicts_follow_the_laws(records):
    wanted = dict.fromkeys(claim_ids("softmax_limit"), PASS) | {"softmax-limit/simplex": FAIL}
    assert {v.id: v.verdict for v in softmax_limit.check(_ideal(records))} == wanted

    def failing(**change: float) -> set[str]:
        return {v.id for v in softmax_limit.check(_ideal(records, **change)) if v.verdict == FAIL}

    assert {"softmax-limit", "softmax-limit/exact"} <= failing(slope=-0.75)
    # without the factor e^s (e^0.25 at least)
    assert {"softmax-limit/constant", "softmax-limit/exact", "softmax-limit/tilted"} <= failing(constant=np.exp(-0.25))
    # a head that would need 0.8 of the pairs
    assert {"softmax-limit/price", "softmax-limit/price-floor", "softmax-limit/two-heads"} <= failing(price=0.8)
    assert {v.id: v.verdict for v in softmax_limit.check(_ideal(records, bent=1e-4))}["softmax-limit/simplex"] == PASS


def test_a_higher_floor_fails_where_the_floor_holds(records):
    """The floor e in place of 2.4286 is a factor 1.12 above: the prices refute it."""
    floor, ideal = "softmax-limit/price-floor", _ideal(records)
    assert {v.id: v.verdict for v in softmax_limit.check(ideal)}[floor] == PASS
    for r in ideal:
        r["floor"] = float(np.e)
    assert {v.id: v.verdict for v in softmax_limit.check(ideal)}[floor] == FAIL


def test_smoke_records_and_figure(records):
    verdicts = softmax_limit.check(records)
    assert tuple(v.id for v in verdicts) == claim_ids("softmax_limit")
    assert {v.figure for v in verdicts} == set(softmax_limit.plot(records))
    assert all(np.min(r["gaussian"]["measured"]) > 0 for r in records)


def test_a_config_out_of_range_names_its_field():
    for field, value in (("M", (4,)), ("slope_from", 16), ("prompts", 0), ("sigma", -1.0)):
        with pytest.raises(ValueError, match=field):
            replace(softmax_limit.SMOKE, **{field: value})
