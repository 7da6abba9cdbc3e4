"""Gaussian noise against what N(0, 1) must do, within five standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from lindm.draws import flat, normal

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
