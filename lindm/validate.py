"""Checks of a user's arrays and numbers.

Each check of an array returns it as a JAX array, or raises `ValueError` with the name of the argument, the rule and the value.
"""

import math
import re
from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from lindm.errors import unknown

Numbers = TypeVar("Numbers", Array, np.ndarray)
# admits rounding in single precision, not an error in a digit
SUM_TOLERANCE = 1e-6


def finite(value: ArrayLike, name: str) -> Array:
    """Any real array without NaN or infinity."""
    array = np.asarray(value)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} must contain real numbers; got dtype {array.dtype}")
    bad = ~np.isfinite(array)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name} must be finite; got {array[at]} at {at}")
    return jnp.asarray(array, dtype=jnp.result_type(float) if array.dtype.kind in "iu" else None)


def shaped(array: Array, shape: tuple[int | None, ...], name: str, letters: str) -> Array:
    """An array of the shape that `letters` names; `None` stands for any size of at least one."""
    fits = array.ndim == len(shape) and all(
        n == want or (want is None and n > 0) for n, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{letters}] = ({wanted}); got {array.shape}")
    return array


def distribution(array: Numbers, name: str) -> Numbers:
    """Probabilities along the last axis: none negative, every row sums to one."""
    values = np.asarray(array)
    if (values < -SUM_TOLERANCE).any():
        at = tuple(int(i) for i in np.argwhere(values < -SUM_TOLERANCE)[0])
        raise ValueError(f"{name} must contain probabilities, none below zero; got {values[at]:.6g} at {at}")
    sums = values.sum(-1)
    off = np.abs(sums - 1) > SUM_TOLERANCE
    if off.any():
        at = tuple(int(i) for i in np.argwhere(off)[0])
        each, row = (f"each row of {name}", f"row {at}") if at else (name, "it")
        raise ValueError(f"{each} must sum to one; {row} sums to {sums[at]:.6g}")
    return array


def legal(value: ArrayLike, S: int, A: int) -> Array:
    """Which actions are legal [S, A]: bool, at least one in every state."""
    array = np.asarray(value)
    if array.dtype != bool or array.shape != (S, A):
        raise ValueError(f"legal must be bool of shape [S, A] = ({S}, {A}); got {array.dtype} of shape {array.shape}")
    if not array.any(1).all():
        raise ValueError(f"legal must allow an action in every state; got none in state {int((~array.any(1)).argmax())}")
    return jnp.asarray(array)


def rewards(r: ArrayLike, name: str) -> None:
    """Rewards [H, S, A] whose sum over the stages is so far from infinity that values, and squares of values, are finite."""
    array = np.asarray(r)
    dtype = array.dtype if np.issubdtype(array.dtype, np.floating) else np.dtype(np.float64)
    limit = math.sqrt(float(np.finfo(dtype).max))
    with np.errstate(over="ignore"):
        total = float(np.abs(array.astype(np.float64)).max((1, 2)).sum())
    if not total < limit:
        rule = f"must sum to less than {limit:.3g} over the stages (the largest of each stage), or values would not be finite"
        raise ValueError(f"the absolute values of {name} {rule}; got {total:.3g}")


def covariance(value: ArrayLike, name: str) -> Array:
    """A finite, symmetric, positive definite matrix."""
    array = finite(value, name)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] == 0:
        raise ValueError(f"{name} must be a square matrix [d, d]; got shape {array.shape}")
    values = np.asarray(array, dtype=np.float64)
    scale = np.abs(values).max()
    asymmetry = np.abs(values - values.T).max()
    if asymmetry > 1e-6 * scale:
        raise ValueError(f"{name} must be symmetric; got entries that differ by {asymmetry:.3g} across the diagonal")
    smallest, largest = np.linalg.eigvalsh((values + values.T) / 2)[[0, -1]]
    if smallest <= 1e-12 * max(largest, 0.0) or largest <= 0:
        raise ValueError(f"{name} must be positive definite (smallest eigenvalue above zero); got {smallest:.3g}")
    return array


def count(value: float, name: str, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not (math.isfinite(number := _number(value)) and number == int(number) >= least):
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
    return int(value)


def nonnegative(value: float, name: str) -> float:
    """A finite number that is not below zero."""
    if not (math.isfinite(number := _number(value)) and number >= 0):
        raise ValueError(f"{name} must be finite and not negative; got {value!r}")
    return value


def positive(value: ArrayLike, name: str) -> None:
    """A finite number above zero. Traced numbers are not checked, here and in the next two functions."""
    if not (isinstance(value, Tracer) or 0 < _number(value) < math.inf):
        raise ValueError(f"{name} must be a finite number above zero; got {value}")


def fraction(value: ArrayLike, name: str) -> None:
    """A number in [0, 1]."""
    if not (isinstance(value, Tracer) or 0 <= _number(value) <= 1):
        raise ValueError(f"{name} must be a number in [0, 1]; got {value}")


def discount(value: ArrayLike) -> None:
    """A number in [0, 1]."""
    if not (isinstance(value, Tracer) or 0 <= _number(value) <= 1):
        raise ValueError(f"discount must be a number in [0, 1]; got {value}")


def _number(value: ArrayLike) -> float:
    """The value of a scalar; NaN, which fails every rule, for anything else."""
    array = np.asarray(value)
    return float(array) if array.ndim == 0 and array.dtype.kind in "iuf" else math.nan


def interval(low: float, high: float) -> None:
    """Two finite numbers, low <= high."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"low and high must be finite; got low = {low}, high = {high}")
    if high < low:
        raise ValueError(f"high must be at least low = {low}; got {high}")


def index(word: str, names: Sequence[str], argument: str) -> int:
    """The number of a name in a list of names; a word that is none of them may be such a number, in decimal."""
    if word in names:
        return names.index(word)
    if re.fullmatch("[0-9]{1,9}", word) and int(word) < len(names):
        return int(word)
    raise ValueError(unknown(argument, word, names))
