# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from lindm_theory import margin


def test_the_values_at_infinite_context_are_those_of_loops(make_problem):
    W = make_problem(0)
    rng = np.random.default_rng(0)
    A, Lambda = rng.normal(size=(3, 3, 3)), np.eye(3) + 0.2
    got = margin.infinite_context_values(*map(jnp.asarray, (W.phi, A, Lambda, W.w)))
    for h, s, a in np.ndindex(3, 4, 3):
        np.testing.assert_allclose(got[h, s, a], W.phi[s, a] @ A[h] @ Lambda @ W.w[h], rtol=1e-11)


def test_the_margin_compares_the_best_optimal_action_with_the_best_other():
    Qstar = jnp.array([[1.0, 1.0, 0.2], [1.0, 0.5, 0.2], [3.0, 3.0, 3.0]])
    values = jnp.array([[0.1, 0.9, 0.6], [0.4, 0.7, 0.1], [1.0, 2.0, 3.0]])
    np.testing.assert_allclose(margin.bias_margin(values, Qstar), [0.3, -0.3, np.inf])


def test_the_flip_length_is_the_largest_length_that_flips():
    margins = jnp.array([[[0.1, -1.0]], [[0.2, 0.1]], [[-0.1, 0.3]], [[0.2, 0.4]]])
    assert margin.flip_length(margins, jnp.array([1, 5, 10, 20])) == 10
    assert margin.flip_length(jnp.abs(margins), jnp.array([1, 5, 10, 20])) == 0


def test_the_lengths_that_flip_need_not_be_an_interval():
    # in the coordinates of the modes the margin is sum_i a_i N x_i/(1 + N x_i): with d = 3 it may change sign twice
    x, a = np.array([1.0, 0.05, 0.001]), np.array([1.0, -2.5, 1.8])
    signs = [np.sign(np.sum(a * N * x / (1 + N * x))) for N in (1, 100, 10**5)]
    assert signs == [1, -1, 1]


@pytest.mark.parametrize(("density", "beta"), [(0.7, 1.0), (2.0, 2.0), (0.5, 0.5)])
def test_the_gap_law_is_the_integral_over_the_gaps(density, beta):
    deviation, M = 0.8, 400.0
    exact = scipy.integrate.quad(
        lambda g: density * beta * g ** (beta - 1) * g * scipy.stats.norm.cdf(-g * np.sqrt(M) / deviation), 0, 1, epsabs=1e-14
    )[0]
    np.testing.assert_allclose(margin.gap_law(density, beta, deviation, M), exact, rtol=1e-6)


def test_a_positive_density_at_zero_gives_one_over_M():
    np.testing.assert_allclose(margin.no_gap_law(0.7, 0.8, 400.0), 0.7 * 0.64 / 1600, rtol=1e-12)
    np.testing.assert_allclose(margin.gap_law(0.7, 1.0, 0.8, 400.0), margin.no_gap_law(0.7, 0.8, 400.0), rtol=1e-12)
