"""Fine-tuning: prompts, risks and flows by another route, and verdicts that notice other laws."""

import copy
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm.icl.attention import FullAttention
from lindm.io import files
from lindm_experiments import fine_tuning
from lindm_experiments.harness import claims
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from lindm_experiments.harness.experiments import points_of

CFG = fine_tuning.SMOKE


@pytest.fixture(scope="module")
def records() -> list[dict]:
    raw = [{"point": p} | files.to_jsonable(fine_tuning.measure(CFG, p)) for p in points_of(fine_tuning, CFG)]
    return json.loads(json.dumps(raw))


@pytest.fixture(scope="module")
def problem():
    return fine_tuning.draw_problem(CFG, np.random.default_rng(0))


def test_features_and_tasks_have_the_moments_that_they_should(problem):
    np.testing.assert_allclose(problem.phi.T @ problem.phi / len(problem.phi), problem.Lambda, rtol=1e-9, atol=1e-12)
    assert np.linalg.cond(problem.Lambda) == pytest.approx(fine_tuning.KAPPA)
    for pool, size in zip(problem.pools, (2.0, 2.0), strict=True):
        np.testing.assert_allclose(pool.mean(0), 0, atol=1e-12)
        assert np.linalg.eigvalsh(pool.T @ pool / len(pool)).max() == pytest.approx(size)
    old, new, *mixtures = fine_tuning.laws(CFG, problem)
    np.testing.assert_allclose(mixtures[0], fine_tuning.SHARES[0] * old + (1 - fine_tuning.SHARES[0]) * new)
    w = problem.small[0, 0]
    np.testing.assert_allclose(mixtures[len(fine_tuning.SHARES)], np.outer(w, w), rtol=1e-12)
    assert {tuple(np.round(w * np.sign(w[0]), 9)) for w in problem.small[0, : 2 * CFG.few]} == {
        tuple(np.round(w * np.sign(w[0]), 9))
    }


def test_prompts_have_labels_of_their_task_and_the_weighed_queries(problem):
    data = fine_tuning.training(CFG, problem, rate=[0.25], count=[2.0], new=problem.small[:1], sigma=[0.0])
    one = jax.tree.map(lambda a: a[0], data)
    prompt, target = fine_tuning.draw(jax.random.key(0), one)
    w = problem.small[0, 0]
    ratio = np.asarray(prompt.y) / np.asarray(prompt.x @ w.astype(np.float32))
    np.testing.assert_allclose(np.abs(ratio), 1.0, rtol=1e-3)  # the task, with one sign for each prompt
    np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones_like(ratio), rtol=1e-3)
    query = np.asarray(prompt.query[0], float)
    np.testing.assert_allclose(query.T @ query / CFG.d, 0.25 * problem.Lambda, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(target, ratio[:, :1] * (query @ w), rtol=1e-3, atol=1e-4)
    # the noise has the variance that it should
    noisy, _ = fine_tuning.draw(jax.random.key(1), replace(one, sigma=np.float32(0.5), tasks=np.zeros(4000, np.float32)))
    clean, _ = fine_tuning.draw(jax.random.key(1), replace(one, tasks=np.zeros(4000, np.float32)))
    noise = np.asarray(noisy.y - clean.y, float)
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(0.5, rel=0.02)


def test_the_layer_at_the_start_has_the_exact_risk_and_half_its_weights_another(problem):
    laws = fine_tuning.laws(CFG, problem)
    exact = jax.tree.map(
        np.asarray, fine_tuning.predictions(problem.phi, laws, problem.mean, np.float64(CFG.N), np.float64(CFG.sigma))
    )
    rng = np.random.default_rng(1)
    for law in (0, 1):
        w = problem.pools[law][rng.integers(0, fine_tuning.POOL, 20_000)]
        x = problem.phi[rng.integers(0, len(problem.phi), (len(w), CFG.N))]
        y = np.einsum("pnd,pd->pn", x, w) + CFG.sigma * rng.normal(size=x.shape[:2])
        S = np.einsum("pn,pnd->pd", y, x) / CFG.N
        for A in (exact["A"][0], 0.5 * exact["A"][0]):
            off = S @ A.T - w
            squares = np.einsum("pi,ij,pj->p", off, problem.Lambda, off)
            error = squares.std() / np.sqrt(len(squares))
            assert abs(squares.mean() - fine_tuning.risk(exact, A, law)) < 5 * error
    # the flow starts at A_N(Psi_0) and lowers the new risk all the way
    np.testing.assert_allclose(exact["flow"][0, 0], exact["A"][0], rtol=1e-9)
    assert np.all(np.diff(fine_tuning.risk(exact, exact["flow"][0], 1)) < 1e-12)
    layer = fine_tuning.full_layer(exact["A"][0])
    np.testing.assert_allclose(layer.A[0], exact["A"][0], rtol=1e-5)


def test_a_turned_value_weight_and_a_moved_key_query_matrix_change_actions_of_the_layer(problem):
    rng = np.random.default_rng(2)
    A = np.eye(CFG.d) + 0.2 * rng.normal(size=(CFG.d, CFG.d))
    start = fine_tuning.full_layer(A)
    weights = [np.asarray(a[...], float) for a in (start.W_KQ, start.W_PV)]
    x, y = rng.normal(size=(9, CFG.N, CFG.d)), rng.normal(size=(9, CFG.N))
    S = np.einsum("pn,pnd->pd", y, x) / CFG.N
    np.testing.assert_allclose(fine_tuning.predicted(*weights, problem.phi, x, y), S @ A.T @ problem.phi.T, rtol=1e-5, atol=1e-6)

    def changes(label_weight=1.0, moved=0.0, key_label=0.0):
        """`weight_changes` of a layer after training that multiplies the label weight and adds to U and z."""
        W_KQ, W_PV = (np.repeat(a[None], 5, axis=0) for a in weights)
        W_KQ[..., :-1, :-1] += moved * rng.normal(size=(CFG.d, CFG.d))
        W_KQ[..., -1, :-1] += key_label
        W_PV[..., -1, -1] *= label_weight
        W_PV[..., -1, :-1] = 0.3  # the block v is not part of it
        value = FullAttention(CFG.d)
        value.W_KQ, value.W_PV = nnx.Param(jnp.asarray(W_KQ)), nnx.Param(jnp.asarray(W_PV))
        out = fine_tuning.policies(CFG, problem, np.random.default_rng(3), A, A, start, value)
        assert out["new"]["row_changes"] > 0
        return out["new"]["weight_changes"] / out["decisions"]

    assert changes(0.7) == 0
    assert changes(1.9) == 0
    assert changes(-0.7) == 1
    assert changes(0.7, moved=0.1) > 0.005
    assert changes(0.7, key_label=0.1) > 0.005


def _ideal(records: list[dict]) -> list[dict]:
    """Records that follow the theory, with small differences between the seeds."""
    out = [copy.deepcopy(records[i % len(records)]) for i in range(8)]
    for i, r in enumerate(out):
        noise = 1 + 1e-3 * (-1) ** i
        r["all"]["measured"] = (noise * np.array(r["all"]["flow"])).tolist()
        few = np.array(r["few"]["flow"])
        few[1, 0::2], few[1, 1::2] = 0.5 * noise, 0.8
        r["few"]["flow"] = r["few"]["measured"] = few.tolist()
        r["replay"]["measured"] = (noise * np.array(r["replay"]["optimum"])).tolist()
        n, shares = len(r["times"]), len(fine_tuning.SHARES)
        trained = np.array(r["trained"])
        trained[:, n : n + shares] = noise**2 * np.array(r["replay"]["optimum"]) * 1.005
        r["trained"] = trained.tolist()
        value = r["value"]
        value["risk"]["measured"] = (noise * np.array(value["risk"]["exact"])).tolist()
        value["zero_shot"] |= {"gain": 1.0, "lost": noise}
        value["row"]["measured"] = noise * value["row"]["exact"]
        for law, ratio in (("new", 0.5), ("old", 1.5)):
            r["policy"][law] |= {"loss": {"before": 1.0, "all": noise * ratio, "row": noise}, "weight_changes": 0}
            r["policy"][law] |= {"all_changes": 5, "row_changes": 1}
        r["policy"]["decisions"] = 10_000
    return out


def _verdicts(records: list[dict]) -> dict[str, str]:
    return {v.id: v.verdict for v in fine_tuning.check(records)}


def test_the_verdicts_follow_the_theory_and_its_mutants_fail(records, monkeypatch):
    ideal = _ideal(records)
    monkeypatch.setitem(claims.CLAIMS, "fine-tuning/frontier", replace(claims.CLAIMS["fine-tuning/frontier"], hi=0.01))
    assert _verdicts(ideal) == dict.fromkeys(claim_ids("fine_tuning"), PASS)
    mutants = copy.deepcopy(ideal)
    for r in mutants:
        for part in ("all", "few", "replay"):
            r[part]["measured"] = (1.2 * np.array(r[part]["measured"])).tolist()
        r["few"]["measured"][1] = (np.array(r["few"]["measured"][1]) ** -1).tolist()
        r["frontier"] = (1.05 * np.array(r["frontier"])).tolist()  # a frontier that is 5 % too high
        best = np.array(r["replay"]["optimum"]) * 0.9
        r["replay"]["optimum"] = best.tolist()
        value = r["value"]
        value["risk"]["measured"] = (1.2 * np.array(value["risk"]["measured"])).tolist()
        value["zero_shot"]["lost"] *= 0.5  # the claim that the value matrix forgets less
        value["row"]["measured"] *= 1.2
        for law in ("new", "old"):
            policy = r["policy"][law]
            policy["weight_changes"] = policy["all_changes"]  # all weights in place of the value weight
            policy["loss"] = {"before": 1.0, "all": policy["loss"]["row"], "row": policy["loss"]["all"]}
    assert _verdicts(mutants) == dict.fromkeys(claim_ids("fine_tuning"), FAIL)


def test_the_frontier_with_the_shares_exchanged_is_violated(records):
    good = fine_tuning.above_frontier(records[0])
    assert good.min() > 1 - 1e-9
    swapped = copy.deepcopy(records[0])
    swapped["frontier"] = [row[::-1] for row in swapped["frontier"]]
    assert fine_tuning.above_frontier(swapped).min() < 0.99


def test_smoke_gives_every_verdict_and_the_figure(records):
    verdicts = fine_tuning.check(records)
    assert tuple(v.id for v in verdicts) == claim_ids("fine_tuning")
    assert {v.figure for v in verdicts} == set(fine_tuning.plot(records))
    for r in records:
        assert all(r["policy"][law]["weight_changes"] == 0 for law in ("old", "new"))


def test_a_config_out_of_range_names_its_field():
    for field, value in (("times", (1.0,)), ("times", (1.0, 100.0)), ("few", 0), ("steps", 0), ("sigma", -1.0)):
        with pytest.raises(ValueError, match=field):
            replace(CFG, **{field: value})
