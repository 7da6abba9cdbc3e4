"""Policies as alpha vectors, in the format of pomdp-solve (A. R. Cassandra): the number of an action, then S values, and so on.

Whoever takes, at every belief, the action of the vector with the largest product earns at least that product.
"""

from pathlib import Path

import numpy as np

from lindm.io.files import write_atomic


def write_alpha(path: Path, vectors: np.ndarray, actions: np.ndarray) -> None:
    """Write vectors [n, S] with their actions [n] to `path`, atomically. StorageError where it cannot be written."""
    entries = (f"{a}\n{' '.join(map(repr, v))}\n" for a, v in zip(actions.tolist(), vectors.tolist(), strict=True))
    write_atomic(path, "\n".join(entries))
