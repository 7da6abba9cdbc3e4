"""Moments of the contexts of a batch of prompts, and their derivatives, in vectorized loops on a CPU.

A linear layer uses a context (x_n, y_n) only through its moments, sums over pairs of products: S = sum_n y_n x_n / N, and Z of
`lindm.icl.attention`. With d of about 5 features the products of one prompt are too short for vector instructions, so here the
batch is the last axis (x[N,d,B], y[N,B], query[Q,d,B]) and every product is elementwise along it.

The sum over pairs is written out, one product after the other, in place of `jnp.sum` or `jnp.einsum`: XLA's batched products
and its reductions over a leading axis compile to scalar loops on a CPU. A sum of sums is one vectorized loop over the batch.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from lindm.types import Prompt

TERMS = 32  # products added in one expression; the size of the program grows with it


def batch_last(prompts: Prompt) -> tuple[Array, Array, Array]:
    """x[N,d,B], y[N,B], query[Q,d,B] of a batch x[B,N,d], y[B,N], query[B,Q,d].

    The barrier makes this one copy, not one in every loop that reads x.
    """
    x, y, query = (jnp.moveaxis(a, 0, -1) for a in (prompts.x, prompts.y, prompts.query))
    return lax.optimization_barrier((x, y, query))


def sum_pairs(values: Array, x: Array) -> Array:
    """sum_n values[n] x[n] of every prompt: [d, B], from values[N,B] and x[N,d,B].

    The pairs are split into `TERMS` parts of equal length, which are added to each other; what remains is summed the same way.
    """
    terms = min(TERMS, len(values))
    rows = len(values) // terms
    total = values[:rows, None] * x[:rows]
    for k in range(1, terms):
        part = slice(k * rows, (k + 1) * rows)
        total = total + values[part, None] * x[part]
    if rows > 1:
        total = sum_pairs(jnp.ones_like(values[:rows]), total)[None]
    if rest := len(values) - terms * rows:
        total = total + sum_pairs(values[-rest:], x[-rest:])[None]
    return total[0]


def inner_products(query: Array, w: Array) -> Array:
    """<query, w> [Q, B] of every prompt, from query[Q,d,B] and w[d,B]."""
    return sum(query[:, i] * w[i : i + 1] for i in range(1, w.shape[0])) + query[:, 0] * w[:1]


def _values(x: Array, y: Array, weights: Array) -> Array:
    """v'x_n + u y_n of every pair: [N, B], from x[N,d,B], y[N,B] and weights (v, u) [d+1, 1] or [d+1, B]."""
    return inner_products(x, weights[:-1]) + weights[-1:] * y


@jax.custom_vjp
def moments_times(x: Array, y: Array, weights: Array) -> Array:
    """N Z weights of every prompt, without forming Z: [d+1, B], from x[N,d,B], y[N,B] and weights [d+1, 1] or [d+1, B].

    Z is symmetric, so the derivative by the weights is the same product with the cotangent. It is given here because automatic
    differentiation derives it as sums over a leading axis. Forward mode raises a TypeError.
    """
    values = _values(x, y, weights)
    return jnp.concatenate([sum_pairs(values, x), sum_pairs(values, y[:, None])])


def _moments_times_forward(x: Array, y: Array, weights: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return moments_times(x, y, weights), (x, y, weights)


def _moments_times_backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, y, weights = saved
    values, values_of_g = _values(x, y, weights), _values(x, y, g)
    d_x = values[:, None] * g[None, :-1] + values_of_g[:, None] * weights[None, :-1]
    d_y = values * g[-1:] + values_of_g * weights[-1:]
    d_weights = moments_times(x, y, g)
    return d_x, d_y, d_weights if weights.shape == g.shape else d_weights.sum(-1, keepdims=True)


moments_times.defvjp(_moments_times_forward, _moments_times_backward)
