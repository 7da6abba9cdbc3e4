"""Ambiguous POMDPs of the experiments: variants of a problem, and the scale of its values."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.types import APOMDP


def first_stages(problem: APOMDP, stages: int) -> APOMDP:
    """A problem without its later stages; its kernels must be the same at every stage."""
    return replace(problem, models=replace(problem.models, r=problem.models.r[:, :stages]))


def with_start(problem: APOMDP, belief: Array) -> APOMDP:
    """Every model starts from one belief [S]."""
    return replace(problem, models=replace(problem.models, rho=jnp.broadcast_to(belief, problem.models.rho.shape)))


def merge_observations(problem: APOMDP) -> APOMDP:
    """`prostate` with four observations a year: a positive biopsy, or the bin of PSA without one.

    The action tells `null` and `negative` apart, and after a positive biopsy the state is known: only histories are lost.
    """
    kept = np.zeros((9, 4))
    for bin in range(3):
        kept[3 * bin : 3 * bin + 3, [bin, 3, bin]] = np.eye(3)  # negative, positive, null
        kept[3 * bin, bin] = kept[3 * bin + 2, bin] = 1
    return replace(problem, models=replace(problem.models, O=problem.models.O @ kept))


def value_span(problem: APOMDP) -> Array:
    """The most that two policies can differ by []."""
    r = problem.models.r
    return (r.max((0, 2, 3)) - r.min((0, 2, 3))).sum()
