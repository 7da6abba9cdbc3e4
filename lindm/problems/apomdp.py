r"""Ambiguous POMDPs (`APOMDP`): checked, from one model, random; and two kinds that are equivalent to POMDPs.

With G_m the action value under model m,

    alpha = 0:               max_a max_m G_m(b, a)                                               actions (a, m)
    M = 2, alpha <= 1/2:     max_a max_k [ (1 - alpha) G_k(b, a) + alpha G_{1-k}(b, a) ]         actions (a, k)

because alpha min + (1 - alpha) max puts the larger weight on the larger value. In the second, nature moves by model k with
probability 1 - alpha and by the other model otherwise, and the model is observed: observations are pairs (m, o), and the state
carries m, since the law of the observation depends on it. Both require models with the same first-state law: a POMDP has one
belief.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lindm import validate
from lindm.problems.pomdp import draw_pomdp, pomdp
from lindm.types import APOMDP, POMDP, RewardFunction, cast


def apomdp(models: Sequence[POMDP], alpha: float) -> APOMDP:
    """A checked APOMDP.

    Args:
      models: at least one, of the same S, A, O and H, each as `pomdp` accepts it. An axis of stages of length one is repeated
        where another model has all stages.
      alpha: in [0, 1]; 1 is the worst case, 0 the best.

    Raises:
      ValueError: names the model by its index, the argument, the rule and what was got.
    """
    validate.fraction(alpha, "alpha")
    models, checked = list(models), []
    if not models:
        raise ValueError("models must contain at least one POMDP; got none")
    for i, model in enumerate(models):
        try:
            checked.append(pomdp(model.P, model.O, model.r, model.rho, legal=model.legal))
        except ValueError as error:
            raise ValueError(f"model {i}: {error}") from error
        for x, y, name in ((checked[i].r, checked[0].r, "r"), (checked[i].O[0], checked[0].O[0], "O at a stage")):
            if x.shape != y.shape:
                raise ValueError(f"models must have the same shapes: {name} of model {i} has {x.shape}, of model 0 {y.shape}")

    one = checked[0].legal
    if any((model.legal is None) != (one is None) or (one is not None and (model.legal != one).any()) for model in checked):
        raise ValueError("models must allow the same actions: `legal` of all must be that of model 0")

    def stack(*leaves: Array) -> Array:
        shape = max((x.shape for x in leaves), key=lambda shape: shape[0])
        return jnp.stack([jnp.broadcast_to(x, shape) for x in leaves])

    stacked = replace(jax.tree.map(stack, *checked), paid=_paid_rewards(models))
    dtype = stacked.P.dtype
    return APOMDP(models=cast(stacked, dtype), alpha=jnp.asarray(alpha, dtype))


def _paid_rewards(models: Sequence[POMDP]) -> RewardFunction | None:
    """The rewards that the models pay, with an axis of models in front. ValueError where their discounts differ."""
    if all(model.paid is None for model in models):
        return None
    discounts = [float(model.discount) for model in models]
    if other := [i for i, gamma in enumerate(discounts) if gamma != discounts[0]]:
        i = other[0]
        raise ValueError(f"models must have one discount; got {discounts[0]} of model 0 and {discounts[i]} of model {i}")
    tables = [model.r[..., None, None] if model.paid is None else model.paid.R for model in models]
    shape = np.broadcast_shapes(*(R.shape for R in tables))
    return RewardFunction(R=jnp.stack([jnp.broadcast_to(R, shape) for R in tables]), discount=jnp.asarray(discounts))


def single(model: POMDP, alpha: ArrayLike = 1.0) -> APOMDP:
    """A POMDP as an APOMDP with one model, whose value does not depend on alpha (in [0, 1], may be traced)."""
    validate.fraction(alpha, "alpha")
    return APOMDP(models=jax.tree.map(lambda x: x[None], model), alpha=jnp.asarray(alpha, model.r.dtype))


def as_apomdp(problem: POMDP | APOMDP) -> APOMDP:
    """A POMDP as an APOMDP with one model; an APOMDP is returned unchanged."""
    return single(problem) if isinstance(problem, POMDP) else problem


def alpha_maxmin(alpha: ArrayLike, values: Any, axis: int) -> Any:
    """alpha min_m values + (1 - alpha) max_m values over the axis of the models; with one model its value, to the last bit.

    Accepts numpy and JAX arrays.
    """
    if values.shape[axis] == 1:
        return values.squeeze(axis)
    return alpha * values.min(axis) + (1 - alpha) * values.max(axis)


def draw_apomdp(
    key: Array,
    S: int,
    A: int,
    O: int,
    H: int,
    M: int,
    *,
    alpha: ArrayLike = 0.5,
    distance: ArrayLike = 0.3,
    concentration: ArrayLike = 1.0,
    quality: ArrayLike = 0.5,
    low: float = 0.0,
    high: float = 1.0,
    step: float = 0.0,
    discount: ArrayLike | None = None,
    dtype=None,
) -> APOMDP:
    """Random models around a center of `draw_pomdp`, with the rewards and the first-state law of the center.

        P_m = (1 - distance) P_center + distance P'_m,    O_m the same,    P'_m, O'_m drawn like the center's

    so that rows of any two models are at most `distance` apart in total variation.

    Args:
      distance: in [0, 1]. May be traced, as `alpha`, `concentration`, `quality` and `discount` may.

    Raises:
      ValueError: a size or a number is out of its range.
    """
    validate.count(M, "M")
    validate.fraction(alpha, "alpha")
    validate.fraction(distance, "distance")

    numbers = {"concentration": concentration, "quality": quality, "low": low, "high": high, "step": step, "discount": discount}
    draw = partial(draw_pomdp, S=S, A=A, O=O, H=H, dtype=dtype, **numbers)
    drawn = jax.vmap(draw)(jax.random.split(key, 1 + M))  # the center and the others
    models = POMDP(
        P=around_center(drawn.P, distance),
        O=around_center(drawn.O, distance),
        r=jnp.broadcast_to(drawn.r[:1], drawn.r[1:].shape),
        rho=drawn.rho[1:],
        paid=jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x[1:].shape), drawn.paid),
    )
    return APOMDP(models=models, alpha=jnp.asarray(alpha, models.P.dtype))


def around_center(rows: Array, distance: ArrayLike) -> Array:
    """The rows of the models of `draw_apomdp` [M, ...] from those of the center and of the others [1 + M, ...]."""
    share = jnp.asarray(distance, rows.dtype)
    return (1 - share) * rows[:1] + share * rows[1:]


def optimistic(problem: APOMDP) -> POMDP:
    """The POMDP of an APOMDP with alpha = 0: the decision maker chooses the model, too.

    Action a*M + m is action a under model m; the numbers of histories do not change: (a*M + m)*O + o for a step.

    Raises:
      ValueError: alpha is not 0, or the models differ in rho. (Values are checked: not under `jit`.)
    """
    _require_all_legal(problem)
    if float(problem.alpha) != 0:
        raise ValueError(f"alpha must be 0; got {float(problem.alpha)}")
    rho, models = _common_start(problem), problem.models
    M, H, S, A = models.r.shape
    return POMDP(
        P=jnp.moveaxis(models.P, 0, 3).reshape(-1, S, A * M, S),
        O=jnp.moveaxis(models.O, 0, 2).reshape(-1, A * M, *models.O.shape[-2:]),
        r=jnp.moveaxis(models.r, 0, 3).reshape(H, S, A * M),
        rho=rho,
    )


def mixture(problem: APOMDP) -> POMDP:
    """The POMDP of an APOMDP with two models and alpha <= 1/2.

    Action a*2 + k is action a, with weight 1 - alpha on model k; observation m*O + o is o under model m; state s*2 + m is s,
    reached under model m (m = 0 for the first state).

    Raises:
      ValueError: M is not 2, alpha is above 1/2, or the models differ in rho. (Values are checked: not under `jit`.)
    """
    models, alpha = problem.models, problem.alpha
    M, H, S, A = models.r.shape
    _require_all_legal(problem)
    if M != 2:
        raise ValueError(f"problem must have two models; got {M}")
    if float(alpha) > 0.5:
        raise ValueError(f"alpha must be at most 1/2; got {float(alpha)}")
    rho, O, one = _common_start(problem), models.O.shape[-1], jnp.eye(2, dtype=models.P.dtype)
    weight = alpha + (1 - 2 * alpha) * one  # [k, m]
    P = jnp.einsum("km,mhsat,n->hsnaktm", weight, models.P, jnp.ones(2, one.dtype))
    return POMDP(
        P=P.reshape(-1, S * 2, A * 2, S * 2),
        O=jnp.einsum("mhato,mn,k->haktmno", models.O, one, jnp.ones(2, one.dtype)).reshape(-1, A * 2, S * 2, 2 * O),
        r=jnp.einsum("km,mhsa,n->hsnak", weight, models.r, jnp.ones(2, one.dtype)).reshape(H, S * 2, A * 2),
        rho=jnp.einsum("s,n->sn", rho, one[0]).reshape(S * 2),
    )


def _require_all_legal(problem: APOMDP) -> None:
    if problem.models.legal is not None:
        raise ValueError("problem must allow every action in every state: this reduction has none of `legal`")


def _common_start(problem: APOMDP) -> Array:
    rho = np.asarray(problem.models.rho)
    if (rho != rho[0]).any():
        m = int((rho != rho[0]).any(-1).argmax())
        raise ValueError(f"the models must agree in rho; got {rho[0].tolist()} of model 0 and {rho[m].tolist()} of model {m}")
    return problem.models.rho[0]
