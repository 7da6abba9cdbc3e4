"""Linear regression on Gaussian features with Lambda = Psi = I: contexts of several lengths, and layers trained for each."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.icl.attention import ReducedAttention, pad
from lindm.icl.trainer import train_many
from lindm.problems.regression import draw_regression

D = 8  # features
QUERIES = 8  # of each prompt in training


@partial(jax.jit, static_argnames=("contexts", "longest"))
def grams(key: Array, M: Array, contexts: int, longest: int) -> Array:
    """X'X [contexts, m, D, D] of the first M of `longest` Gaussian features."""
    x = jax.random.normal(key, (contexts, longest, D))
    used = (jnp.arange(longest)[None] < M[:, None]).astype(x.dtype)
    return jnp.einsum("mi,cid,cie->cmde", used, x, x)


@lru_cache
def _gaussian_draw(longest: int, batch: int):
    """The draw of a Gaussian training batch of n <= longest pairs and noise sigma, both traced."""

    def draw(key: Array, root: Array, n: Array, sigma: Array):
        keys = jax.random.split(key, batch)
        prompt, target, _ = jax.vmap(lambda k: draw_regression(k, root, root, longest, QUERIES, sigma))(keys)
        return pad(prompt, n), target

    return draw


def gaussian_layers(key: Array, cells: list[tuple[int, float]], steps: int) -> np.ndarray:
    """Layers [cells, D, D] trained for the length and noise of each cell."""
    n = len(cells)
    if n == 0:
        return np.zeros((0, D, D))
    data = (
        jnp.broadcast_to(jnp.eye(D, dtype=jnp.float32), (n, D, D)),
        jnp.asarray([M for M, _ in cells]),
        jnp.asarray([s for _, s in cells], jnp.float32),
    )
    draw = _gaussian_draw(max(M for M, _ in cells), 64)
    layers, _ = train_many(ReducedAttention(D), draw, jax.random.split(key, n), steps=steps, data=data, learning_rate=0.03)
    return np.asarray(layers.A[...][:, 0], float)
