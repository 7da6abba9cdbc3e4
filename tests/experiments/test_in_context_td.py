"""Depth as temporal-difference learning: the looped layer against the library's, tasks and contexts against loops, verdicts."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.icl.attention import ReducedAttention
from lindm.problems.linear_mdp import draw_task, simplex_family
from lindm.types import Prompt
from lindm_experiments import in_context_td as exp
from lindm_experiments.harness.claims import FAIL, PASS
from lindm_theory import temporal_difference as td
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(exp)


@pytest.fixture(scope="module")
def family():
    return simplex_family(jax.random.key(0), 5, 2, exp.D, 1, low=-1.0, high=1.0)


@pytest.mark.parametrize("name", exp.STRUCTURES)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_looped_layer_is_the_reduced_layer_with_equal_blocks_of_its_structure(name, depth):
    rng = np.random.default_rng(1)
    A = jnp.asarray(0.2 * rng.normal(size=(2 * exp.D, 2 * exp.D)))
    layer = exp.LoopedAttention(A, *(m.astype(float) for m in exp.structure(name)), depth, 4)
    C, E = A[: exp.D, : exp.D], -A[exp.D :, : exp.D]
    block = {"free": A, "td": td.td_blocks(C[None])[0], "two": td.td_blocks(C[None], E[None])[0]}[name]
    x, y, query = (jnp.asarray(rng.normal(size=shape)) for shape in ((7, 2 * exp.D), (7,), (3, 2 * exp.D)))
    prompt = Prompt(x=x, y=y, query=query)
    np.testing.assert_allclose(layer.block(), block, rtol=1e-12)
    np.testing.assert_allclose(layer(prompt), ReducedAttention(2 * exp.D, depth, A=block)(prompt), rtol=1e-10)
    one = jax.tree.map(lambda a: a[None], prompt)
    np.testing.assert_allclose(exp.predictions(block, one, jnp.asarray(depth), layers=4)[0], layer(prompt), rtol=1e-10)


def test_the_values_of_tasks_are_those_of_iteration_over_states(family):
    gamma = 0.8
    tasks = exp.draw_tasks(jax.random.key(1), family, jnp.asarray(gamma), tasks=3)
    keys = jax.random.split(jax.random.key(1), 3)
    for n in range(3):
        task = draw_task(keys[n], family)
        phi, mu, theta = (np.asarray(a) for a in (task.phi, task.mu[0], task.theta[0]))
        P = np.einsum("sad,dt->sat", phi, mu)
        for name, r in (("policy", phi @ theta), ("optimal", phi @ theta), ("negated", -phi @ theta)):
            Q = np.zeros((5, 2))
            for _ in range(300):
                Q = r + gamma * P @ (Q.mean(1) if name == "policy" else Q.max(1))
            np.testing.assert_allclose(phi @ np.asarray(tasks[name][n]), Q, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(np.diff(tasks["cdf"][n], prepend=0, axis=-1), P.reshape(10, 5), atol=1e-9)


def test_contexts_hold_possible_transitions_with_their_rewards(family):
    tasks = exp.draw_tasks(jax.random.key(2), family, jnp.asarray(0.5), tasks=2)
    x, following, x_next, r = exp.draw_transitions(jax.random.key(3), family, tasks, N=400)
    table = np.asarray(family.phi).reshape(-1, exp.D)
    np.testing.assert_allclose(r, np.einsum("bnd,bd->bn", x, tasks["theta"]), rtol=1e-12)
    pair = np.abs(np.asarray(x)[0][:, None] - table[None]).sum(-1).argmin(-1)
    state = np.abs(np.asarray(following)[0][:, None] - np.asarray(family.phi)[None]).sum((-1, -2)).argmin(-1)
    action = np.abs(np.asarray(x_next)[0][:, None] - np.asarray(family.phi)[state]).sum(-1).argmin(-1)
    np.testing.assert_array_equal(np.asarray(x_next)[0], np.asarray(family.phi)[state, action])
    P = np.diff(tasks["cdf"][0], prepend=0, axis=-1)
    wanted = P.mean(0)  # uniform pairs
    for drawn, law in ((state, wanted), (pair, np.full(10, 0.1)), (action, np.full(2, 0.5))):
        frequency = np.bincount(drawn, minlength=len(law)) / 400
        assert (np.abs(frequency - law) < 5 * np.sqrt(law / 400)).all()


def test_value_iteration_on_every_transition_finds_the_optimal_values():
    """Deterministic next states, every pair once, one-hot features, no penalty: least squares is exact."""
    eye = np.eye(4)
    following = eye.reshape(2, 2, 4)[np.array([1, 0, 0, 1])]  # two states with two actions each
    r = np.array([1.0, 0.0, -0.5, 0.2])
    w = exp.value_iteration(eye[None], following[None], r[None], 0.5, np.zeros((4, 4)))[0]
    Q = np.zeros(4)
    for _ in range(100):
        Q = r + 0.5 * (following @ Q).max(-1)
    np.testing.assert_allclose(w, Q, atol=1e-8)


def _many(records: list[dict]) -> list[dict]:
    out = copy.deepcopy(records * 3)
    for i, r in enumerate(out):
        e = 0.001 * i
        r["risk"] = {"free": [0.1, 0.04 + e], "td": [0.1, 0.1], "two": [0.1, 0.045]}
        r["distance"] = {"td": [0.0, 0.06 + e], "two": [0.0, 0.001]}
        r["optimal"], r["floor"], r["value iteration"] = [1.6, 1.1 + e], 1.0, 0.3 + e
    return out


def test_verdicts_follow_the_numbers(records):
    expected = [PASS, PASS, FAIL, PASS, PASS, PASS, PASS, PASS]
    assert [v.verdict for v in exp.check(_many(records))] == expected
    other = _many(records)
    for i, r in enumerate(other):
        r["hand-set"] = 1e-9
        r["distance"] = {"td": [0.05, 0.001], "two": [0.0, 0.001]}
        r["risk"]["free"][1] = 0.09
        r["optimal"], r["value iteration"] = [1.6, 0.9 + 0.001 * i], 1.2
    wrong = [v.verdict for v in exp.check(other)]
    assert wrong == [FAIL, FAIL, PASS, FAIL, FAIL, FAIL, FAIL, FAIL]


def test_smoke_records_and_figure(records):
    for r in records:
        assert r["hand-set"] < 1e-13
        assert 0 < r["floor"] < 1 and r["floor"] < r["wrong floors"]["uncentered"]
    assert set(exp.plot(records)) == {"in-context-td"}


def test_a_config_out_of_range_names_its_field():
    for field, value in (("N", 0), ("gamma", 0.95), ("depths", (2, 1)), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=field):
            replace(exp.SMOKE, **{field: value})
