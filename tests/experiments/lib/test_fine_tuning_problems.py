"""Fine-tuning: features, tasks, prompts, exact risks and policies by another route."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm.icl.attention import FullAttention
from lindm_experiments.lib import fine_tuning_problems

d = 3
SIZES = {"d": d, "few": 1, "sets": 2, "N": 16, "sigma": 0.3}


@pytest.fixture(scope="module")
def problem():
    return fine_tuning_problems.draw_problem(np.random.default_rng(0), **SIZES)


def test_features_and_tasks_have_the_moments_that_they_should(problem):
    np.testing.assert_allclose(problem.phi.T @ problem.phi / len(problem.phi), problem.Lambda, rtol=1e-9, atol=1e-12)
    assert np.linalg.cond(problem.Lambda) == pytest.approx(fine_tuning_problems.KAPPA)
    for pool, size in zip(problem.pools, (2.0, 2.0), strict=True):
        np.testing.assert_allclose(pool.mean(0), 0, atol=1e-12)
        assert np.linalg.eigvalsh(pool.T @ pool / len(pool)).max() == pytest.approx(size)
    old, new, *mixtures = fine_tuning_problems.laws(problem)
    np.testing.assert_allclose(mixtures[0], fine_tuning_problems.SHARES[0] * old + (1 - fine_tuning_problems.SHARES[0]) * new)
    w = problem.small[0, 0]
    np.testing.assert_allclose(mixtures[len(fine_tuning_problems.SHARES)], np.outer(w, w), rtol=1e-12)
    assert {tuple(np.round(w * np.sign(w[0]), 9)) for w in problem.small[0, : 2 * problem.few]} == {
        tuple(np.round(w * np.sign(w[0]), 9))
    }


def test_prompts_have_labels_of_their_task_and_the_weighed_queries(problem):
    data = fine_tuning_problems.training(problem, 8, rate=[0.25], count=[2.0], new=problem.small[:1], sigma=[0.0])
    one = jax.tree.map(lambda a: a[0], data)
    prompt, target = fine_tuning_problems.draw(jax.random.key(0), one)
    w = problem.small[0, 0]
    ratio = np.asarray(prompt.y) / np.asarray(prompt.x @ w.astype(np.float32))
    np.testing.assert_allclose(np.abs(ratio), 1.0, rtol=1e-3)  # the task, with one sign for each prompt
    np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones_like(ratio), rtol=1e-3)
    query = np.asarray(prompt.query[0], float)
    np.testing.assert_allclose(query.T @ query / d, 0.25 * problem.Lambda, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(target, ratio[:, :1] * (query @ w), rtol=1e-3, atol=1e-4)
    # the noise has the variance that it should
    noisy, _ = fine_tuning_problems.draw(jax.random.key(1), replace(one, sigma=np.float32(0.5), tasks=np.zeros(4000, np.float32)))
    clean, _ = fine_tuning_problems.draw(jax.random.key(1), replace(one, tasks=np.zeros(4000, np.float32)))
    noise = np.asarray(noisy.y - clean.y, float)
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(0.5, rel=0.02)


def test_the_layer_at_the_start_has_the_exact_risk_and_half_its_weights_another(problem):
    exact = fine_tuning_problems.predictions(problem)
    rng = np.random.default_rng(1)
    for law in (0, 1):
        w = problem.pools[law][rng.integers(0, fine_tuning_problems.POOL, 20_000)]
        x = problem.phi[rng.integers(0, len(problem.phi), (len(w), problem.N))]
        y = np.einsum("pnd,pd->pn", x, w) + problem.sigma * rng.normal(size=x.shape[:2])
        S = np.einsum("pn,pnd->pd", y, x) / problem.N
        for A in (exact["A"][0], 0.5 * exact["A"][0]):
            off = S @ A.T - w
            squares = np.einsum("pi,ij,pj->p", off, problem.Lambda, off)
            error = squares.std() / np.sqrt(len(squares))
            assert abs(squares.mean() - fine_tuning_problems.risk(exact, A, law)) < 5 * error
    # the flow starts at A_N(Psi_0) and lowers the new risk all the way
    np.testing.assert_allclose(exact["flow"][0, 0], exact["A"][0], rtol=1e-9)
    assert np.all(np.diff(fine_tuning_problems.risk(exact, exact["flow"][0], 1)) < 1e-12)
    layer = fine_tuning_problems.full_layer(exact["A"][0])
    np.testing.assert_allclose(layer.A[0], exact["A"][0], rtol=1e-5)


def test_a_turned_value_weight_and_a_moved_key_query_matrix_change_actions_of_the_layer(problem):
    rng = np.random.default_rng(2)
    A = np.eye(d) + 0.2 * rng.normal(size=(d, d))
    start = fine_tuning_problems.full_layer(A)
    weights = [np.asarray(a[...], float) for a in (start.W_KQ, start.W_PV)]
    x, y = rng.normal(size=(9, problem.N, d)), rng.normal(size=(9, problem.N))
    S = np.einsum("pn,pnd->pd", y, x) / problem.N
    np.testing.assert_allclose(
        fine_tuning_problems.predicted(*weights, problem.phi, x, y), S @ A.T @ problem.phi.T, rtol=1e-5, atol=1e-6
    )

    def changes(label_weight=1.0, moved=0.0, key_label=0.0):
        """`weight_changes` of a layer after training that multiplies the label weight and adds to U and z."""
        W_KQ, W_PV = (np.repeat(a[None], 5, axis=0) for a in weights)
        W_KQ[..., :-1, :-1] += moved * rng.normal(size=(d, d))
        W_KQ[..., -1, :-1] += key_label
        W_PV[..., -1, -1] *= label_weight
        W_PV[..., -1, :-1] = 0.3  # the block v is not part of it
        value = FullAttention(d)
        value.W_KQ, value.W_PV = nnx.Param(jnp.asarray(W_KQ)), nnx.Param(jnp.asarray(W_PV))
        out = fine_tuning_problems.policies(problem, 64, np.random.default_rng(3), A, A, start, value)
        assert out["new"]["row_changes"] > 0
        return out["new"]["weight_changes"] / out["decisions"]

    assert changes(0.7) == 0
    assert changes(1.9) == 0
    assert changes(-0.7) == 1
    assert changes(0.7, moved=0.1) > 0.005
    assert changes(0.7, key_label=0.1) > 0.005
