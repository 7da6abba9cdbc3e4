"""Greedy policies and their exact loss."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.solvers import policy_values, tree
from lindm.solvers.belief import child_history, step_index
from tests.lindm.mdps import as_mdp, numpy_mdp

suboptimality = jax.jit(policy_values.suboptimality)

S, A, H = 4, 3, 3


def test_suboptimality_is_the_best_value_less_the_policys_over_all_policies():
    P, r, rho = (array[:2, :2, :2, :2] if array.ndim == 4 else array for array in numpy_mdp(0, S, A, H))
    P, r, rho = P / P.sum(-1, keepdims=True), r[:2, :2, :2], rho[:2] / rho[:2].sum()
    values = {}
    for choice in itertools.product(range(2), repeat=4):
        pi, V = np.array(choice).reshape(2, 2), np.zeros(2)
        for h in reversed(range(2)):
            V = np.array([r[h, s, pi[h, s]] + P[h, s, pi[h, s]] @ V for s in range(2)])
        values[choice] = rho @ V
    best = max(values.values())
    for choice, value in values.items():
        loss = suboptimality(as_mdp(P, r, rho), jnp.asarray(choice).reshape(2, 2))
        assert loss.shape == ()
        assert float(loss) == pytest.approx(best - value, abs=1e-12)


def test_mixing_policies_mixes_their_loss_at_one_state():
    # only the first stage is mixed, so that the loss is linear in the mixture
    P, r, rho = numpy_mdp(1, S, A, H)
    mdp, pi = as_mdp(P, r, rho), np.zeros((H, S), int)
    other = pi.copy()
    other[0] = 1
    weights = 0.3 * np.eye(A)[pi] + 0.7 * np.eye(A)[other]
    mixed = float(suboptimality(mdp, jnp.asarray(weights)))
    parts = [float(suboptimality(mdp, jnp.asarray(each))) for each in (pi, other)]
    assert mixed == pytest.approx(0.3 * parts[0] + 0.7 * parts[1], rel=1e-12)


def test_suboptimality_under_vmap_is_a_loop():
    problems = [as_mdp(*numpy_mdp(seed, S, A, H)) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    pi = jnp.asarray(np.random.default_rng(0).integers(0, A, (3, H, S)))
    got = jax.jit(jax.vmap(suboptimality))(stack, pi)
    for i in range(3):
        assert float(got[i]) == pytest.approx(float(suboptimality(problems[i], pi[i])), rel=1e-12)


# --- ambiguous problems


def table_policy(reference, seed):
    rng = np.random.default_rng(seed)
    B = reference.A * reference.M * reference.obs
    policy = [rng.dirichlet(np.ones(reference.A), B**t) for t in range(reference.H)]

    def act(t, history):
        return policy[t][sum(((a * reference.M + m) * reference.obs + o) * B**k for k, (a, m, o) in enumerate(history))]

    return tuple(jnp.asarray(table) for table in policy), act


def fixed_value(reference, m, act, b, t=0, history=()):
    """V_m by plain recursion: model m at every step."""
    total = 0.0
    for a, p_a in enumerate(act(t, history)):
        total += p_a * float(b @ reference.r[m, t, :, a])
        for o in range(reference.obs):
            p, after = reference.step(b, t, a, m, o)
            if p > 0 and t + 1 < reference.H:
                total += p_a * p * fixed_value(reference, m, act, after, t + 1, (*history, (a, m, o)))
    return total


def test_the_value_under_a_fixed_model_and_over_the_whole_horizon_are_those_of_plain_recursion(brute):
    reference = brute.random(21, M=3, H=3, alpha=0.3)
    policy, act = table_policy(reference, 0)
    wanted = [fixed_value(reference, m, act, reference.rho[m]) for m in range(3)]
    actual = [policy_values.fixed_model_value(reference.problem(), policy, m) for m in range(3)]
    np.testing.assert_allclose(actual, wanted, rtol=1e-12)
    whole = 0.3 * min(wanted) + 0.7 * max(wanted)
    np.testing.assert_allclose(policy_values.whole_horizon_value(reference.problem(), policy), whole, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_choosing_the_model_at_every_stage_is_worse_in_the_worst_case_and_better_in_the_best_for_every_policy(brute, seed):
    for alpha, sign in ((1.0, 1), (0.0, -1)):
        reference = brute.random(seed, S=2, A=2, O=2, M=3, H=3, alpha=alpha)
        differences = []
        for number in range(6):
            _, act = table_policy(reference, number)
            once = reference.mix([fixed_value(reference, m, act, reference.rho[m]) for m in range(3)])
            differences.append(sign * (once - reference.V(list(reference.rho), 0, (), act)))
        assert min(differences) >= -1e-12 and max(differences) > 1e-3


@pytest.mark.parametrize(("seed", "alpha"), [(0, 1.0), (1, 0.6), (2, 0.3)])
def test_the_best_pure_policy_over_the_whole_horizon_is_known_from_each_model_alone(brute, seed, alpha):
    # all 2^9 pure policies over the histories of two stages against max_a [alpha min_m Q_m(a) + (1 - alpha) max_m Q_m(a)]
    reference = brute.random(seed, S=2, A=2, O=2, M=2, H=2, alpha=alpha)
    steps = list(itertools.product(range(2), range(2), range(2)))
    worth = []
    for first, *later in itertools.product(range(2), repeat=9):
        chosen = {(): first} | {(step,): action for step, action in zip(steps, later, strict=True)}

        def act(t, history, chosen=chosen):
            return np.eye(2)[chosen[history]]

        worth.append(reference.mix([fixed_value(reference, m, act, reference.rho[m]) for m in range(2)]))
    alone = [tree.tree(jax.tree.map(lambda x, m=m: x[m : m + 1] if x.ndim else x, reference.problem())).Q[0] for m in range(2)]
    Q = np.array(alone)
    np.testing.assert_allclose(max(worth), max(reference.mix(list(Q[:, a])) for a in range(2)), rtol=1e-12)


def test_some_stagewise_optimal_policies_are_not_optimal_over_the_whole_horizon(brute):
    def loss(seed):
        problem = brute.random(seed, S=2, A=2, O=2, M=2, H=2, alpha=1.0).problem()
        alone = [tree.tree(jax.tree.map(lambda x, m=m: x[m : m + 1] if x.ndim else x, problem)).Q[0] for m in range(2)]
        stagewise = tree.optimal_policy(problem, tree.tree(problem))
        return float(np.min(alone, 0).max() - policy_values.whole_horizon_value(problem, stagewise))

    losses = [loss(seed) for seed in range(12)]
    assert min(losses) > -1e-12 and max(losses) > 0.01


def test_the_three_criteria_are_different_problems(brute):
    problem = brute.random(22, M=2, H=3, alpha=1.0).problem()
    policy = tree.optimal_policy(problem, tree.tree(problem))
    stagewise, whole = float(tree.policy_value(problem, policy)), float(policy_values.whole_horizon_value(problem, policy))
    assert stagewise < whole - 1e-3  # nature that moves at every stage is the stronger enemy


def without_models(problem, policy) -> tree.Policy:
    """A policy over histories of (a, o), numbered like those of a POMDP, as one over histories of (a, m, o)."""
    M, A, O = problem.num_models, problem.num_actions, problem.num_observations
    one = jax.tree.map(lambda x: x[:1] if x.ndim else x, problem)
    a, _, o = np.indices((A, M, O)).reshape(3, -1)
    tables = []
    for t, table in enumerate(policy):
        index = np.zeros(1, int)
        for k in range(t):
            index = child_history(one, k, index, step_index(one, a, 0, o)[:, None]).reshape(-1)
        tables.append(table[index])
    return tuple(tables)


def test_a_policy_that_does_not_look_at_the_model_acts_alike_under_all_of_them(brute):
    reference = brute.random(23, A=2, M=3, O=2, H=3)
    rng = np.random.default_rng(1)
    blind = [rng.dirichlet(np.ones(2), 4**t) for t in range(3)]
    lifted = without_models(reference.problem(), tuple(jnp.asarray(table) for table in blind))

    def act(t, history):
        return blind[t][sum((a * 2 + o) * 4**k for k, (a, _, o) in enumerate(history))]

    np.testing.assert_allclose(
        tree.policy_value(reference.problem(), lifted), reference.V(list(reference.rho), 0, (), act), rtol=1e-12
    )
    for m in range(3):
        model = brute(*(x[m : m + 1] for x in (reference.P, reference.O, reference.r, reference.rho)), 0.0).problem()
        alone = tree.policy_value(model, tuple(jnp.asarray(table) for table in blind))
        np.testing.assert_allclose(policy_values.fixed_model_value(reference.problem(), lifted, m), alone, rtol=1e-12)


def test_a_model_that_is_not_there_is_refused(brute):
    problem = brute.random(0, M=2, H=1).problem()
    with pytest.raises(ValueError, match="m must be the number of a model from 0 to 1; got 2"):
        policy_values.fixed_model_value(problem, tree.uniform_policy(problem), 2)


def test_a_policy_over_other_histories_is_refused_and_not_misread(brute):
    problem = brute.random(0, A=2, M=3, O=2, H=3).problem()
    blind = tuple(jnp.zeros(4**t, jnp.int32) for t in range(3))
    for criterion in (policy_values.whole_horizon_value, lambda p, pi: policy_values.fixed_model_value(p, pi, 0)):
        with pytest.raises(ValueError, match=r"policy\[1\] must have shape \[histories\] = \(12\); got \(4,\)"):
            criterion(problem, blind)
