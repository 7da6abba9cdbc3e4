"""Baseline predictors with the signature of the attention layer: predict(prompt) -> yhat[Q].

With X [N, d], y [N] and a query x_q:

    closed form   yhat = x_q' A S,  S = X'y / N                     one attention layer with A = A_N or another matrix
    iterated      w <- w + A (S - G w),  G = X'X / N                 the same layer, applied repeatedly
    ridge         w = (X'X + lam I)^-1 X'y
    OLS           w = pinv(X) y                                      the least-squares solution of minimum norm
    Bayes         w = m + Psi X'(X Psi X' + sigma^2 I)^-1 (y - X m)   posterior mean for w ~ N(m, Psi)

Where the data are transitions and not labels of Q*, value iteration is fitted backward: LSVI and its pessimistic form PEVI return
Qhat [H, S, A], and `bootstrap` does the same with any predictor in place of ridge regression.
A predictor takes one prompt: `vmap` outside.
"""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from lindm import validate
from lindm.icl.label_laws import bellman_labels
from lindm.icl.prompts import draw_pairs
from lindm.types import MDP, Prompt

Predictor = Callable[[Prompt], Array]
"""prompt (x [N, d], y [N], query [Q, d]) -> yhat [Q]"""


def _number(name: str, value: float, *, zero: bool) -> None:
    if isinstance(value, Tracer):
        return
    if not np.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be finite and {'at least' if zero else 'greater than'} 0; got {value}")


def _finite(name: str, value: ArrayLike) -> Array:
    """A checked array; traced weights (differentiated, or selected by a traced stage) are not checked."""
    return jnp.asarray(value) if isinstance(value, Tracer) else validate.finite(value, name)


def _square(name: str, matrix: ArrayLike) -> Array:
    array = _finite(name, matrix)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"{name} must be a square matrix [d, d]; got shape {array.shape}")
    return array


# --- predictors --------------------------------------------------------------------------------------------------------


def closed_form(A: ArrayLike) -> Predictor:
    """The reduced layer with weights A [d, d]: yhat = x_q' A S, S = (1/N) sum y_i x_i."""
    A = _square("A", A)
    return lambda prompt: prompt.query @ (A @ (prompt.y @ prompt.x / prompt.x.shape[0]))


def iterated(A: ArrayLike, steps: int) -> Predictor:
    """`steps` steps of w <- w + A (S - G w) from zero. One step is `closed_form`; A a multiple of I is gradient descent."""
    A = _square("A", A)
    validate.count(steps, "steps")

    def predict(prompt: Prompt) -> Array:
        N = prompt.x.shape[0]

        def step(_, w):
            return w + A @ ((prompt.y - prompt.x @ w) @ prompt.x / N)

        return prompt.query @ jax.lax.fori_loop(0, steps, step, jnp.zeros_like(prompt.x[0]))

    return predict


def ridge(lam: float) -> Predictor:
    """w = argmin sum_i (y_i - <x_i, w>)^2 + lam |w|^2 = (X'X + lam I)^-1 X'y; lam > 0 is not divided by N."""
    _number("lam", lam, zero=False)

    def predict(prompt: Prompt) -> Array:
        gram = prompt.x.T @ prompt.x + lam * jnp.eye(prompt.x.shape[1], dtype=prompt.x.dtype)
        return prompt.query @ jnp.linalg.solve(gram, prompt.y @ prompt.x)

    return predict


def ols() -> Predictor:
    """Least squares w = pinv(X) y, the solution of minimum norm where there are many (N < d, or repeated one-hot pairs)."""
    return lambda prompt: prompt.query @ jnp.linalg.lstsq(prompt.x, prompt.y)[0]


def bayes(Psi: ArrayLike, sigma: float, mean: ArrayLike | None = None) -> Predictor:
    """Posterior mean of <x_q, w> for w ~ N(mean, Psi) and labels with noise N(0, sigma^2): the Bayes-optimal predictor.

    For other laws of w with these moments it is the best predictor affine in y given X.

    Args:
        Psi: [d, d] covariance of w around the mean (with mean None: second moment), positive semidefinite, may be singular.
        sigma: >= 0; at 0 the labels are interpolated, in the limit sigma -> 0.
        mean: [d], zero if None.
    Raises: ValueError if Psi is not symmetric positive semidefinite, or sigma is negative.
    """
    Psi = _square("Psi", Psi)
    _number("sigma", sigma, zero=True)
    values, vectors = jnp.linalg.eigh(Psi)
    if not isinstance(Psi, Tracer):
        scale = float(jnp.max(jnp.abs(Psi)))
        slack = 100 * float(jnp.finfo(Psi.dtype).eps) * scale
        if float(jnp.max(jnp.abs(Psi - Psi.T))) > slack:
            raise ValueError(f"Psi must be symmetric; got an asymmetry of {float(jnp.max(jnp.abs(Psi - Psi.T))):.3g}")
        if float(values[0]) < -slack * Psi.shape[0]:
            raise ValueError(f"Psi must be positive semidefinite (smallest eigenvalue >= 0); got {float(values[0]):.3g}")
    root = vectors @ jnp.diag(jnp.sqrt(jnp.maximum(values, 0)))  # Psi = root root'
    prior = jnp.zeros(Psi.shape[0], Psi.dtype) if mean is None else _finite("mean", mean)
    if prior.shape != Psi.shape[:1]:
        raise ValueError(f"mean must have shape {Psi.shape[:1]} to fit Psi; got {prior.shape}")

    def predict(prompt: Prompt) -> Array:
        # w = m + root v with v ~ N(0, I): a ridge regression in d dimensions, whatever the rank of Psi
        x, y = prompt.x @ root, prompt.y - prompt.x @ prior
        if isinstance(sigma, (int, float)) and sigma == 0:
            v = jnp.linalg.lstsq(x, y)[0]
        else:
            v = jnp.linalg.solve(x.T @ x + jnp.asarray(sigma, x.dtype) ** 2 * jnp.eye(x.shape[1], dtype=x.dtype), y @ x)
        return prompt.query @ (prior + root @ v)

    return predict


def random(key: Array) -> Predictor:
    """yhat_q ~ N(0, 1), drawn for every context: its greedy policy takes uniformly random actions.

    The bits of the context are folded into the key, so contexts under `vmap` get different numbers.
    """

    def predict(prompt: Prompt) -> Array:
        own = key
        for total in (jnp.sum(prompt.x), jnp.sum(prompt.y)):
            own = jax.random.fold_in(own, jax.lax.bitcast_convert_type(total.astype(jnp.float32), jnp.uint32))
        return jax.random.normal(own, prompt.query.shape[:-1], prompt.query.dtype)

    return predict


# --- from transitions --------------------------------------------------------------------------------------------------


def _check_transitions(phi: Array, x: Array, r: Array, next_phi: Array) -> None:
    (H, n, d), A = x.shape, phi.shape[1]
    chex.assert_shape([phi, r, next_phi], [(None, A, d), (H, n), (H, n, A, d)])


def lsvi(phi: Array, x: Array, r: Array, next_phi: Array, lam: float) -> tuple[Array, Array]:
    """Least-squares value iteration on a data set of transitions (Bradtke, Barto 1996; Jin, Yang, Wang, Jordan, COLT 2020).

    Backwards from w_H = 0:  w_h = (sum x x' + lam I)^-1 sum x_i ( r_i + max_a <phi(s'_i, a), w_{h+1}> ), no bonus, no clipping.

    Args:
        phi: [S, A, d]; x: [H, n, d]; r: [H, n]; next_phi: [H, n, A, d] features of every action at the next state.
        lam: > 0, not divided by n.
    Returns: Qhat [H, S, A] = <phi, w_h> and w [H, d].
    """
    _number("lam", lam, zero=False)
    return _lsvi(phi, x, r, next_phi, lam)


@jax.jit
def _lsvi(phi: Array, x: Array, r: Array, next_phi: Array, lam: ArrayLike) -> tuple[Array, Array]:
    _check_transitions(phi, x, r, next_phi)

    def stage(w, at):
        x, r, after = at
        target = r + jnp.max(after @ w, axis=-1)
        w = jnp.linalg.solve(x.T @ x + lam * jnp.eye(x.shape[1], dtype=x.dtype), target @ x)
        return w, (phi @ w, w)

    _, (Q, w) = jax.lax.scan(stage, jnp.zeros_like(x[0, 0]), (x, r, next_phi), reverse=True)
    return Q, w


def pevi(phi: Array, x: Array, r: Array, next_phi: Array, lam: float, beta: float, clip: bool = True) -> Array:
    """Pessimistic value iteration for a linear MDP (Jin, Yang, Wang, ICML 2021, Algorithm 2), with rewards in [0, 1].

    L_h = sum x x' + lam I,  w_h = L_h^-1 sum x_i ( r_i + max_a Qhat_{h+1}(s'_i, a) ),
    Qhat_h(s, a) = clip( <phi, w_h> - beta sqrt(phi' L_h^-1 phi), 0, H - h ),  h = 0, ..., H - 1.

    Args:
        phi: [S, A, d]; x: [H, n, d]; r: [H, n]; next_phi: [H, n, A, d]; lam: > 0; beta: >= 0.
        clip: to [0, H - h] as in the source; off, Qhat with beta = 0 is `lsvi`.
    Returns: Qhat [H, S, A].
    """
    _number("lam", lam, zero=False)
    _number("beta", beta, zero=True)
    return _pevi(phi, x, r, next_phi, lam, beta, clip)


@partial(jax.jit, static_argnames="clip")
def _pevi(phi: Array, x: Array, r: Array, next_phi: Array, lam: ArrayLike, beta: ArrayLike, clip: bool) -> Array:
    H, d = x.shape[0], x.shape[-1]
    _check_transitions(phi, x, r, next_phi)

    def pessimistic(features, w, inverse, stages_to_go):
        bonus = jnp.sqrt(jnp.maximum(jnp.einsum("...d,de,...e->...", features, inverse, features), 0))
        Q = features @ w - beta * bonus
        return jnp.clip(Q, 0, stages_to_go) if clip else Q

    def stage(carry, at):
        w, inverse = carry
        x, r, after, stages_to_go = at
        # at the last stage w = 0 and inverse = 0: the value after the horizon is zero
        target = r + jnp.max(pessimistic(after, w, inverse, stages_to_go - 1), axis=-1)
        inverse = jnp.linalg.inv(x.T @ x + lam * jnp.eye(d, dtype=x.dtype))
        w = inverse @ (target @ x)
        return (w, inverse), pessimistic(phi, w, inverse, stages_to_go)

    stages_to_go = jnp.arange(H, 0, -1).astype(x.dtype)
    start = (jnp.zeros(d, x.dtype), jnp.zeros((d, d), x.dtype))
    return jax.lax.scan(stage, start, (x, r, next_phi, stages_to_go), reverse=True)[1]


def bootstrap(
    key: Array, mdp: MDP, phi: Array, cdf: Array, n: int, predict: Callable[[Array, Prompt], Array], idx: Array | None = None
) -> Array:
    """Value iteration in context: stage h is predicted from labels r + max_a Qhat_{h+1}(s', a), the estimate of the next stage.

    With `ridge` this is LSVI; with the attention layer it is the layer without an oracle.

    Args:
        phi: [S, A, d]; cdf: [S*A] of the design; n: pairs in each stage's context.
        predict: (h, prompt) -> yhat; h is a traced stage, to pick the weights of the stage: `lambda h, p: closed_form(A[h])(p)`.
        idx: [H, n] pairs, in place of i.i.d. draws from the design.
    Returns: Qhat [H, S, A].
    """
    H, S, A = mdp.r.shape
    key_pairs, key_labels = jax.random.split(key)
    pairs = draw_pairs(key_pairs, cdf, (H, n)) if idx is None else idx
    features = phi.reshape(S * A, -1)

    def stage(Q_next, at):
        h, key_stage, pairs_h = at
        y = bellman_labels(key_stage, mdp, h, pairs_h, Q_next).astype(phi.dtype)
        Q = predict(h, Prompt(x=features[pairs_h], y=y, query=features)).reshape(S, A)
        return Q, Q

    steps = (jnp.arange(H, dtype=jnp.int32), jax.random.split(key_labels, H), pairs)
    return jax.lax.scan(stage, jnp.zeros((S, A), phi.dtype), steps, reverse=True)[1]
