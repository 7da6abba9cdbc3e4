"""Gaussian noise and Dirichlet rows against what their laws must do, within five standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from lindm.random import dirichlet, flat, normal

SIZE = 1_000_001


@pytest.fixture(scope="module")
def sample():
    return np.asarray(normal(jax.random.key(7), (SIZE,)), np.float64)


def test_moments_up_to_the_eighth_are_those_of_a_standard_normal(sample):
    for k in range(1, 9):
        want = special.factorial2(k - 1) if k % 2 == 0 else 0.0
        sem = np.sqrt((special.factorial2(2 * k - 1) - want**2) / SIZE)
        assert abs(np.mean(sample**k) - want) < 5 * sem


def test_the_distribution_is_normal_in_the_middle_and_in_the_tails(sample):
    assert stats.kstest(sample, "norm").pvalue > 1e-6
    for t in (1.0, 2.0, 3.0, 4.0):
        for tail in (sample > t, sample < -t):
            p = stats.norm.sf(t)
            assert abs(tail.mean() - p) < 5 * np.sqrt(p / SIZE)
    assert np.isfinite(sample).all() and np.abs(sample).max() < 5.7


def test_the_two_variates_of_a_pair_and_neighbours_are_independent(sample):
    half = (SIZE + 1) // 2
    a, b = sample[: half - 1], sample[half:]
    for x, y in ((a, b), (sample[:-1], sample[1:])):
        for f in (lambda v: v, np.square, np.abs):
            assert abs(np.corrcoef(f(x), f(y))[0, 1]) < 5 / np.sqrt(len(x))
    angle = np.arctan2(a, b)
    assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-6


def test_shapes_types_and_keys():
    key = jax.random.key(0)
    for shape in ((), (0, 3), (1,), (5, 3, 2)):
        assert normal(key, shape).shape == shape and normal(key, shape).dtype == jnp.float32
    np.testing.assert_array_equal(normal(key, (3, 4)).ravel(), normal(key, (12,)))
    np.testing.assert_array_equal(normal(key, (4,), jnp.float64), jax.random.normal(key, (4,), jnp.float64))
    assert normal(jax.random.key(0, impl="rbg"), (4,)).shape == (4,)
    assert not np.array_equal(normal(jax.random.key(1), (4,)), normal(key, (4,)))


def test_vmap_over_keys_is_a_loop_over_keys():
    keys = jax.random.split(jax.random.key(3), 5)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(lambda k: normal(k, (7, 2))))(keys), np.stack([normal(k, (7, 2)) for k in keys]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("sampler", [jax.random.uniform, jax.random.exponential, jax.random.normal])
def test_a_flat_draw_is_the_same_numbers(sampler):
    key = jax.random.key(3)
    # up to the last bit: a logarithm may be vectorised differently in a loop of another shape
    np.testing.assert_allclose(flat(sampler, key, (3, 4, 5), jnp.float32), sampler(key, (3, 4, 5), jnp.float32), rtol=1e-5)
    assert flat(sampler, key, (), jnp.float32).shape == ()


ROWS, N = 40_000, 4  # one shape for the laws: one compilation


@pytest.mark.parametrize("c", [0.01, 0.3, 0.99, 1.0, 2.5, 1e6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_every_entry_of_a_dirichlet_row_has_its_beta_law(c, dtype):
    rows = np.asarray(dirichlet(jax.random.key(11), c, (ROWS, N), dtype), np.float64)
    law = stats.beta(c, (N - 1) * c)
    # where rounding to 0 and 1 cannot be seen; Dvoretzky, Kiefer and Wolfowitz, at most 1e-6 for each comparison
    points = np.concatenate([10.0 ** np.arange(-6, -1), np.linspace(0.02, 0.98, 97), law.ppf(np.linspace(0.01, 0.99, 99))])
    points = points[(points >= 1e-6) & (points <= 1 - 1e-6)]
    for entry in rows.T:
        below = np.searchsorted(np.sort(entry), points, side="right") / ROWS
        assert np.abs(below - law.cdf(points)).max() < np.sqrt(np.log(2e6) / (2 * ROWS))


@pytest.mark.parametrize("c", [0.05, 0.7, 4.0])
def test_dirichlet_rows_have_their_second_and_third_moments(c):
    rows = np.asarray(dirichlet(jax.random.key(12), c, (ROWS, N), jnp.float64))
    total = N * c
    products = rows[:, :, None] * rows[:, None, :]
    second = (c * c + c * np.eye(N)) / (total * (total + 1))
    assert (np.abs(products.mean(0) - second) <= 5 * products.std(0) / np.sqrt(ROWS)).all()
    triple = rows[:, 1:].prod(-1)
    assert abs(triple.mean() - c**3 / (total * (total + 1) * (total + 2))) <= 5 * triple.std() / np.sqrt(ROWS)


@pytest.mark.parametrize("c", [0.3, 1.0, 2.5])
def test_moments_of_long_dirichlet_rows_show_the_shape_of_the_gammas(c):
    # in a long row the sum is nearly a constant and hides nothing: a wrong sign in the rejection test is off by ten errors here
    rows = np.asarray(dirichlet(jax.random.key(16), c, (2_000, 500), jnp.float64))
    for k in (2, 3, 4):
        power = (rows**k).sum(-1)
        want = 500 * stats.beta(c, 499 * c).moment(k)
        assert abs(power.mean() - want) < 5 * power.std() / np.sqrt(len(rows))


def test_entries_of_different_dirichlet_rows_are_independent():
    x = np.asarray(dirichlet(jax.random.key(13), 0.5, (ROWS, N), jnp.float64))[:, 0]
    for lag in (1, 2, ROWS // 2):
        assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 5 / np.sqrt(ROWS - lag)


@pytest.mark.parametrize("c", [1e-30, 1e-3, 0.01, 1e7])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_extreme_concentrations_give_distributions_and_no_entry_is_preferred(c, dtype):
    rows = np.asarray(dirichlet(jax.random.key(14), c, (ROWS, N), dtype))
    assert rows.dtype == dtype
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(-1), 1, rtol=1e-6 if dtype == jnp.float32 else 1e-14)
    share = np.bincount(rows.argmax(-1), minlength=N) / ROWS
    assert np.abs(share - 1 / N).max() < 5 * np.sqrt(3 / 16 / ROWS)
    assert rows.max(-1).mean() > 0.95 if c < 1 else np.abs(rows - 1 / N).max() < 1e-3


@pytest.mark.parametrize("c", [0.0, -0.5, -3.0, np.nan, np.inf])
def test_a_concentration_without_a_law_gives_nan_and_returns(c):
    assert np.isnan(dirichlet(jax.random.key(0), c, (ROWS, N), jnp.float64)).all()


def test_dirichlet_rows_under_vmap_are_a_loop_over_keys_and_concentrations():
    keys, c = jax.random.split(jax.random.key(15), 4), jnp.array([0.02, 0.8, 1.0, 30.0])
    stack = jax.jit(jax.vmap(lambda key, c: dirichlet(key, c, (50, 2, 3))))(keys, c)
    loop = np.stack([dirichlet(key, float(x), (50, 2, 3)) for key, x in zip(keys, c, strict=True)])
    np.testing.assert_allclose(stack, loop, rtol=1e-9, atol=1e-300)


def test_dirichlet_rows_come_in_any_shape_with_a_last_axis():
    key = jax.random.key(0)
    assert dirichlet(key, 1.0, (0, 3)).shape == (0, 3)
    np.testing.assert_array_equal(dirichlet(key, 0.1, (2, 1)), 1)
    with pytest.raises(ValueError, match="shape must have a last axis"):
        dirichlet(key, 1.0, ())
