"""Certified bounds against an independent recursion over the belief tree and published values."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.solvers.hsvi import Bounds, _evaluate, hsvi, memory_bytes, value_bounds
from lindm.types import POMDP

KINDS = ("dense", "sparse", "deterministic")
TRIALS = 8  # one compilation serves most tests


def rows(rng, kind: str, *shape: int):
    """Probability vectors along the last axis, with many zeros if `sparse`, of zeros and ones if `deterministic`."""
    p = rng.dirichlet(np.ones(shape[-1]), shape[:-1])
    top = p == p.max(-1, keepdims=True)
    if kind == "deterministic":
        return top.astype(float)
    if kind == "sparse":
        p = p * (top | (rng.uniform(size=shape) < 0.4))
    return p / p.sum(-1, keepdims=True)


def model(seed: int, S=3, A=2, O=2, H=4, P_kind="dense", O_kind="dense", stages=(None, None)) -> POMDP:
    """No action is good everywhere, rewards have either sign, and every other model likes to stay where it is.

    Kernels change with the stage unless `stages` (of P, of O) says 1.
    """
    rng = np.random.default_rng(seed)
    P, r = rows(rng, P_kind, stages[0] or H, S, A, S), rng.normal(size=(H, S, A))
    return POMDP(
        P=jnp.asarray((P + np.eye(S)[:, None]) / 2 if seed % 2 else P),
        O=jnp.asarray(rows(rng, O_kind, stages[1] or H, A, S, O)),
        r=jnp.asarray(r - (S > 1) * r.mean(1, keepdims=True) + rng.normal()),
        rho=jnp.asarray(rows(rng, O_kind, S)),
    )


def exact(problem: POMDP, h: int, b):
    """Q*_h [n, A] at beliefs b [n, S], by recursion over everything that can happen."""
    P, O, r = (np.asarray(x) for x in (problem.P, problem.O, problem.r))
    P_h, O_h = (x[0] if len(x) == 1 else x[h] for x in (P, O))
    Q = b @ r[h]
    if h + 1 < len(r):
        for a in range(r.shape[2]):
            for o in range(O.shape[3]):
                Q[:, a] += exact(problem, h + 1, (b @ P_h[:, a]) * O_h[a, :, o]).max(-1)
    return Q


def beliefs_for(seed: int, bounds: Bounds, h: int):
    """Beliefs [20, S] of all kinds: anywhere, on edges, at corners, at the points of the upper bound and close to them."""
    rng, S = np.random.default_rng(seed), bounds.points.shape[-1]
    points = np.asarray(bounds.points)[h][rng.integers(0, bounds.points.shape[1], 8)]
    near = 0.98 * points + 0.02 * rng.dirichlet(np.ones(S), 8)
    groups = (rows(rng, kind, 4, S) for kind in KINDS)
    return np.concatenate([*groups, points[:3], near[3:]])


def rounding(problem: POMDP) -> float:
    return 1e-12 * float(np.abs(np.asarray(problem.r)).max((1, 2)).sum())


# --- truth


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), P_kind=st.sampled_from(KINDS), O_kind=st.sampled_from(KINDS))
def test_the_optimal_value_lies_between_the_bounds_at_all_beliefs_of_all_stages(seed, P_kind, O_kind):
    problem = model(seed, P_kind=P_kind, O_kind=O_kind)
    bounds, slack = hsvi(problem, trials=TRIALS), rounding(problem)
    for h in range(4):
        b = beliefs_for(seed, bounds, h)
        lower, upper = value_bounds(bounds, h, b)
        V = exact(problem, h, b).max(-1)
        assert (lower <= V + slack).all() and (upper + slack >= V).all()
        if h == 3:
            np.testing.assert_allclose(lower, V, rtol=0, atol=slack)
            np.testing.assert_allclose(upper, V, rtol=0, atol=slack)


@given(seed=st.integers(0, 10**6), P_kind=st.sampled_from(KINDS), O_kind=st.sampled_from(KINDS))
def test_vectors_of_a_trial_bound_their_action_values_and_policies(seed, P_kind, O_kind):
    problem = model(seed, P_kind=P_kind, O_kind=O_kind)
    bounds, slack = hsvi(problem, trials=TRIALS), rounding(problem)
    for h in range(3):
        Q = exact(problem, h, np.asarray(bounds.points[h]))
        assert (np.asarray(bounds.values[h]) >= Q - slack).all()
        upper = value_bounds(bounds, h, bounds.points[h])[1]
        assert (upper <= np.asarray(bounds.values[h]).max(-1) + slack).all()
        corners = exact(problem, h, np.eye(3))
        assert (np.asarray(bounds.corners[h]) >= corners - slack).all()
        assert (np.asarray(bounds.alphas[h]) <= corners.max(-1) + slack).all()


@pytest.mark.parametrize(
    "S, A, O, H, stages",
    [(1, 2, 2, 3, (1, None)), (2, 1, 1, 3, (None, 1)), (2, 2, 2, 1, (None, None))],
)
def test_sizes_of_one_are_solved_exactly_and_a_kernel_may_be_shared_by_the_stages(S, A, O, H, stages):
    problem = model(7, S, A, O, H, stages=stages)
    bounds = hsvi(problem, trials=1)
    for h in range(H):
        b = rows(np.random.default_rng(h), "dense", 5, S)
        for bound in value_bounds(bounds, h, b):
            np.testing.assert_allclose(bound, exact(problem, h, b).max(-1), rtol=1e-12)


def test_tiger_is_solved_to_its_published_values_at_all_horizons():
    # Cassandra, Kaelbling, Littman 1994; values of pomdp-solve. Without a discount field, the last n stages are the problem
    # of horizon n times gamma^(10 - n).
    P, O = np.full((1, 2, 3, 2), 0.5), np.full((1, 3, 2, 2), 0.5)
    P[0, :, 0], O[0, 0] = np.eye(2), [[0.85, 0.15], [0.15, 0.85]]
    gamma = 0.95 ** np.arange(10)
    r = gamma[:, None, None] * np.array([[-1.0, -100, 10], [-1, 10, -100]])
    bounds = hsvi(POMDP(P=jnp.asarray(P), O=jnp.asarray(O), r=jnp.asarray(r), rho=jnp.full(2, 0.5)), trials=64)
    for n, value in {1: -1, 2: -1.95, 3: 2.3098, 5: 2.7630961931, 10: 6.6933684318}.items():
        lower, upper = (float(x) / gamma[10 - n] for x in value_bounds(bounds, 10 - n, jnp.full(2, 0.5)))
        assert lower == pytest.approx(value, abs=1e-6)
        assert upper - lower <= 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_trials_close_the_gap_of_a_random_model(seed):
    problem = model(seed, H=6, stages=(1, 1))
    rho = np.asarray(problem.rho)
    lower, upper = (float(x) for x in value_bounds(hsvi(problem, trials=100), 0, rho))
    V = exact(problem, 0, rho[None]).max()
    reward_range = np.ptp(np.asarray(problem.r), axis=(1, 2)).sum()
    assert V - 1e-5 * reward_range <= lower <= V + 1e-12 * reward_range
    assert V - 1e-12 * reward_range <= upper <= V + 1e-3 * reward_range


def test_the_bounds_are_the_stated_functions_of_their_tables():
    # more slots than a block, not a multiple of it; points and beliefs with zeros, and slots without a point at all
    rng, (H, S, A, N) = np.random.default_rng(0), (2, 4, 3, 75)
    alphas, corners = rng.normal(size=(H, A + N, S)), rng.normal(size=(H, S, A))
    points, values = rows(rng, "sparse", H, N, S), rng.normal(size=(H, N, A))
    points[:, ::5], values[:, ::5] = 0, np.inf
    bounds = Bounds(
        alphas=jnp.asarray(alphas),
        corners=jnp.asarray(corners),
        points=jnp.asarray(points),
        values=jnp.asarray(values),
        trials=jnp.asarray(N),
    )
    beliefs = rows(rng, "sparse", 40, S)
    lower, upper = value_bounds(bounds, 0, beliefs)
    for b, low, up in zip(beliefs, lower, upper, strict=True):
        assert low == pytest.approx((alphas[0] @ b).max(), rel=1e-13)
        cut = np.zeros(A)
        for p, q in zip(points[0], values[0], strict=True):
            if p.any():
                cut = np.maximum(cut, (b[p > 0] / p[p > 0]).min() * (p @ corners[0] - q))
        assert up == pytest.approx((b @ corners[0] - cut).max(), rel=1e-12)
    best = _evaluate(bounds, 0, N, jnp.asarray(beliefs))[2]
    np.testing.assert_array_equal(best, (beliefs @ alphas[0].T).argmax(-1))


def test_rewards_that_depend_on_nothing_and_an_impossible_observation_make_no_nan():
    problem = model(0)
    O, r = np.zeros((4, 2, 3, 2)), np.arange(4.0)[:, None, None] * np.ones((4, 3, 2))
    O[..., 1] = 1
    bounds = hsvi(replace(problem, O=jnp.asarray(O), r=jnp.asarray(r)), trials=TRIALS)
    for h in range(4):
        for bound in value_bounds(bounds, h, rows(np.random.default_rng(h), "sparse", 5, 3)):
            np.testing.assert_allclose(bound, r[h:, 0, 0].sum(), rtol=1e-13)


# --- promises


@given(
    seed=st.integers(0, 10**6),
    P_kind=st.sampled_from(KINDS),
    O_kind=st.sampled_from(KINDS),
    fraction=st.sampled_from((1.0, 1e-2, 1e-3, 1e-5)),
)
def test_more_trials_never_widen_the_bounds_at_any_belief(seed, P_kind, O_kind, fraction):
    problem = model(seed, P_kind=P_kind, O_kind=O_kind)
    many, slack = hsvi(problem, trials=TRIALS), rounding(problem)
    few = hsvi(problem, trials=TRIALS, tolerance=fraction)
    assert few.trials <= many.trials == TRIALS
    for h in range(4):
        b = beliefs_for(seed, many, h)
        (lower, upper), (higher, below) = value_bounds(few, h, b), value_bounds(many, h, b)
        assert (higher >= lower - slack).all() and (below <= upper + slack).all()


def test_bounds_are_homogeneous_and_zero_at_the_belief_zero():
    bounds = hsvi(model(0), trials=TRIALS)
    b = rows(np.random.default_rng(1), "sparse", 2, 5, 3)
    for one, double in zip(value_bounds(bounds, 1, b), value_bounds(bounds, 1, 2 * b), strict=True):
        assert one.shape == (2, 5)
        np.testing.assert_allclose(double, 2 * one, rtol=1e-13)
    assert value_bounds(bounds, 1, np.zeros(3)) == (0, 0)


def stack_of(count: int) -> POMDP:
    models = [model(seed, P_kind=KINDS[seed % 3], O_kind=KINDS[(seed // 3) % 3]) for seed in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


def test_a_stack_of_problems_is_a_loop_over_them_and_each_stops_on_its_own():
    stack = stack_of(9)
    together = jax.vmap(lambda problem: hsvi(problem, trials=TRIALS, tolerance=1e-3))(stack)
    assert len(set(np.asarray(together.trials))) > 2
    for i in range(9):
        alone = hsvi(jax.tree.map(lambda x, i=i: x[i], stack), trials=TRIALS, tolerance=1e-3)
        for one, other in zip(jax.tree.leaves(jax.tree.map(lambda x, i=i: x[i], together)), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_search_stops_when_the_gap_at_the_start_is_below_the_tolerance():
    for seed in range(10):
        problem = model(seed)
        reward_range = np.ptp(np.asarray(problem.r), axis=(1, 2)).sum()
        bounds = hsvi(problem, trials=TRIALS, tolerance=1e-3)
        lower, upper = value_bounds(bounds, 0, problem.rho)
        assert bounds.trials == TRIALS or upper - lower < 1e-3 * reward_range
        assert hsvi(problem, trials=TRIALS).trials == TRIALS
    assert hsvi(problem, trials=TRIALS, tolerance=1.0).trials == 1


def test_unused_slots_cannot_win():
    bounds = hsvi(model(3), trials=TRIALS, tolerance=1.0)
    used, rng = int(bounds.trials), np.random.default_rng(0)
    assert used < TRIALS
    unused = np.arange(TRIALS)[:, None] >= used
    assert np.isinf(np.asarray(bounds.values)[:3, used:]).all()
    other = replace(bounds, points=jnp.where(unused[None], rows(rng, "sparse", 4, TRIALS, 3), bounds.points))
    A = bounds.corners.shape[-1]
    np.testing.assert_array_equal(bounds.alphas[:, A + used :], np.broadcast_to(bounds.alphas[:, :1], (4, TRIALS - used, 3)))
    b = rows(rng, "sparse", 30, 3)
    for h in range(4):
        np.testing.assert_array_equal(value_bounds(bounds, h, b), value_bounds(other, h, b))


def rooms_visited(r):
    """The rooms 1 and 2 that trials see at stage 1: the first action chooses between them for good."""
    P, O = np.zeros((4, 3, 2, 3)), np.full((4, 2, 3, 2), 0.5)
    P[:, 0, 0, 1] = P[:, 0, 1, 2] = P[:, 1, :, 1] = P[:, 2, :, 2] = 1
    problem = POMDP(P=jnp.asarray(P), O=jnp.asarray(O), r=jnp.asarray(r), rho=jnp.asarray(np.eye(3)[0]))
    return np.asarray(hsvi(problem, trials=TRIALS).points)[1].argmax(-1)


def test_every_second_trial_also_visits_what_never_looks_worth_a_visit():
    r = np.zeros((4, 3, 2))
    r[:, 1], r[:, 2] = 1, -1
    rooms = rooms_visited(r)
    assert (rooms[::2] == 1).all() and (rooms[1::2] == 2).any()


def test_a_trial_follows_the_upper_bound_and_not_the_lower_one():
    r = np.zeros((4, 3, 2))
    r[:, 1] = 0.8
    r[[1, 2, 3], 2, [1, 0, 1]] = 1  # better, but not by one and the same action
    assert rooms_visited(r)[0] == 2


def test_the_memory_is_that_of_the_formula():
    problem = model(0)
    assert memory_bytes(problem, TRIALS) == sum(x.nbytes for x in jax.tree.leaves(hsvi(problem, trials=TRIALS)))


def test_single_precision_in_is_single_precision_out():
    problem = model(0, H=3, O_kind="sparse")
    bounds = hsvi(jax.tree.map(lambda x: x.astype(jnp.float32), problem), trials=4)
    b = rows(np.random.default_rng(0), "sparse", 5, 3)
    lower, upper = value_bounds(bounds, 1, b.astype(np.float32))
    assert {x.dtype.name for x in (lower, upper, bounds.alphas, bounds.values)} == {"float32"}
    V = exact(problem, 1, b).max(-1)
    assert (lower <= V + 1e-4).all() and (upper + 1e-4 >= V).all()


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="trials must be a whole number of at least 1; got 0"):
        hsvi(model(0), trials=0)
    with pytest.raises(ValueError, match="tolerance must be finite and not negative; got -1"):
        hsvi(model(0), tolerance=-1)
