"""Errors of reduced layers that are applied repeatedly, w <- w + A (S - G w) from w = 0, measured after every layer.

S = X'y/M and G = X'X/M are the moments of a context of M pairs, which is all that the layers see of it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from lindm.icl.label_laws import noisy_labels
from lindm.icl.prompts import draw_pairs
from lindm.problems.linear_mdp import MDPFamily, second_moment
from lindm.solvers.rollout import cumulative
from lindm_experiments.lib import linear_mdps

BLOCK = 1024  # one-hot contexts in flight


def path(blocks: Array, G: Array, S: Array) -> Array:
    """w after every layer, [k, d]: w <- w + A_j (S - G w) from zero; blocks [k, d, d], G [d, d], S [d]."""

    def layer(w: Array, A: Array) -> tuple[Array, Array]:
        w = w + A @ (S - G @ w)
        return w, w

    return jax.lax.scan(layer, jnp.zeros_like(S), blocks)[1]


@partial(jax.jit, static_argnames=("contexts", "length", "layers"))
def long_bias(key: Array, family: MDPFamily, A: Array, w: Array, contexts: int, length: int, layers: int) -> Array:
    """Risk [R, layers] of A [R, d, d] repeated, on very long noiseless contexts; every context serves all tasks w [n, d]."""
    x_all, cdf, Lambda = linear_mdps.pairs_table(family), cumulative(family.design), second_moment(family)

    def context(k: Array) -> Array:
        x = x_all[draw_pairs(k, cdf, length)]
        G = x.T @ x / length

        def risk(A: Array) -> Array:
            blocks = jnp.broadcast_to(A, (layers, *A.shape))
            e = jax.vmap(lambda w: path(blocks, G, G @ w) - w[None, :])(w)
            return jnp.einsum("nki,ij,nkj->k", e, Lambda, e) / len(w)

        return jax.vmap(risk)(A)

    return jax.lax.map(context, jax.random.split(key, contexts)).mean(0)


@partial(jax.jit, static_argnames=("longest",))
def finite_contexts(
    key: Array, family: MDPFamily, stacks: tuple[Array, ...], w: Array, lengths: Array, sigma: Array, longest: int
) -> tuple[tuple[Array, ...], Array, Array]:
    """Contexts of L lengths, one task w [n, d] each: squared errors [n, L, k] after every layer of each stack [k, d, d] of
    blocks, of least squares [n, L], and G [n, L, d, d]."""
    x_all, cdf, Lambda = linear_mdps.pairs_table(family), cumulative(family.design), second_moment(family)
    used = (jnp.arange(longest)[None, :] < lengths[:, None]) / lengths[:, None]

    def context(at) -> tuple[tuple[Array, ...], Array, Array]:
        k, w = at
        which, label = jax.random.split(k)
        x = x_all[draw_pairs(which, cdf, longest)]
        y = noisy_labels(label, x, w, sigma)
        G = jnp.einsum("lm,mi,mj->lij", used, x, x, optimize=[(0, 1), (0, 1)])
        S = used @ (y[:, None] * x)

        def error(v: Array) -> Array:
            return jnp.einsum("...i,ij,...j->...", v, Lambda, v)

        deep = tuple(error(jax.vmap(lambda G, S, b=b: path(b, G, S))(G, S) - w[None, None, :]) for b in stacks)
        return deep, error(jnp.linalg.solve(G, S[..., None])[..., 0] - w[None, :]), G

    return jax.lax.map(context, (jax.random.split(key, len(w)), w), batch_size=256)


@partial(jax.jit, static_argnames=("contexts", "longest", "layers"))
def onehot_risk(key: Array, family: MDPFamily, a: Array, w: Array, lengths: Array, contexts: int, longest: int, layers: int):
    """Risk [L, layers] of diag(a) repeated on noiseless tabular contexts, each serving all tasks w [n, d]."""
    cdf = cumulative(family.design)
    used = jnp.arange(longest)[None, :] < lengths[:, None]
    eye, psi = jnp.eye(len(a)), jnp.square(w).mean(0)

    def context(k: Array) -> Array:
        seen = eye[draw_pairs(k, cdf, longest)]
        left = 1.0 - a[None, :] * (used @ seen) / lengths[:, None]
        powers = jnp.cumprod(jnp.broadcast_to(left, (layers, *left.shape)), axis=0)
        return jnp.einsum("kli,i->lk", jnp.square(powers), family.design * psi)

    def block(k: Array) -> Array:
        return jax.vmap(context)(jax.random.split(k, BLOCK)).mean(0)

    return jax.lax.map(block, jax.random.split(key, contexts // BLOCK)).mean(0)
