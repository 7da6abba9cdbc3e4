"""Suites: their sizes, their splits and the action gap of every task."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.families import random_suites as suites
from lindm.types import APOMDP, MDP, POMDP


@pytest.mark.parametrize("name, kind", [("mdp", MDP), ("pomdp", POMDP), ("apomdp", APOMDP)])
def test_a_suite_has_three_horizons_and_two_splits_of_one_size(name, kind):
    assert len(suites.HORIZONS[name]) == 3
    for horizon in suites.HORIZONS[name]:
        for split in ("id", "ood"):
            task = jax.eval_shape(partial(suites.draw_task, suite=suites.suite(name, horizon, split)), jax.random.key(0))
            assert isinstance(task, kind)
            r = task.models.r if isinstance(task, APOMDP) else task.r
            assert r.shape[-3] == horizon
    assert suites.suite(name).horizon == suites.HORIZONS[name][1]
    assert suites.suite(name, split="ood") != suites.suite(name)


action_gap = jax.jit(suites.action_gap)


def numpy_lead(reference):
    """The least lead over histories that the oracle's play meets with the suites' probability, by plain recursion."""
    lead = np.inf

    def visit(beliefs, mass, t, history):
        nonlocal lead
        Q = np.sort(reference.Q(beliefs, t, history))
        if max(mass) >= suites.REACH:
            lead = min(lead, Q[-1] - Q[-2])
        a = int(np.argmax(reference.Q(beliefs, t, history)))
        for m in range(reference.M if t + 1 < reference.H else 0):
            for o in range(reference.obs):
                p, b = reference.step(beliefs[m], t, a, m, o)
                if p * mass[m] > 0:
                    visit([b] * reference.M, [p * mass[m]] * reference.M, t + 1, (*history, (a, m, o)))

    visit(list(reference.rho), [1.0] * reference.M, 0, ())
    return lead


def test_the_action_gap_is_the_smallest_one_on_histories_of_the_optimal_policy(brute):
    for seed in range(4):
        reference = brute.random(seed, S=3, A=3, O=2, M=2, H=3, alpha=0.4)
        np.testing.assert_allclose(action_gap(reference.problem()), numpy_lead(reference), rtol=1e-9)


def test_the_action_gap_of_an_mdp_is_the_smallest_one_over_all_states():
    Q = np.random.default_rng(0).normal(size=(3, 4, 3))
    steady = jnp.broadcast_to(jnp.eye(4)[:, None], (1, 4, 3, 4)) * 0 + 0.25
    r = Q.copy()
    wanted = np.sort(Q, -1)[..., -1] - np.sort(Q, -1)[..., -2]  # the next state does not depend on the action
    gap = action_gap(MDP(P=steady, r=jnp.asarray(r), rho=jnp.full(4, 0.25)))
    np.testing.assert_allclose(gap, wanted.min(), rtol=1e-12)


@pytest.mark.parametrize("name", suites.NAMES)
def test_every_task_has_the_gap_and_rewards_in_round_numbers(name):
    suite = suites.suite(name, suites.HORIZONS[name][0], "ood")
    keys = jax.random.split(jax.random.key(1), 20)
    tasks = jax.jit(lambda keys: jax.lax.map(lambda key: suites.draw_task(key, suite), keys))(keys)
    gaps = jax.jit(lambda tasks: jax.lax.map(suites.action_gap, tasks))(tasks)
    assert (np.asarray(gaps) >= suite.gap * (1 - 1e-9)).all()
    r = np.asarray(tasks.models.r if name == "apomdp" else tasks.r)
    np.testing.assert_allclose(r / suite.step, np.round(r / suite.step), atol=1e-9)
    assert r.min() < 0 and r.min() >= suite.low and r.max() <= suite.high
    assert len({x.tobytes() for x in r}) == 20


def test_a_gap_that_no_task_has_shows_as_nan(monkeypatch):
    monkeypatch.setattr(suites, "MAX_CANDIDATES", 5)
    greedy = replace(suites.suite("mdp", 4), gap=5.0)
    task = suites.draw_task(jax.random.key(0), greedy)
    assert isinstance(task, MDP) and np.isnan(np.asarray(task.r)).all()


def test_without_a_gap_the_first_candidate_is_taken():
    any_task = replace(suites.suite("mdp", 4), gap=0.0)
    task = suites.draw_task(jax.random.key(0), any_task)
    assert isinstance(task, MDP) and task.r.shape == (4, 5, 3) and np.isfinite(np.asarray(task.r)).all()


def test_a_single_action_has_no_rival():
    assert np.isinf(suites.action_gap(MDP(P=jnp.ones((1, 1, 1, 1)), r=jnp.ones((2, 1, 1)), rho=jnp.ones(1))))


@pytest.mark.parametrize(
    "arguments, rule",
    [
        (("maze",), "suite must be one of mdp, pomdp, apomdp; got 'maze'"),
        (("mdp", 0), "horizon must be a whole number of at least 1; got 0"),
        (("mdp", 4, "test"), "split must be one of id, ood; got 'test'"),
    ],
)
def test_unknown_suites_horizons_and_splits_raise_an_error(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        suites.suite(*arguments)
