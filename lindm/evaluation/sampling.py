"""Random draws from many discrete laws at once, in numpy."""

import numpy as np


def draw_indices(laws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An index [n] from each row of weights [n, k], by inverse CDF of one uniform number each."""
    cdf = np.cumsum(laws, axis=-1)
    return (cdf <= (rng.random(len(laws)) * cdf[:, -1])[:, None]).sum(-1)
