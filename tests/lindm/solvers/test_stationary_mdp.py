"""Bounds of stationary MDPs against all policies by linear equations, and an independent recursion; sparse forms; files."""

import itertools
import json
import math
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO
from scipy import sparse

from lindm.errors import DataError
from lindm.problems import cassandra
from lindm.problems.stationary import StationaryPOMDP, stationary, stationary_mdp
from lindm.solvers.stationary_mdp import DENSE, load_policy, solve

FOREST = stationary(cassandra.read(Path(__file__).parents[1] / "problems" / "files" / "forest.pomdp"))
METHODS = ("value-iteration", "policy-iteration")


def draw(seed: int, discount: float, S=4, A=2, power=3.0) -> StationaryPOMDP:
    rng = np.random.default_rng(seed)
    P = rng.exponential(size=(S, A, S)) ** power
    rho = rng.exponential(size=S) * (rng.random(S) < 0.7) + 1e-3
    return stationary_mdp(P / P.sum(-1, keepdims=True), rng.normal(size=(S, A)), rho / rho.sum(), discount)


def value_of(problem: StationaryPOMDP, policy) -> np.ndarray:
    """V [S] of a stationary policy, by linear equations."""
    P = np.stack([problem.P[a].toarray()[s] for s, a in enumerate(policy)])
    return np.linalg.solve(np.eye(len(P)) - problem.discount * P, problem.r[np.arange(len(P)), policy])


def best(problem: StationaryPOMDP) -> np.ndarray:
    """V* [S]: the best of all stationary policies, each by itself."""
    S, A = problem.r.shape
    return np.max([value_of(problem, policy) for policy in itertools.product(range(A), repeat=S)], axis=0)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), discount=st.sampled_from([0.0, 0.5, 0.9, 0.99]), tolerance=st.sampled_from([3.0, 0.1, 0.0]))
def test_bounds_contain_the_value_and_the_policy_earns_the_lower_one(method, seed, discount, tolerance):
    problem = draw(seed, discount)
    solution, V = solve(problem, method=method, tolerance=tolerance), best(problem)
    earned = value_of(problem, solution.policy[0])
    rounding = 1e-13 * np.abs(V).max() / (1 - discount)  # of the linear equations of this test
    assert (solution.lower_values <= earned + rounding).all() and (solution.upper_values + rounding >= V).all()
    assert solution.upper - solution.lower <= max(tolerance, 1e-9)
    rows = np.flatnonzero(problem.rho)
    Q = problem.r + discount * np.stack([P @ V for P in problem.P], axis=1)
    lost = (V - Q[np.arange(4), solution.policy[0]])[rows].max()
    assert lost <= solution.regret + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_the_forest_has_its_published_values(method):
    solution = solve(FOREST, method=method)
    assert solution.lower_values == pytest.approx([26.244, 29.484, 33.484], abs=1e-9)
    assert solution.upper_values == pytest.approx([26.244, 29.484, 33.484], abs=1e-9)
    assert (solution.first_action, solution.regret, solution.act("old"), solution.method) == ("wait", 0, "wait", method)


def test_a_finite_horizon_is_backward_induction():
    solution, V, actions = solve(FOREST, 4), np.zeros(3), []
    for _ in range(4):
        Q = np.stack([[0, 0, 4] + 0.9 * (0.1 * V[0] + 0.9 * V[[1, 2, 2]]), [0, 1, 2] + 0.9 * V[[0, 0, 0]]], axis=1)
        V, actions = Q.max(1), [Q.argmax(1).tolist(), *actions]
    assert solution.policy.tolist() == actions and solution.lower == solution.upper == pytest.approx(V[0], abs=1e-13)
    assert solution.act("middle", 3) == "cut" and solution.act("middle", 0) == "wait" and solution.regret == 0


def test_more_states_than_are_solved_densely_take_memory_by_their_nonzeros():
    S, k, rng = 30 * DENSE, 3, np.random.default_rng(0)
    columns = (np.arange(S)[:, None] + rng.integers(-5, 6, (S, k))) % S
    P = [sparse.csr_array((np.full(S * k, 1 / k), columns.ravel(), np.arange(0, S * k + 1, k)), shape=(S, S)) for _ in range(2)]
    tracemalloc.start()
    problem = stationary_mdp(P, rng.uniform(size=(S, 2)), np.full(S, 1 / S), 0.9)
    solution = solve(problem, tolerance=1e-6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert solution.upper - solution.lower <= 1e-6 and peak < 30e6  # one dense kernel has 7,200 MB
    Q = problem.r + 0.9 * np.stack([matrix @ solution.lower_values for matrix in P], axis=1)  # a fixed point, within the bounds
    assert np.abs(Q.max(1) - solution.lower_values).max() <= 2e-6
    stopped = solve(problem, timeout=1e-9)
    assert stopped.lower <= solution.upper and solution.lower <= stopped.upper and stopped.iterations == 1


def test_an_mdp_has_the_same_value_as_arrays_and_as_sparse_matrices_of_either_kind():
    P = np.stack([matrix.toarray() for matrix in FOREST.P], axis=1)
    padded = [BCOO.fromdense(P[:, a], nse=9) for a in range(2)]
    for form in (P, P.tolist(), [sparse.coo_matrix(P[:, a]) for a in range(2)], padded):
        assert solve(stationary_mdp(form, FOREST.r, FOREST.rho, 0.9)).lower == pytest.approx(26.244, abs=1e-6)


def test_arrays_keep_double_precision_where_jax_has_single():
    P, r, rho = np.array([[[0.1, 0.9]], [[0.3, 0.7]]]), np.array([[0.1], [0.2]]), np.array([0.3, 0.7])
    with jax.enable_x64(False):
        problem = stationary_mdp(P, r, rho, 0.9)
    np.testing.assert_array_equal(problem.P[0].toarray(), P[:, 0])
    np.testing.assert_array_equal(problem.r, r)
    np.testing.assert_array_equal(problem.rho, rho)


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"P": np.full((3, 2, 3), 0.5)}, r"each row of P\[0\] must sum to one; row 0 sums to 1.5"),
        ({"P": np.zeros((2, 3, 3))}, r"P must have shape \[S, A, S\] = \(3, 2, 3\); got \(2, 3, 3\)"),
        ({"P": [sparse.eye_array(3)]}, "P must contain a matrix for each of the 2 actions; got 1"),
        ({"P": [sparse.eye_array(3), sparse.eye_array(2)]}, r"P\[1\] must have shape \[S, S\] = \(3, 3\); got \(2, 2\)"),
        ({"P": [sparse.eye_array(3), 2 * sparse.eye_array(3) - np.eye(3)[[1, 2, 0]]]}, r"P\[1\] must contain probabilities"),
        ({"P": [sparse.eye_array(3), np.nan * sparse.eye_array(3)]}, r"the entries of P\[1\] must be finite"),
        ({"r": np.zeros(3)}, r"r must have shape \[S, A\]"),
        ({"rho": [1.0, 0.0]}, "rho must have shape"),
        ({"rho": [1.0, 1.0, 0.0]}, "^rho must sum to one"),
        ({"discount": 1.5}, "discount must be a number in"),
    ],
)
def test_arrays_that_are_no_mdp_raise_an_error_that_names_them(change, rule):
    fine = {"P": [sparse.eye_array(3)] * 2, "r": np.zeros((3, 2)), "rho": [1.0, 0, 0], "discount": 0.9}
    with pytest.raises(ValueError, match=rule):
        stationary_mdp(**fine | change)


def test_what_does_not_fit_an_mdp_raises_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"discount must be below 1 where the horizon is infinite; got 1"):
        solve(stationary_mdp([sparse.eye_array(2)], np.zeros((2, 1)), [1.0, 0], 1.0))
    with pytest.raises(ValueError, match=r"method must be one of .*; got 'simplex'"):
        solve(FOREST, method="simplex")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="method must be auto over a finite horizon of an MDP; got 'value-iteration'"):
        solve(FOREST, 3, method="value-iteration")
    with pytest.raises(ValueError, match=r"path of a saved policy of an MDP must end in .json"):
        solve(FOREST).save(tmp_path / "policy.alpha")
    for state, rule in ((3, "state must be from 0 to 2; got 3"), ("ancient", "state must be one of .*; got 'ancient'")):
        with pytest.raises(ValueError, match=rule):
            solve(FOREST).act(state)
    two = solve(stationary_mdp([sparse.eye_array(2)] * 2, np.eye(2), [0.5, 0.5], 0.5))
    assert two.first_actions == {0: 0, 1: 1} and two.lower == pytest.approx(2)
    with pytest.raises(ValueError, match="problem must have one first action"):
        _ = two.first_action


def test_a_saved_policy_is_read_back_and_a_damaged_one_raises_an_error(tmp_path):
    for horizon, policy in ((math.inf, [0, 0, 0]), (2, [[0, 0, 0], [0, 1, 0]])):
        path = tmp_path / "new" / "policy.json"
        solve(FOREST, horizon).save(path)
        content = load_policy(path)
        assert content["policy"] == policy and content["states"] == ["young", "middle", "old"]
        assert content["horizon"] == (2 if horizon == 2 else None)
    path.write_text(path.read_text().replace('"old"', '"new"'))
    with pytest.raises(DataError, match="is damaged"):
        load_policy(path)
    path.write_text(json.dumps({}))
    with pytest.raises(DataError, match="must have the format"):
        load_policy(path)
