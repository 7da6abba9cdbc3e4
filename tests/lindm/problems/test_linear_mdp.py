"""Linear MDPs: the families, the change of coordinates, and the checks of a user's arrays."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lindm.problems.linear_mdp import draw_task as eager_draw_task
from lindm.problems.linear_mdp import linear_mdp, onehot_family, second_moment, simplex_family, with_second_moment
from lindm.problems.linear_mdp import tabulate as eager_tabulate
from lindm.solvers.dp import plan_linear

draw_task, tabulate = jax.jit(eager_draw_task), jax.jit(eager_tabulate)

S, A, D, H = 5, 3, 4, 3


@pytest.fixture(scope="module")
def family():
    return simplex_family(jax.random.key(0), S, A, D, H, low=-0.5, high=2.0)


def by_hand(seed: int):
    """A valid linear MDP as numpy arrays."""
    rng = np.random.default_rng(seed)
    return {
        "phi": rng.dirichlet(np.ones(D), (S, A)),
        "mu": rng.dirichlet(np.ones(S), (H, D)),
        "theta": rng.normal(size=(H, D)),
        "rho": rng.dirichlet(np.ones(S)),
    }


def random_covariance(seed: int, kappa: float):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(D, D)))
    return (basis * np.geomspace(1, kappa, D)) @ basis.T


# --- families


def test_simplex_features_are_probability_vectors_and_tasks_are_mdps(family):
    phi = np.asarray(family.phi)
    assert phi.shape == (S, A, D)
    assert (phi >= 0).all()
    np.testing.assert_allclose(phi.sum(-1), 1, rtol=1e-13)
    table = tabulate(draw_task(jax.random.key(1), family))
    assert table.P.shape == (H, S, A, S)
    assert (table.P >= 0).all()
    np.testing.assert_allclose(table.P.sum(-1), 1, rtol=1e-13)
    assert (table.r >= -0.5).all()
    assert (table.r <= 2.0).all()


def test_a_task_of_a_one_hot_family_is_a_tabular_mdp_with_free_entries():
    family = onehot_family(S, A, H)
    np.testing.assert_array_equal(family.phi.reshape(S * A, S * A), np.eye(S * A))
    task = draw_task(jax.random.key(2), family)
    table = tabulate(task)
    for h, s, a in itertools.product(range(H), range(S), range(A)):
        np.testing.assert_array_equal(table.P[h, s, a], task.mu[h, s * A + a])
        assert table.r[h, s, a] == task.theta[h, s * A + a]
    np.testing.assert_allclose(second_moment(family), np.eye(S * A) / (S * A), rtol=1e-13)


def test_the_table_is_the_inner_product_written_out(family):
    task = draw_task(jax.random.key(3), with_second_moment(family, random_covariance(0, 5.0)))
    phi, mu, theta = (np.asarray(leaf) for leaf in (task.phi, task.mu, task.theta))
    table = tabulate(task)
    for h, s, a in itertools.product(range(H), range(S), range(A)):
        assert table.r[h, s, a] == pytest.approx(sum(phi[s, a, i] * theta[h, i] for i in range(D)), rel=1e-12)
        for t in range(S):
            assert table.P[h, s, a, t] == pytest.approx(sum(phi[s, a, i] * mu[h, i, t] for i in range(D)), abs=1e-13)


def test_tasks_share_features_and_differ_in_everything_else_from_stage_to_stage(family):
    one, two = draw_task(jax.random.key(1), family), draw_task(jax.random.key(2), family)
    np.testing.assert_array_equal(one.phi, two.phi)
    assert (one.mu != two.mu).all()
    assert (one.theta != two.theta).all()
    assert (one.mu[0] != one.mu[1]).all()
    assert (one.theta[0] != one.theta[1]).all()


def test_reward_weights_are_uniform_in_their_box_and_measures_are_flat_dirichlet(family):
    n = 20_000
    tasks = jax.vmap(lambda k: draw_task(k, family))(jax.random.split(jax.random.key(0), n))
    theta, mu = np.asarray(tasks.theta), np.asarray(tasks.mu)
    assert (np.abs(theta.mean(0) - 0.75) <= 5 * theta.std(0) / np.sqrt(n)).all()
    assert (np.abs(theta.var(0) - 2.5**2 / 12) <= 5 * 2.5**2 * np.sqrt(1 / 180 / n)).all()
    assert (np.abs(mu.mean(0) - 1 / S) <= 5 * mu.std(0) / np.sqrt(n)).all()
    variance = (S - 1) / (S**2 * (S + 1))
    squares = (mu - 1 / S) ** 2
    assert (np.abs(squares.mean(0) - variance) <= 5 * squares.std(0) / np.sqrt(n)).all()


def test_the_second_moment_is_weighted_by_the_design(family):
    design = np.random.default_rng(0).dirichlet(np.ones(S * A))
    x = np.asarray(family.phi).reshape(S * A, D)
    want = sum(design[i] * np.outer(x[i], x[i]) for i in range(S * A))
    np.testing.assert_allclose(second_moment(replace(family, design=jnp.asarray(design))), want, rtol=1e-12)


def test_a_stack_of_tasks_is_a_loop_over_keys(family):
    keys = jax.random.split(jax.random.key(9), 3)
    stack = jax.jit(jax.vmap(lambda k: tabulate(draw_task(k, family))))(keys)
    for i, key in enumerate(keys):
        one = tabulate(draw_task(key, family))
        np.testing.assert_allclose(stack.P[i], one.P, rtol=1e-12)
        np.testing.assert_allclose(stack.r[i], one.r, rtol=1e-12)


def test_a_family_in_single_precision_gives_tasks_in_single_precision(family):
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), family)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((draw_task(jax.random.key(0), small), second_moment(small)))}
    assert dtypes == {"float32"}


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"S": 0}, "S must be a whole number"),
        ({"A": 1.5}, "A must be a whole number"),
        ({"H": -1}, "H must be a whole number"),
        ({"power": -1.0}, "power must be finite and not negative"),
        ({"power": float("nan")}, "power must be finite"),
        ({"low": 2.0, "high": 1.0}, "high must be at least low"),
        ({"high": float("inf")}, "low and high must be finite"),
    ],
)
def test_families_out_of_range_raise_an_error_that_names_them(arguments, rule):
    sizes = {"S": S, "A": A, "H": H} | arguments
    with pytest.raises(ValueError, match=rule):
        onehot_family(**sizes)
    with pytest.raises(ValueError, match=rule):
        simplex_family(jax.random.key(0), d=D, **sizes)


def test_a_family_of_no_features_raises_an_error():
    with pytest.raises(ValueError, match="d must be a whole number"):
        simplex_family(jax.random.key(0), S, A, 0, H)
    with pytest.raises(ValueError, match="feature_power must be finite"):
        simplex_family(jax.random.key(0), S, A, D, H, feature_power=-2.0)


# --- other coordinates


@pytest.mark.parametrize("kappa", [1.0, 10.0, 1e4])
def test_carried_features_have_exactly_the_given_covariance(family, kappa):
    C = random_covariance(1, kappa)
    design = jnp.asarray(np.random.default_rng(2).dirichlet(np.ones(S * A)))
    for start in (family, replace(family, design=design)):
        carried = with_second_moment(start, C)
        np.testing.assert_allclose(second_moment(carried), C, rtol=0, atol=1e-12 * kappa)
        x = np.asarray(carried.phi).reshape(S * A, D)
        np.testing.assert_allclose((x.T * np.asarray(start.design)) @ x, C, rtol=0, atol=1e-12 * kappa)


@given(seed=st.integers(0, 10**6), kappa=st.sampled_from([1.0, 30.0, 1e3]))
def test_carrying_a_family_keeps_every_one_of_its_mdps(seed, kappa):
    family = simplex_family(jax.random.key(seed % 7), S, A, D, H, low=-1.0, high=1.0)
    carried = with_second_moment(family, random_covariance(seed, kappa))
    key = jax.random.key(seed)
    before, after = tabulate(draw_task(key, family)), tabulate(draw_task(key, carried))
    np.testing.assert_allclose(after.P, before.P, rtol=0, atol=1e-11)
    np.testing.assert_allclose(after.r, before.r, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(after.rho, before.rho)


def test_carrying_twice_is_carrying_once(family):
    C, key = random_covariance(3, 20.0), jax.random.key(5)
    once, twice = with_second_moment(family, C), with_second_moment(with_second_moment(family, np.eye(D)), C)
    np.testing.assert_allclose(second_moment(twice), C, atol=1e-11)
    np.testing.assert_allclose(tabulate(draw_task(key, twice)).P, tabulate(draw_task(key, once)).P, atol=1e-11)


@given(seed=st.integers(0, 10**6))
def test_any_invertible_change_of_coordinates_gives_the_same_valid_problem(seed):
    arrays = by_hand(seed)
    T = np.random.default_rng(seed + 1).normal(size=(D, D)) + 3 * np.eye(D)
    back = np.linalg.inv(T).T
    moved = linear_mdp(arrays["phi"] @ T.T, np.einsum("ij,hjt->hit", back, arrays["mu"]), arrays["theta"] @ back.T, arrays["rho"])
    before, after = tabulate(linear_mdp(**arrays)), tabulate(moved)
    np.testing.assert_allclose(after.P, before.P, atol=1e-9)
    np.testing.assert_allclose(after.r, before.r, atol=1e-9)


@pytest.mark.parametrize(
    ("C", "rule"),
    [
        (np.diag([1.0, 1.0, 1.0, -1.0]), "C must be positive definite"),
        (np.eye(D) + np.triu(np.ones((D, D)), 1), "C must be symmetric"),
        (np.eye(D + 1), "C must have shape"),
        (np.diag([1.0, 1.0, 1.0, np.nan]), "C must be finite"),
        (np.ones(D), "C must be a square matrix"),
    ],
)
def test_a_covariance_that_is_none_raises_an_error(family, C, rule):
    with pytest.raises(ValueError, match=rule):
        with_second_moment(family, C)


def test_features_that_do_not_span_cannot_be_carried(family):
    flat = replace(family, phi=jnp.broadcast_to(family.phi[:1, :1], family.phi.shape))
    with pytest.raises(ValueError, match="second moment must be positive definite"):
        with_second_moment(flat, np.eye(D))


# --- problems built by hand


def test_a_problem_built_by_hand_is_accepted_as_it_is():
    arrays = by_hand(0)
    problem = linear_mdp(**arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(problem, name), array)


def test_the_first_state_is_uniform_unless_said_otherwise():
    arrays = by_hand(1)
    del arrays["rho"]
    np.testing.assert_allclose(linear_mdp(**arrays).rho, 1 / S, rtol=1e-14)


@pytest.mark.parametrize("name", ["phi", "mu", "theta", "rho"])
def test_arrays_of_mixed_precision_become_one_problem_that_can_be_planned(name):
    arrays = by_hand(1)
    problem = linear_mdp(**(arrays | {name: arrays[name].astype(np.float32)}))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(problem)} == {"float64"}
    assert plan_linear(problem)[1].shape == (H, D)


def test_a_drawn_task_is_valid(family):
    for member in (family, with_second_moment(family, random_covariance(4, 100.0))):
        task = draw_task(jax.random.key(0), member)
        linear_mdp(task.phi, task.mu, task.theta, task.rho)


@pytest.mark.parametrize("name", ["phi", "mu", "theta", "rho"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_values_that_are_not_finite_raise_an_error_that_names_them(name, bad):
    arrays = by_hand(2)
    arrays[name].reshape(-1)[3] = bad
    with pytest.raises(ValueError, match=f"^{name} must be finite"):
        linear_mdp(**arrays)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("phi", (S * A, D)),
        ("phi", (S, 0, D)),
        ("theta", (D,)),
        ("theta", (H, D + 1)),
        ("mu", (D, S)),
        ("mu", (H + 1, D, S)),
        ("mu", (H, S, D)),
        ("rho", (S + 1,)),
        ("rho", (1, S)),
    ],
)
def test_a_wrong_shape_raises_an_error_that_names_it(name, shape):
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        linear_mdp(**(by_hand(3) | {name: np.full(shape, 0.25)}))


def test_a_kernel_that_does_not_sum_to_one_raises_an_error():
    arrays = by_hand(4)
    arrays["mu"][1, 2, 0] += 0.1
    with pytest.raises(ValueError, match=r"kernel P.* must sum to one"):
        linear_mdp(**arrays)


def test_a_kernel_with_negative_probabilities_raises_an_error():
    arrays = by_hand(5)
    arrays["phi"][0, 0] = [1.0, 0.0, 0.0, 0.0]
    arrays["mu"][2, 0] = [1.3, -0.3, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"kernel P.* none below zero"):
        linear_mdp(**arrays)


@pytest.mark.parametrize(("rho", "rule"), [([0.5, 0.5, 0.5, 0, 0], "sum to one"), ([1.5, -0.5, 0, 0, 0], "below zero")])
def test_a_start_that_is_no_distribution_raises_an_error(rho, rule):
    with pytest.raises(ValueError, match=f"rho must .*{rule}"):
        linear_mdp(**(by_hand(6) | {"rho": np.array(rho)}))
