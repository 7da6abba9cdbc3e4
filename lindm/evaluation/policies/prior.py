"""Models that are drawn from the law of a suite: a sample of the prior."""

from functools import lru_cache

import jax
import numpy as np

from lindm.datasets.generate import BLOCK, draw_block
from lindm.evaluation.environments import double_precision
from lindm.families.suites import Suite
from lindm.types import APOMDP, MDP, POMDP, Problem

STREAM = 2**32 - 1  # of the random keys of models, apart from those of tasks


@lru_cache(maxsize=4)
def draw_models(suite: Suite, count: int, seed: int) -> Problem:
    """`count` problems of the suite as one with a leading axis, in numpy; none is a task of a dataset with the same seed.

    Raises:
      ValueError: the kernel of an MDP changes with the stage, the legal actions depend on the state, or a reward of an MDP on the
        next state.
    """
    with double_precision():
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), STREAM)
        blocks = []
        for first in range(0, count, BLOCK):
            last = min(first + BLOCK, count)
            blocks.append(jax.tree.map(lambda x, n=last - first: np.asarray(x)[:n], draw_block(key, first, last, suite)))
    models: Problem = jax.tree.map(lambda *x: np.concatenate(x), *blocks)
    tables: MDP | POMDP = models.models if isinstance(models, APOMDP) else models
    if tables.legal is not None:
        raise ValueError(f"source must have the same legal actions in all states for this policy; got {suite.name}")
    if not suite.sizes.observations and tables.P.shape[1] > 1:
        raise ValueError(f"source must have one kernel for all stages for this policy; got {suite.name}")
    if not suite.sizes.observations and tables.paid is not None and max(tables.paid.R.shape[-2:]) > 1:
        raise ValueError(f"source must have rewards of state and action alone for this policy; got {suite.name}")
    return models
