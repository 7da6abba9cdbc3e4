"""Alpha vectors in the format of pomdp-solve: for each vector the number of its action, then a number for each state."""

import re
from pathlib import Path

import numpy as np

from lindm.errors import DataError
from lindm.io import inputs, limits


def read_alpha(path: Path, num_states: int, num_actions: int) -> tuple[np.ndarray, np.ndarray]:
    """The actions [n] and the vectors [n, S] of a file.

    Raises:
      DataError: the file cannot be read, or is no set of alpha vectors of a problem of these sizes; with file:line.
    """
    actions: list[int] = []
    rows: list[list[float]] = []
    line = 1
    for line, text in enumerate(inputs.read_text(path, limits.POMDP_FILE).splitlines(), start=1):
        for word in text.split():
            if not rows or len(rows[-1]) == num_states:
                if not re.fullmatch("[0-9]{1,9}", word) or int(word) >= num_actions:
                    rule = f"the number of an action, from 0 to {num_actions - 1}, before each vector of {num_states} numbers"
                    raise DataError(f"{path}:{line}: expected {rule}; got {word[:40]!r}")
                actions.append(int(word))
                rows.append([])
                continue
            try:
                rows[-1].append(float(word))
            except ValueError:
                raise DataError(f"{path}:{line}: expected a number of an alpha vector; got {word[:40]!r}") from None
    if not rows or len(rows[-1]) < num_states:
        got = f"{len(rows[-1])} at the end" if rows else "an empty file"
        raise DataError(f"{path}:{line}: expected an alpha vector with {num_states} numbers, one for each state; got {got}")
    vectors = np.array(rows)
    if not np.isfinite(vectors).all():
        row = int(np.argwhere(~np.isfinite(vectors))[0][0])
        raise DataError(f"{path}: alpha vectors must be finite; vector {row + 1} is not")
    return np.array(actions), vectors
