"""The claims about isotropy against numpy: weights, equivariance, the balance line, and records that were tampered with."""

import json
from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.problems.linear_mdp import onehot_family, second_moment
from lindm_experiments import isotropy
from lindm_experiments.harness.claims import claim_ids
from lindm_experiments.harness.experiments import points_of
from lindm_experiments.isotropy import FULL, QUICK, SIMPLEX, SMOKE


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """Five records: the one smoke seed that was measured, five times."""
    point = points_of(isotropy, SMOKE)[0]
    record = json.loads(json.dumps({"point": point} | isotropy.measure(SMOKE, point)))
    return [record | {"point": {"seed": s}} for s in range(5)]


def weights(phi: np.ndarray, Psi: np.ndarray, N: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lambda, R and A_N of a uniform design, by loops."""
    x = phi.reshape(-1, phi.shape[-1])
    Lambda = np.mean([np.outer(v, v) for v in x], axis=0)
    K = np.mean([(v @ Psi @ v) * np.outer(v, v) for v in x], axis=0)
    R = K - Lambda @ Psi @ Lambda
    return Lambda, R, Psi @ Lambda @ np.linalg.inv(Lambda @ Psi @ Lambda + R / N)


def test_a_smoke_run_gives_every_claim_and_every_figure(records):
    assert tuple(v.id for v in isotropy.check(records)) == claim_ids("isotropy")
    assert set(isotropy.plot(records)) == {"plane", "actions"}
    assert QUICK.seeds >= 5 and FULL.seeds >= 10


def test_no_action_differs_in_the_isotropic_families_and_some_do_elsewhere(records):
    record = records[0]
    assert all(record["families"][n]["differing"] == 0 for n in isotropy.ISOTROPIC)
    assert all(record["bandits"][n]["differing"] == 0 for n in isotropy.LAWS[:2])
    assert record["bandits"][isotropy.LAWS[2]]["differing"] > 0
    assert record["families"][SIMPLEX]["differing"] > 0
    assert record["coordinates"]["differing"] == 0


def test_the_charge_of_equation_six_equals_numpy(records):
    record, d = records[0], isotropy.d
    for name in (isotropy.ISOTROPIC[0], SIMPLEX):
        Lambda = np.asarray(second_moment(isotropy.families(isotropy.SMOKE.base_seed)[name]))
        spectrum = np.linalg.eigvalsh(Lambda)
        one = (1 + 2 * d + d**2 * spectrum[-1] / spectrum[0]) * np.trace(Lambda)
        expected = [isotropy.H * one / n**2 for n in record["N"]]
        np.testing.assert_allclose(record["families"][name]["paper_bias"], expected, rtol=1e-10)
    expected = [(1 + 2 * d + d**2 * k) * d for k in record["kappa"]]
    np.testing.assert_allclose(record["coordinates"]["paper"], expected, rtol=1e-10)


def test_weights_bias_and_balance_agree_with_numpy():
    family, rng = isotropy.families(1)[SIMPLEX], np.random.default_rng(0)
    pool = rng.normal(0.5, 1, (2, 100, isotropy.d))
    N, M = np.array([3.0, 50.0]), np.array([5.0, 80.0])
    out = isotropy.predict(family, jnp.asarray(pool), jnp.asarray(False), jnp.asarray(N), jnp.asarray(M))
    stages = [np.einsum("ni,nj->ij", p, p) / len(p) for p in pool]

    def parts(M: float, N: float) -> tuple[float, float]:
        estimation = bias = 0.0
        for Psi in stages:
            Lambda, R, A = weights(np.asarray(family.phi), Psi, N)
            miss = A @ Lambda - np.eye(len(A))
            estimation += np.trace(Lambda @ A @ R @ A.T) / M
            bias += np.trace(Lambda @ miss @ Psi @ miss.T)
        return estimation, bias

    for i, n in enumerate(N):
        np.testing.assert_allclose(out["A"][i, 1], weights(np.asarray(family.phi), stages[1], n)[2], rtol=1e-8)
        assert out["bias"][i] == pytest.approx(parts(1.0, n)[1], rel=1e-8)
    for m, n in zip(M, np.asarray(out["balance"]), strict=True):
        estimation, bias = parts(m, n)
        assert estimation == pytest.approx(bias, rel=1e-8)


def test_exchangeable_is_the_mean_over_all_permutations():
    Psi = np.random.default_rng(1).normal(size=(3, 3))
    Psi = Psi @ Psi.T
    orders = [np.eye(3)[list(p)] for p in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))]
    mean = sum(P.T @ Psi @ P for P in orders) / 6
    np.testing.assert_allclose(isotropy.exchangeable(jnp.asarray(Psi)), mean, atol=1e-14)


def test_on_tabular_features_with_exchangeable_tasks_the_weights_lie_in_the_span_of_identity_and_ones():
    phi = np.asarray(onehot_family(2, 3, 1).phi)
    for N in (1.0, 7.0, 400.0):
        A = weights(phi, 0.3 * np.eye(6) + 2.0, N)[2]
        off = A[~np.eye(6, dtype=bool)]
        np.testing.assert_allclose(off, off[0], atol=1e-12)
        np.testing.assert_allclose(np.diag(A), A[0, 0], atol=1e-12)
        assert A[0, 0] > off[0]


def test_the_layer_is_equivariant():
    rng = np.random.default_rng(2)
    phi, root, T = np.asarray(isotropy.families(1)[SIMPLEX].phi), rng.normal(size=(6, 6)), rng.normal(size=(6, 6))
    Psi, back = root @ root.T, np.linalg.inv(T)
    A = weights(phi, Psi, 9.0)[2]
    carried = weights(phi @ T.T, back.T @ Psi @ back, 9.0)[2]
    np.testing.assert_allclose(carried, back.T @ A @ back, rtol=1e-7, atol=1e-8)


def test_sign_symmetry_alone_leaves_an_anisotropic_fourth_moment():
    x = isotropy.bandit_law(isotropy.LAWS[2])
    np.testing.assert_allclose(x.T @ x / len(x), np.eye(4), atol=1e-12)
    np.testing.assert_allclose((x**2).sum(1) * x.T @ x / len(x), np.diag([4.0, 4, 5, 5]), atol=1e-12)
    axes = isotropy.bandit_law("signed axes")
    np.testing.assert_allclose((axes**2).sum(1) * axes.T @ axes / len(axes), 4 * np.eye(4), atol=1e-12)


def test_one_action_that_differs_refutes_the_claim(records):
    for path in (("families", isotropy.ISOTROPIC[0]), ("bandits", isotropy.LAWS[0]), ("coordinates",)):
        broken = deepcopy(records)
        cell = broken[3]
        for step in path:
            cell = cell[step]
        cell["differing"] = 1
        verdicts = {v.id: v.verdict for v in isotropy.check(broken)}
        assert verdicts["isotropy/coordinates" if path == ("coordinates",) else "isotropy"] == "FAIL"


def test_a_policy_that_does_not_depend_on_N_refutes_the_anisotropic_claim(records):
    before = {v.id: v.verdict for v in isotropy.check(records)}
    assert before["isotropy/anisotropic"] == "PASS"
    broken = deepcopy(records)
    for record in broken:
        record["families"][SIMPLEX]["share"] = [[0.0] * len(SMOKE.M) for _ in SMOKE.N]
    assert {v.id: v.verdict for v in isotropy.check(broken)}["isotropy/anisotropic"] == "FAIL"


@pytest.mark.parametrize("change", [{"tasks": 0}, {"N": (4,)}, {"M": (8, 4)}, {"kappa": (0, 1)}, {"seeds": 0}])
def test_a_config_out_of_range_is_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        isotropy.Config(**change)


def test_a_shorter_context_is_the_beginning_of_a_longer_one():
    family = isotropy.families(1)[SIMPLEX]
    tests, pool = isotropy.draw_test_tasks(jax.random.key(5), family, SMOKE.tasks, SMOKE.pool, SMOKE.M[-1])
    M = jnp.asarray(SMOKE.M, float)
    A = isotropy.predict(family, pool, jnp.asarray(False), jnp.asarray([2.0, 512.0, 4.0, 16.0]), M)["A"]
    _, actions = isotropy.policies(family, tests, A, M)
    (_, _, w, pairs), phi = tests, np.asarray(family.phi)
    x = phi.reshape(-1, isotropy.d)[np.asarray(pairs)[3]]
    for m, length in enumerate(SMOKE.M):
        S = np.stack([sum((v @ w[3, h]) * v for v in x[h, :length]) / length for h in range(isotropy.H)])
        Q = np.einsum("sai,hij,hj->hsa", phi, np.asarray(A[1]), S)
        np.testing.assert_array_equal(np.asarray(actions)[3, 1, m], Q.argmax(-1))
