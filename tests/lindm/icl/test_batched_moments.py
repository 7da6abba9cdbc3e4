"""Sums over pairs and their derivatives against numpy's einsum and against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lindm.icl.batched_moments import TERMS, batch_last, inner_products, moments_times, sum_pairs
from lindm.types import Prompt

LENGTHS = [1, TERMS - 1, TERMS, TERMS + 1, 2 * TERMS + 7]


def a_batch(n, d=3, batch=4, queries=2):
    rng = np.random.default_rng(n)
    return rng.normal(size=(batch, n, d)), rng.normal(size=(batch, n)), rng.normal(size=(batch, queries, d))


def laid_out(x, y, query):
    return batch_last(Prompt(x=jnp.asarray(x), y=jnp.asarray(y), query=jnp.asarray(query)))


@pytest.mark.parametrize("n", [*LENGTHS, TERMS**2 + TERMS + 1])
def test_the_sum_over_pairs_is_that_of_numpy_at_every_length(n):
    x, y, query = a_batch(n)
    last = laid_out(x, y, query)
    np.testing.assert_allclose(sum_pairs(last[1], last[0]), np.einsum("bn,bni->ib", y, x), rtol=1e-12, atol=1e-12)


def test_the_batch_is_the_last_axis_and_inner_products_are_over_features():
    x, y, query = a_batch(5)
    last = laid_out(x, y, query)
    for got, want in zip(last, (x, y, query), strict=True):
        np.testing.assert_array_equal(got, np.moveaxis(want, 0, -1))
    np.testing.assert_allclose(inner_products(last[2], last[0][0]), np.einsum("bqi,bi->qb", query, x[:, 0]), rtol=1e-12)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("n", LENGTHS)
def test_moments_times_weights_is_the_product_with_the_second_moments(n, width):
    """One vector of weights for the batch, or one for each prompt."""
    x, y, query = a_batch(n)
    columns = np.concatenate([x, y[:, :, None]], axis=2)
    weights = np.random.default_rng(0).normal(size=(4, width))
    last = laid_out(x, y, query)
    want = np.einsum("bni,bnj,jb->ib", columns, columns, np.broadcast_to(weights, (4, 4)))
    np.testing.assert_allclose(moments_times(*last[:2], jnp.asarray(weights)), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 4])
def test_reverse_derivatives_of_moments_times_weights_are_those_of_differences(width):
    x, y, _ = laid_out(*a_batch(5))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, width)))
    check_grads(moments_times, (x, y, weights), order=2, modes=["rev"], rtol=1e-6, atol=1e-6)


def test_forward_mode_raises_an_error():
    x, y, _ = laid_out(*a_batch(5))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: moments_times(x, y, jnp.ones((4, 1))), (x,), (x,))
