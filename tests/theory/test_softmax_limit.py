"""The limit of softmax attention on long prompts, against Monte Carlo, Gauss-Hermite quadrature and enumeration in numpy."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from lindm_theory import softmax_limit as limit


def softmax(scores):
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def numbers(s, m2, v):
    return limit.QueryNumbers(*(jnp.asarray(float(a)) for a in (s, m2, v)))


@pytest.mark.parametrize(("s", "M"), [(0.3, 2), (1.0, 7), (4.0, 12)])
def test_the_moments_of_the_softmax_weights_are_those_of_simulated_scores(s, M):
    zeta = np.sqrt(s) * np.random.default_rng(M).normal(size=(100_000, M))
    p = softmax(zeta)
    moments = limit.attention_moments(jnp.asarray(s), jnp.asarray(float(M)))
    mean = (p * zeta).sum(1) / s
    for samples, exact in (
        (np.sum(p**2, axis=1), moments.participation),
        (1 - mean, moments.participation),  # the shrinkage is the participation
        ((mean - 1) ** 2, moments.square),
    ):
        assert abs(samples.mean() - exact) < 5 * samples.std() / np.sqrt(len(samples))


def test_one_pair_and_two_pairs_have_closed_moments():
    """M = 1: p = 1. M = 2: p_1 is the logistic function of a difference N(0, 2 s), by Gauss-Hermite."""
    z, weight = np.polynomial.hermite_e.hermegauss(80)
    for s in (0.2, 1.0, 3.0):
        one = limit.attention_moments(jnp.asarray(s), jnp.asarray(1.0))
        np.testing.assert_allclose([one.participation, one.square], [1.0, 1 + 1 / s], rtol=1e-8)
        p = 1 / (1 + np.exp(-np.sqrt(2 * s) * z))
        wanted = np.sum(weight * (p**2 + (1 - p) ** 2)) / weight.sum()
        two = limit.attention_moments(jnp.asarray(s), jnp.asarray(2.0))
        np.testing.assert_allclose(two.participation, wanted, rtol=1e-6)


@pytest.mark.parametrize("M", [3, 30])
def test_the_exact_distance_is_that_of_simulated_prompts(M):
    rng = np.random.default_rng(M)
    root, k, w, sigma = rng.normal(size=(3, 3)) / 2, rng.normal(size=3) / 2, rng.normal(size=3), 0.4
    Lambda = root @ root.T
    x = rng.normal(size=(40_000, M, 3)) @ root.T
    y = x @ w + sigma * rng.normal(size=x.shape[:2])
    squares = (np.sum(softmax(x @ k) * y, axis=1) - w @ Lambda @ k) ** 2
    q = limit.query_numbers(k, Lambda, np.outer(w, w), sigma)
    exact = limit.mean_square_distance(q, jnp.asarray(float(M)))
    assert abs(squares.mean() - exact) < 5 * squares.std() / np.sqrt(len(squares))
    linear = (np.mean((x @ k) * y, axis=1) - w @ Lambda @ k) ** 2
    assert abs(M * linear.mean() - limit.linear_constant(q)) < 5 * M * linear.std() / np.sqrt(len(linear))


def test_the_constant_is_the_limit_of_the_exact_law_and_fails_below_e_to_the_s():
    for s, share in ((0.25, 0.9), (1.0, 0.1)):
        q = numbers(s, share * s * 1.3, 1.3)
        scaled = [M * limit.mean_square_distance(q, jnp.asarray(M)) / limit.softmax_constant(q) for M in (1e2, 1e4, 1e6)]
        assert scaled[0] < scaled[1] < scaled[2] < 1
        assert scaled[2] > 1 - 1e-4
    q = numbers(4.0, 0.0, 1.0)
    assert 64 * limit.mean_square_distance(q, jnp.asarray(64.0)) < 0.2 * limit.softmax_constant(q)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_next_order_of_the_law_needs_prompts_well_above_e_to_the_2s(share):
    """By Gauss-Hermite: E[Z^2 (1 - 2 b + 3 b^2)], Z = mean of e (y - m), b = mean of e - 1; and its closed form."""
    z, weight = np.polynomial.hermite_e.hermegauss(100)
    weight = weight / weight.sum()
    v, distance = 1.3, jax.jit(limit.mean_square_distance)
    for s in (0.5, 1.0, 2.0, 3.0):
        q = numbers(s, share * s * v, v)
        m = np.sqrt(share * s * v)
        e = np.exp(np.sqrt(s) * z - s / 2)  # the mean is 1
        off = m * z / np.sqrt(s) - m
        square = off**2 + v - m**2 / s  # E[(y - m)^2 | score]
        first = weight @ (e**2 * square)
        np.testing.assert_allclose(limit.softmax_constant(q), first, rtol=1e-8)
        b = e - 1
        second = -2 * weight @ (e**2 * square * b) + 3 * first * (weight @ b**2) + 6 * (weight @ (e * off * b)) ** 2
        leading = -2 * np.exp(2 * s) * (v + 4 * m**2) / (v + m**2)
        rest = 3 * np.exp(s) - 1 + 6 * np.exp(s) * m**2 / (v + m**2)
        np.testing.assert_allclose(second / first, leading + rest, rtol=1e-7)
        M = 100 * np.exp(3 * s)
        measured = [n * (n * distance(q, jnp.asarray(n)) / limit.softmax_constant(q) - 1) for n in (M / 2, M)]
        np.testing.assert_allclose(2 * measured[1] - measured[0], leading + rest, rtol=0.01)
        assert abs(measured[1] / leading - 1) < 2 * np.exp(-s)  # the terms with e^s
    # s = 4: how much too large the law is
    q = numbers(4.0, share * 4.0 * v, v)
    excess = [limit.softmax_constant(q) / (M * distance(q, jnp.asarray(M))) for M in (10 * np.exp(8.0), 10 * np.exp(4.0), 64.0)]
    if share != 0.5:
        wanted = [1.10, 2.3, 5.3] if share == 0 else [1.27, 4.5, 13]
        np.testing.assert_allclose(excess, wanted, rtol=0.05)


def test_the_constant_of_a_finite_law_is_the_delta_method_by_enumeration():
    """All contexts of M pairs of a law with two points, with their probabilities."""
    phi, weights, k, w = np.array([[1.0], [-0.5]]), np.array([0.4, 0.6]), np.array([0.8]), np.array([1.5])
    M = 400
    n = np.arange(M + 1)
    score = np.exp(phi[:, 0] * k[0])
    values = (n * score[0] * phi[0, 0] + (M - n) * score[1] * phi[1, 0]) * w[0] / (n * score[0] + (M - n) * score[1])
    m = float(limit.tilted_mean(phi, weights, k) @ w)
    assert m == pytest.approx(np.sum(weights * score * phi[:, 0]) / np.sum(weights * score) * w[0])
    exact = M * np.sum(scipy.stats.binom.pmf(n, M, weights[0]) * (values - m) ** 2)
    np.testing.assert_allclose(limit.tilted_constant(phi, weights, k, w), exact, rtol=0.01)


def test_on_gaussian_features_the_tilted_mean_is_linear_and_the_constant_is_its_closed_form():
    """Gauss-Hermite nodes are a finite law with the moments of a Gaussian."""
    z, weight = np.polynomial.hermite_e.hermegauss(40)
    grid = np.array(list(itertools.product(z, z)))
    weights = np.array([a * b for a, b in itertools.product(weight, weight)]) / weight.sum() ** 2
    root = np.array([[0.8, 0.0], [0.3, 0.5]])
    phi, Lambda = grid @ root.T, root @ root.T
    k, w = np.array([0.7, -0.9]), np.array([1.0, 2.0])
    np.testing.assert_allclose(limit.tilted_mean(phi, weights, k), Lambda @ k, rtol=1e-9)
    q = limit.query_numbers(k, Lambda, np.outer(w, w), 0.3)
    np.testing.assert_allclose(limit.tilted_constant(phi, weights, k, w, 0.09), limit.softmax_constant(q), rtol=1e-8)
    both = limit.tilt(phi, weights, k) / weights, limit.tilt(phi, weights, -k) / weights
    y, m = phi @ w, w @ Lambda @ k
    influence = (both[0] * (y - m) - both[1] * (y + m)) / 2  # of (R(k) - R(-k)) / 2
    noise = np.sum(weights * (both[0] - both[1]) ** 2) / 4 * 0.09
    np.testing.assert_allclose(np.sum(weights * influence**2) + noise, limit.two_head_constant(q), rtol=1e-8)


def test_the_least_price_is_that_of_a_search_and_falls_from_e_to_2_43():
    for r in (1e-9, 0.2, 0.7, 1.0):
        found: Any = scipy.optimize.minimize_scalar(lambda s, r=r: float(limit.price(s, r)), bounds=(0.05, 3), method="bounded")
        np.testing.assert_allclose(limit.best_score_variance(r), found.x, rtol=1e-4)
        np.testing.assert_allclose(limit.least_price(r), found.fun, rtol=1e-8)
    prices = limit.least_price(jnp.linspace(0, 1, 50))
    assert np.all(np.diff(prices) < 0)
    np.testing.assert_allclose([prices[0], prices[-1]], [np.e, 2.4286], rtol=1e-4)


def test_price_and_alignment_are_ratios_of_the_constants_and_one_task_along_the_query_attains_one():
    rng = np.random.default_rng(2)
    root, k = rng.normal(size=(4, 4)), rng.normal(size=4) / 3
    q = limit.query_numbers(k, root @ root.T, np.eye(4), 0.5)
    r = limit.alignment(q)
    assert 0 < r < 1
    np.testing.assert_allclose(limit.price(q.s, r), limit.softmax_constant(q) / limit.linear_constant(q), rtol=1e-10)
    np.testing.assert_allclose(limit.alignment(limit.query_numbers(3 * k, root @ root.T, np.eye(4), 0.5)), r, rtol=1e-10)
    along = limit.query_numbers(k, root @ root.T, np.outer(k, k))
    np.testing.assert_allclose(limit.alignment(along), 1.0, rtol=1e-10)


def test_small_scores_make_two_heads_one_linear_layer_and_one_head_never():
    q = numbers(1e-3, 3e-4, 2.0)
    np.testing.assert_allclose(limit.two_head_constant(q) / limit.linear_constant(q), 1.0, atol=1e-5)
    assert limit.softmax_constant(q) / limit.linear_constant(q) > 100


def test_a_bounded_law_is_not_linear_and_its_slope_at_zero_is_the_centered_covariance():
    rng = np.random.default_rng(1)
    phi, weights = rng.dirichlet(np.ones(3), size=9), rng.dirichlet(np.ones(9))
    mean = weights @ phi
    covariance = phi.T @ (weights[:, None] * phi) - np.outer(mean, mean)
    k = rng.normal(size=3)
    near = limit.tilted_mean(phi, weights, 1e-5 * k)
    np.testing.assert_allclose((near - mean) / 1e-5, covariance @ k, rtol=1e-3)
    U = rng.normal(size=(3, 3))
    # the affine map by numpy's least squares
    target = np.asarray(limit.tilted_mean(phi, weights, phi @ (6 * U).T))
    root = np.sqrt(weights)[:, None]
    design = root * np.hstack([phi, np.ones((9, 1))])
    centered = root * (target - weights @ target)
    left = centered - design @ np.linalg.lstsq(design, centered, rcond=None)[0]
    wanted = np.sum(left**2) / np.sum(centered**2)
    np.testing.assert_allclose(limit.nonlinearity(phi, weights, 6 * U), wanted, rtol=1e-6)
    assert wanted > 0.01 > 10 * limit.nonlinearity(phi, weights, 0.01 * U)
    onehot = limit.tilted_mean(np.eye(3), np.full(3, 1 / 3), 30 * np.eye(3))
    np.testing.assert_allclose(onehot, np.eye(3), atol=1e-12)  # hot: the table itself


def test_many_queries_and_lengths_at_once():
    q = limit.QueryNumbers(jnp.array([0.3, 1.0]), jnp.array([0.1, 0.2]), jnp.array([1.0, 2.0]))
    table = jax.jit(limit.batch_distance)(q, jnp.array([4.0, 64.0, 256.0]))
    assert table.shape == (3, 2)
    np.testing.assert_allclose(table[1, 1], limit.mean_square_distance(numbers(1.0, 0.2, 2.0), jnp.asarray(64.0)), rtol=1e-10)


def test_the_risk_of_an_isotropic_head_is_that_of_simulated_regression():
    d, M, sigma, scale, u = 3, 9, 0.5, 0.9, 0.8
    rng = np.random.default_rng(0)
    x, w, q = rng.normal(size=(60_000, M, d)), rng.normal(size=(60_000, d)), rng.normal(size=(60_000, d))
    y = np.einsum("pmd,pd->pm", x, w) + sigma * rng.normal(size=x.shape[:2])
    p = softmax(scale * np.einsum("pmd,pd->pm", x, q))
    squares = (u * np.sum(p * y, axis=1) - np.sum(w * q, axis=1)) ** 2
    exact = jax.jit(limit.isotropic_risk, static_argnums=2)(scale, u, d, float(M), sigma)
    assert abs(squares.mean() - exact) < 5 * squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - 1.05 * exact) > 5 * squares.std() / np.sqrt(len(squares))


def test_the_best_isotropic_head_is_that_of_a_search_with_another_quadrature():
    d, N, sigma = 4, 16, 0.3
    head = jax.jit(limit.best_isotropic_head, static_argnums=0)(d, float(N), sigma)
    nodes, weights = scipy.special.roots_genlaguerre(20, d / 2 - 1)
    rho, weights = 2 * nodes, weights / weights.sum()
    moments = jax.jit(jax.vmap(limit.attention_moments, (0, None)))

    def least(scale):
        s = scale**2 * rho
        m = moments(jnp.asarray(s), jnp.asarray(float(N)))
        beta, mean_square = np.asarray(m.participation), np.asarray(m.square)
        square = weights @ ((d - 1 + sigma**2) * beta + s * (mean_square + 1 - 2 * beta))
        cross = weights @ (scale * rho * (1 - beta))
        return d - cross**2 / square

    found: Any = scipy.optimize.minimize_scalar(least, bounds=(0.3, 2), method="bounded", options={"xatol": 1e-4})
    np.testing.assert_allclose(head.risk, found.fun, rtol=2e-5)
    np.testing.assert_allclose(head.scale, found.x, rtol=0.01)
