"""Pretraining on T prompts: the records, the fits by the normal equations, and criteria that notice another law."""

import copy

import numpy as np
import pytest

from lindm_experiments import pretraining
from lindm_experiments.harness.claims import FAIL, PASS, Mutant, claim_ids
from lindm_experiments.harness.mutants import try_mutants
from lindm_experiments.mutants import PRETRAINING
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(pretraining)


def test_it_runs_and_decides_and_draws_what_it_says(records):
    verdicts = pretraining.check(records)
    assert tuple(v.id for v in verdicts) == claim_ids("pretraining")
    assert {v.figure for v in verdicts} <= set(pretraining.plot(records))


@pytest.mark.parametrize("T", [5, 40])
def test_the_fits_solve_the_normal_equations_and_have_the_smallest_norm_without_a_ridge(T):
    rng = np.random.default_rng(T)
    w, S, query = rng.normal(size=(3, T, 3))
    free, fitted = pretraining.one_query_fits(w, S, query, [0.0, 0.7])
    Z = np.stack([np.outer(q, s).ravel() for q, s in zip(query, S, strict=True)])
    y = np.array([q @ v for q, v in zip(query, w, strict=True)])
    np.testing.assert_allclose(Z.T @ (Z @ fitted.ravel() - y) + 0.7 * fitted.ravel(), 0.0, atol=1e-9)
    np.testing.assert_allclose(free.ravel(), np.linalg.pinv(Z) @ y, atol=1e-7)


def test_the_exact_risk_is_the_mean_over_fresh_prompts():
    cfg, rng = pretraining.SMOKE, np.random.default_rng(0)
    Lambda, Psi, _ = pretraining.covariances(rng, cfg.d)
    A = rng.normal(size=(cfg.d, cfg.d))
    for law, Lambda_ in (("Gaussian", Lambda), ("one-hot", np.eye(cfg.d) / cfg.d)):
        w, S, query = pretraining.draw_prompts(rng, law, Lambda_, Psi, 200_000, cfg)
        B = S.T @ S / len(S)
        errors = np.square(np.sum(query * (w - S @ A.T), axis=1))
        assert abs(pretraining.exact_risk(A, Lambda_, Psi, B) - errors.mean()) < 5 * errors.std() / np.sqrt(len(S))


def test_the_layer_of_one_hot_features_uses_their_own_moments():
    cfg = pretraining.Config(seeds=1, d_first=4, N=16, repeats_first=100, contexts=20_000, tau_first=64)
    for law in pretraining.LAWS:
        found = pretraining.first_order(np.random.default_rng(1), law, cfg)
        np.testing.assert_allclose([found["one"] / found["C_one"], found["all"] / found["C_all"]], 1.0, atol=0.15)


def _ideal(records: list[dict]) -> list[dict]:
    out = [copy.deepcopy(records[i % len(records)]) for i in range(5)]
    for i, r in enumerate(out):
        near = 1 + 1e-3 * i
        shape = np.array(r["predicted"]).shape
        r["predicted"][1] = (1.3 * np.array(r["predicted"][0])).tolist()  # other tasks cost more
        r["measured"] = (np.array(r["predicted"]) * near).tolist()
        falling = r["least"] * np.linspace(3.0, 1.5, shape[1])
        for name in ("measured", "predicted"):
            for test in range(2):
                for t in range(shape[1]):
                    r[name][test][t][-1] = falling[t] * (1 + 0.3 * test) * (near if name == "measured" else 1.0)
        peak = np.zeros(shape[1:])
        peak[r["T"].index(r["d"] ** 2), 0] = 3.0 + 0.1 * i
        r["log_risk"] = peak.tolist()
        for f in r["first_order"]:
            f["C_one"] = f["C_all"] * (f["d"] + (2 if f["law"] == "Gaussian" else 0))
            f["one"], f["all"] = f["C_one"] * near, f["C_all"] * (2 - near)
            f["C_residual"], f["C_tasks"] = f["C_one"] / 1.3, f["C_one"] / 80
        r["published"] = [v * near for _, v in pretraining.LIMITS]
    return out


def _verdicts(records: list[dict]) -> dict[str, str]:
    return {v.id: v.verdict for v in pretraining.check(records)}


def test_ideal_records_pass_but_for_the_two_refuted_statements(records):
    wanted = {id: FAIL if id.endswith(("gaussian-residual", "fixed-prompts")) else PASS for id in claim_ids("pretraining")}
    assert _verdicts(_ideal(records)) == wanted


@pytest.mark.parametrize(
    "claim", ["pretraining", "mismatch", "first-order", "double-descent", "ridge", "all-queries", "published"]
)
def test_another_law_fails(records, claim):
    mutants = _ideal(records)
    for r in mutants:
        if claim in ("pretraining", "mismatch"):  # one cell of one test
            r["measured"][int(claim == "mismatch")][0][1] *= 1.2
        if claim == "first-order":
            r["first_order"][1]["all"] *= 1.4
        if claim == "double-descent":
            r["log_risk"] = (0.2 * np.array(r["log_risk"])).tolist()
        if claim == "ridge":
            r["measured"][0][r["T"].index(r["d"] ** 2)][-1] *= 3
        if claim == "all-queries":
            r["first_order"][0]["one"] *= 1.4
        if claim == "published":
            r["published"][1] -= 0.1  # without the noise of the query's label
    id = claim if claim == "pretraining" else f"pretraining/{claim}"
    assert _verdicts(mutants)[id] == FAIL


@pytest.mark.parametrize("mutant", PRETRAINING, ids=lambda m: f"{m.claim}: {m.mistake}")
def test_every_mutant_is_killed_on_ideal_records(records, mutant: Mutant):
    assert try_mutants([mutant], {"pretraining": _ideal(records)})[0].killed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": (0.5, 1.0)}, "tau contain 0.25"),
        ({"ridge": (0.1, 0.5)}, "ridge must start at 0"),
        ({"d": 1}, "d must be"),
        ({"every": (2.0, 1.0)}, "every must contain"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        pretraining.Config(**change)
