"""Backward induction at the sizes and in the batches that `solve_many` chooses, against numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.solvers import dp as oracles
from lindm.types import MDP


def numpy_stack(count, S, A, H, staged):
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(S), (count, H if staged else 1, S, A)), rng.normal(size=(count, H, S, A))


def as_stack(P, r):
    return MDP(P=jnp.asarray(P), r=jnp.asarray(r), rho=jnp.full((len(P), P.shape[-1]), 1 / P.shape[-1]))


def numpy_plan(P, r):
    H, S, A = r.shape
    Q, V = np.empty_like(r), np.zeros(S)
    for h in reversed(range(H)):
        for s in range(S):
            for a in range(A):
                Q[h, s, a] = r[h, s, a] + np.dot(P[h if len(P) > 1 else 0, s, a], V)
        V = Q[h].max(-1)
    return Q


@pytest.mark.parametrize("H", [1, 2, 6])
@pytest.mark.parametrize("staged", [False, True])
def test_one_kernel_for_all_stages_or_one_for_each_gives_the_values_of_numpy(staged, H):
    P, r = numpy_stack(1, 7, 3, H, staged)
    plan, Q = oracles.backward_induction(jax.tree.map(lambda x: x[0], as_stack(P, r))), numpy_plan(P[0], r[0])
    np.testing.assert_allclose(plan.Q, Q, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(plan.V, Q.max(-1), rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(plan.pi, Q.argmax(-1))
    assert plan.pi.dtype == jnp.int32 and plan.Q.shape == (H, 7, 3)


# --- stages whose actions have settled


settled_stages = jax.jit(oracles._stages_until_settled)
follow = jax.jit(oracles._follow)


def stationary(P, r, H, legal=None):
    """An MDP with the same P [S, A, S] and r [S, A] at all stages."""
    S = len(r)
    rewards = jnp.broadcast_to(jnp.asarray(r), (H, *r.shape))
    return MDP(P=jnp.asarray(P)[None], r=rewards, rho=jnp.full(S, 1 / S), legal=None if legal is None else jnp.asarray(legal))


def check_settled(mdp):
    """V and pi are those of numpy whatever settles; returns the first stage that followed a settled policy, -1 for none."""
    V, pi, h = settled_stages(mdp)
    V, pi = follow(mdp, V, pi, h)
    Q = numpy_plan(np.asarray(mdp.P), np.where(True if mdp.legal is None else mdp.legal, mdp.r, -np.inf))
    np.testing.assert_allclose(V, Q.max(-1), rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(pi, Q.argmax(-1))
    assert pi.dtype == np.int32
    return int(h)


def test_a_model_that_mixes_settles_and_ties_or_rewards_that_change_with_the_stage_do_not():
    rng = np.random.default_rng(1)
    P, r = rng.dirichlet(np.ones(6), (6, 3)), rng.uniform(size=(6, 3))
    assert check_settled(stationary(P, r, 14)) >= 5
    P_tied, r_tied = P.copy(), r.copy()
    P_tied[2], r_tied[2] = P[2, 0], r[2, 0]
    assert check_settled(stationary(P_tied, r_tied, 14)) == -1
    same = stationary(P, r, 14)
    assert check_settled(replace(same, r=same.r.at[0].set(1 - r))) == -1


@pytest.mark.parametrize("seed", range(12))
def test_actions_that_change_far_from_the_end_are_found(seed):
    """Deterministic moves and rewards far away: the best action changes many stages before the end, or never settles."""
    rng = np.random.default_rng(seed)
    P = np.eye(6)[rng.integers(0, 6, (6, 3))]
    r = np.where(rng.uniform(size=(6, 3)) < 0.2, rng.uniform(1, 3, (6, 3)), rng.uniform(0, 0.5, (6, 3)))
    check_settled(stationary(P, r, 14))
    slow = 0.03 * rng.dirichlet(np.ones(6), (6, 3)) + 0.97 * np.eye(6)[:, None]
    check_settled(stationary(slow, r, 14))


def test_a_lead_at_the_end_that_a_slow_gain_overtakes_does_not_settle():
    """Action 1 of state 0 leads to a state that pays .2 at every stage; action 0 pays 1 once and leads to one that pays none."""
    P = np.zeros((3, 2, 3))
    P[0, 0, 1] = P[0, 1, 2] = P[1, :, 1] = P[2, :, 2] = 1
    r = np.array([[1, 0], [0, -1], [0.2, -1]])
    mdp = stationary(P, r, 12)
    check_settled(mdp)
    assert np.asarray(oracles.backward_induction(mdp).pi)[:, 0].tolist() == [1] * 6 + [0] * 6


def test_rows_that_sum_to_less_than_one_are_in_the_bound_and_illegal_actions_never_lead():
    # every state gains as much as every other, and the action that ends the episode half the time leads in the last two stages
    P, r = np.repeat([[[1 / 6]], [[1 / 12]]], 6, axis=-1).reshape(1, 2, 6).repeat(6, 0), np.tile([0.5, 1.5], (6, 1))
    check_settled(stationary(P, r, 14))
    assert np.asarray(oracles.backward_induction(stationary(P, r, 14)).pi)[:, 0].tolist() == [0] * 12 + [1, 1]
    rng = np.random.default_rng(3)
    P, r = rng.dirichlet(np.ones(6), (6, 3)), rng.uniform(size=(6, 3))
    legal = np.ones((6, 3), bool)
    legal[0], legal[1, 0] = [False, True, False], False
    assert check_settled(stationary(P, r, 14, legal)) >= 5


def test_from_a_size_on_the_policy_is_followed_once_it_settles_alone_and_in_a_stack():
    S, A, H = 82, 5, 6
    rng = np.random.default_rng(0)
    P, r = rng.dirichlet(np.ones(S), (2, S, A)), rng.uniform(size=(2, S, A))
    assert P[0].nbytes >= oracles.SETTLING_BYTES
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(stationary(P[i], r[i], H) for i in range(2)))
    for V, pi in (jax.jit(jax.vmap(oracles.optimal_policy))(stack), oracles.solve_many(oracles.optimal_policy, stack)):
        for i in range(2):
            Q = numpy_plan(P[i][None], np.broadcast_to(r[i], (H, S, A)))
            np.testing.assert_allclose(V[i], Q.max(-1), rtol=1e-12)
            np.testing.assert_array_equal(pi[i], Q.argmax(-1))


# --- stacks


def batches_of(monkeypatch, work):
    """How `work` was mapped: the batch size given to `lax.map` (1 for none), or the word vmap."""
    seen, plain = [], jax.lax.map
    monkeypatch.setattr(
        jax.lax, "map", lambda f, xs, *, batch_size=None: seen.append(batch_size or 1) or plain(f, xs, batch_size=batch_size)
    )
    result = work()
    return result, seen or ["vmap"]


# S, models, batch: as many as fit 48 KiB, and divide the stack; a stack that fits whole is one batch
@pytest.mark.parametrize(
    "S, count, expected", [(2, 6, "vmap"), (6, 24, 12), (6, 34, 2), (6, 13, 1), (12, 3, "vmap"), (30, 2, 1), (30, 1, 1)]
)
def test_every_automatic_batch_size_is_a_loop_over_the_stack(monkeypatch, S, count, expected):
    P, r = numpy_stack(count, S, 3, 4, staged=True)
    assert oracles.BATCH_BYTES == 48 * 1024
    stack = as_stack(P, r)
    plans, seen = batches_of(monkeypatch, lambda: oracles.solve_many(oracles.backward_induction, stack))
    assert seen == [expected]
    for i in range(count):
        np.testing.assert_allclose(plans.Q[i], numpy_plan(P[i], r[i]), rtol=1e-12, atol=1e-13)


def test_on_an_accelerator_the_stack_is_one_batch(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    stack = as_stack(*numpy_stack(3, 30, 3, 4, staged=True))
    plans, seen = batches_of(monkeypatch, lambda: oracles.solve_many(oracles.backward_induction, stack))
    assert seen == ["vmap"] and plans.V.shape == (3, 4, 30)


def test_a_batch_size_that_is_given_is_used_and_may_leave_a_remainder(monkeypatch):
    P, r = numpy_stack(5, 4, 2, 3, staged=False)
    pi = jnp.zeros((5, 3, 4), jnp.int32)
    for requested, expected in ((1, 1), (2, 2), (5, "vmap"), (9, "vmap")):
        with monkeypatch.context() as patch:
            values, seen = batches_of(
                patch,
                lambda requested=requested: oracles.solve_many(oracles.policy_value, as_stack(P, r), pi, batch_size=requested),
            )
        assert seen == [expected]
        for i in range(5):
            one = jax.tree.map(lambda x, i=i: x[i], as_stack(P, r))
            np.testing.assert_allclose(values[i], oracles.policy_value(one, pi[i]), rtol=1e-12)
