"""Dependence: smoke, a prediction by another route, and a verdict that can fail."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from lindm_experiments import dependence
from lindm_experiments.harness.claims import claim_ids
from lindm_experiments.harness.experiments import points_of


@pytest.fixture(scope="module")
def records():
    return [{"point": p} | dependence.measure(dependence.SMOKE, p) for p in points_of(dependence, dependence.SMOKE)]


def on_the_lines(record: dict, seeds: int = 8) -> list[dict]:
    """The record as if the measurement and the training were right, with small differences between the seeds."""
    out = []
    for seed in range(seeds):
        r, factor = copy.deepcopy(record), 1 + 1e-3 * (-1) ** seed
        for c in r["cells"]:
            c["measured"] = {k: factor * v for k, v in c["exact"].items()}
            c["size"][0] = factor * c["size"][1]
        r["weights_error"] = [1e-3 * factor] * len(r["names"])
        out.append(r)
    return out


def test_smoke_gives_every_verdict_and_figure(records):
    verdicts = dependence.check(records)
    assert [v.id for v in verdicts] == list(claim_ids("dependence"))
    assert set(dependence.plot(records)) == {v.figure for v in verdicts}


def test_kernels_are_kernels_with_the_stated_stationary_law_and_covariance():
    cases = dependence.chains(dependence.SMOKE, 5)
    for kernel, start, phi in zip(*(np.asarray(a) for a in (cases.kernel, cases.start, cases.phi)), strict=True):
        np.testing.assert_allclose(kernel.sum(1), 1, atol=1e-12)
        assert kernel.min() >= -1e-15
        np.testing.assert_allclose(start @ kernel, start, atol=1e-12)
        spectrum = np.linalg.eigvalsh((phi * start[:, None]).T @ phi)
        np.testing.assert_allclose(spectrum[-1] / spectrum[0], dependence.SMOKE.kappa, rtol=1e-9)


def test_risk_and_effective_size_are_the_double_sum_over_pairs_in_numpy(records):
    """E[S S'] from all pairs (i, j) and powers of the kernel, where the code uses one pass along the chain."""
    cfg = dependence.SMOKE
    cases = dependence.chains(cfg, cfg.base_seed)
    k_pool, *_ = jax.random.split(jax.random.key(cfg.base_seed), 3)
    pool, tested = (np.asarray(dependence.draw_tasks(k, cases, tasks=cfg.contexts)) for k in jax.random.split(k_pool))
    c = dependence.names(cfg).index("turn")
    phi, p, kernel = (np.asarray(a)[c] for a in (cases.phi, cases.start, cases.kernel))
    Psi, Psi_trained = (w[c].T @ w[c] / len(w[c]) for w in (tested, pool))
    outer = phi[:, :, None] * phi[:, None, :]
    Lambda = np.einsum("n,nij->ij", p, outer)

    def second(length: int, kernel: np.ndarray, Psi: np.ndarray = Psi) -> np.ndarray:
        total = np.zeros_like(Lambda)
        for lag in range(length):
            joint = p[:, None] * np.linalg.matrix_power(kernel, lag)
            term = np.einsum("ab,aij,jk,bkl->il", joint, outer, Psi, outer)
            total += (length - lag) * (term if lag == 0 else term + term.T)
        return total / length**2

    independent = np.broadcast_to(p, kernel.shape)
    A = np.linalg.solve(second(cfg.N, independent, Psi_trained), Lambda @ Psi_trained).T
    M = cfg.M[-1]
    V = second(M, kernel) - Lambda @ Psi @ Lambda
    V_1 = second(1, kernel) - Lambda @ Psi @ Lambda
    miss = A @ Lambda - np.eye(len(A))
    risk = np.trace(Lambda @ A @ V @ A.T) + np.trace(Lambda @ miss @ Psi @ miss.T)
    size = np.trace(Lambda @ A @ V_1 @ A.T) / np.trace(Lambda @ A @ V @ A.T)
    cell = next(x for x in records[0]["cells"] if (x["case"], x["M"], x["pooled"]) == ("turn", M, False))
    np.testing.assert_allclose(cell["exact"]["plain"], risk, rtol=1e-9)
    np.testing.assert_allclose(cell["size"][1], size, rtol=1e-9)


def test_measured_risks_are_near_the_exact_ones_even_in_the_smoke_run(records):
    ratios = [c["measured"]["plain"] / c["exact"]["plain"] for r in records for c in r["cells"]]
    np.testing.assert_allclose(ratios, 1, atol=0.25)


def test_points_on_the_lines_pass(records):
    assert [v.verdict for v in dependence.check(on_the_lines(records[0]))] == ["PASS"] * 4


@pytest.mark.parametrize("which", range(4))
def test_a_mutated_record_turns_the_verdict_into_fail(records, which):
    wrong = on_the_lines(records[0])
    for r in wrong:
        turn = next(c for c in r["cells"] if c["case"] == "turn")
        slow = next(c for c in r["cells"] if c["case"].startswith("stay"))
        if which == 0:
            turn["measured"]["own"] *= 1.1
        elif which == 1:
            slow["size"] = [1.2 * slow["M"] * s / slow["size"][1] for s in slow["size"]]
        elif which == 2:
            turn["size"] = [0.8 * turn["M"] * s / turn["size"][1] for s in turn["size"]]
        else:
            r["weights_error"][1] += 0.03
    assert dependence.check(wrong)[which].verdict == "FAIL"


@pytest.mark.parametrize("bad", [{"contexts": 100}, {"copies": 1}, {"M": (8, 4)}, {"stick": (0.0, 1.0)}, {"kappa": 0.5}])
def test_a_config_out_of_range_names_the_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        dataclasses.replace(dependence.QUICK, **bad)
