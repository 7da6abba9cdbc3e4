r"""Training of attention layers on new tasks at every step, in one compiled loop.

The loss is the mean of (yhat - target)^2 over a batch of prompts and their queries. For the reduced layer at depth 1 it is a
quadratic in A with curvature Lambda_q (x) E[S S'], whose condition number is about cond(Lambda)^3 when tasks are isotropic: the
directions of small eigenvalues of Lambda are slow, and A_N is largest there. Three measures reach the optimum to a percent:
Adam (scale-free), a learning rate that falls to zero (cosine, after a short warm-up), and the average of the iterates over the
last part of the run (Polyak, Juditsky 1992), which removes most of the remaining sampling noise.

The compiled program depends on the structure of the layer, `draw`, `steps`, `optimizer` and the shapes of `data`, not on values:
pass everything that changes between seeds and points through `data`, and keep `draw` a module-level function.

    def draw(key, root, n):                                 # n may be traced: see lindm.icl.attention.pad
        prompt, target, _ = ...                             # batch axis first: x[B,N,d], y[B,N], query[B,Q,d], target[B,Q]
        return pad(prompt, n), target

    layer, losses = train(ReducedAttention(d), draw, key, steps=2000, data=(root, 20))
    layers, losses = train_many(ReducedAttention(d), draw, keys, steps=2000, data=(roots, ns))      # every leaf [R, ...]
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypedDict, TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from lindm.types import Prompt

Layer = TypeVar("Layer", bound=nnx.Module)
Draw = Callable[..., tuple[Prompt, Array]]


class TrainOptions(TypedDict, total=False):
    """Options of `train` and `train_many`."""

    learning_rate: float
    """Peak of the schedule (linear warm-up, cosine to zero), > 0. [default: 0.1]"""
    warmup: float
    """Fraction of the steps, in [0, 1). [default: 0.05]"""
    average: float
    """Fraction of the steps, in [0, 1), at the end of the run, whose iterates are averaged; 0: the last one. [default: 0.25]"""
    clip: float | None
    """Largest global norm of a gradient, > 0. [default: none]"""
    optimizer: optax.GradientTransformation | None
    """In place of Adam with the schedule (`learning_rate`, `warmup` and `clip` are then not used). Pass one object to all calls:
    a new one compiles again."""


def train(
    layer: Layer,
    draw: Draw,
    key: Array,
    *,
    steps: int,
    data: tuple[Any, ...] = (),
    **options: Unpack[TrainOptions],
) -> tuple[Layer, Array]:
    """Train a copy of `layer` and return it with the loss of every step.

    Args:
        layer: any module that maps one `Prompt` to yhat[Q]; its parameters (`nnx.Param`) are trained, in their own dtype. Not
            modified. A method `predict_batch` (see `lindm.icl.attention`) is called in place of `jax.vmap(layer)`.
        draw: `draw(key, *data) -> (Prompt, target[B,Q])`, the prompt with a leading batch axis. Both are cast to the
            dtype of the parameters; drawing in that dtype is faster.
        key: PRNG key. Step t draws with `fold_in(key, t)`.
        steps: number of steps, >= 1.
        data: pytrees passed to `draw`; new values do not trigger a new compilation.
        options: `learning_rate`, `warmup`, `average`, `clip`, `optimizer`; see `TrainOptions`.

    Returns:
        The trained layer and losses[steps], each taken before the step's update.

    Raises:
        ValueError: an argument out of range, a prompt and target that do not fit.
        FloatingPointError: a loss that is not finite; names the first such step.
    """
    schedule, optimizer = _check_options(steps, **options)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    params, losses = _fit(graphdef, draw, params, rest, key, data, *schedule, steps=steps, optimizer=optimizer)
    _check_finite(np.asarray(losses)[None])
    return nnx.merge(graphdef, params, rest), losses


def train_many(
    layer: Layer,
    draw: Draw,
    keys: Array,
    *,
    steps: int,
    data: tuple[Any, ...] = (),
    **options: Unpack[TrainOptions],
) -> tuple[Layer, Array]:
    """`train` for R runs in parallel (seeds, stages, lengths, problems), all from the same initial layer.

    The arguments that are not listed are those of `train`, the same for all runs.

    Args:
        keys: [R] PRNG keys.
        data: as in `train`, every leaf with a leading axis R.

    Returns:
        A layer whose parameters have a leading axis R (`predict_many` makes predictions of it), and losses[R, steps].
    """
    schedule, optimizer = _check_options(steps, **options)
    runs = keys.shape[0] if keys.ndim else 0
    for leaf in jax.tree.leaves(data):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != runs or runs == 0:
            raise ValueError(f"data must have the leading axis R = {runs} of keys in every leaf; got shape {np.shape(leaf)}")
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    params, losses = _fit_many(graphdef, draw, params, rest, keys, data, *schedule, steps=steps, optimizer=optimizer)
    _check_finite(np.asarray(losses))
    return nnx.merge(graphdef, params, rest), losses


def predict_many(layers: nnx.Module, prompts: Prompt) -> Array:
    """yhat[R,B,Q] of the R layers of `train_many`, each on its own B prompts: x[R,B,N,d], y[R,B,N], query[R,B,Q,d]."""
    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)
    return jax.vmap(lambda params, prompt: jax.vmap(nnx.merge(graphdef, params, rest))(prompt))(params, prompts)


def _check_options(
    steps: int,
    learning_rate: float = 0.1,
    warmup: float = 0.05,
    average: float = 0.25,
    clip: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[tuple[float, float, float, float | None], optax.GradientTransformation | None]:
    """The options with their defaults: numbers, which `jit` traces, and the optimizer."""
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1; got {steps}")
    if optimizer is None and not 0 < learning_rate < np.inf:
        raise ValueError(f"learning_rate must be positive and finite; got {learning_rate}")
    for name, value in (("warmup", warmup), ("average", average)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1); got {value}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive; got {clip}")
    return (learning_rate, warmup, average, clip), optimizer


def _check_finite(losses: np.ndarray) -> None:
    bad = ~np.isfinite(losses)
    if bad.any():
        run, step = (int(i) for i in np.argwhere(bad)[0])
        where = f"run {run}, " if len(losses) > 1 else ""
        raise FloatingPointError(
            f"loss must stay finite; got {losses[run, step]} at {where}step {step} of {losses.shape[1]} "
            "(a smaller learning_rate or clip may help, if the draws themselves are finite)"
        )


def _loss(params, graphdef, rest, prompt: Prompt, target: Array) -> Array:
    layer = nnx.merge(graphdef, params, rest)
    predict = layer.predict_batch if hasattr(layer, "predict_batch") else jax.vmap(layer)
    yhat = predict(prompt)
    return jnp.mean((yhat - target) ** 2)


def _run(graphdef, draw, params, rest, key, data, learning_rate, warmup, average, clip, *, steps, optimizer):
    dtype = jax.tree.leaves(params)[0].dtype
    restore = lambda p: p  # noqa: E731
    if optimizer is None:  # Adam is entrywise: one vector in place of a tree halves the number of small operations
        optimizer = _adam(learning_rate, warmup, clip, steps)
        params, restore = ravel_pytree(params)

    def step(carry, t):
        params, mean, state = carry
        batch = jax.tree.map(lambda a: a.astype(dtype), draw(jax.random.fold_in(key, t), *data))
        _check_batch(*batch)
        loss, grads = jax.value_and_grad(lambda p: _loss(restore(p), graphdef, rest, *batch))(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        # the mean over the iterates after `first`; before it the weight is 1 and `mean` is the last iterate
        first = jnp.minimum(steps * (1 - average), steps - 1)
        weight = (1 / jnp.maximum(t + 1 - jnp.floor(first), 1)).astype(dtype)
        mean = jax.tree.map(lambda m, p: m + weight * (p - m), mean, params)
        return (params, mean, state), loss

    (_, mean, _), losses = lax.scan(step, (params, params, optimizer.init(params)), jnp.arange(steps))
    return restore(mean), losses


def _adam(learning_rate, warmup, clip, steps: int) -> optax.GradientTransformation:
    def schedule(t):
        t = (t + 1) / (steps + 1)  # the rate is positive at the first and at the last step
        rise = jnp.minimum(t / jnp.maximum(warmup, 1e-9), 1)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.maximum(t - warmup, 0) / (1 - warmup)))
        return learning_rate * rise * fall

    clipped = () if clip is None else (optax.clip_by_global_norm(clip),)
    return optax.chain(*clipped, optax.scale_by_adam(b2=0.99), optax.scale_by_learning_rate(schedule))


def _check_batch(prompt: Prompt, target: Array) -> None:
    x, y, query = prompt.x.shape, prompt.y.shape, prompt.query.shape
    if len(x) != 3 or len(query) != 3 or y != x[:2] or query[0] != x[0]:
        raise ValueError(f"draw must return x[B,N,d], y[B,N], query[B,Q,d]; got x{x}, y{y}, query{query}")
    if target.shape != query[:2]:
        raise ValueError(f"draw must return target[B,Q] = {query[:2]}; got {target.shape}")


_fit = partial(jax.jit, static_argnames=("graphdef", "draw", "steps", "optimizer"))(_run)


@partial(jax.jit, static_argnames=("graphdef", "draw", "steps", "optimizer"))
def _fit_many(graphdef, draw, params, rest, keys, data, learning_rate, warmup, average, clip, *, steps, optimizer):
    def one(key, data):
        return _run(
            graphdef, draw, params, rest, key, data, learning_rate, warmup, average, clip, steps=steps, optimizer=optimizer
        )

    return jax.vmap(one)(keys, data)
