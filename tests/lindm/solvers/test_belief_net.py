"""The certified net against an independent recursion over histories: bounds hold everywhere, and close where they should."""

import itertools
import tracemalloc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.solvers import belief_net as nets
from lindm.types import APOMDP, POMDP

ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)
PER_POINT = ("beliefs", "lower", "upper", "radius", "slope_low", "slope_high")


class Arrays(NamedTuple):
    P: np.ndarray  # [M, H|1, S, A, S]
    O: np.ndarray  # [M, H|1, A, S, O]
    r: np.ndarray  # [M, H, S, A]
    rho: np.ndarray  # [M, S]
    alpha: float

    def problem(self) -> APOMDP:
        P, O, r, rho = (jnp.asarray(part) for part in self[:4])
        return APOMDP(models=POMDP(P=P, O=O, r=r, rho=rho), alpha=jnp.asarray(self.alpha))


def random_arrays(seed: int, S: int, A: int, O: int, M: int, H: int) -> Arrays:
    """Sharp or flat laws with exact zeros, rewards of both signs, laws of the first state that differ, stages that may."""
    rng = np.random.default_rng(seed)
    stages, sharpness = rng.choice([1, H]), rng.choice([0.3, 1.0, 3.0])

    def laws(n: int, *shape: int) -> np.ndarray:
        p = rng.dirichlet(np.full(n, sharpness), shape)
        p = p * ((rng.uniform(size=p.shape) > 0.15) | (p == p.max(-1, keepdims=True)))
        return p / p.sum(-1, keepdims=True)

    P, Z, rho = laws(S, M, stages, S, A), laws(O, M, stages, A, S), laws(S, M)
    return Arrays(P, Z, rng.normal(size=(M, H, S, A)) + rng.normal(), rho, float(rng.choice(ALPHAS)))


def after(arrays: Arrays, h: int, b: np.ndarray, m: int, a: int, o: int) -> tuple[np.ndarray, np.ndarray]:
    """The probability of an observation and the belief it leaves, for beliefs [n, S]; any belief where it cannot be seen."""
    P, O = arrays.P[m, h % arrays.P.shape[1]], arrays.O[m, h % arrays.O.shape[1]]
    joint = np.stack([sum(b[:, i] * P[i, a, j] for i in range(b.shape[1])) * O[a, j, o] for j in range(b.shape[1])], 1)
    p = joint.sum(1)
    return p, np.where(p[:, None] > 0, joint / np.where(p > 0, p, 1)[:, None], 1 / b.shape[1])


def value(arrays: Arrays, h: int, *starts: np.ndarray) -> np.ndarray:
    """V_h by recursion over histories: beliefs [n, S], one for all models or one for each."""
    M, H, _, A = arrays.r.shape
    best = np.full(len(starts[0]), -np.inf)
    for a in range(A):
        gains = []
        for m in range(M):
            b = starts[m % len(starts)]
            gain = b @ arrays.r[m, h, :, a]
            for o in range(arrays.O.shape[-1] if h + 1 < H else 0):
                p, child = after(arrays, h, b, m, a, o)
                gain = gain + p * value(arrays, h + 1, child)
            gains.append(gain)
        best = np.maximum(best, arrays.alpha * np.min(gains, 0) + (1 - arrays.alpha) * np.max(gains, 0))
    return best


def root(arrays: Arrays) -> float:
    return float(value(arrays, 0, *(law[None] for law in arrays.rho))[0])


def histories(arrays: Arrays, rng: np.random.Generator, n: int) -> list[np.ndarray]:
    """Beliefs [n, S] after random histories that can happen, for every stage from 1 on."""
    M, H, S, A = arrays.r.shape
    beliefs = np.zeros((H, n, S))
    for i in range(n):
        b = None
        for h in range(H - 1):
            m, a = rng.integers(M), rng.integers(A)
            start = arrays.rho[m] if b is None else b
            steps = [after(arrays, h, start[None], m, a, o) for o in range(arrays.O.shape[-1])]
            b = steps[rng.choice([o for o, (p, _) in enumerate(steps) if p[0] > 0])][1][0]
            beliefs[h + 1, i] = b
    return list(beliefs[1:])


def anywhere(rng: np.random.Generator, n: int, S: int) -> np.ndarray:
    return np.concatenate([np.eye(S), rng.dirichlet(np.ones(S), n - S)])


def filled(net: nets.Net, n: int) -> nets.Net:
    """The same net with more points that repeat the first, so that nets of several sizes share a compilation."""
    more = n - net.beliefs.shape[1]
    fields = {k: np.asarray(getattr(net, k)) for k in PER_POINT}
    longer = {k: jnp.asarray(np.concatenate([x, np.repeat(x[:, :1], more, 1)], 1)) for k, x in fields.items()}
    return nets.Net(**longer, low=net.low, high=net.high, lipschitz=net.lipschitz, points=net.points)


value_bounds = jax.jit(nets.value_bounds)
QUERIES = 20


def bounds(net: nets.Net, h: int, beliefs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lower, upper = value_bounds(filled(net, 128), h, jnp.asarray(beliefs))
    return np.asarray(lower), np.asarray(upper)


def holds(lower, exact, upper, scale: float = 1.0) -> None:
    tolerance = 1e-12 * scale
    assert (np.asarray(lower) <= exact + tolerance).all(), (lower - exact).max()
    assert (exact <= np.asarray(upper) + tolerance).all(), (exact - upper).max()


# --- the bounds contain the value


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1, 4), (2, 2, 2, 3, 4), (3, 2, 2, 2, 4), (4, 2, 3, 1, 4), (3, 1, 2, 3, 4)])
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), points=st.sampled_from([1, 5, 20, 100]))
def test_the_exact_value_lies_between_the_bounds_at_the_start_after_any_history_and_anywhere_else(sizes, seed, points):
    arrays, rng = random_arrays(seed, *sizes), np.random.default_rng(seed)
    net = nets.net(arrays.problem(), points=points)
    assert (np.asarray(net.points)[1:] <= points).all()
    holds(net.lower[0], root(arrays), net.upper[0])
    for h, reached in enumerate(histories(arrays, rng, QUERIES // 2), 1):
        beliefs = np.concatenate([reached, anywhere(rng, QUERIES // 2, sizes[0])])
        lower, upper = bounds(net, h, beliefs)
        assert (lower <= upper).all()
        holds(lower, value(arrays, h, beliefs), upper)


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), points=st.sampled_from([3, 10, 30]))
def test_between_any_two_beliefs_and_any_two_in_a_ball_the_value_changes_within_the_slopes(seed, points):
    arrays, rng = random_arrays(seed, 3, 2, 2, 2, 3), np.random.default_rng(seed)
    net = nets.net(arrays.problem(), points=points)
    for h in (1, 2):
        b, g = anywhere(rng, 12, 3), rng.permutation(anywhere(rng, 12, 3))
        d, rise = b - g, value(arrays, h, b) - value(arrays, h, g)
        up, down = np.maximum(d, 0), np.maximum(-d, 0)
        low, high = np.asarray(net.low[h]), np.asarray(net.high[h])
        holds(up @ low - down @ high, rise, up @ high - down @ low)
        holds(b @ low, value(arrays, h, b), b @ high)
        assert (abs(rise) <= float(net.lipschitz[h]) * abs(d).sum(1) + 1e-12).all()

        # two beliefs at the rim of the ball of each point: towards random corners, as far as the radius allows
        g, radius = np.asarray(net.beliefs[h]), np.asarray(net.radius[h])[:, None]
        pair = []
        for _ in range(2):
            towards = np.eye(3)[rng.integers(3, size=len(g))] - g
            length = abs(towards).sum(1, keepdims=True)
            pair.append(g + towards * np.minimum(1, radius / np.where(length > 0, length, 1)))
        d, rise = pair[0] - pair[1], value(arrays, h, pair[0]) - value(arrays, h, pair[1])
        ends = np.stack([d * np.asarray(net.slope_low[h]), d * np.asarray(net.slope_high[h])])
        holds(ends.min(0).sum(1), rise, ends.max(0).sum(1))


def test_the_bound_in_l1_is_the_least_one_where_there_is_nothing_to_decide():
    # one model and one action: the value is linear, and moving all mass from the worst state to the best changes it by the span
    arrays = random_arrays(3, 3, 1, 2, 1, 4)
    net = nets.net(arrays.problem(), points=2)
    for h in range(4):
        corners = value(arrays, h, np.eye(3))
        np.testing.assert_allclose(net.low[h], corners, rtol=1e-12)
        np.testing.assert_allclose(net.high[h], corners, rtol=1e-12)
        assert float(net.lipschitz[h]) == pytest.approx(np.ptp(corners) / 2, rel=1e-12)


def test_mixing_of_a_kernel_lowers_the_lipschitz_constant():
    # the state stays with probability 1/2 and is drawn anew otherwise, unseen: moving all mass costs 1 + 1/2 + 1/4 + ... at most
    P = np.broadcast_to((np.eye(2)[:, None] + 0.5) / 2, (1, 1, 2, 2, 2))
    r = np.broadcast_to(np.eye(2), (1, 6, 2, 2))
    net = nets.net(Arrays(P, np.ones((1, 1, 2, 2, 1)), r, np.full((1, 2), 0.5), 1.0).problem())
    np.testing.assert_allclose(2 * net.lipschitz, 2 - 0.5 ** np.arange(5, -1, -1), rtol=1e-12)
    assert (net.high[0] - net.low[0] > 4).all()


def test_a_value_above_its_own_chord_is_between_the_bounds():
    # the worst of three models at the last stage: 0 at both corners, 0.4 and more between
    r = np.zeros((3, 2, 2, 1))
    r[:, 1, :, 0] = [[1, 0], [0, 1], [0.4, 0.4]]
    arrays = Arrays(np.full((3, 1, 2, 1, 2), 0.5), np.full((3, 1, 1, 2, 1), 1.0), r, np.array([[0.5, 0.5]] * 3), 1.0)
    beliefs = np.stack([np.linspace(0, 1, 21), 1 - np.linspace(0, 1, 21)], 1)
    exact = value(arrays, 1, beliefs)
    assert exact[10] > (exact[0] + exact[-1]) / 2 + 0.3
    net = nets.net(arrays.problem())
    lower, upper = bounds(net, 1, beliefs)
    holds(lower, exact, upper)
    assert lower[10] == pytest.approx(0.4) == upper[10]  # the one belief that is reached
    assert (upper[[0, -1]] - exact[[0, -1]] > 0.1).all()


# --- the two steps of the argument for a ball


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), points=st.sampled_from([4, 40, 400]), S=st.integers(2, 4))
def test_the_image_of_a_ball_is_in_the_ball_of_its_cell_where_that_is_said(seed, points, S):
    arrays, rng = random_arrays(seed, S, 2, 2, 2, 2), np.random.default_rng(seed)
    K = np.einsum("msax,maxo->maosx", arrays.P[:, 0], arrays.O[:, 0])
    g, ball = rng.dirichlet(np.ones(S), 30), 10 ** rng.uniform(-4, 0, 30) * (np.arange(30) < 25)
    reach = 10 ** rng.uniform(-3, 0)
    means, balls, (cell, inside), merged = nets.next_layer(np.repeat(g[:, None], 2, 1), K, ball, reach, points)
    assert (balls <= (merged + reach) * (1 + 1e-9) + 1e-11).all()
    for _ in range(20):
        towards = np.eye(S)[rng.integers(S, size=30)] - g
        x = g + towards * np.minimum(1, ball / abs(towards).sum(1))[:, None]
        for m, a, o in itertools.product(range(2), repeat=3):
            here, there = (after(arrays, 0, b, m, a, o) for b in (g, x))
            at = cell[:, m, a, o]
            distance = [abs(child - means[at]).sum(1) for _, child in (here, there)]
            seen = here[0] > 0
            assert (distance[0] <= balls[at] + 1e-13)[seen].all() and (distance[0] <= merged + 1e-13)[seen].all()
            assert (distance[1] <= balls[at] + 1e-13)[inside[:, m, a, o] & (there[0] > 0)].all()
    assert inside[25:].all()  # a ball that is a point


@given(seed=st.integers(0, 10**6), S=st.integers(2, 4))
def test_the_largest_of_functions_that_bend_as_their_slopes_allow_keeps_to_its_slopes(seed, S):
    rng = np.random.default_rng(seed)
    n, k = 8, 3
    ball, at = 10 ** rng.uniform(-2, 0, n), rng.normal(size=(n, k)) / 3
    low = rng.normal(size=(n, k, S))
    high = low + np.where(rng.uniform(size=(n, k, S)) < 0.5, 0, rng.exponential(size=(n, k, S)))
    bent = np.where(rng.uniform(size=(n, k)) < 0.5, 1, -1)  # convex or concave
    top = nets.maximum(nets.LocalBounds(at, at, low, high), ball)
    np.testing.assert_array_equal(top.lower, at.max(1))

    def function(d: np.ndarray) -> np.ndarray:
        ends = np.stack([d[:, None] * low, d[:, None] * high])
        return (at + np.where(bent > 0, ends.max(0).sum(-1), ends.min(0).sum(-1))).max(1)

    for i, j in itertools.permutations(range(S), 2):
        way = (np.eye(S)[i] - np.eye(S)[j]) * ball[:, None] / 2  # from the center to the rim
        d = np.array([0.5, 0.99, 1.0])[:, None, None] * way
        for here, there in itertools.combinations((0 * way, *d), 2):
            step = there - here
            ends = np.stack([step * top.low, step * top.high])
            holds(ends.min(0).sum(1), function(there) - function(here), ends.max(0).sum(1))


# --- the width of the bounds


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_with_room_for_every_reachable_belief_the_bounds_meet_at_the_start_and_after_every_history(seed):
    arrays, rng = random_arrays(seed, 3, 2, 2, 2, 3), np.random.default_rng(seed)
    net = nets.net(arrays.problem(), points=128)
    np.testing.assert_allclose([net.lower[0, 0], net.upper[0, 0]], root(arrays), rtol=0, atol=1e-10)
    for h, reached in enumerate(histories(arrays, rng, QUERIES), 1):
        for side in bounds(net, h, reached):
            np.testing.assert_allclose(side, value(arrays, h, reached), rtol=0, atol=1e-10)


def test_a_linear_value_costs_nothing_to_merge():
    arrays = random_arrays(5, 3, 1, 3, 1, 4)
    net = nets.net(arrays.problem(), points=1)
    np.testing.assert_allclose([net.lower[0, 0], net.upper[0, 0]], root(arrays), rtol=1e-12)
    beliefs = anywhere(np.random.default_rng(0), QUERIES, 3)
    for side in bounds(net, 2, beliefs):
        np.testing.assert_allclose(side, value(arrays, 2, beliefs), rtol=1e-12, atol=1e-14)


def test_the_intervals_shrink_as_points_are_added():
    widths = np.zeros((4, 3))
    for seed, (i, points) in itertools.product(range(4), enumerate((8, 64, 512))):
        net = nets.net(random_arrays(seed, 3, 2, 2, 3, 5)._replace(alpha=0.7).problem(), points=points)
        widths[seed, i] = net.upper[0, 0] - net.lower[0, 0]
    assert (widths[:, 0] > 1e-6).all()
    assert (widths[:, 1] <= widths[:, 0]).all() and (widths[:, 2] <= widths[:, 1]).all()
    assert widths[:, 2].mean() < widths[:, 0].mean() / 20


def test_one_step_of_lookahead_with_the_bounds_is_no_worse_than_the_bounds_at_the_start():
    arrays = random_arrays(11, 2, 2, 2, 3, 4)._replace(alpha=0.3)
    net = nets.net(arrays.problem(), points=5)
    ends = []
    for side in range(2):
        best = -np.inf
        for a in range(2):
            G = [float(arrays.rho[m] @ arrays.r[m, 0, :, a]) for m in range(3)]
            for m, o in itertools.product(range(3), range(2)):
                p, child = after(arrays, 0, arrays.rho[m : m + 1], m, a, o)
                G[m] += p[0] * float(bounds(net, 1, np.repeat(child, QUERIES, 0))[side][0])
            best = max(best, 0.3 * min(G) + 0.7 * max(G))
        ends.append(best)
    holds(ends[0], root(arrays), ends[1])
    assert float(net.lower[0, 0]) - 1e-12 <= ends[0] <= ends[1] <= float(net.upper[0, 0]) + 1e-12


# --- queries


@pytest.fixture(scope="module")
def merged() -> nets.Net:
    return filled(nets.net(random_arrays(7, 2, 2, 2, 3, 4).problem(), points=20), 128)


def test_stages_may_be_traced_and_beliefs_have_any_leading_axes(merged):
    beliefs = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(2), (3, 7)))
    together = value_bounds(merged, 2, beliefs)
    assert together[0].shape == (3, 7)
    assert nets.value_bounds(merged, 2, jnp.zeros((0, 2)))[1].shape == (0,)
    lower, upper = nets.value_bounds(merged, 2, beliefs[0, 0])
    np.testing.assert_allclose([lower, upper], [side[0, 0] for side in together], rtol=1e-14)


def test_vmap_over_beliefs_stages_and_nets_is_a_loop(merged):
    beliefs = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(2), (3, 7)))
    other = jax.tree.map(lambda x: x, filled(nets.net(random_arrays(8, 2, 2, 2, 3, 4).problem(), points=20), 128))
    both = jax.tree.map(lambda *x: jnp.stack(x), merged, other)
    over_beliefs = jax.jit(jax.vmap(nets.value_bounds, (None, None, 0)))(merged, 2, beliefs)
    over_stages = jax.jit(jax.vmap(nets.value_bounds, (None, 0, 0)))(merged, jnp.arange(1, 4), beliefs)
    over_nets = jax.jit(jax.vmap(nets.value_bounds, (0, None, None)))(both, 2, beliefs[0])
    for i in range(3):
        for bounds_of, h in ((over_beliefs, 2), (over_stages, i + 1)):
            np.testing.assert_allclose([side[i] for side in bounds_of], value_bounds(merged, h, beliefs[i]), rtol=1e-14)
    for i, net in enumerate((merged, other)):
        np.testing.assert_allclose([side[i] for side in over_nets], value_bounds(net, 2, beliefs[0]), rtol=1e-14)


def test_a_problem_of_one_stage_is_its_reward_and_one_of_one_state_has_one_belief():
    arrays = random_arrays(0, 2, 3, 2, 3, 1)
    net = nets.net(arrays.problem())
    assert net.beliefs.shape == (1, 3, 2)
    np.testing.assert_allclose([net.lower[0], net.upper[0]], root(arrays), rtol=1e-13)
    arrays = random_arrays(0, 1, 2, 2, 2, 3)
    net = nets.net(arrays.problem())
    np.testing.assert_array_equal(net.points, [2, 1, 1])
    np.testing.assert_allclose([net.lower[0, 0], net.upper[0, 0]], root(arrays), rtol=1e-13)


def test_single_precision_does_not_crash():
    arrays = random_arrays(2, 2, 2, 2, 2, 3)
    with jax.enable_x64(False):
        net = nets.net(arrays.problem(), points=20)
        lower, upper = nets.value_bounds(net, 1, jnp.asarray(np.eye(2), jnp.float32))
        assert net.beliefs.dtype == lower.dtype == jnp.float32
    exact = value(arrays, 1, np.eye(2))
    assert (np.asarray(lower) <= exact + 1e-4).all() and (exact <= np.asarray(upper) + 1e-4).all()


def test_invalid_arguments_raise_an_error(merged):
    problem = random_arrays(0, 2, 2, 2, 1, 2).problem()
    with pytest.raises(ValueError, match="points must be a whole number of at least 1; got 0"):
        nets.net(problem, points=0)
    with pytest.raises(ValueError, match=r"problem must be a single one, .* got rewards of shape \(3, 1, 2, 2, 2\)"):
        nets.net(jax.tree.map(lambda x: jnp.stack([x] * 3), problem))
    with pytest.raises(ValueError, match="h must be a stage after the first, from 1 to 3; got 4"):
        nets.value_bounds(merged, 4, jnp.ones(2) / 2)


# --- cells and bytes


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), S=st.integers(1, 5), points=st.sampled_from([1, 2, 17, 400]))
def test_merging_keeps_to_the_number_of_points_and_joins_what_is_equal(seed, S, points):
    rng = np.random.default_rng(seed)
    distinct = rng.dirichlet(np.ones(S), 200).round(2)
    distinct = distinct / distinct.sum(1, keepdims=True)
    beliefs = np.repeat(distinct, 3, 0) * (1 + 1e-15 * rng.normal(size=(600, S)))
    means, cell = nets.merge(beliefs, points)
    assert len(means) <= points and set(cell) == set(range(len(means)))
    np.testing.assert_allclose(means.sum(1), 1, rtol=1e-14)
    assert (means >= 0).all()
    np.testing.assert_array_equal(cell.reshape(200, 3), np.repeat(cell[::3, None], 3, 1))
    if points == 400:
        np.testing.assert_allclose(means[cell], beliefs, rtol=0, atol=1e-11)


def test_with_more_points_the_cells_are_smaller():
    beliefs = np.random.default_rng(0).dirichlet(np.ones(3), 20_000)
    sizes = []
    for points in (100, 1000, 10_000):
        means, cell = nets.merge(beliefs, points)
        assert len(means) > points / 3
        sizes.append(np.abs(beliefs - means[cell]).sum(1).max())
    assert sizes[1] < sizes[0] / 2 and sizes[2] < sizes[1] / 2 and sizes[0] < 0.4


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2, 7), (3, 2, 3, 2, 5), (6, 2, 2, 2, 5)])
def test_the_estimate_of_memory_is_enough_and_not_far_off(sizes):
    problem = random_arrays(1, *sizes).problem()
    tracemalloc.start()
    nets.net(problem, points=1500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < nets.memory_bytes(problem, 1500) < 4 * peak
