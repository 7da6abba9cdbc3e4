"""Every rule refuses what breaks it, by the argument's name, and lets the rest through unchanged."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm import validate


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    where=st.integers(0),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_one_value_that_is_not_finite_is_found_wherever_it_is(shape, where, bad):
    array = np.zeros(shape)
    np.testing.assert_array_equal(validate.finite(array, "theta"), array)
    at = np.unravel_index(where % array.size, shape)
    array[at] = bad
    with pytest.raises(ValueError, match=rf"theta must be finite; got {bad} at \({int(at[0])},"):
        validate.finite(array, "theta")


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([True]), np.array([1j]), np.array([None])])
def test_values_that_are_not_real_numbers_raise_errors(value):
    with pytest.raises(ValueError, match="theta must contain real numbers"):
        validate.finite(value, "theta")


def test_whole_numbers_become_floating_ones_and_floating_ones_keep_their_precision():
    assert validate.finite([1, 2], "r").dtype == jnp.float64
    assert validate.finite(np.ones(2, np.float32), "r").dtype == jnp.float32


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), shift=st.sampled_from([-0.3, -1e-4, 1e-4, 0.3]))
def test_a_row_that_is_off_by_a_digit_is_no_distribution(seed, n, shift):
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.ones(n), (3, 2))
    validate.distribution(jnp.asarray(rows), "P")
    validate.distribution(jnp.asarray(rows, jnp.float32), "P")
    i, j, k = rng.integers(3), rng.integers(2), rng.integers(n)
    rows[i, j, k] += shift
    with pytest.raises(ValueError, match=r"P must contain probabilities|each row of P must sum to one"):
        validate.distribution(jnp.asarray(rows), "P")


def test_the_sum_of_one_distribution_and_of_a_row_are_named():
    with pytest.raises(ValueError, match=r"^rho must sum to one; it sums to 1\.1$"):
        validate.distribution(jnp.asarray([0.9, 0.2]), "rho")
    with pytest.raises(ValueError, match=r"^each row of P must sum to one; row \(1,\) sums to 0\.9$"):
        validate.distribution(jnp.asarray([[0.5, 0.5], [0.7, 0.2]]), "P")


def test_negative_probabilities_are_refused_even_in_rows_that_sum_to_one():
    with pytest.raises(ValueError, match=r"rho must contain probabilities, none below zero; got -0.2 at \(1,\)"):
        validate.distribution(jnp.asarray([1.2, -0.2]), "rho")


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 5), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_a_covariance_is_accepted_and_with_one_eigenvalue_turned_over_refused(seed, d, scale):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    spectrum = scale * rng.uniform(0.1, 2.0, d)
    validate.covariance((basis * spectrum) @ basis.T, "Psi")
    spectrum[rng.integers(d)] *= -1
    with pytest.raises(ValueError, match="Psi must be positive definite"):
        validate.covariance((basis * spectrum) @ basis.T, "Psi")


@pytest.mark.parametrize(
    ("matrix", "rule"),
    [
        (np.zeros((2, 2)), "Psi must be positive definite"),
        (np.array([[1.0, 1.0], [1.0, 1.0]]), "Psi must be positive definite"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "Psi must be symmetric"),
        (np.ones((2, 3)), "Psi must be a square matrix"),
        (np.ones(4), "Psi must be a square matrix"),
        (np.zeros((0, 0)), "Psi must be a square matrix"),
        (np.diag([1.0, np.nan]), "Psi must be finite"),
    ],
)
def test_matrices_that_are_no_covariance_are_refused(matrix, rule):
    with pytest.raises(ValueError, match=rule):
        validate.covariance(matrix, "Psi")


@pytest.mark.parametrize("bad", [0, -3, 1.5, True, float("nan"), float("inf")])
def test_a_count_is_a_whole_number_from_one_on(bad):
    with pytest.raises(ValueError, match="H must be a whole number of at least 1"):
        validate.count(bad, "H")


def test_counts_come_back_as_integers():
    assert validate.count(np.int64(3), "H") == 3
    assert type(validate.count(2.0, "H")) is int


def test_errors_of_shapes_name_the_axes():
    with pytest.raises(ValueError, match=r"mu must have shape \[H, d, S\] = \(2, any, 3\); got \(2, 3\)"):
        validate.shaped(jnp.zeros((2, 3)), (2, None, 3), "mu", "H, d, S")
    with pytest.raises(ValueError, match="mu must have shape"):
        validate.shaped(jnp.zeros((2, 0, 3)), (2, None, 3), "mu", "H, d, S")
    validate.shaped(jnp.zeros((2, 7, 3)), (2, None, 3), "mu", "H, d, S")
