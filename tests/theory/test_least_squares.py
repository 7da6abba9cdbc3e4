"""The layer against least squares: sampling, and the assumptions without which the boundary moves."""

from math import sqrt

import jax.numpy as jnp
import numpy as np
import pytest

from lindm_theory import least_squares as theory
from lindm_theory.in_context import gaussian_risk


@pytest.mark.parametrize(("M", "sigma"), [(3, 0.5), (20, 1.0), (100, 3.0)])
def test_the_risk_of_the_layer_is_that_of_the_closed_form(M, sigma):
    np.testing.assert_allclose(theory.layer_risk(M, sigma, 8), gaussian_risk(jnp.eye(8), M, M, sigma).total, rtol=1e-12)


@pytest.mark.parametrize(("M", "sigma"), [(2, 1.0), (14, 2.0), (40, 0.5)])
def test_the_risk_of_least_squares_is_that_of_sampled_problems(M, sigma):
    rng = np.random.default_rng(M)
    x, w = rng.standard_normal((20_000, M, 8)), rng.standard_normal((20_000, 8))
    y = np.einsum("rmd,rd->rm", x, w) + sigma * rng.standard_normal((20_000, M))
    error = ((np.einsum("rdm,rm->rd", np.linalg.pinv(x), y) - w) ** 2).sum(1)
    assert abs(error.mean() - theory.ols_risk(M, sigma, 8)) < 5 * error.std() / sqrt(len(error))


def test_the_layer_beats_least_squares_exactly_above_the_boundary():
    for d in (3, 8, 20):
        for M in (*range(1, d - 1), *range(d + 2, 6 * d)):
            star = theory.boundary(M, d)
            for sigma2 in (0.5 * abs(star), 0.99 * star, 1.01 * star, 2 * abs(star) + 0.1):
                if sigma2 > 0:
                    better = theory.layer_risk(M, sqrt(sigma2), d) < theory.ols_risk(M, sqrt(sigma2), d)
                    assert better == (sigma2 > star), (d, M, sigma2)


def test_the_boundary_is_another_one_if_lambda_is_not_a_multiple_of_the_identity():
    # the risk of OLS under Lambda, d sigma^2/(M - d - 1), does not depend on Lambda; that of the layer does
    M, Lambda = 40, jnp.diag(jnp.array([2.9, 0.05, 0.05]))
    sigma2 = 0.9 * theory.boundary(M, 3)
    ols = theory.ols_risk(M, sqrt(sigma2), 3)
    assert theory.layer_risk(M, sqrt(sigma2), 3) > ols > gaussian_risk(Lambda, M, M, sqrt(sigma2)).total
