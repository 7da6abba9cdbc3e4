"""Tabular problems: valid and invalid arrays, and the moments of random problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.problems.mdp import draw_mdp, draw_stationary_mdp, mdp, over_stages, simplex_rows
from lindm.solvers.dp import backward_induction, occupancy

S, A, H = 3, 2, 2


def arrays(seed: int = 0):
    rng = np.random.default_rng(seed)
    return {"P": rng.dirichlet(np.ones(S), (H, S, A)), "r": rng.normal(size=(H, S, A)), "rho": rng.dirichlet(np.ones(S))}


def test_a_valid_problem_is_returned_unchanged():
    given_arrays = arrays()
    problem = mdp(**given_arrays)
    for name, array in given_arrays.items():
        np.testing.assert_array_equal(getattr(problem, name), array)


def test_lists_and_whole_numbers_are_accepted():
    problem = mdp(P=[[[[1, 0]], [[0, 1]]]], r=[[[1], [0]]], rho=[1, 0])
    assert problem.P.shape == (1, 2, 1, 2)
    assert jnp.issubdtype(problem.P.dtype, jnp.floating)


@pytest.mark.parametrize("name", ["P", "r", "rho"])
def test_arrays_of_mixed_precision_become_one_problem_that_can_be_solved(name):
    mixed = arrays() | {name: arrays()[name].astype(np.float32)}
    problem = mdp(**mixed)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(problem)} == {"float64"}
    plan = backward_induction(problem)
    assert np.isfinite(plan.V).all()
    np.testing.assert_allclose(occupancy(problem, plan.pi).sum(-1), 1, rtol=1e-5)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), shift=st.sampled_from([-2.0, -0.01, 0.01, 2.0]), name=st.sampled_from(["P", "rho"]))
def test_a_kernel_or_start_with_one_wrong_entry_raises_an_error_that_names_it(seed, shift, name):
    broken = arrays(seed)
    flat = broken[name].reshape(-1)
    flat[seed % flat.size] += shift
    with pytest.raises(ValueError, match=rf"(row of )?\b{name}\b must"):
        mdp(**broken)


@pytest.mark.parametrize("name", ["P", "r", "rho"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_raise_an_error_that_names_them(name, bad):
    broken = arrays()
    broken[name].reshape(-1)[-1] = bad
    with pytest.raises(ValueError, match=f"^{name} must be finite"):
        mdp(**broken)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("P", np.full((S, A, S), 1 / S)),
        ("P", np.full((H + 1, S, A, S), 1 / S)),
        ("P", np.full((H, S, A, S + 1), 1 / (S + 1))),
        ("r", np.zeros((S, A))),
        ("r", np.zeros((0, S, A))),
        ("rho", np.full(S + 1, 1 / (S + 1))),
        ("rho", np.full((1, S), 1 / S)),
    ],
)
def test_a_wrong_shape_raises_an_error_that_names_it(name, array):
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        mdp(**(arrays() | {name: array}))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0, 200.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_random_rows_are_distributions_at_any_power(power, dtype):
    rows = np.asarray(simplex_rows(jax.random.key(0), (500, 7), power, dtype))
    assert rows.dtype == dtype
    assert np.isfinite(rows).all()
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(-1), 1, rtol=1e-5 if dtype == jnp.float32 else 1e-13)


def test_rows_of_power_one_have_the_moments_of_the_flat_dirichlet_law():
    n, count = 5, 60_000
    rows = np.asarray(simplex_rows(jax.random.key(1), (count, n)))
    # E p_i p_j = (1 + [i = j]) / (n (n + 1)), so the covariance is known in full
    second = (1 + np.eye(n)) / (n * (n + 1))
    products = rows[:, :, None] * rows[:, None, :]
    assert (np.abs(rows.mean(0) - 1 / n) <= 5 * rows.std(0) / np.sqrt(count)).all()
    assert (np.abs(products.mean(0) - second) <= 5 * products.std(0) / np.sqrt(count)).all()


def test_a_larger_power_concentrates_rows_and_power_zero_makes_them_uniform():
    key = jax.random.key(2)
    np.testing.assert_allclose(simplex_rows(key, (10, 4), 0.0), 0.25, rtol=1e-13)
    largest = [float(simplex_rows(key, (2_000, 4), power).max(-1).mean()) for power in (0.5, 1.0, 2.0, 6.0)]
    assert largest == sorted(largest)
    assert largest[-1] > 0.8


def test_drawn_problems_are_valid_and_stay_in_the_reward_range():
    problem = draw_mdp(jax.random.key(0), S, A, H, power=2.0, low=-1.0, high=0.5)
    checked = mdp(problem.P, problem.r, problem.rho)
    assert checked.P.shape == (H, S, A, S)
    assert (problem.r >= -1).all()
    assert (problem.r <= 0.5).all()
    np.testing.assert_allclose(problem.rho, 1 / S)


def test_drawn_rewards_fill_their_range_evenly_and_stages_differ():
    problems = jax.vmap(lambda k: draw_mdp(k, S, A, H, low=2.0, high=6.0))(jax.random.split(jax.random.key(0), 3_000))
    r = np.asarray(problems.r)
    assert abs(r.mean() - 4) < 5 * np.sqrt(16 / 12 / r.size)
    assert abs(r.var() - 16 / 12) < 5 * 16 * np.sqrt(1 / 180 / r.size)
    assert abs(np.corrcoef(r[:, 0].ravel(), r[:, 1].ravel())[0, 1]) < 5 / np.sqrt(r[:, 0].size)
    assert (problems.P[:, 0] != problems.P[:, 1]).any((1, 2, 3)).all()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"S": 0}, "S must be a whole number"),
        ({"A": 0}, "A must be a whole number"),
        ({"H": 2.5}, "H must be a whole number"),
        ({"low": 1.0, "high": 0.0}, "high must be at least low"),
        ({"low": float("nan")}, "low|high"),
        ({"high": float("inf")}, "high"),
        ({"power": -1.0}, "power"),
        ({"power": float("nan")}, "power"),
    ],
)
def test_random_problems_out_of_range_raise_an_error_that_names_them(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        draw_mdp(jax.random.key(0), **({"S": S, "A": A, "H": H} | arguments))


@given(seed=st.integers(0, 10**6), c=st.floats(0.01, 100.0), discount=st.floats(0.1, 1.0), step=st.sampled_from([0.0, 0.05, 0.3]))
def test_stationary_problems_are_valid_and_discount_one_table(seed, c, discount, step):
    problem = draw_stationary_mdp(
        jax.random.key(seed), S, A, 4, concentration=c, low=-1.0, high=2.0, step=step, discount=discount
    )
    checked = mdp(problem.P, problem.r, problem.rho)
    assert checked.P.shape == (1, S, A, S)
    r = np.asarray(problem.r)
    assert (r[0] >= -1).all() and (r[0] <= 2).all()
    np.testing.assert_allclose(r, r[:1] * discount ** np.arange(4)[:, None, None], rtol=1e-13)
    np.testing.assert_allclose(problem.rho, 1 / S)


@pytest.mark.parametrize("c", [0.2, 3.0])
def test_stationary_kernels_have_the_moments_of_the_dirichlet_law(c):
    count = 20_000
    rows = np.asarray(
        jax.vmap(lambda k: draw_stationary_mdp(k, 3, 1, 1, concentration=c).P)(jax.random.split(jax.random.key(5), count))
    )
    products = rows[:, 0, :, 0, :, None] * rows[:, 0, :, 0, None, :]
    want = (c * c + c * np.eye(3)) / (3 * c * (3 * c + 1))
    assert (np.abs(products.mean(0) - want) <= 5 * products.std(0) / np.sqrt(count)).all()


def test_stepped_rewards_are_the_multiples_in_range_equally_often_and_short_in_a_text():
    r = np.asarray(draw_stationary_mdp(jax.random.key(0), 2, 5_000, 1, low=-0.1, high=0.35, step=0.1).r).ravel()
    values, counts = np.unique(r, return_counts=True)
    assert values.tolist() == [-0.1, 0.0, 0.1, 0.2, 0.3]
    assert np.abs(counts / r.size - 0.2).max() < 5 * np.sqrt(0.16 / r.size)
    whole = np.asarray(draw_stationary_mdp(jax.random.key(1), 2, 5_000, 1, low=-6.0, high=3.0, step=3.0).r)
    assert np.unique(whole).tolist() == [-6, -3, 0, 3]


def test_unstepped_rewards_fill_their_range_evenly():
    r = np.asarray(draw_stationary_mdp(jax.random.key(2), 2, 5_000, 1, low=2.0, high=6.0).r)
    assert abs(r.mean() - 4) < 5 * np.sqrt(16 / 12 / r.size)
    assert abs(r.var() - 16 / 12) < 5 * 16 * np.sqrt(1 / 180 / r.size)


def test_numbers_of_a_stationary_problem_may_be_traced_and_stacks_are_loops():
    def draw(key, c, discount):
        return draw_stationary_mdp(key, S, A, 3, concentration=c, discount=discount)

    keys, c, discount = jax.random.split(jax.random.key(3), 3), jnp.array([0.1, 1.0, 9.0]), jnp.array([0.5, 0.9, 1.0])
    stack = jax.jit(jax.vmap(draw))(keys, c, discount)
    for i in range(3):
        one = draw(keys[i], float(c[i]), float(discount[i]))
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-300), stack, one)


def test_stationary_problems_come_in_single_precision():
    problem = draw_stationary_mdp(jax.random.key(0), S, A, H, concentration=0.01, step=0.1, discount=0.9, dtype=jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(problem)} == {"float32"}
    mdp(problem.P, problem.r, problem.rho)


def test_a_table_of_rewards_serves_every_stage_and_stages_keep_their_own():
    table, stages = np.array([[1.0, 2.0]]), np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    np.testing.assert_array_equal(over_stages(jnp.asarray(table), 3, 0.5), [[[1, 2]], [[0.5, 1]], [[0.25, 0.5]]])
    np.testing.assert_array_equal(over_stages(jnp.asarray(stages), 2, 0.5), [[[1, 2]], [[1.5, 2]]])


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"S": 0}, "S must be a whole number"),
        ({"H": 2.5}, "H must be a whole number"),
        ({"concentration": 0.0}, "concentration must be a finite number above zero; got 0"),
        ({"concentration": float("nan")}, "concentration must be"),
        ({"concentration": float("inf")}, "concentration must be"),
        ({"concentration": [1.0, 2.0]}, "concentration must be"),
        ({"low": 1.0, "high": 0.0}, "high must be at least low"),
        ({"step": -0.1}, "step must be finite and not negative"),
        ({"step": 0.4, "low": 0.5, "high": 0.7}, "step must have a multiple between low = 0.5 and high = 0.7; got 0.4"),
        ({"discount": -0.5}, r"discount must be a number in \[0, 1\]; got -0.5"),
        ({"discount": 1.01}, "discount must be"),
        ({"discount": float("nan")}, "discount must be"),
        ({"discount": "high"}, "discount must be"),
    ],
)
def test_stationary_problems_out_of_range_raise_an_error_that_names_them(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        draw_stationary_mdp(jax.random.key(0), **({"S": S, "A": A, "H": H} | arguments))
