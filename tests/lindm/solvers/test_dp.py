"""Dynamic programming against enumeration of policies and paths, Monte Carlo, and identities."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lindm as ld
from lindm.problems.linear_mdp import tabulate
from lindm.solvers import dp as oracles
from lindm.solvers.policy_values import suboptimality
from lindm.types import MDP, LinearMDP
from tests.lindm.mdps import as_mdp, numpy_mdp

# compiled once for each shape; an eager scan is compiled again at every call
backward_induction = jax.jit(oracles.backward_induction)
optimal_policy = jax.jit(oracles.optimal_policy)
plan_linear = jax.jit(oracles.plan_linear)
policy_value = jax.jit(oracles.policy_value)
occupancy = jax.jit(oracles.occupancy)


def numpy_linear(seed: int, S: int, A: int, D: int, H: int) -> LinearMDP:
    rng = np.random.default_rng(seed)
    return LinearMDP(
        phi=jnp.asarray(rng.dirichlet(np.ones(D), (S, A))),
        mu=jnp.asarray(rng.dirichlet(np.ones(S), (H, D))),
        theta=jnp.asarray(rng.normal(size=(H, D))),
        rho=jnp.asarray(rng.dirichlet(np.ones(S))),
    )


def mixed_policy(seed: int, S: int, A: int, H: int):
    return np.random.default_rng(seed).dirichlet(np.ones(A), (H, S))


def paths(P, r, pi, start: int, first: int):
    """Every (probability, states, return) from a state at a stage on, under probabilities pi [H, S, A]."""
    H, S, A = r.shape
    for steps in itertools.product(range(S * A), repeat=H - first):
        s, a = np.divmod(steps, A)
        if s[0] != start:
            continue
        p, total = 1.0, 0.0
        for k, h in enumerate(range(first, H)):
            p *= pi[h, s[k], a[k]] * (P[h - 1, s[k - 1], a[k - 1], s[k]] if k else 1.0)
            total += r[h, s[k], a[k]]
        yield p, s, total


# --- the optimum


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_the_optimal_value_is_the_best_over_all_deterministic_policies(seed):
    S, A, H = 2, 2, 3
    P, r, rho = numpy_mdp(seed, S, A, H)
    plan = backward_induction(as_mdp(P, r, rho))
    best = np.full((H, S), -np.inf)
    for choice in itertools.product(range(A), repeat=H * S):
        pi, V = np.array(choice).reshape(H, S), np.zeros(S)
        for h in reversed(range(H)):
            V = np.array([r[h, s, pi[h, s]] + P[h, s, pi[h, s]] @ V for s in range(S)])
            best[h] = np.maximum(best[h], V)
    np.testing.assert_allclose(plan.V, best, rtol=1e-12)
    V, pi = optimal_policy(as_mdp(P, r, rho))
    np.testing.assert_allclose(V, best, rtol=1e-12)
    assert pi.dtype == np.int32 and (pi == plan.pi).all()


def test_action_values_are_one_step_and_then_the_best():
    P, r, rho = numpy_mdp(0, 4, 3, 3)
    plan = backward_induction(as_mdp(P, r, rho))
    V = np.vstack([np.asarray(plan.V), np.zeros((1, 4))])
    for h, s, a in itertools.product(range(3), range(4), range(3)):
        assert plan.Q[h, s, a] == pytest.approx(r[h, s, a] + sum(P[h, s, a, t] * V[h + 1, t] for t in range(4)), rel=1e-12)
        assert plan.V[h, s] >= plan.Q[h, s, a]
        assert plan.V[h, s] == plan.Q[h, s, plan.pi[h, s]]
    assert plan.pi.dtype == jnp.int32


def test_ties_go_to_the_lowest_index():
    P = np.full((2, 3, 4, 3), 1 / 3)
    r = np.zeros((2, 3, 4))
    assert (backward_induction(as_mdp(P, r, np.ones(3) / 3)).pi == 0).all()
    r[0, 1, [1, 3]] = 1.0
    r[1, 2, [2, 3]] = 1.0
    np.testing.assert_array_equal(backward_induction(as_mdp(P, r, np.ones(3) / 3)).pi, [[0, 1, 0], [0, 0, 2]])


def test_with_one_stage_to_go_the_value_is_the_reward_alone():
    P, r, rho = numpy_mdp(1, 4, 3, 1)
    np.testing.assert_array_equal(backward_induction(as_mdp(P, r, rho)).Q, r)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), shift=st.floats(-3, 3), scale=st.floats(0.1, 4))
def test_shifted_and_scaled_rewards_keep_the_policy_and_move_the_value_by_the_stages_to_go(seed, shift, scale):
    P, r, rho = numpy_mdp(seed, 4, 3, 3)
    plan, moved = backward_induction(as_mdp(P, r, rho)), backward_induction(as_mdp(P, scale * r + shift, rho))
    np.testing.assert_array_equal(plan.pi, moved.pi)
    np.testing.assert_allclose(moved.V, scale * np.asarray(plan.V) + shift * np.array([[3], [2], [1]]), rtol=1e-10, atol=1e-10)


# --- linear problems


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_planning_in_features_is_planning_in_the_table(seed):
    S, A, D, H = 6, 3, 4, 4
    problem = numpy_linear(seed, S, A, D, H)
    phi, mu, theta = (np.asarray(leaf) for leaf in (problem.phi, problem.mu, problem.theta))
    table = as_mdp(np.einsum("sad,hdt->hsat", phi, mu), np.einsum("sad,hd->hsa", phi, theta), problem.rho)
    (plan, w), reference = plan_linear(problem), backward_induction(table)
    np.testing.assert_allclose(plan.Q, reference.Q, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(plan.V, reference.V, rtol=1e-11, atol=1e-12)
    np.testing.assert_array_equal(plan.pi, reference.pi)
    # the weights solve the linear system that the table of Q* poses
    fitted = [np.linalg.lstsq(phi.reshape(-1, D), np.asarray(reference.Q[h]).ravel(), rcond=None) for h in range(H)]
    np.testing.assert_allclose(w, [f[0] for f in fitted], rtol=1e-8, atol=1e-9)
    for h in range(H):
        np.testing.assert_allclose(phi @ np.asarray(w[h]), reference.Q[h], rtol=1e-11, atol=1e-12)
    after = np.vstack([np.asarray(reference.V)[1:], np.zeros((1, S))])
    np.testing.assert_allclose(w, theta + np.einsum("hdt,ht->hd", mu, after), rtol=1e-11, atol=1e-12)


def test_other_coordinates_leave_the_plan_and_move_the_weights_by_the_inverse_transpose():
    problem = numpy_linear(0, 6, 3, 4, 4)
    T = np.random.default_rng(1).normal(size=(4, 4)) + 3 * np.eye(4)
    back = jnp.asarray(np.linalg.inv(T).T)
    moved = LinearMDP(
        phi=problem.phi @ T.T, mu=jnp.einsum("ij,hjt->hit", back, problem.mu), theta=problem.theta @ back.T, rho=problem.rho
    )
    (plan, w), (plan_moved, w_moved) = plan_linear(problem), plan_linear(moved)
    np.testing.assert_allclose(plan_moved.Q, plan.Q, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(w_moved, np.asarray(w) @ np.asarray(back).T, rtol=1e-10, atol=1e-11)


# --- a given policy


@pytest.mark.parametrize("deterministic", [True, False])
def test_value_and_occupancy_are_those_of_all_enumerated_paths(deterministic):
    S, A, H = 2, 3, 3
    P, r, rho = numpy_mdp(2, S, A, H)
    pi = mixed_policy(3, S, A, H)
    given_policy = pi.argmax(-1) if deterministic else pi
    pi = np.eye(A)[pi.argmax(-1)] if deterministic else pi
    V, d = policy_value(as_mdp(P, r, rho), jnp.asarray(given_policy)), occupancy(as_mdp(P, r, rho), jnp.asarray(given_policy))
    visits = np.zeros((H, S))
    for s in range(S):
        for h in range(H):
            assert V[h, s] == pytest.approx(sum(p * total for p, _, total in paths(P, r, pi, s, h)), rel=1e-12)
        for p, states, _ in paths(P, r, pi, s, 0):
            visits[np.arange(H), states] += rho[s] * p
    np.testing.assert_allclose(d, visits, rtol=1e-12)


def test_value_and_occupancy_are_within_five_standard_errors_of_simulated_episodes():
    S, A, H, n = 6, 3, 5, 40_000
    P, r, rho = numpy_mdp(4, S, A, H)
    pi, rng = mixed_policy(5, S, A, H), np.random.default_rng(6)
    s, total, seen = rng.choice(S, n, p=rho), np.zeros(n), []
    for h in range(H):
        seen.append(np.bincount(s, minlength=S) / n)
        a = (pi[h][s].cumsum(-1) < rng.uniform(size=(n, 1))).sum(-1)
        total += r[h, s, a]
        s = (P[h, s, a].cumsum(-1) < rng.uniform(size=(n, 1))).sum(-1)
    V, d = policy_value(as_mdp(P, r, rho), jnp.asarray(pi)), np.asarray(occupancy(as_mdp(P, r, rho), jnp.asarray(pi)))
    assert abs(total.mean() - rho @ np.asarray(V[0])) < 5 * total.std() / np.sqrt(n)
    assert (np.abs(np.array(seen) - d) < 5 * np.sqrt(d * (1 - d) / n)).all()


@given(seed=st.integers(0, 10**6))
def test_occupancies_are_distributions_that_start_at_rho(seed):
    P, r, rho = numpy_mdp(seed, 5, 3, 4)
    d = np.asarray(occupancy(as_mdp(P, r, rho), jnp.asarray(mixed_policy(seed, 5, 3, 4))))
    assert (d >= 0).all()
    np.testing.assert_allclose(d.sum(-1), 1, rtol=1e-13)
    np.testing.assert_array_equal(d[0], rho)


@given(seed=st.integers(0, 10**6))
def test_the_loss_of_a_policy_is_the_sum_of_its_gaps_over_the_states_it_visits(seed):
    # Kakade, Langford 2002: V* - V^pi = sum_h E_{s ~ d_h^pi} [ V*_h(s) - Q*_h(s, pi_h(s)) ]
    S, A, H = 5, 3, 4
    mdp = as_mdp(*numpy_mdp(seed, S, A, H))
    pi = np.random.default_rng(seed).integers(0, A, (H, S))
    plan = backward_induction(mdp)
    gaps = np.asarray(plan.V) - np.take_along_axis(np.asarray(plan.Q), pi[..., None], -1)[..., 0]
    loss = np.asarray(mdp.rho) @ np.asarray(plan.V[0] - policy_value(mdp, jnp.asarray(pi))[0])
    assert loss == pytest.approx((np.asarray(occupancy(mdp, jnp.asarray(pi))) * gaps).sum(), rel=1e-11, abs=1e-12)
    assert loss >= -1e-12


def test_the_value_is_the_reward_collected_along_the_occupancy():
    mdp, pi = as_mdp(*numpy_mdp(7, 5, 3, 4)), mixed_policy(8, 5, 3, 4)
    collected = np.einsum("hs,hsa,hsa->", occupancy(mdp, jnp.asarray(pi)), pi, mdp.r)
    assert float(mdp.rho @ policy_value(mdp, jnp.asarray(pi))[0]) == pytest.approx(float(collected), rel=1e-12)


def test_following_the_plan_earns_its_value():
    mdp = as_mdp(*numpy_mdp(9, 5, 3, 4))
    plan = backward_induction(mdp)
    np.testing.assert_allclose(policy_value(mdp, plan.pi), plan.V, rtol=1e-13)


def test_a_policy_of_indices_is_the_same_policy_as_probabilities():
    mdp = as_mdp(*numpy_mdp(10, 5, 3, 4))
    pi = np.random.default_rng(0).integers(0, 3, (4, 5))
    for function in (policy_value, occupancy):
        np.testing.assert_array_equal(function(mdp, jnp.asarray(pi)), function(mdp, jnp.asarray(np.eye(3)[pi])))


# --- many at once


def stack_of(count: int) -> MDP:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[as_mdp(*numpy_mdp(seed, 4, 3, 3)) for seed in range(count)])


@pytest.mark.parametrize("many", [jax.vmap, lambda solver: lambda *args: oracles.solve_many(solver, *args, batch_size=4)])
def test_a_stack_of_problems_is_a_loop_over_them(many):
    count = 6  # not a multiple of the batch
    stack = stack_of(count)
    pi = jnp.asarray(np.random.default_rng(0).integers(0, 3, (count, 3, 4)))
    plans, values, visits = many(backward_induction)(stack), many(policy_value)(stack, pi), many(occupancy)(stack, pi)
    for i in range(count):
        one = as_mdp(*numpy_mdp(i, 4, 3, 3))
        plan = backward_induction(one)
        np.testing.assert_allclose(plans.Q[i], plan.Q, rtol=1e-12)
        np.testing.assert_array_equal(plans.pi[i], plan.pi)
        np.testing.assert_allclose(values[i], policy_value(one, pi[i]), rtol=1e-12)
        np.testing.assert_allclose(visits[i], occupancy(one, pi[i]), rtol=1e-12)


def test_a_stack_of_linear_problems_is_a_loop_over_them():
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[numpy_linear(seed, 4, 3, 3, 3) for seed in range(3)])
    plans, w = jax.jit(jax.vmap(plan_linear))(stack)
    for i in range(3):
        plan, weights = plan_linear(numpy_linear(i, 4, 3, 3, 3))
        np.testing.assert_allclose(plans.V[i], plan.V, rtol=1e-12)
        np.testing.assert_allclose(w[i], weights, rtol=1e-12)


def test_single_precision_in_is_single_precision_out():
    mdp = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), as_mdp(*numpy_mdp(0, 4, 3, 3)))
    plan = backward_induction(mdp)
    arrays = (plan.V, plan.Q, policy_value(mdp, plan.pi), occupancy(mdp, plan.pi))
    assert {array.dtype.name for array in arrays} == {"float32"}


def test_numpy_arrays_are_solved_in_double_precision_without_the_flag_of_jax():
    rng, (S, A, D, H) = np.random.default_rng(3), (5, 3, 4, 3)
    phi, mu, theta = rng.dirichlet(np.ones(D), (S, A)), rng.dirichlet(np.ones(S), (H, D)), rng.normal(size=(H, D))
    pi = rng.integers(A, size=(H, S))
    with jax.enable_x64(False):
        problem = ld.linear_mdp(phi, mu, theta)
        table = tabulate(problem)
        plan, w = oracles.plan_linear(problem)
        by_table, (V, _) = oracles.backward_induction(table), oracles.optimal_policy(table)
        of_pi, visits, loss = oracles.policy_value(table, pi), oracles.occupancy(table, pi), suboptimality(table, pi)
        uniform = oracles.policy_value(table, oracles.uniform_policy(table))

    r, P = np.einsum("sad,hd->hsa", phi, theta), np.einsum("sad,hdt->hsat", phi, mu)
    best, weights, value, mean = np.zeros((H + 1, S)), np.zeros((H, D)), np.zeros((H + 1, S)), np.zeros((H + 1, S))
    for h in reversed(range(H)):
        weights[h] = theta[h] + mu[h] @ best[h + 1]
        best[h] = (r[h] + P[h] @ best[h + 1]).max(-1)
        value[h] = (r[h] + P[h] @ value[h + 1])[np.arange(S), pi[h]]
        mean[h] = (r[h] + P[h] @ mean[h + 1]).mean(-1)
    d = [np.full(S, 1 / S)]
    for h in range(H - 1):
        d.append(d[h] @ P[h, np.arange(S), pi[h]])
    pairs = [(w, weights), (plan.V, best[:-1]), (by_table.V, best[:-1]), (V, best[:-1]), (of_pi, value[:-1])]
    for got, want in [*pairs, (visits, d), (uniform, mean[:-1]), (loss, (best[0] - value[0]).mean())]:
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_a_policy_may_come_in_another_precision_than_the_problem():
    mdp = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), as_mdp(*numpy_mdp(0, 4, 3, 3)))
    pi = mixed_policy(1, 4, 3, 3)
    for function in (policy_value, occupancy):
        assert function(mdp, jnp.asarray(pi)).dtype == jnp.float32
        np.testing.assert_allclose(function(mdp, jnp.asarray(pi)), function(mdp, jnp.asarray(pi, jnp.float32)), rtol=1e-6)


def test_shapes_that_do_not_fit_raise_an_error():
    problem = as_mdp(*numpy_mdp(0, 3, 2, 4))
    for broken in (
        replace(problem, rho=problem.rho[1:]),
        replace(problem, P=problem.P[:2]),
        jax.tree.map(lambda x: x[None], problem),
    ):
        with pytest.raises((AssertionError, ValueError)):
            oracles.backward_induction(broken)
