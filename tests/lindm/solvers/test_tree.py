"""The belief tree against plain recursion over histories."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.problems import cassandra, cassandra_problems
from lindm.problems.apomdp import mixture, optimistic, single
from lindm.problems.pomdp import reveal
from lindm.solvers import dp, tree
from lindm.solvers.belief import num_histories
from lindm.types import APOMDP, MDP
from tests.clock import HANGS

CASES = [
    {"S": 3, "A": 2, "O": 2, "M": 1, "H": 5, "alpha": 0.4},
    {"S": 3, "A": 2, "O": 2, "M": 2, "H": 4, "alpha": 0.3, "staged": True},
    {"S": 2, "A": 2, "O": 2, "M": 3, "H": 3, "alpha": 0.7},
    {"S": 4, "A": 3, "O": 2, "M": 2, "H": 3, "alpha": 1.0, "sparse": True},
    {"S": 3, "A": 2, "O": 3, "M": 2, "H": 2, "alpha": 0.0},
    {"S": 2, "A": 2, "O": 2, "M": 2, "H": 1, "alpha": 0.5},
    {"S": 1, "A": 1, "O": 1, "M": 1, "H": 3, "alpha": 0.5},
]


def index(reference, history):
    return sum(
        ((a * reference.M + m) * reference.obs + o) * (reference.A * reference.M * reference.obs) ** k
        for k, (a, m, o) in enumerate(history)
    )


def tables(seed, reference, deterministic):
    """A random policy over histories, as arrays and as a function."""
    rng = np.random.default_rng(seed)
    B = reference.A * reference.M * reference.obs
    policy = [rng.dirichlet(np.ones(reference.A), B**t) for t in range(reference.H)]
    if deterministic:
        policy = [table.argmax(-1).astype(np.int32) for table in policy]

    def act(t, history):
        row = policy[t][index(reference, history)]
        return np.eye(reference.A)[row] if deterministic else row

    return tuple(jnp.asarray(table) for table in policy), act


def close(actual, wanted, scale=10.0):
    np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-12 * scale)


def test_numpy_arrays_are_solved_in_double_precision_without_the_flag_of_jax(brute):
    reference = brute.random(0, **CASES[1])
    problem = reference.problem()
    with jax.enable_x64(False):
        values = tree.value(problem), np.asarray(tree.tree(problem).Q)[0].max()
        random = tree.uniform_value(problem), tree.policy_value(problem, tree.uniform_policy(problem))
    assert all(value.dtype == np.float64 for value in (*values, *random))
    close(values, [reference.V(list(reference.rho), 0)] * 2)
    close(random[0], random[1])


@pytest.mark.parametrize("case", CASES)
def test_the_value_is_that_of_plain_recursion(brute, case):
    for seed in range(3):
        reference = brute.random(seed, **case)
        close(tree.value(reference.problem()), reference.V(list(reference.rho), 0))


@pytest.mark.parametrize("case", CASES)
def test_the_action_values_at_every_history_are_those_of_plain_recursion(brute, case):
    reference = brute.random(7, **case)
    table, B = tree.tree(reference.problem()), reference.A * reference.M * reference.obs
    assert table.Q.shape == (num_histories(reference.problem()), reference.A)
    for t in range(reference.H):
        Q, seen = tree.stage_Q(table, t, B), np.zeros(B**t, bool)
        for history, beliefs in reference.histories(t):
            close(Q[index(reference, history)], reference.Q(beliefs, t, history))
            seen[index(reference, history)] = True
        np.testing.assert_array_equal(np.asarray(Q)[~seen], 0)


def test_blocks_of_any_size_give_the_same_tree(brute, monkeypatch):
    problem = brute.random(1, S=3, A=2, O=2, M=1, H=7).problem()
    whole = tree.tree(problem).Q
    for cache in (0, 1 << 9, 3 << 10, 1 << 14):
        monkeypatch.setattr(tree, "CACHE_BYTES", cache)
        jax.clear_caches()
        close(tree.tree(problem).Q, whole)
        close(tree.value(problem), whole[0].max())
    jax.clear_caches()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_value_of_any_policy_over_histories_is_that_of_plain_recursion(brute, case, deterministic):
    reference = brute.random(3, **case)
    policy, act = tables(5, reference, deterministic)
    close(
        tree.policy_value(reference.problem(), policy),
        reference.V(list(reference.rho), 0, (), act),
    )


def test_no_policy_beats_the_optimal_one_and_the_optimal_one_has_the_value(brute):
    reference = brute.random(4, S=3, A=2, O=2, M=2, H=3, alpha=0.6)
    problem = reference.problem()
    best = float(tree.value(problem))
    close(tree.policy_value(problem, tree.optimal_policy(problem, tree.tree(problem))), best)
    values = [float(tree.policy_value(problem, tables(seed, reference, True)[0])) for seed in range(40)]
    assert max(values) <= best + 1e-12 and len(set(values)) > 30


def test_the_uniform_policy_takes_every_action_alike(brute):
    reference = brute.random(8, M=2, H=3)
    problem = reference.problem()
    wanted = reference.V(list(reference.rho), 0, (), lambda t, history: np.full(reference.A, 1 / reference.A))
    close(tree.policy_value(problem, tree.uniform_policy(problem)), wanted)
    close(tree.uniform_value(problem), wanted)


def test_a_stack_of_problems_is_a_loop_over_them(brute):
    problems = [brute.random(seed, M=2, H=4).problem() for seed in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    alone = jnp.stack([tree.value(w) for w in problems])
    close(jax.vmap(tree.value)(stack), alone)
    close(jax.lax.map(tree.value, stack), alone)


# --- reductions


def test_a_revealed_mdp_has_the_mdps_value_at_every_known_state():
    rng = np.random.default_rng(0)
    S, A, H = 3, 2, 4
    P, r = jnp.asarray(rng.dirichlet(np.ones(S), (H, S, A))), jnp.asarray(rng.normal(size=(H, S, A)))
    plan = dp.backward_induction(MDP(P=P, r=r, rho=jnp.full(S, 1 / S)))
    starts = [tree.value(single(reveal(MDP(P=P, r=r, rho=rho)))) for rho in jnp.eye(S)]
    close(starts, plan.V[0])


def test_one_model_makes_the_attitude_idle(brute):
    reference = brute.random(2, M=1, H=4)
    values = [tree.value(APOMDP(models=reference.problem().models, alpha=jnp.asarray(alpha))) for alpha in (0.0, 0.3, 1.0)]
    assert len({float(v) for v in values}) == 1


def test_the_best_case_is_a_pomdp_over_actions_and_models(brute):
    problem = brute.random(5, M=3, H=3, alpha=0.0, same_start=True).problem()
    close(tree.value(single(optimistic(problem))), tree.value(problem))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
def test_two_models_and_a_bold_attitude_are_a_pomdp(brute, alpha):
    problem = brute.random(6, M=2, H=3, alpha=alpha, same_start=True).problem()
    close(tree.value(single(mixture(problem))), tree.value(problem))


def test_the_value_falls_with_the_attitude_and_lies_between_the_extremes(brute):
    models = brute.random(9, M=3, H=3).problem().models
    values = [float(tree.value(APOMDP(models=models, alpha=jnp.asarray(a)))) for a in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]


def test_the_value_is_positively_homogeneous_in_belief_and_reward(brute):
    reference = brute.random(10, M=2, H=3, alpha=0.4)
    problem = reference.problem()
    parts = problem.models
    for factor in (0.5, 3.0):
        scaled = type(parts)(P=parts.P, O=parts.O, r=parts.r, rho=factor * parts.rho)
        close(tree.value(APOMDP(models=scaled, alpha=problem.alpha)), factor * tree.value(problem))
        rewarded = type(parts)(P=parts.P, O=parts.O, r=factor * parts.r, rho=parts.rho)
        close(tree.value(APOMDP(models=rewarded, alpha=problem.alpha)), factor * tree.value(problem))


def test_some_apomdps_with_three_models_have_a_value_that_is_not_convex(brute):
    def above_chord(reference):
        """How far the value at the middle of a segment of beliefs lies above the mean of its ends."""
        ends = [np.eye(2)[0], np.eye(2)[1], np.full(2, 0.5)]
        left, right, middle = (reference.V([b] * 3, 0) for b in ends)
        return middle - (left + right) / 2

    assert max(above_chord(brute.random(seed, S=2, M=3, H=2, alpha=1.0)) for seed in range(20)) > 0.01
    assert max(above_chord(brute.random(seed, S=2, M=3, H=2, alpha=0.0)) for seed in range(20)) < 1e-12


# --- errors


def test_a_policy_of_the_wrong_shape_raises_an_error(brute):
    problem = brute.random(0, A=2, M=2, O=2, H=2).problem()
    good = tree.uniform_policy(problem)
    with pytest.raises(ValueError, match=r"policy must have one array for each of the 2 stages; got 1"):
        tree.policy_value(problem, good[:1])
    with pytest.raises(ValueError, match=r"policy\[1\] must have shape"):
        tree.policy_value(problem, (good[0], good[1][:5]))


def test_a_tree_takes_no_more_memory_than_memory_bytes():
    code = (
        "import resource, jax; jax.config.update('jax_enable_x64', True)\n"
        "from lindm.solvers import tree\n"
        "from lindm.problems.apomdp import as_apomdp\n"
        "from lindm.problems.pomdp import draw_pomdp\n"
        "def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "p = as_apomdp(draw_pomdp(jax.random.key(0), 3, 2, 2, 12))\n"
        "before = peak(); tree.tree(p).Q.block_until_ready()\n"
        "assert tree.memory_bytes(p) > 3e8 and peak() - before < tree.memory_bytes(p), peak() - before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr


# --- values that others published


@pytest.mark.parametrize(
    "file, horizon, discount, value",
    [
        ("tiger", 1, 0.95, -1.0),
        ("tiger", 2, 0.95, -1.95),
        ("tiger", 3, 0.95, 2.3098),
        ("tiger", 5, 0.95, 2.7630961931),
        ("tiger", 10, 0.95, 6.6933684318),
        ("tiger", 5, 1.0, 3.60915),
        ("1d", 5, 0.75, 0.9482417793),
        ("4x3", 5, 0.95, 0.0899850532),
    ],
)
def test_the_value_at_the_start_is_that_of_pomdp_solve(file, horizon, discount, value):
    model = cassandra.read(Path(__file__).parents[1] / "problems" / "files" / f"{file}.pomdp")
    result = tree.value(single(cassandra_problems.to_pomdp(model, horizon, discount)))
    np.testing.assert_allclose(result, value, atol=1e-6)
