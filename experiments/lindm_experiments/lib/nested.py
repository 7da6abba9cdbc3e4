"""Reduced layers for several lengths at once, trained and tested on strips of pairs that are cut into contexts of each length.

Random numbers are most of the cost, and a strip of 64 pairs is one context of length 64 or sixteen of length 4: no pair is wasted
on a shorter length. The layers see the same pairs but share no parameter.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from lindm.icl.attention import ReducedAttention, query_columns
from lindm.icl.trainer import train_many
from lindm.types import Prompt
from lindm_experiments.lib.feature_laws import D, Law, draw_pairs, moment

DESCENT = optax.sgd(0.8)  # constant steps and an average over the iterates: least squares on all that was seen


class Nested(nnx.Module):
    """Reduced layers for several lengths, side by side: a strip of pairs is cut into contexts of each length in turn.

    Every context has its own d queries, in the order of lengths and cuts. The layers share no parameter, only the pairs.
    """

    def __init__(self, lengths: tuple[int, ...], dtype=jnp.float32):
        self.lengths = lengths
        self.layers = nnx.List([ReducedAttention(D, dtype=dtype) for _ in lengths])

    def __call__(self, prompt: Prompt) -> Array:
        out, first = [], 0
        for N, layer in zip(self.lengths, self.layers, strict=True):
            cuts = len(prompt.y) // N
            query = prompt.query[first : first + cuts * D].reshape(cuts, D, D)
            first += cuts * D
            contexts = Prompt(x=prompt.x.reshape(cuts, N, D), y=prompt.y.reshape(cuts, N), query=query)
            out.append(jax.vmap(layer)(contexts).ravel())
        return jnp.concatenate(out)


def strip_prompts(lengths: tuple[int, ...], batch: int, key: Array, law: Law, tasks: Array, query: Array) -> tuple[Prompt, Array]:
    """`batch` strips of fresh pairs, each read with one group of tasks [groups, K, d] and the query columns [d, d]."""
    k_group, k_pairs = jax.random.split(key)
    groups, K, _ = tasks.shape
    contexts = sum(lengths[-1] // N for N in lengths)
    w = tasks[jax.random.randint(k_group, (batch,), 0, groups)]
    x, noise = draw_pairs(k_pairs, law, (batch, lengths[-1]))
    y = jnp.einsum("bnd,bkd->bkn", x, w) + noise[:, None]
    target = jnp.tile(jnp.einsum("bkd,qd->bkq", w, query), (1, 1, contexts))

    def each_task(a: Array) -> Array:
        return jnp.broadcast_to(a[:, None], (batch, K, *a.shape[1:])).reshape(batch * K, *a.shape[1:])

    queries = jnp.broadcast_to(jnp.tile(query, (contexts, 1))[None], (batch * K, contexts * D, D))
    return Prompt(x=each_task(x), y=y.reshape(batch * K, -1), query=queries), target.reshape(batch * K, -1)


@lru_cache
def draw_of(lengths: tuple[int, ...], batch: int) -> Callable:
    """The draw function of one set of sizes: the same object on every call, so that nothing compiles twice."""
    return partial(strip_prompts, lengths, batch)


def stack(trees: list):
    """Leaves [R, ...] in single precision."""
    return jax.tree.map(lambda *a: np.stack(a).astype(np.float32), *trees)


def scaled_queries(law: Law, tasks: np.ndarray) -> np.ndarray:
    """Query columns [d, d] of the law, scaled so that the largest curvature of the loss is about two."""
    Lambda, w = np.asarray(moment(law)), tasks.reshape(-1, D)
    curvature = np.linalg.norm(Lambda, 2) * np.linalg.norm(Lambda @ (w.T @ w / len(w)) @ Lambda, 2)
    return np.asarray(query_columns(Lambda / curvature))


def fit(key: Array, chosen: list[Law], tasks: list, lengths: tuple[int, ...], batch: int, **options) -> tuple[Array, tuple]:
    """Trained layers Ahat [law, N, d, d] in double precision, and what `strip_prompts` was given."""
    queries = [scaled_queries(law, group) for law, group in zip(chosen, tasks, strict=True)]
    keys, data = jax.random.split(key, len(chosen)), (stack(chosen), stack(tasks), stack(queries))
    nested, _ = train_many(Nested(lengths), draw_of(lengths, batch), keys, data=data, **options)
    weights = np.stack([np.asarray(layer.A[...])[:, 0] for layer in nested.layers], axis=1)
    return jnp.asarray(weights, float), (keys, data)


@partial(jax.jit, static_argnames=("lengths", "batch", "steps"))
def seen_moment(keys: Array, data: tuple, lengths: tuple[int, ...], batch: int, steps: int) -> Array:
    """Gbar [law, d, d]: the second moment of all features of the last three quarters of a training run, drawn once more."""

    def one(key: Array, law: Law) -> Array:
        def add(total: Array, t: Array) -> tuple[Array, None]:
            _, k_pairs = jax.random.split(jax.random.fold_in(key, t))
            x = draw_pairs(k_pairs, law, (batch, lengths[-1]))[0].reshape(-1, D)
            return total + x.T @ x / len(x), None

        times = jnp.arange(steps // 4, steps)
        return jax.lax.scan(add, jnp.zeros((D, D), law.phi.dtype), times)[0] / len(times)

    return jax.vmap(one)(keys, data[0])


def bias_on(G: np.ndarray, A: np.ndarray, Lambda: np.ndarray) -> list[float]:
    """Squared error [N] of layers A [N, d, d] on a context with second moment G and labels without noise, Psi = I.

    All that a layer sees of the context of a task w is S = G w, and the mean of ||A G w - w||^2_Lambda is a trace.
    """
    miss = A @ G - np.eye(D)
    return np.einsum("ij,njk,nik->n", Lambda, miss, miss).tolist()


def long_biases(key: Array, chosen: list[Law], lengths: tuple[int, ...], batch: int, steps: int) -> list[dict[str, list[float]]]:
    """The squared bias [N] of layers trained at each length, for each law: `bias` and `at_Lambda`.

    The tasks are a frame with Psi = I, and every context has them all. `bias` is measured on one context, all features that the
    layer was trained on; `at_Lambda` has the error of their second moment in it.
    """
    frame = [D**0.5 * np.eye(D)[None] for _ in chosen]
    sizes = {"lengths": lengths, "batch": batch}
    Ahat, seen = fit(key, chosen, frame, **sizes, steps=steps, average=0.75, optimizer=DESCENT)
    G = np.asarray(seen_moment(*seen, **sizes, steps=steps), float)
    Lambda = [np.asarray(moment(law)) for law in chosen]
    return [
        {"bias": bias_on(Gbar, A, L), "at_Lambda": bias_on(L, A, L)}
        for A, Gbar, L in zip(np.asarray(Ahat), G, Lambda, strict=True)
    ]


def answers(A: Array, prompt: Prompt) -> Array:
    """yhat [N, contexts, K, Q] of the layers A [N, d, d]: x [contexts, M, d], y [contexts, K, M], query [Q, d]."""

    def layer(A: Array) -> Array:
        read = ReducedAttention(D, A=A)
        tasks = jax.vmap(lambda x, y: read(Prompt(x=x, y=y, query=prompt.query)), (None, 0))
        return jax.vmap(tasks)(prompt.x, prompt.y)

    return jax.vmap(layer)(A)


@partial(jax.jit, static_argnames=("lengths", "strips"))
def measured(key: Array, law: Law, A: Array, tasks: Array, lengths: tuple[int, ...], strips: int = 4) -> tuple[Array, Array]:
    """Squared error of Qhat and its variance over the contexts of a task, both [N, M], mean over tasks [groups, K, d]."""
    query = query_columns(moment(law))

    def group(item: tuple[Array, Array]) -> tuple[Array, Array]:
        k, w = item
        x, noise = draw_pairs(k, law, (strips, lengths[-1]))
        y = jnp.einsum("cnd,kd->ckn", x, w) + noise[:, None]
        errors, variances = [], []
        for M in lengths:
            cuts = lengths[-1] // M
            labels = jnp.moveaxis(y.reshape(strips, len(w), cuts, M), 2, 1).reshape(strips * cuts, len(w), M)
            yhat = answers(A, Prompt(x=x.reshape(strips * cuts, M, D), y=labels, query=query))
            errors.append(jnp.mean((yhat - (w @ query.T)[None, None]) ** 2, axis=(1, 2, 3)))
            variances.append(jnp.mean(jnp.var(yhat, axis=1, ddof=1), axis=(1, 2)))
        return jnp.stack(errors, -1), jnp.stack(variances, -1)

    error, variance = jax.lax.map(group, (jax.random.split(key, len(tasks)), tasks), batch_size=min(32, len(tasks)))
    return error.mean(0), variance.mean(0)
