"""Actions that are not legal, where the state is hidden: bounds of hsvi and of the search, against sets of states in Python."""
# what may be None is there in these tests
# pyright: reportOptionalSubscript=false

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

import lindm as ld
from lindm.evaluation.environments import BoundedEnvironment, environment, make_tasks
from lindm.evaluation.optimality_gap import evaluate_policy
from lindm.evaluation.policies.beliefs import QMDP
from lindm.evaluation.policies.optimal import Oracle, Random
from lindm.problems.apomdp import as_apomdp
from lindm.problems.stationary import StationaryPOMDP, to_pomdp
from lindm.solvers import legal_supports, point_based, tree
from lindm.solvers.alpha_values import policy_value_bounds
from lindm.solvers.hsvi import value_bounds
from lindm.solvers.rollout import demonstrate
from lindm.solvers.solve import labels, solve

S, A, O, H = 4, 3, 3, 4
SUBSETS = [frozenset(x) for k in range(1, S + 1) for x in itertools.combinations(range(S), k)]


def rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    weights = rng.exponential(size=shape) * (rng.random(shape) < 0.6)
    weights[..., 0] += weights.sum(-1) == 0
    return weights / weights.sum(-1, keepdims=True)


def draw(seed: int, discount: float = 0.5) -> StationaryPOMDP:
    """A problem without an action that is legal in all states: it can have beliefs without any, which must be avoided."""
    rng = np.random.default_rng(seed)
    legal = rng.random((S, A)) < 0.7
    legal[np.arange(S), rng.integers(A, size=S)] = True
    legal[rng.permutation(S)[:A], np.arange(A)] = False  # never all of them
    legal[~legal.any(1), :] = [True, False, True]
    P, Q = rows(rng, A, S, S), rows(rng, A, S, O)
    r = np.where(legal, rng.normal(size=(S, A)), 0)
    kernels = {"P": tuple(map(sparse.csr_array, P)), "O": tuple(map(sparse.csr_array, Q))}
    return StationaryPOMDP(**kernels, r=r, rho=rows(rng, S), discount=discount, legal=legal)


def following(problem: StationaryPOMDP, X: frozenset, a: int) -> list[frozenset]:
    """The sets of possible states after an action, one for each possible observation."""
    P, Q = problem.P[a].toarray(), problem.O[a].toarray()
    sets = [frozenset(u for s in X for u in range(S) if P[s, u] > 0 and Q[u, o] > 0) for o in range(O)]
    return [x for x in sets if x]


def endless(problem: StationaryPOMDP) -> dict[frozenset, list[int]]:
    """By the set of possible states, of all subsets, the actions with which legal actions never run out."""
    can = {X: [a for a in range(A) if all(problem.legal[s, a] for s in X)] for X in SUBSETS}
    while True:
        kept = {X: [a for a in can[X] if all(can[Y] for Y in following(problem, X, a))] for X in SUBSETS}
        if kept == can:
            return can
        can = kept


def value(problem: StationaryPOMDP, b: np.ndarray, stages: int, can: dict | None = None) -> float:
    """V* of an unnormalized belief; with `can`, over the actions that it lists."""
    if not stages or not b.sum() > 0:
        return 0.0
    X, best = frozenset(np.flatnonzero(b).tolist()), -np.inf
    for a in can[X] if can else [a for a in range(A) if problem.legal[sorted(X), a].all()]:
        after = (b @ problem.P[a].toarray())[:, None] * problem.O[a].toarray()
        later = sum(value(problem, u, stages - 1, can) for u in after.T)
        best = max(best, float(b @ problem.r[:, a]) + problem.discount * later)
    return best


def some(finite: bool, n: int) -> list[int]:
    """Seeds of problems in which no action is legal in all states, with or without a policy that takes legal actions alone."""
    return [s for s in range(200) if not draw(s).legal.all(0).any() and np.isfinite(value(draw(s), draw(s).rho, H)) == finite][:n]


SOLVABLE = some(True, 6)


def test_hsvi_takes_actions_that_every_possible_state_allows():
    doomed = 0
    for seed in SOLVABLE:
        stationary = draw(seed)
        problem = to_pomdp(stationary, H)
        exact, solution = value(stationary, stationary.rho, H), solve(problem, "hsvi", effort=64)
        assert exact == pytest.approx(float(solve(problem, "tree").value), rel=1e-12, abs=1e-12)
        assert float(solution.lower) - 1e-9 <= exact <= float(solution.upper) + 1e-9
        assert float(solution.upper) - float(solution.lower) < 1e-6
        # along random legal episodes: the same legal actions as the tree, and bounds of its values
        episodes, labeled = demonstrate(np.asarray([0, seed], np.uint32), solution, 40, 1.0)
        exact_labels = labels(solve(problem, "tree"), episodes)
        assert (labeled.legal == exact_labels.legal).all() and (np.isneginf(labeled.Q) == ~np.asarray(labeled.legal)).all()
        legal = np.asarray(labeled.legal)
        np.testing.assert_allclose(np.asarray(labeled.Q)[legal], np.asarray(exact_labels.Q)[legal], atol=0.2)
        doomed += (~legal).sum() > (~stationary.legal[np.asarray(episodes.s)]).sum()
    assert doomed  # somewhere an action that the state allows is not legal at the belief


def test_bounds_hold_at_all_beliefs_and_stages():
    rng = np.random.default_rng(0)
    for seed in SOLVABLE[:3]:
        stationary = draw(seed)
        bounds = solve(to_pomdp(stationary, H), "hsvi", effort=8).tables
        for h in range(H):
            beliefs = np.concatenate([np.eye(S), rows(rng, 12, S)])
            lower, upper = map(np.asarray, value_bounds(bounds, h, beliefs))
            exact = stationary.discount**h * np.array([value(stationary, b, H - h) for b in beliefs])
            assert (lower <= exact + 1e-9).all() and (exact <= upper + 1e-9).all()


def test_a_pomdp_too_large_for_its_tree_is_evaluated_by_bounds():
    problem = to_pomdp(draw(SOLVABLE[1]), H)
    exact, bounded = (make_tasks([problem], [()], **options) for options in ({}, {"budget": 0, "effort": 64}))
    assert isinstance(bounded[0].environment, BoundedEnvironment)
    for policy in (Oracle(), Random(), QMDP(), lambda demonstrations, history: np.full(A, 1 / A)):
        (one,), (other,) = (evaluate_policy(tasks, policy, max_histories=10**6) for tasks in (exact, bounded))
        assert one and other and other.masked == pytest.approx(one.masked, abs=1e-12)
        assert other.optimal_value - other.suboptimality == pytest.approx(one.optimal_value - one.suboptimality, abs=1e-6)
        assert other.uniform_value == pytest.approx(one.uniform_value, rel=1e-9)
        assert other.optimal_value - 1e-9 <= one.optimal_value <= other.optimal_value + other.width + 1e-9


def test_kernels_that_change_with_the_stage_have_supports_of_their_own():
    first, second = (to_pomdp(draw(seed), H) for seed in SOLVABLE[:2])
    stages = {name: np.concatenate([getattr(p, name) for p in (first, second, first, second)]) for name in ("P", "O")}
    problem = ld.pomdp(**stages, r=np.asarray(first.r), rho=first.rho, legal=first.legal)
    exact = float(np.max(tree.tree(as_apomdp(problem)).Q[0]))
    if np.isfinite(exact):
        solution = solve(problem, "hsvi", effort=64)
        assert float(solution.lower) - 1e-9 <= exact <= float(solution.upper) + 1e-9
        assert float(solution.upper - solution.lower) < 1e-6
    else:
        with pytest.raises(ValueError, match="legal must allow an action at every belief"):
            solve(problem, "hsvi")


@pytest.mark.parametrize("seed", SOLVABLE)
def test_the_search_without_an_end_never_runs_out_of_legal_actions(seed):
    problem = draw(seed)
    can, n = endless(problem), 6
    if not can[frozenset(np.flatnonzero(problem.rho).tolist())]:
        with pytest.raises(ValueError, match="legal must allow an action at every belief"):
            point_based.solve(problem)
        return
    solution = point_based.solve(problem, tolerance=1e-6)
    tail = problem.discount**n / (1 - problem.discount)
    exact = value(problem, problem.rho, n, can)
    lowest, highest = exact + tail * problem.lowest_reward, exact + tail * problem.r.max()
    assert solution.lower <= highest + 1e-9 and lowest - 1e-9 <= solution.upper and solution.upper - solution.lower < 1e-5
    # the policy earns what it promises, by a route of its own, and so does its graph
    low, high = policy_value_bounds(problem, solution.actions, solution.vectors, tolerance=1e-4)
    assert high >= solution.lower - 1e-9 and low <= solution.upper + 1e-9 and high - low < 1e-3
    graph = solution.graph()
    assert graph.value >= solution.lower - 1e-5
    start = frozenset(np.flatnonzero(problem.rho).tolist())
    assert {a for a in range(A) if np.isfinite(solution.q_upper[a])} == set(can[start])


def test_a_finite_horizon_of_the_search_needs_beliefs_that_always_allow_an_action():
    tried = {True: 0, False: 0}
    for seed in SOLVABLE:
        problem = replace(draw(seed), discount=1.0)
        exact = value(problem, problem.rho, H)
        try:
            solution = point_based.solve(problem, H, tolerance=1e-9)
        except ValueError as e:
            assert "point-based has no finite horizon where legal actions lead to a belief without one" in str(e)
            tried[False] += 1
            continue
        tried[True] += 1
        assert solution.lower - 1e-9 <= exact <= solution.upper + 1e-9 and solution.upper - solution.lower < 1e-6
    assert all(tried.values())


def test_one_action_that_is_always_legal_is_enough_where_there_are_too_many_supports(monkeypatch):
    monkeypatch.setattr(legal_supports, "MAX_SUPPORTS", 1)
    problem = draw(SOLVABLE[0])
    with pytest.raises(ValueError, match="at most 1 sets of possible states"):
        solve(to_pomdp(problem, H), "hsvi")
    problem.legal[:, 0] = True
    solution, exact = solve(to_pomdp(problem, H), "hsvi"), value(problem, problem.rho, H)
    assert float(solution.lower) - 1e-9 <= exact <= float(solution.upper) + 1e-9
    assert environment(to_pomdp(problem, H), budget=0).uniform_value is None
    found = point_based.solve(problem, tolerance=1e-6)
    assert found.upper - found.lower < 1e-5 and abs(found.lower - value(problem, problem.rho, 7)) < 0.1


def test_where_every_policy_runs_out_of_legal_actions_all_methods_say_so():
    (seed,) = some(False, 1)
    for method in ("tree", "hsvi"):
        with pytest.raises(ValueError, match="legal must allow an action at every belief that can be reached"):
            solve(to_pomdp(draw(seed), H), method)
    with pytest.raises(ValueError, match="legal must allow an action at every belief that can be reached"):
        point_based.solve(draw(seed))
