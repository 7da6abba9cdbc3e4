# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from lindm_theory import concentration as tail


def sums(values, weights, M):
    """Law of the mean of M independent draws, by enumeration: (chance, mean)."""
    for draw in itertools.product(range(len(values)), repeat=M):
        yield np.prod([weights[i] for i in draw]), np.mean([values[i] for i in draw], axis=0)


@pytest.mark.parametrize("seed", range(6))
def test_the_scalar_tails_bound_the_enumerated_chance(seed):
    rng = np.random.default_rng(seed)
    values, weights, M = rng.normal(size=3) + 0.7, rng.dirichlet(np.ones(3)), 7
    mean = weights @ values
    variance = weights @ (values - mean) ** 2
    chance = sum(p for p, v in sums(values, weights, M) if v <= 0)
    for bound in (
        tail.cantelli(mean, variance / M),
        tail.bernstein_tail(mean, variance, mean - values.min(), M),
        jnp.exp(-M * tail.chernoff_exponent(jnp.asarray(values), jnp.asarray(weights))),
    ):
        assert chance <= float(bound) + 1e-12


def test_a_margin_that_is_not_positive_gives_the_trivial_bound():
    for margin in (0.0, -1.0):
        assert tail.cantelli(margin, 0.3) == 1.0
        assert tail.bernstein_tail(margin, 0.3, 1.0, 50) == 1.0
    assert tail.chernoff_exponent(jnp.array([1.0, -2.0]), jnp.array([0.5, 0.5])) < 1e-6


def test_cantelli_is_attained_by_a_two_point_law():
    margin, variance = 0.8, 0.5
    p = variance / (variance + margin**2)  # mass at zero; the rest above, with the right mean and variance
    np.testing.assert_allclose(tail.cantelli(margin, variance), p, rtol=1e-12)
    top = margin / (1 - p)
    np.testing.assert_allclose(p * margin**2 + (1 - p) * (top - margin) ** 2, variance, rtol=1e-12)


def two_points(low, high):
    """Chance of `high` and variance of the law of mean zero on -low and high."""
    return low / (low + high), low * high


def upper_chance(low, high, M, t):
    """P(mean of M copies >= t), exactly: the number of `high` is binomial."""
    p, _ = two_points(low, high)
    return scipy.stats.binom.sf(np.ceil((t + low) * M / (low + high) - 1e-9) - 1, M, p)


@pytest.mark.parametrize(("low", "high"), [(30.0, 0.2), (3.0, 0.5), (1.0, 1.0), (0.5, 3.0), (0.2, 30.0)])
def test_bernstein_holds_with_a_bound_on_one_side_on_skewed_laws(low, high):
    """Y = E Z - Z in {-low, high}: b = high only. Chances by exact binomial sums."""
    _, variance = two_points(low, high)
    without = []
    for M in (5, 40, 400):
        for t in np.array([0.02, 0.1, 0.4, 0.9]) * high:
            chance = upper_chance(low, high, M, t)
            assert chance <= tail.bernstein_tail(t, variance, high, M)
            without.append(chance > tail.bernstein_tail(t, variance, 0.0, M))
        for delta in (0.3, 0.01, 1e-6):
            assert upper_chance(low, high, M, tail.bernstein_radius(variance, high, M, delta)) <= delta
    p, _ = two_points(low, high)
    fourth = p * high**4 + (1 - p) * low**4
    if low > high:  # moments are not those of a variable that is bounded by b on both sides
        assert fourth > high**2 * variance * 5
    if high > low:  # the term with b is needed
        assert any(without)


def test_the_exponent_of_bernstein_is_attained_to_a_factor_near_one_on_a_skewed_law():
    low, high, M = 0.2, 30.0, 20_000
    _, variance = two_points(low, high)
    t = 0.2
    truth = -np.log(upper_chance(low, high, M, t))
    exponent = -np.log(tail.bernstein_tail(t, variance, high, M))
    assert truth / 1.25 < exponent <= truth


def test_the_radius_solves_bernstein():
    variance, bound, M, delta = 0.4, 2.0, 30, 0.05
    t = tail.bernstein_radius(variance, bound, M, delta)
    np.testing.assert_allclose(tail.bernstein_tail(t, variance, bound, M), delta, rtol=1e-10)


def test_the_chernoff_exponent_is_that_of_a_numerical_search_and_beats_bernstein():
    values, weights, noise = np.array([1.0, 0.2, -0.5]), np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.1, 0.2])
    search = scipy.optimize.minimize_scalar(
        lambda t: np.log(weights @ (np.exp(-t * values) * np.cosh(t * noise))),
        bounds=(0, 20),
        method="bounded",
        options={"xatol": 1e-10},
    )
    rate = tail.chernoff_exponent(jnp.asarray(values), jnp.asarray(weights), jnp.asarray(noise))
    np.testing.assert_allclose(rate, -search.fun, rtol=1e-8)
    mean = weights @ values
    variance = weights @ ((values - mean) ** 2 + noise**2)
    assert rate > tail.bernstein_exponent(mean, variance, np.max(mean - values + noise))


def test_the_chernoff_exponent_ignores_points_of_zero_probability_and_survives_zeros():
    values, weights = jnp.array([1.0, 0.2, -50.0]), jnp.array([0.5, 0.5, 0.0])
    assert tail.chernoff_exponent(values, weights) > 5.0  # never negative: the rate is infinite, the search is cut
    assert tail.chernoff_exponent(jnp.zeros(3), jnp.full(3, 1 / 3)) == 0.0


def test_the_chernoff_exponent_is_the_limit_of_enumerated_chances():
    # P(Binomial(M, p) share <= 1/2), p = .7: the exponent is that of Cramer
    p, M = 0.7, 2000
    rate = tail.chernoff_exponent(jnp.array([0.5, -0.5]), jnp.array([p, 1 - p]))
    np.testing.assert_allclose(-scipy.stats.binom.logcdf(M // 2, M, p) / M, rate, rtol=0.03)


@pytest.mark.parametrize("delta", [0.5, 0.2, 0.05])
def test_smale_and_zhou_hold_on_enumerated_vectors(delta):
    rng = np.random.default_rng(0)
    values, weights, M = rng.normal(size=(4, 2)), rng.dirichlet(np.ones(4)), 5
    values = values - weights @ values
    b, v = np.linalg.norm(values, axis=1).max(), weights @ np.sum(values**2, axis=1)
    level = tail.smale_zhou(b, v, M, delta)
    assert sum(p for p, mean in sums(values, weights, M) if np.linalg.norm(mean) > level) <= delta


def test_the_normal_approximation_is_a_prediction_close_to_the_truth_for_many_pairs():
    got = tail.gaussian_flip_prediction(0.2 - 0.5 / 300, 0.21 / 300 * 4 / 4)
    np.testing.assert_allclose(got, scipy.stats.norm.cdf(-(0.2 - 0.5 / 300) / np.sqrt(0.21 / 300)), rtol=1e-10)


def test_the_error_size_is_that_of_loops(design):
    D = design(0)
    rng = np.random.default_rng(0)
    A, F, w, noise = rng.normal(size=(3, 3)), rng.normal(size=(3, 3)), rng.normal(size=3), rng.uniform(size=5)
    Lq = F @ F.T
    sizes, second = [], 0.0
    for x, p, e in zip(D.phi, D.weights, noise, strict=True):
        for sign in (-1, 1):
            z = A @ (x * (x @ w + sign * e) - D.Lambda @ w)
            sizes.append(np.sqrt(z @ Lq @ z))
            second += p / 2 * z @ Lq @ z
    b, v = tail.error_size(D.phi, jnp.asarray(D.weights), A, w, Lq, jnp.asarray(noise), jnp.asarray(noise**2))
    np.testing.assert_allclose([b, v], [max(sizes), second], rtol=1e-11)


def test_rung_5_is_the_sum_over_stages_of_its_formula(make_problem):
    W = make_problem(0)
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(12))
    flat = W.phi.reshape(-1, 3)
    Lambda = sum(p * np.outer(x, x) for p, x in zip(weights, flat, strict=True))
    A, M, delta = np.stack([np.linalg.inv(Lambda + 0.1 * h * np.eye(3)) for h in range(3)]), 20, 0.1
    expected = 0.0
    for h in range(3):
        z = [flat[i] * (flat[i] @ W.w[h]) - Lambda @ W.w[h] for i in range(12)]
        sizes = [np.sqrt((A[h] @ y) @ Lambda @ (A[h] @ y)) for y in z]
        b, v = max(sizes), weights @ np.square(sizes)
        L = max(np.sqrt(x @ np.linalg.inv(Lambda) @ x) for x in flat)
        log = np.log(2 * 3 / delta)
        bias = max(abs(x @ (A[h] @ Lambda - np.eye(3)) @ W.w[h]) for x in flat)
        expected += 2 * (bias + L * (2 * b * log / M + np.sqrt(2 * v * log / M)))
    got = tail.high_probability_rung(
        jnp.asarray(W.phi), jnp.asarray(A), jnp.asarray(W.w), jnp.asarray(weights), M, delta, jnp.asarray(Lambda)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_the_norms_are_those_of_loops_and_what_greedy_sees_is_at_most_twice_the_norm(make_problem):
    phi = make_problem(1).phi
    W = np.einsum("sai,saj->ij", phi, phi) / 12
    inverse = np.linalg.inv(W)
    flat = phi.reshape(-1, 3)
    L = max(np.sqrt(x @ inverse @ x) for x in flat)
    span = max(np.sqrt((p[a] - p[b]) @ inverse @ (p[a] - p[b])) for p in phi for a in range(3) for b in range(3))
    np.testing.assert_allclose(tail.feature_norm(phi, W), L, rtol=1e-11)
    np.testing.assert_allclose(tail.difference_norm(phi, W), span, rtol=1e-11)
    assert span <= 2 * L


def test_the_g_optimal_matrix_has_squared_norm_d(make_problem):
    phi = jnp.asarray(make_problem(2, S=6, A=3, d=4).phi)
    np.testing.assert_allclose(jnp.square(tail.feature_norm(phi, tail.g_optimal_moment(phi, 5000))), 4.0, rtol=2e-3)


def test_tails_are_batched(make_problem):
    margins = jnp.array([[0.1, -0.2], [0.3, 0.0]])
    assert jax.vmap(lambda m: tail.bernstein_tail(m, jnp.ones(2), jnp.ones(2), 10))(margins).shape == (2, 2)
