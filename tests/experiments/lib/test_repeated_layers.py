"""Repeated layers: the path of w is that of a deep layer, and errors on finite contexts are those of a loop in numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from lindm.icl.attention import ReducedAttention
from lindm.problems.linear_mdp import onehot_family
from lindm.types import Prompt
from lindm_experiments.lib import repeated_layers


def test_the_path_is_what_a_deep_reduced_layer_computes():
    k_A, k_x, k_y = jax.random.split(jax.random.key(0), 3)
    A, x = 0.3 * jax.random.normal(k_A, (3, 4, 4)), jax.random.normal(k_x, (9, 4))
    y = jax.random.normal(k_y, (9,))
    layer = ReducedAttention(4, 3, A=A)
    yhat = layer(Prompt(x=x, y=y, query=jnp.eye(4)))
    np.testing.assert_allclose(repeated_layers.path(A, x.T @ x / 9, x.T @ y / 9)[-1], yhat, rtol=1e-12)


def test_errors_on_finite_contexts_are_those_of_steps_in_numpy():
    """One-hot features: G is diagonal, so the steps and least squares can be written out for each coordinate."""
    family = onehot_family(3, 2, 1, low=-1.0, high=1.0)
    w, rng = np.random.default_rng(0).normal(size=(4, 6)), np.random.default_rng(1)
    stacks = tuple(jnp.asarray(0.5 * np.eye(6) + 0.05 * rng.normal(size=(k, 6, 6))) for k in (3, 2))
    deep, squares, G = repeated_layers.finite_contexts(
        jax.random.key(0), family, stacks, jnp.asarray(w), jnp.asarray([8.0, 512.0]), jnp.asarray(0.0), 512
    )
    Lambda = np.diag(family.design)
    assert G.shape == (4, 2, 6, 6) and [e.shape for e in deep] == [(4, 2, 3), (4, 2, 2)]
    counts = np.asarray(G) * np.array([8, 512])[:, None, None]
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    np.testing.assert_allclose(np.trace(np.asarray(G), axis1=2, axis2=3), 1)
    for t, length in np.ndindex(4, 2):
        for stack, errors in zip(stacks, deep, strict=True):
            guess = np.zeros(6)
            for A, error in zip(np.asarray(stack), errors[t, length], strict=True):
                guess = guess + A @ np.asarray(G[t, length]) @ (w[t] - guess)
                np.testing.assert_allclose(error, (guess - w[t]) @ Lambda @ (guess - w[t]), rtol=1e-9)
    np.testing.assert_allclose(squares[:, 1], 0, atol=1e-18)  # every coordinate is in the long context, and no noise


def test_a_long_context_has_the_moments_of_the_features():
    family = onehot_family(3, 2, 1, low=-1.0, high=1.0)
    A, w = jnp.asarray(2.0 * np.eye(6))[None], jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)))
    risk = repeated_layers.long_bias(jax.random.key(1), family, A, w, contexts=2, length=1 << 17, layers=3)
    left = 1 - 2.0 * np.asarray(family.design)  # of each coordinate after a layer
    expected = [np.mean(np.square(np.asarray(w) * left**k) @ np.asarray(family.design)) for k in (1, 2, 3)]
    np.testing.assert_allclose(risk[0], expected, rtol=0.02)
