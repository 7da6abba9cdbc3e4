"""Log-loss on actions: the minima against other minimizers, losses and bounds against simulation, verdicts against mutants."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.icl.attention import ReducedAttention
from lindm.problems.linear_mdp import simplex_family
from lindm.solvers.dp import policy_value
from lindm.types import MDP, Prompt
from lindm_experiments import log_loss as exp
from lindm_experiments.harness.claims import FAIL, PASS
from lindm_experiments.lib import linear_mdps
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(exp)


def test_cross_entropy_weights_are_the_minimum_that_gradient_descent_finds():
    rng = np.random.default_rng(0)
    phi, S = rng.normal(size=(4, 3, 2)), rng.normal(size=(60, 2))
    noisy = np.einsum("sai,nj,ij->nsa", phi, S, rng.normal(size=(2, 2))) + rng.gumbel(size=(60, 4, 3))
    target, weights = np.eye(3)[noisy.argmax(-1)], np.full(60, 1 / 60)
    A, gradient = exp.cross_entropy_weights(phi, S, target, weights)
    B = np.zeros((2, 2))
    for _ in range(3000):
        logits = np.einsum("sai,ij,nj->nsa", phi, B, S)
        q = np.exp(logits - logits.max(-1, keepdims=True))
        q /= q.sum(-1, keepdims=True)
        B -= 0.3 * np.einsum("nsa,sai,nj->ij", q - target, phi, S) / 240
    np.testing.assert_allclose(A, B, rtol=1e-3)  # the ridge takes 2e-4
    assert gradient < 1e-8


def test_unused_tasks_do_not_matter():
    rng = np.random.default_rng(1)
    phi, S = rng.normal(size=(3, 2, 2)), rng.normal(size=(30, 2))
    target = np.eye(2)[rng.integers(2, size=(30, 3))]
    used = np.where(np.arange(30) < 20, 1 / 20, 0.0)
    part, _ = exp.cross_entropy_weights(phi, S[:20], target[:20], np.full(20, 1 / 20))
    whole, _ = exp.cross_entropy_weights(phi, S, target, used)
    np.testing.assert_allclose(whole, part, rtol=1e-8)


def test_the_logits_are_the_predictions_of_the_attention_layer():
    family = simplex_family(jax.random.key(0), 3, 2, 2, 1)
    rng = np.random.default_rng(2)
    A, x, y = rng.normal(size=(2, 2)), rng.normal(size=(5, 2)), rng.normal(size=5)
    query = linear_mdps.pairs_table(family)
    layer = ReducedAttention(2, A=jnp.asarray(A))
    logits = linear_mdps.action_values(family, jnp.asarray(A)[None], jnp.asarray(y @ x / 5)[None])
    np.testing.assert_allclose(logits.ravel(), layer(Prompt(x=jnp.asarray(x), y=jnp.asarray(y), query=query)), rtol=1e-12)


def test_the_cliff_returns_one_to_the_expert_and_the_probability_of_no_deviation_to_others():
    rng = np.random.default_rng(3)
    H, S, A = 3, 4, 2
    P, rho = rng.dirichlet(np.ones(S), size=(H, S, A)), rng.dirichlet(np.ones(S))
    mdp = MDP(P=jnp.asarray(P), r=jnp.asarray(rng.normal(size=(H, S, A))), rho=jnp.asarray(rho))
    expert, q = rng.integers(A, size=(H, S)), rng.dirichlet(np.ones(A), size=(H, S))
    edge = exp.cliff(mdp, jnp.asarray(expert))
    np.testing.assert_allclose(edge.P.sum(-1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(edge.rho @ policy_value(edge, jnp.asarray(np.tile(expert, 2)))[0], 1.0, rtol=1e-12)
    agree = np.zeros(20000)
    for i in range(len(agree)):  # simulated trajectories of the imitator in the MDP itself
        s, right = rng.choice(S, p=rho), True
        for h in range(H):
            a = rng.choice(A, p=q[h, s])
            right, s = right and a == expert[h, s], rng.choice(S, p=P[h, s, a])
        agree[i] = right
    value = float(edge.rho @ policy_value(edge, jnp.asarray(np.concatenate([q, q], axis=1)))[0])
    assert abs(value - agree.mean()) < 4 * agree.std() / np.sqrt(len(agree))


def test_no_bound_is_broken_and_its_mutants_break(records):
    for r in records:
        for b in r["bounds"]:
            assert sum(b["violations"].values()) == 0
            assert b["mean"]["loss"] <= b["mean"]["deviation"] <= b["mean"]["regret"] <= b["mean"]["return"]
            for name in ("cliff", "thin"):
                truth = b["mean"]["cliff" if name == "cliff" else "thin cliff"]
                assert truth <= b["mean"][f"{name} bound"] <= 1.5 * truth
        assert r["bounds"][-1]["stage mean"] > r["n"] // 2
        assert all(truth <= bound * (1 + 1e-12) <= 2 * truth for truth, bound in r["attained"].values())


def _many(records: list[dict], few: float) -> list[dict]:
    out = copy.deepcopy(records * 3)
    for i, r in enumerate(out):
        squares = np.ones(len(r["T"]))
        late = 1 + 0.001 * i
        r["n"], r["loss"] = 1000, {"squares": squares, "hot": squares, "hard": [few, late], "soft": [0.9 * few, late]}
    return out


def test_verdicts_follow_the_losses_and_a_broken_bound_fails(records):
    expected = [PASS] * 6 + [FAIL]
    assert [v.verdict for v in exp.check(_many(records, 1.2))] == expected
    other = _many(records, 0.9)
    assert exp.check(other)[0].verdict == FAIL
    for r in other:
        r["loss"]["hot"] = [1.05, 1.0]
        r["loss"]["soft"] = r["loss"]["hard"]
        r["loss"]["hard"] = [0.9, 1.2]
    assert [v.verdict for v in exp.check(other)][1:4] == [FAIL] * 3
    other[0]["bounds"][0]["violations"]["regret"] = 1
    for r in other:
        r["bounds"][0]["thin ratio"] = 2.0
        r["bounds"][-1]["stage mean"] = 0
    assert [v.verdict for v in exp.check(other)][4:] == [FAIL, FAIL, PASS]
    below = _many(records, 1.2)
    below[0]["attained"]["greedy"][1] *= 0.9
    assert exp.check(below)[4].verdict == FAIL


def test_a_doubtful_greedy_choice_attains_its_bound():
    truth, bound = exp.doubtful(0.3)
    assert truth == 0.3
    np.testing.assert_allclose(bound, 0.3, rtol=1e-12)


def test_the_figure(records):
    assert set(exp.plot(records)) == {"log-loss"}


def test_a_config_out_of_range_names_its_field():
    for field, value in (("tasks", 0), ("horizon", 1), ("M", 0), ("temperature", 0.0), ("T", (64, 16))):
        with pytest.raises(ValueError, match=field):
            replace(exp.SMOKE, **{field: value})
