"""The identity of a stationary problem: a digest of each of its parts, by which a saved policy knows its own problem again.

Numbers are rounded to ten decimals, so that a problem is the same whether it was read sparse or dense, or made from a finite
horizon. Names are no part of it: a policy file has them beside it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy import sparse

from lindm.problems.stationary import StationaryPOMDP

DECIMALS = 10


def problem_digests(problem: StationaryPOMDP) -> dict[str, str]:
    """A digest of each part: transitions, observations, rewards, start, discount and, where there are any, legal actions."""
    parts: dict[str, Iterable[Any]] = {
        "transitions": problem.P,
        "observations": problem.O,
        "rewards": [problem.r],
        "start": [problem.rho],
        "discount": [np.array([problem.discount])],
    }
    parts |= {} if problem.legal is None else {"legal actions": [np.asarray(problem.legal, float)]}
    return {part: _digest(arrays) for part, arrays in parts.items()}


def differences(own: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The parts in which two problems differ."""
    return [part for part in {**own, **other} if own.get(part) != other.get(part)]


def _digest(arrays: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        entries = sparse.coo_array(np.atleast_2d(array) if isinstance(array, np.ndarray) else array)
        entries.sum_duplicates()
        values = np.round(entries.data.astype(float), DECIMALS)
        kept = np.flatnonzero(values)
        order = kept[np.lexsort((entries.col[kept], entries.row[kept]))]
        digest.update(str(entries.shape).encode())
        for column in (entries.row[order].astype(np.int64), entries.col[order].astype(np.int64), values[order]):
            digest.update(column.tobytes())
    return digest.hexdigest()[:32]
