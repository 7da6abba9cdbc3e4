"""Closed forms against sampling and against `theory`, the conditional risks against real predictors, and tampered records."""

import json
from copy import deepcopy
from math import sqrt

import jax.numpy as jnp
import numpy as np
import pytest

from lindm.icl import predictors as baselines
from lindm.types import Prompt
from lindm_experiments import against_statistics as against
from lindm_experiments.against_statistics import SMOKE
from lindm_experiments.harness.claims import claim_ids
from lindm_experiments.harness.experiments import points_of
from lindm_experiments.lib import predictor_risks
from lindm_experiments.lib.predictor_risks import BAYES, CENTERED, LAYER


@pytest.fixture(scope="module")
def records() -> list[dict]:
    point = points_of(against, SMOKE)[0]
    record = json.loads(json.dumps({"point": point} | against.measure(SMOKE, point)))
    return [record | {"point": {"seed": s}} for s in range(5)]


def test_a_smoke_run_gives_every_claim_and_every_figure(records):
    assert tuple(v.id for v in against.check(records)) == claim_ids("against_statistics")
    assert set(against.plot(records)) == {"map", "methods"}


@pytest.mark.parametrize("M", [4, 12])
def test_the_risk_given_a_context_is_that_of_the_real_predictors(M):
    rng = np.random.default_rng(M)
    d, sigma, draws = 6, 0.7, 20_000
    x, root, A = rng.standard_normal((M, d)), rng.standard_normal((d, d)), rng.standard_normal((d, d))
    Psi, query = root @ root.T, np.eye(d)
    arrays = [jnp.asarray(a) for a in ((x.T @ x)[None], A[None], float(M), Psi, [sigma], np.eye(d))]
    exact = predictor_risks.risks(*arrays)
    # every predictor is linear in y: its matrix is read off the unit labels
    predictors = {LAYER: baselines.closed_form(A), "OLS": baselines.ols(), BAYES: baselines.bayes(Psi, sigma)}
    w = rng.standard_normal((draws, d)) @ root.T
    y = w @ x.T + sigma * rng.standard_normal((draws, M))
    for name, predict in predictors.items():
        columns = [predict(Prompt(x=jnp.asarray(x), y=jnp.asarray(e), query=jnp.asarray(query))) for e in np.eye(M)]
        error = ((y @ np.stack(columns) - w) ** 2).sum(1)
        assert abs(error.mean() - float(exact[name][0, 0])) < 5 * error.std() / sqrt(draws), name
    assert exact[BAYES][0, 0] < min(exact[LAYER][0, 0], exact["OLS"][0, 0])


def test_a_layer_that_inverts_the_gram_matrix_on_its_own_targets_is_lsvi():
    rng = np.random.default_rng(3)
    H, M, d, A, lam = 3, 11, 4, 2, 0.5
    phi, x = rng.uniform(size=(5, A, d)), rng.uniform(size=(H, M, d))
    r, after = rng.uniform(size=(H, M)), rng.uniform(size=(H, M, A, d))
    inverse = np.stack([M * np.linalg.inv(g.T @ g + lam * np.eye(d)) for g in x])
    arrays = [jnp.asarray(a) for a in (phi, inverse, x, r, after)]
    expected, _ = baselines.lsvi(arrays[0], *arrays[2:], lam)
    np.testing.assert_allclose(predictor_risks.own_targets(*arrays, jnp.asarray(float(M))), expected, rtol=1e-9)


def test_no_context_in_the_record_beats_bayes_and_the_uniform_policy_is_worst(records):
    cells = records[0]["mdp"]
    assert all(c["beats_bayes"] == 0 for c in (*cells, *records[0]["gaussian"]))
    assert all(c["loss"]["uniform policy"] > c["loss"]["Bayes, mean and covariance"] for c in cells)


def test_on_the_attained_context_layer_and_bayes_have_the_risk_of_ridge_regression():
    M, sigma, D = 8, 0.3, against.D
    bayes, layer = against.bayes_context(M, sigma)
    g = M + D + 1
    np.testing.assert_allclose([bayes, layer], D * (sigma**4 + sigma**2 * g) / (g + sigma**2) ** 2, rtol=1e-12)


@pytest.mark.fault("F24")
def test_tampered_records_flip_the_verdicts(records):
    good = deepcopy(records)
    for record in good:
        for cell in record["gaussian"]:
            cell["risk"][LAYER], cell["risk"]["OLS"] = cell["layer_exact"], cell["ols_exact"]
    assert against.check(good)[0].verdict == "PASS"
    for record in good:
        record["gaussian"][-1]["risk"][LAYER] *= 1.2
        record["mdp"][0]["loss"][CENTERED] = 2.0
    good[2]["mdp"][0]["beats_bayes"] = 1
    verdicts = {v.id: v.verdict for v in against.check(good)}
    assert verdicts["against-statistics"] == "FAIL"
    assert verdicts["against-statistics/bayes"] == "FAIL"
    assert verdicts["against-statistics/small-context"] == "FAIL"


@pytest.mark.parametrize(
    "change", [{"M_gauss": (8,)}, {"sigma": (0.0,)}, {"M_small": 7}, {"sigma_small": 7.0}, {"M_trained": (3,)}, {"tasks": 0}]
)
def test_a_config_out_of_range_is_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        against.Config(**change)
