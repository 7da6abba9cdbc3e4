"""Learned weights beside the closed form: the records, A_N by numpy, and a criterion that notices another matrix."""

import copy

import jax
import numpy as np
import pytest

from lindm.problems.linear_mdp import second_moment
from lindm_experiments import weights
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(weights)


def test_smoke_records_decide_every_claim_and_draw_every_figure(records):
    verdicts = weights.check(records)
    assert tuple(v.id for v in verdicts) == claim_ids("weights")
    figures = weights.plot(records)
    assert {v.figure for v in verdicts} <= set(figures)


def test_the_gaussian_closed_form_in_the_record_is_the_inverse_of_gamma(records):
    spectrum = np.geomspace(2.0, 1.0, 4)
    Lambda = np.diag(4 * spectrum / spectrum.sum())
    N = weights.SMOKE.N
    gamma = (1 + 1 / N) * Lambda + np.trace(Lambda) / N * np.eye(4)
    law = weights._of(records[0], "gaussian")
    np.testing.assert_allclose(law["A_N"][0], np.linalg.inv(gamma), rtol=1e-10)
    np.testing.assert_allclose(np.array(law["full"]["U_limit"]) * law["full"]["u_limit"], np.linalg.inv(gamma), rtol=1e-10)


def test_the_onehot_closed_form_solves_its_normal_equations_by_enumeration():
    """With N = 2 pairs of two rows the moments of a context are a sum over four contexts."""
    family = weights.families(jax.random.key(0))["one-hot"]
    d = family.phi.shape[-1]
    w = np.random.default_rng(0).uniform(size=(3, 2048, d)) + 1.0
    A = np.asarray(weights.closed_forms(family, w, np.float64(2.0))[0])[0]
    Psi = w[0].T @ w[0] / len(w[0])
    SS, Sw = np.zeros((d, d)), np.zeros((d, d))
    for i in range(d):
        for j in range(d):
            G = np.zeros((d, d))
            G[i, i] += 0.5
            G[j, j] += 0.5
            SS += G @ Psi @ G / d**2
            Sw += G @ Psi / d**2
    np.testing.assert_allclose(A[0] @ SS, Sw.T, atol=1e-12)


def test_columns_in_the_place_of_queries_keep_the_second_moment():
    family = weights.families(jax.random.key(1))["simplex"]
    Lambda = np.asarray(second_moment(family))
    prompt, target = weights.new_task_prompts(5, 3)(jax.random.key(0), family, np.sqrt(4) * np.linalg.cholesky(Lambda).T)
    assert prompt.x.shape == (3, 3 * 5, 4) and target.shape == prompt.query.shape[:2] == (3, 4 * 4)
    np.testing.assert_allclose(np.asarray(prompt.query[0, :4]).T @ np.asarray(prompt.query[0, :4]) / 4, Lambda, rtol=1e-10)


def _ideal(records: list[dict]) -> list[dict]:
    """Records of a layer that reached its closed form, in five slightly different seeds."""
    out = [copy.deepcopy(records[i % len(records)]) for i in range(5)]
    for i, r in enumerate(out):
        for law in r["laws"]:
            law["learned"] = (np.array(law["A_N"]) * (1 + 1e-3 * i)).tolist()
        full = weights._of(r, "gaussian")["full"]
        full["U"] = (np.array(full["U_limit"]) * (1 + 1e-3 * i)).tolist()
        full["u"] = full["u_limit"] * (1 - 1e-3 * i)
        r["leak"] |= {"risk_full": 0.97 + 1e-3 * i, "risk_reduced": 1.0}
    return out


def test_the_closed_form_passes_and_the_paper_gamma_is_refuted(records):
    assert [v.verdict for v in weights.check(_ideal(records))] == [PASS, PASS, FAIL, PASS]


def test_other_weights_turn_the_verdict(records):
    mutants = _ideal(records)
    for i, r in enumerate(mutants):
        law = weights._of(r, "simplex")
        law["learned"][-1] = (np.array(law["A_N"][-1]) * (1.05 + 1e-3 * i)).tolist()  # one stage of one law, 5 % off
        weights._of(r, "gaussian")["full"]["u"] *= 1.2
        r["leak"]["risk_full"] += 0.1
    assert [v.verdict for v in weights.check(mutants)] == [FAIL, FAIL, FAIL, FAIL]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": 1}, "chunks must be a whole number of at least 2"),
        ({"N_leak": 64}, "N_leak must not exceed N = 32; got 64"),
        ({"pool": 1000}, "pool must be a multiple of 2048"),
        ({"batch": 0}, "batch"),
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        weights.Config(**change)
