"""Point-based bounds against an independent recursion over the belief tree, published values, and the policy that is returned."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from lindm.problems import cassandra
from lindm.problems.stationary import StationaryPOMDP, stationary
from lindm.solvers.point_based import solve
from lindm.solvers.stationary_solution import StationarySolution, total_discount
from tests.lindm.solvers.test_hsvi import rows

FILES = Path(__file__).parents[1] / "problems" / "files"
TIGER_FOREVER = 19.371368  # pomdp-solve, to the digits that it prints


def read(name: str, discount: float | None = None) -> StationaryPOMDP:
    return stationary(cassandra.read(FILES / f"{name}.pomdp"), discount)


def model(seed: int, discount: float, S=3, A=2, O=2, kind="dense") -> StationaryPOMDP:
    rng = np.random.default_rng(seed)
    r = rng.normal(size=(S, A))
    return StationaryPOMDP(
        P=tuple(sparse.csr_array((rows(rng, kind, S, S) + np.eye(S)) / 2) for _ in range(A)),
        O=tuple(sparse.csr_array(rows(rng, kind, S, O)) for _ in range(A)),
        r=r - r.mean(0) + rng.normal(),
        rho=rows(rng, "dense", S),
        discount=discount,
    )


def exact(problem: StationaryPOMDP, stages: int, b: np.ndarray) -> np.ndarray:
    """Q* [A] at an unnormalized belief, by recursion over everything that can happen."""
    Q = b @ problem.r
    if stages > 1:
        for a, (P, O) in enumerate(zip(problem.P, problem.O, strict=True)):
            after = (b @ P.toarray())[:, None] * O.toarray()
            Q[a] += problem.discount * sum(exact(problem, stages - 1, u).max() for u in after.T)
    return Q


def earned(bounds: StationarySolution, stages: int, b: np.ndarray, to_go: float) -> float:
    """What the policy earns in so many stages from an unnormalized belief; it acts as with `to_go` stages to go."""
    if stages == 0 or not b.sum() > 0:
        return 0.0
    problem = bounds.problem
    a = bounds.act(b / b.sum(), to_go)
    after = (b @ problem.P[a].toarray())[:, None] * problem.O[a].toarray()
    now = float(b @ problem.r[:, a])
    return now + problem.discount * sum(earned(bounds, stages - 1, u, to_go - 1) for u in after.T)


@pytest.mark.parametrize(
    ("name", "discount", "horizon", "value"),
    [
        ("tiger", 0.95, 1, -1.0),
        ("tiger", 0.95, 2, -1.95),
        ("tiger", 0.95, 3, 2.3098),
        ("tiger", 0.95, 5, 2.7630961931),
        ("tiger", 0.95, 10, 6.6933684318),
        ("1d", 0.75, 5, 0.9482417793),
        ("4x3", 0.95, 5, 0.0899850532),
    ],
)
def test_a_finite_horizon_gives_the_published_values(name, discount, horizon, value):
    bounds = solve(read(name, discount), horizon, tolerance=1e-10)
    assert bounds.upper - bounds.lower <= 1e-10
    assert bounds.lower == pytest.approx(value, abs=1e-6 if name != "tiger" else 1e-9)


def test_without_a_discount_a_finite_horizon_is_solved_too():
    bounds = solve(replace(read("tiger"), discount=1.0), 5, tolerance=1e-10)
    assert (bounds.lower, bounds.upper) == pytest.approx((3.60915, 3.60915), abs=1e-9)


def test_an_infinite_horizon_gives_the_published_value_of_the_tiger():
    bounds = solve(read("tiger"), tolerance=1e-6)
    assert bounds.lower <= TIGER_FOREVER + 1e-6 and bounds.upper >= TIGER_FOREVER - 1e-6
    assert bounds.upper - bounds.lower <= 1e-6
    assert bounds.q_lower.argmax() == 0 and bounds.q_upper[1:].max() < bounds.q_lower[0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["dense", "sparse", "deterministic"]),
    st.sampled_from([0, 1, 4, 30]),
    st.sampled_from([0.3, 0.9, 1.0]),
    st.integers(1, 4),
)
def test_bounds_contain_the_value_after_any_number_of_trials(seed, kind, trials, discount, horizon):
    problem = model(seed, discount, kind=kind)
    value = exact(problem, horizon, problem.rho).max()
    bounds = solve(problem, horizon, trials=trials)
    assert bounds.lower - 1e-9 <= value <= bounds.upper + 1e-9
    if trials == 30 and horizon < 4:
        assert bounds.upper - bounds.lower < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_bounds_of_an_infinite_horizon_agree_with_a_long_finite_one(seed):
    problem = model(seed, 0.5, kind="sparse" if seed % 2 else "dense")
    bounds = solve(problem, tolerance=1e-7, trials=400)
    begun, rest = exact(problem, 7, problem.rho).max(), 0.5**7 / (1 - 0.5)
    assert bounds.upper - bounds.lower < 1e-4
    assert bounds.lower <= begun + rest * problem.r.max() + 1e-9
    assert bounds.upper >= begun + rest * problem.r.min() - 1e-9


@pytest.mark.parametrize("kind", ["dense", "sparse", "deterministic"])
@pytest.mark.parametrize("trials", [0, 3, 25])
def test_the_policy_of_a_finite_horizon_earns_the_lower_bound(kind, trials):
    for seed in range(4):
        problem = model(seed, 0.9, kind=kind)
        bounds = solve(problem, 4, trials=trials)
        value = earned(bounds, 4, problem.rho, 4)
        assert bounds.lower - 1e-9 <= value <= bounds.upper + 1e-9


@pytest.mark.parametrize("kind", ["dense", "sparse", "deterministic"])
def test_the_policy_of_an_infinite_horizon_earns_the_lower_bound(kind):
    for seed in range(4):
        problem = model(seed, 0.6, kind=kind)
        bounds = solve(problem, trials=20)
        stages, rest = 9, 0.6**9 / (1 - 0.6)
        value = earned(bounds, stages, problem.rho, math.inf)
        assert value + rest * problem.r.max() >= bounds.lower - 1e-9
        assert value + rest * problem.r.min() <= bounds.upper + 1e-9


@pytest.mark.parametrize("horizon", [6, math.inf])
def test_every_vector_is_earned_by_its_action_and_its_successors(horizon):
    problem = model(1, 0.9, S=4, A=3, O=3, kind="sparse")
    bounds = solve(problem, horizon, trials=30)
    assert len(bounds.vectors) > 5
    for v, a, successors, least in zip(bounds.vectors, bounds.actions, bounds.successors, bounds.least, strict=True):
        P, O = problem.P[a].toarray(), problem.O[a].toarray()
        if least == 1:
            after = np.zeros(problem.num_states)
        else:
            shorter = bounds.least[successors]
            assert (shorter <= least - 1).all()
            # the promise of a successor that needs fewer stages, with the worst reward at the stages that are left
            left = problem.r.min() * (0 if least == math.inf else (0.9**shorter - 0.9 ** (least - 1)) / (1 - 0.9))
            after = (O * (bounds.vectors[successors] + np.reshape(left, (-1, 1)) * np.ones(4)).T).sum(1)
        assert (v <= problem.r[:, a] + 0.9 * P @ after + 1e-7).all()


def test_more_time_never_loosens_a_bound():
    problem = model(3, 0.95, S=5, A=3, O=3)
    results = [solve(problem, trials=n) for n in (0, 2, 8, 32)]
    assert all(a.lower <= b.lower + 1e-9 and b.upper <= a.upper + 1e-9 for a, b in pairwise(results))


def test_the_search_is_the_same_every_time():
    first, second = (solve(model(5, 0.95, S=4), trials=12) for _ in range(2))
    assert (first.lower, first.upper) == (second.lower, second.upper)
    np.testing.assert_array_equal(first.vectors, second.vectors)


def test_the_search_ends_at_its_timeout_with_bounds_that_hold():
    bounds = solve(read("tiger"), tolerance=0.0, timeout=1e-9)
    assert bounds.trials == 0 and bounds.lower <= TIGER_FOREVER <= bounds.upper


def test_equal_rewards_and_a_single_action_close_the_gap_at_once():
    same = replace(model(2, 0.8), r=np.full((3, 2), -2.0))
    assert (solve(same).lower, solve(same).upper) == pytest.approx((-10, -10), abs=1e-6)
    alone = model(4, 0.8, A=1)
    chain = np.linalg.solve(np.eye(3) - 0.8 * alone.P[0].toarray(), alone.r[:, 0])
    bounds = solve(alone, tolerance=1e-9)
    assert (bounds.lower, bounds.upper) == pytest.approx((alone.rho @ chain,) * 2, abs=1e-7)


def test_a_discount_of_one_has_no_infinite_horizon():
    with pytest.raises(ValueError, match=r"discount must be below 1 where the horizon is infinite; got 1"):
        solve(read("tiger", 1.0))


@pytest.mark.parametrize("horizon", [7, math.inf])
def test_with_discount_zero_the_first_reward_counts_alone(horizon):
    problem = model(6, 0.0)
    bounds = solve(problem, horizon)
    assert (bounds.lower, bounds.upper) == pytest.approx(((problem.rho @ problem.r).max(),) * 2, abs=1e-12)


def test_a_far_end_is_solved_without_one_and_its_tail_is_in_the_bounds():
    problem, shorter = model(1, 0.5), 12
    tail = 0.5**shorter * np.ptp(problem.r) / 0.5
    far = solve(problem, shorter, tolerance=20 * tail, trials=60)
    near = solve(problem, shorter, tolerance=1e-9, trials=400)
    assert far.is_stationary and not near.is_stationary and far.horizon == near.horizon == shorter
    assert far.lower <= near.lower + 1e-9 and near.upper <= far.upper + 1e-9
    assert tail <= far.upper - far.lower <= 20 * tail  # the tail is counted once
    assert far.lower - 1e-9 <= earned(far, 8, problem.rho, 8) + 0.5**8 * total_discount(0.5, 4) * problem.r.max()
    assert solve(read("tiger"), 1000, tolerance=1e-6).lower == pytest.approx(TIGER_FOREVER, abs=1e-6)


def test_an_alpha_file_has_an_action_and_a_row_for_each_vector(tmp_path):
    solution = solve(read("tiger"), trials=1)
    solution.save(tmp_path / "new" / "policy.alpha")
    blocks = (tmp_path / "new" / "policy.alpha").read_text().split("\n\n")
    assert [int(block.split()[0]) for block in blocks] == solution.actions.tolist()
    np.testing.assert_array_equal([[float(x) for x in block.split()[1:]] for block in blocks], solution.vectors)


def test_what_an_alpha_file_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.alpha or \.json; got 'policy\.txt'"):
        solve(read("tiger"), trials=1).save("policy.txt")
    with pytest.raises(ValueError, match="this policy changes with the stage"):
        solve(read("tiger"), 3, trials=1).save(tmp_path / "policy.alpha")
