"""Layers on the signed twins of `lindm_theory.lower_bound`: two tasks in d = 2, each with both signs of its rewards.

The two actions of a task have features along the coordinates, so a context is the number of times that each action occurs in it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lindm.icl.attention import FullAttention, ReducedAttention
from lindm.icl.predictors import iterated
from lindm.solvers.ties import greedy
from lindm.types import Prompt


@partial(jax.jit, static_argnames="depth")
def wrong_shares(
    reduced: Array, full: tuple[Array, Array], step: Array, x: Array, w: Array, shares: Array, chance: Array, depth: int
) -> tuple[Array, Array, Array]:
    """Share of wrong actions over the four signed twins and all contexts: reduced layers [L], full layers [F], a deep one [].

    reduced [L, 2, 2]; full (W_PV, W_KQ) [F, 3, 3]; the deep layer repeats step [2, 2]. x [2, 2, 2] features of the actions in the
    contexts of the two tasks, w [2, 2]; shares [n, 2] of the actions in a context, with its chance [n]. A linear layer sees the
    moments of a context alone, and two pairs scaled by the roots of their shares have the moments of M pairs.
    """

    def wrong(predict: Callable[[Prompt], Array]) -> Array:
        def one(task: Array, sign: Array, share: Array) -> Array:
            pairs = jnp.sqrt(2.0 * share)[:, None] * x[task]
            yhat = predict(Prompt(x=pairs, y=sign * pairs @ w[task], query=jnp.eye(2)))
            return (greedy(yhat) != greedy(sign * w[task])).astype(yhat.dtype)  # A_N is indifferent: the tie rule decides

        grid = jax.vmap(jax.vmap(jax.vmap(one, (None, None, 0)), (None, 0, None)), (0, None, None))
        return jnp.mean(grid(jnp.arange(2), jnp.array([1.0, -1.0]), shares) @ chance)

    def full_layer(W_PV: Array, W_KQ: Array) -> FullAttention:
        layer = FullAttention(2, dtype=W_PV.dtype)
        layer.W_PV, layer.W_KQ = nnx.Param(W_PV[None]), nnx.Param(W_KQ[None])
        return layer

    return (
        jax.vmap(lambda A: wrong(ReducedAttention(2, A=A)))(reduced),
        jax.vmap(lambda P, K: wrong(full_layer(P, K)))(*full),
        wrong(iterated(step, depth)),
    )


def embedded(v: np.ndarray, U: np.ndarray, u: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W_PV, W_KQ) [3, 3] of a full layer from its blocks; what does not enter the prediction is zero."""
    W_PV, W_KQ = np.zeros((3, 3)), np.zeros((3, 3))
    W_PV[2, :2], W_PV[2, 2], W_KQ[:2, :2], W_KQ[2, :2] = v, u, U, z
    return W_PV, W_KQ
