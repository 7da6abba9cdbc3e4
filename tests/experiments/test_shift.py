"""Shift: smoke, a prediction by another route, and a verdict that can fail."""

import copy

import jax
import numpy as np
import pytest

from lindm_experiments import shift
from lindm_experiments.harness.claims import claim_ids
from lindm_experiments.harness.experiments import points_of
from lindm_experiments.lib import linear_mdps


@pytest.fixture(scope="module")
def records():
    return [{"point": p} | shift.measure(shift.SMOKE, p) for p in points_of(shift, shift.SMOKE)]


def on_the_lines(record: dict, seeds: int = 8) -> list[dict]:
    """The record as if the measurement were right, with small differences between the seeds."""
    out = []
    for seed in range(seeds):
        r, factor = copy.deepcopy(record), 1 + 1e-3 * (-1) ** seed
        r["measured"] = {kind: [factor * v for v in r["exact"][kind]] for kind in shift.KINDS}
        r["long"]["measured"] = {kind: factor * v for kind, v in r["long"]["floor"].items()}
        r["policies"]["n"] = 5000
        out.append(r)
    return out


def numpy_risk(A, x, p, w, Lambda_q, M, sigma):
    """Mean over the tasks w [n, d] of |A S_M - w|^2 in Lambda_q, pair by pair of the law (x [m, d], p [m])."""
    total = 0.0
    for task in w:
        y = x @ task
        mean = (p * y) @ x
        covariance = (x * (p * (y**2 + sigma**2))[:, None]).T @ x - np.outer(mean, mean)
        miss = A @ mean - task
        total += np.trace(Lambda_q @ A @ covariance @ A.T) / M + miss @ Lambda_q @ miss
    return total / len(w)


def test_smoke_gives_every_verdict_and_figure(records):
    verdicts = shift.check(records)
    assert [v.id for v in verdicts] == list(claim_ids("shift"))
    assert set(shift.plot(records)) == {v.figure for v in verdicts}


def test_the_predictions_are_the_risk_summed_over_tasks_and_pairs_in_numpy(records):
    cfg = shift.SMOKE
    k_pool, _, k_tasks, *_ = jax.random.split(jax.random.key(cfg.base_seed), 6)
    train, query, other = shift.families(cfg, cfg.base_seed)
    x = np.asarray(linear_mdps.pairs_table(train))
    p, q, o = (np.asarray(f.design) for f in (train, query, other))
    pool = np.asarray(linear_mdps.task_pool(k_pool, train))
    w = np.asarray(linear_mdps.task_pool(k_tasks, train))[:, : cfg.contexts]
    Lambda = (x * p[:, None]).T @ x
    predicted = dict.fromkeys(shift.KINDS, 0.0)
    M = cfg.M[0]
    for h in range(len(w)):
        Psi = pool[h].T @ pool[h] / len(pool[h])
        K = (x * (p * np.einsum("ni,ij,nj->n", x, Psi, x))[:, None]).T @ x
        A = Psi @ Lambda @ np.linalg.inv((1 - 1 / cfg.N) * Lambda @ Psi @ Lambda + K / cfg.N)
        for kind, law in {
            "none": (x, p, Lambda, 0.0),
            "query": (x, p, (x * q[:, None]).T @ x, 0.0),
            "noise": (x, p, Lambda, cfg.sigma),
            "scale": (cfg.c * x, p, Lambda, 0.0),
            "spectrum": (x, o, Lambda, 0.0),
        }.items():
            seen, weights, Lambda_q, sigma = law
            predicted[kind] += numpy_risk(A, seen, weights, w[h], Lambda_q, M, sigma)
    for kind in shift.KINDS:
        np.testing.assert_allclose(records[0]["closed"][kind][0], predicted[kind], rtol=1e-9)


def test_the_scale_changes_no_action_and_the_spectrum_does(records):
    for r in records:
        assert all(r["policies"]["changed"][f"{c:g}"] == 0 for c in shift.SMOKE.scales)
        assert r["policies"]["changed"]["spectrum"] > 0
        assert r["policies"]["error"]["3"] > 10 * r["policies"]["error"]["1"]


def test_points_on_the_lines_pass(records):
    assert [v.verdict for v in shift.check(on_the_lines(records[0]))] == ["PASS"] * 3


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_mutated_record_turns_the_verdict_into_fail(records, which):
    wrong = on_the_lines(records[0])
    for r in wrong:
        if which == 0:
            r["measured"]["query"][-1] *= 1.1
        elif which == 1:
            r["long"]["measured"]["spectrum"] *= 1.1
        else:
            r["policies"]["changed"]["3"] = 1
    assert shift.check(wrong)[which].verdict == "FAIL"


@pytest.mark.parametrize(
    "bad",
    [{"c": 0.0}, {"sigma": -1.0}, {"contexts": 100}, {"M": (8, 4)}, {"kappa": 0.5}, {"tilt_query": 0.0}, {"scales": (2.0,)}],
)
def test_a_config_out_of_range_names_the_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        shift.Config(**bad)
