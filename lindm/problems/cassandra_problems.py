"""Problems with a horizon from models of `.pomdp` files."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lindm import validate
from lindm.errors import DataError
from lindm.problems.cassandra import Model
from lindm.problems.cassandra_sections import quote
from lindm.types import MDP, POMDP, RewardFunction


def to_pomdp(model: Model, horizon: int, discount: float | None = None) -> POMDP:
    """The first `horizon` stages as a POMDP, with discount^h folded into the rewards; `None` is the file's own discount."""
    arrays = _arrays(model, horizon, discount)
    return POMDP(**arrays, O=jnp.asarray(model.O[None], arrays["P"].dtype))


def to_mdp(model: Model, horizon: int, discount: float | None = None) -> MDP:
    """`to_pomdp` of a file without observations."""
    return MDP(**_arrays(model, horizon, discount))


def _arrays(model: Model, horizon: int, discount: float | None) -> dict[str, Any]:
    gamma = model.discount if discount is None else discount
    if not 0 <= gamma <= 1:
        raise ValueError(f"discount must be a number from 0 to 1; got {gamma}")
    r = float(gamma) ** np.arange(validate.count(horizon, "horizon"))[:, None, None] * model.r
    arrays = {"P": model.P[None], "r": r, "rho": model.start}
    arrays: dict[str, Any] = {name: jnp.asarray(array, jnp.result_type(float)) for name, array in arrays.items()}
    arrays["legal"] = None if model.legal is None else jnp.asarray(model.legal)
    if model.rewards is None and gamma == 1:
        return arrays
    R = model.r[:, :, None, None] if model.rewards is None else model.rewards.R()
    paid = RewardFunction(R=jnp.asarray(R[None], arrays["r"].dtype), discount=jnp.asarray(gamma, arrays["r"].dtype))
    return arrays | {"paid": paid}


def to_pomdps(models: Sequence[Model], names: Sequence[str], horizon: int, discount: float | None = None) -> list[POMDP]:
    """`to_pomdp` of several models of one problem, the argument of `apomdp`.

    Raises:
      DataError: where the states, actions, observations or (with `discount` None) discounts are not those of the
        first model; the message names the file, by `names`.
    """
    if not models or len(models) != len(names):
        raise ValueError(f"models must be at least one, each with its name; got {len(models)} models and {len(names)} names")
    for model, name in zip(models, names, strict=True):
        if not model.observations:
            raise DataError(f"{name}: observations must be given in several files, which are models of one POMDP; this is an MDP")
        if not np.array_equal(model.legal, models[0].legal):  # pyright: ignore[reportArgumentType]
            raise DataError(f"{name}: `illegal` must be as in {names[0]}")
        for word in ("states", "actions", "observations") + (() if discount is not None else ("discount",)):
            mine, first = getattr(model, word), getattr(models[0], word)
            if mine != first:
                raise DataError(f"{name}: {word} must be as in {names[0]}, {quote(str(first))}; got {quote(str(mine))}")
    return [to_pomdp(model, horizon, discount) for model in models]
