"""Gaussian contexts of several lengths are cuts of one context."""

import jax
import jax.numpy as jnp
import numpy as np

from lindm_experiments.lib import gaussian_regression


def test_the_moments_are_those_of_the_first_pairs_of_one_context():
    """X'X of the first M pairs has rank M, each next length adds pairs, and the mean is M times the identity."""
    lengths, D = np.array([2, 5, 8]), gaussian_regression.D
    G = np.asarray(gaussian_regression.grams(jax.random.key(0), jnp.asarray(lengths), contexts=4000, longest=8))
    assert G.shape == (4000, 3, D, D)
    for i, M in enumerate(lengths):
        assert set(np.linalg.matrix_rank(G[:20, i])) == {M}
        np.testing.assert_allclose(G[:, i].mean(0), M * np.eye(D), atol=5 * np.sqrt(2 * M / 4000))
    assert set(np.linalg.matrix_rank(G[:20, 1] - G[:20, 0])) == {3}


def test_without_a_cell_no_layer_is_trained():
    D = gaussian_regression.D
    assert gaussian_regression.gaussian_layers(jax.random.key(0), [], steps=1).shape == (0, D, D)
