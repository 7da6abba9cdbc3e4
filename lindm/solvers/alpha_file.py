"""Alpha vectors in files: of pomdp-solve, for each vector the number of its action, then a number for each state; and of SARSOP.

SARSOP writes XML, `<Vector action="2" obsValue="0">` and the numbers. It is read without an XML parser: nothing in a file of
others is expanded or fetched.
"""

import re
from pathlib import Path

import numpy as np

from lindm.errors import DataError
from lindm.io import inputs, limits

VECTOR = re.compile(r'<Vector\s+action="([0-9]{1,9})"\s+obsValue="([0-9]{1,9})"\s*>([^<]*)</Vector>')


def read_alpha(path: Path, num_states: int, num_actions: int) -> tuple[np.ndarray, np.ndarray]:
    """The actions [n] and the vectors [n, S] of a file of pomdp-solve, or of SARSOP if its name ends in .policy.

    Raises:
      DataError: the file cannot be read, or is no set of alpha vectors of a problem of these sizes; with file:line.
    """
    if path.suffix == ".policy":
        return _read_sarsop(path, num_states, num_actions)
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
    return np.array(actions), _finite(path, rows)


def _read_sarsop(path: Path, num_states: int, num_actions: int) -> tuple[np.ndarray, np.ndarray]:
    """`read_alpha` of the XML of pomdpsol."""
    text = inputs.read_text(path, limits.POMDP_FILE)
    for part in ("SparseVector", "<!ENTITY"):
        if (at := text.find(part)) >= 0:
            raise DataError(f"{path}:{_line(text, at)}: expected elements <Vector> alone; got {part!r}, which is not read")
    actions: list[int] = []
    rows: list[list[float]] = []
    for found in VECTOR.finditer(text):
        action, observed = int(found[1]), int(found[2])
        words = found[3].split()
        try:
            if action >= num_actions or observed:
                rule = f"an action from 0 to {num_actions - 1} and obsValue 0, of a problem whose state is all hidden"
                raise ValueError(f"expected {rule}; got action {action}, obsValue {observed}")
            if len(words) != num_states:
                rule = f"an alpha vector with {num_states} numbers, one for each state"
                raise ValueError(f"expected {rule}; got {len(words)}")
            rows.append(_numbers(words))
        except ValueError as e:  # lines are counted here alone: there are thousands of vectors in megabytes
            raise DataError(f"{path}:{_line(text, found.start())}: {e}") from None
        actions.append(action)
    if not rows:
        raise DataError(f'{path}: expected <Vector action="..." obsValue="0">, as SARSOP writes its policies; found none')
    return np.array(actions), _finite(path, rows)


def _numbers(words: list[str]) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError as e:
        raise ValueError(f"expected the numbers of an alpha vector: {e}") from None


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _finite(path: Path, rows: list[list[float]]) -> np.ndarray:
    vectors = np.array(rows)
    if not np.isfinite(vectors).all():
        row = int(np.argwhere(~np.isfinite(vectors))[0][0])
        raise DataError(f"{path}: alpha vectors must be finite; vector {row + 1} is not")
    return vectors
