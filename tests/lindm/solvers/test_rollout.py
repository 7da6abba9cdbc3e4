"""Demonstrations around the optimal policy: their law, their labels and their mean return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.solvers import dp, rollout, tree
from lindm.solvers.policy_values import fixed_model_value
from lindm.solvers.solve import solve
from lindm.types import EXACT, MDP, POMDP

demonstrate = jax.jit(rollout.demonstrate, static_argnames="n")


def five_errors(sample, mean):
    assert abs(sample.mean() - float(mean)) <= 5 * sample.std(ddof=1) / np.sqrt(len(sample))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_optimal_policy_earns_its_value_in_the_game_against_nature(brute, alpha):
    problem = brute.random(11, S=3, A=2, O=2, M=3, H=3, alpha=alpha).problem()
    episodes, labels = demonstrate(jax.random.key(0), solve(problem), 20_000, 0.0)
    np.testing.assert_array_equal(episodes.a, labels.action)
    five_errors(np.asarray(episodes.r.sum(-1)), tree.value(problem))


def test_a_uniform_behavior_earns_the_value_of_the_uniform_policy_of_a_pomdp(brute):
    apomdp = brute.random(12, M=1, H=4).problem()
    problem = jax.tree.map(lambda x: x[0], apomdp.models)
    episodes, labels = demonstrate(jax.random.key(1), solve(problem), 20_000, 1.0)
    assert episodes.m is None and isinstance(problem, POMDP)
    five_errors(np.asarray(episodes.r.sum(-1)), tree.policy_value(apomdp, tree.uniform_policy(apomdp)))
    assert abs((np.asarray(episodes.a) != np.asarray(labels.action)).mean() - 0.5) < 0.02


def test_epsilon_is_the_share_of_random_actions(brute):
    problem = brute.random(13, A=2, M=2, H=4).problem()
    episodes, labels = demonstrate(jax.random.key(2), solve(problem), 10_000, 0.3)
    five_errors((np.asarray(episodes.a) != np.asarray(labels.action)).mean(-1), 0.15)  # half of them hit by chance


def test_under_a_fixed_model_the_optimal_policy_earns_its_value_under_that_model(brute):
    problem = brute.random(14, M=3, H=3, alpha=0.5).problem()
    solution = solve(problem)
    policy = tree.optimal_policy(problem, solution.tables)
    for m in range(3):
        episodes, _ = demonstrate(jax.random.key(m), solution, 20_000, 0.0, jnp.asarray(m))
        assert (np.asarray(episodes.m) == m).all()
        five_errors(np.asarray(episodes.r.sum(-1)), fixed_model_value(problem, policy, m))


def test_every_step_has_the_label_of_its_own_history(brute):
    reference = brute.random(15, S=3, A=2, O=2, M=2, H=3, alpha=0.6, staged=True)
    problem = reference.problem()
    episodes, labels = demonstrate(jax.random.key(3), solve(problem), 30, 0.7)
    steps = [np.asarray(x) for x in (episodes.a, episodes.m, episodes.o)]
    for k in range(30):
        beliefs, history = list(reference.rho), ()
        for t in range(reference.H):
            Q = reference.Q(beliefs, t, history)
            np.testing.assert_allclose(labels.Q[k, t], Q, rtol=1e-12, atol=1e-12)
            assert labels.action[k, t] == Q.argmax() and labels.certificate[k, t] == EXACT and labels.regret[k, t] == 0
            a, m, o = (int(x[k, t]) for x in steps)
            assert episodes.r[k, t] == reference.r[m, t, int(episodes.s[k, t]), a]
            p, b = reference.step(beliefs[m], t, a, m, o)
            assert p > 0  # nothing impossible happens
            beliefs, history = [b] * reference.M, (*history, (a, m, o))


def test_nature_takes_the_worst_model_with_the_probability_of_the_attitude(brute):
    reference = brute.random(16, M=3, H=2, alpha=0.7)
    problem = reference.problem()
    episodes, _ = demonstrate(jax.random.key(4), solve(problem), 20_000, 1.0)
    first, taken = np.asarray(episodes.a[:, 0]), np.asarray(episodes.m[:, 0])
    for a in range(reference.A):
        G = reference.G(list(reference.rho), 0, (), a)
        taken_here = taken[first == a]
        five_errors(taken_here == np.argmin(G), 0.7)
        five_errors(taken_here == np.argmax(G), 0.3)


def test_an_mdp_is_demonstrated_and_labeled_at_its_states():
    rng = np.random.default_rng(0)
    S, A, H = 4, 3, 5
    problem = MDP(
        P=jnp.asarray(rng.dirichlet(np.ones(S), (1, S, A))),
        r=jnp.asarray(rng.normal(size=(H, S, A))),
        rho=jnp.asarray(rng.dirichlet(np.ones(S))),
    )
    solution = solve(problem)
    episodes, labels = demonstrate(jax.random.key(5), solution, 20_000, 0.25)
    Q = np.asarray(dp.backward_induction(problem).Q)
    stages = np.arange(H)
    np.testing.assert_array_equal(labels.Q, Q[stages, np.asarray(episodes.s)])
    np.testing.assert_array_equal(labels.action, Q.argmax(-1)[stages, np.asarray(episodes.s)])
    mixed = 0.75 * np.eye(A)[Q.argmax(-1)] + 0.25 / A
    five_errors(np.asarray(episodes.r.sum(-1)), problem.rho @ dp.policy_value(problem, jnp.asarray(mixed))[0])


@pytest.mark.parametrize(
    "n, epsilon, nature, rule",
    [
        (0, 0.0, None, "n must be a whole number of at least 1; got 0"),
        (1, 2.0, None, "epsilon must"),
        (1, float("nan"), None, "epsilon must"),
        (1, 0.0, 7, "nature must be a model from 0 to 1; got 7"),
        (1, 0.0, -1, "nature must be a model from 0 to 1; got -1"),
    ],
)
def test_numbers_out_of_their_range_raise_an_error(brute, n, epsilon, nature, rule):
    problem = brute.random(0, M=2, H=1).problem()
    with pytest.raises(ValueError, match=rule):
        rollout.demonstrate(jax.random.key(0), solve(problem), n, epsilon, nature)


def test_nature_has_no_choice_among_one_model(brute):
    problem = jax.tree.map(lambda x: x[0], brute.random(0, M=1, H=1).problem().models)
    with pytest.raises(ValueError, match="nature must be left out for a problem with one model"):
        rollout.demonstrate(jax.random.key(0), solve(problem), 1, 0.0, 0)
