"""Gaussian regression: every moment the closed forms rest on, by Monte Carlo within five standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.problems.regression import covariance, draw_regression

D, N, Q, TASKS = 3, 4, 2, 40_000
LAMBDA = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, -0.2], [0.0, -0.2, 0.3]])
PSI = np.array([[1.0, -0.4, 0.1], [-0.4, 0.5, 0.0], [0.1, 0.0, 2.0]])
SIGMA = 0.7


@pytest.fixture(scope="module")
def drawn():
    keys = jax.random.split(jax.random.key(0), TASKS)
    draw = jax.vmap(lambda k: draw_regression(k, np.linalg.cholesky(LAMBDA), np.linalg.cholesky(PSI), N, Q, SIGMA))
    return jax.tree.map(np.asarray, draw(keys))


def assert_mean(samples, want):
    """The mean over the first axis within five standard errors of `want`, entry by entry."""
    error = np.abs(samples.mean(0) - want)
    assert (error <= 5 * samples.std(0) / np.sqrt(len(samples)) + 1e-12).all()


def test_shapes_are_those_of_the_contract(drawn):
    prompt, target, w = drawn
    assert prompt.x.shape == (TASKS, N, D)
    assert prompt.y.shape == (TASKS, N)
    assert prompt.query.shape == (TASKS, Q, D)
    assert target.shape == (TASKS, Q)
    assert w.shape == (TASKS, D)


def test_features_and_queries_are_centered_with_second_moment_lambda(drawn):
    prompt, _, _ = drawn
    for points in (prompt.x[:, 1], prompt.query[:, 0]):
        assert_mean(points, np.zeros(D))
        assert_mean(points[:, :, None] * points[:, None, :], LAMBDA)


def test_fourth_moments_are_gaussian_by_isserlis(drawn):
    x = drawn[0].x[:, 0]
    outer = x[:, :, None] * x[:, None, :]
    sampled = np.einsum("nij,jk,nkl->nil", outer, PSI, outer)  # x x' Psi x x'
    assert_mean(sampled, 2 * LAMBDA @ PSI @ LAMBDA + np.trace(PSI @ LAMBDA) * LAMBDA)


def test_task_vectors_are_centered_with_second_moment_psi(drawn):
    w = drawn[2]
    assert_mean(w, np.zeros(D))
    assert_mean(w[:, :, None] * w[:, None, :], PSI)


def test_points_of_one_task_are_independent_of_each_other_and_of_the_task(drawn):
    prompt, _, w = drawn
    zero = np.zeros((D, D))
    for one, other in ((prompt.x[:, 0], prompt.x[:, 1]), (prompt.x[:, 0], prompt.query[:, 0]), (prompt.x[:, 0], w)):
        assert_mean(one[:, :, None] * other[:, None, :], zero)
        assert_mean((one**2)[:, :, None] * (other**2)[:, None, :], np.outer((one**2).mean(0), (other**2).mean(0)))


def test_labels_are_linear_with_gaussian_noise_and_targets_carry_none(drawn):
    prompt, target, w = drawn
    np.testing.assert_allclose(target, np.einsum("nqd,nd->nq", prompt.query, w), rtol=1e-10, atol=1e-12)
    noise = prompt.y - np.einsum("nmd,nd->nm", prompt.x, w)
    assert_mean(noise, np.zeros(N))
    assert_mean(noise[:, :, None] * noise[:, None, :], SIGMA**2 * np.eye(N))
    assert_mean(noise**4, np.full(N, 3 * SIGMA**4))
    assert_mean(noise[:, :1] * prompt.x[:, 0], np.zeros(D))


def test_without_sigma_labels_are_exact():
    prompt, _, w = draw_regression(jax.random.key(0), jnp.eye(D), jnp.eye(D), N, Q)
    np.testing.assert_allclose(prompt.y, np.asarray(prompt.x) @ np.asarray(w), rtol=1e-12)


def test_single_precision_roots_give_single_precision_tasks():
    root = jnp.eye(D, dtype=jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(draw_regression(jax.random.key(0), root, root, N, Q, 0.1))} == {"float32"}


def test_a_stack_of_tasks_is_a_loop_over_keys():
    keys = jax.random.split(jax.random.key(3), 3)
    root = np.linalg.cholesky(LAMBDA)
    stack = jax.vmap(lambda k: draw_regression(k, root, root, N, Q, SIGMA))(keys)
    for i, key in enumerate(keys):
        one = draw_regression(key, root, root, N, Q, SIGMA)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), jax.tree.map(lambda leaf, i=i: leaf[i], stack), one
        )


@settings(max_examples=25)
@given(d=st.integers(2, 8), kappa=st.floats(1.0, 1e4), trace=st.floats(0.1, 50.0))
def test_prescribed_covariances_have_the_given_condition_number_and_trace(d, kappa, trace):
    values = np.linalg.eigvalsh(np.asarray(covariance(d, kappa, trace)))
    assert values[-1] / values[0] == pytest.approx(kappa, rel=1e-9)
    assert values.sum() == pytest.approx(trace, rel=1e-12)
    ratios = values[1:] / values[:-1]
    np.testing.assert_allclose(ratios, kappa ** (1 / (d - 1)), rtol=1e-8)


def test_the_trace_is_the_dimension_unless_given_and_one_dimension_works():
    assert float(jnp.trace(covariance(5, 3.0))) == pytest.approx(5)
    np.testing.assert_allclose(covariance(4, 1.0), np.eye(4), rtol=1e-12)
    np.testing.assert_allclose(covariance(1, 1.0, 2.5), [[2.5]])


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((0, 2.0), "d must be a whole number"),
        ((3, 0.5), "kappa must be"),
        ((3, float("inf")), "kappa must be"),
        ((3, float("nan")), "kappa must be"),
        ((1, 2.0), "kappa must be"),
        ((3, 2.0, 0.0), "trace must be"),
        ((3, 2.0, float("nan")), "trace must be"),
    ],
)
def test_covariances_out_of_range_raise_an_error_that_names_them(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        covariance(*arguments)
