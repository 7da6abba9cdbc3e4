"""Rewards of a file in Cassandra's format (`lindm.problems.cassandra`): the table that its R entries write, and its expectation.

The table [A, S, S, O] can be the largest one of a problem, so it is built one action at a time.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lindm.io import limits

if TYPE_CHECKING:
    from lindm.problems.cassandra_sections import Section

ALL = slice(None)

Entry = tuple["Section", tuple[slice, ...], np.ndarray]  # with the part of the table that it writes, and what it writes there


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardEntries:
    """The R entries of a file, in their order."""

    entries: tuple[Entry, ...]
    shape: tuple[int, int, int, int]  # [A, S, S|1, O|1]: an axis on which no entry depends has length one
    sign: float  # -1 where the file gives costs
    ended: np.ndarray  # [S] bool, states that pay nothing: the episode is over

    def tables(self) -> Iterator[np.ndarray]:
        """R [S, S|1, O|1] of each action, in one array that the next one overwrites. DataError for too many numbers."""
        table, writes = np.empty(self.shape[1:]), 0
        numbered: dict[int | None, list[tuple[int, Any, tuple, Any]]] = {}  # by action, None for all
        for number, (entry, (action, *cell), values) in enumerate(self.entries):
            numbered.setdefault(action.start, []).append((number, entry, tuple(cell), values))
        for a in range(self.shape[0]):
            table[:] = 0.0
            for _, entry, cell, values in heapq.merge(numbered.get(None, []), numbered.get(a, []), key=lambda each: each[0]):
                writes = count_writes(writes, table[cell].size, entry)
                table[cell] = self.sign * values[0] + 0.0  # + 0.0: no cost is 0.0, not -0.0
            table[self.ended] = 0.0
            yield table

    def R(self) -> np.ndarray:
        """The table [S, A, S|1, O|1]. DataError where it is above `POMDP_TABLE` numbers."""
        if (total := int(np.prod(self.shape))) > limits.POMDP_TABLE:
            raise self.entries[0][0].stop(f"rewards of all actions make {total} numbers; at most {limits.POMDP_TABLE}")
        return np.stack([table.copy() for table in self.tables()], axis=1)


def read_rewards(
    entries: list[Entry], T: np.ndarray, O: np.ndarray, sign: float, ended: np.ndarray
) -> tuple[np.ndarray, RewardEntries | None]:
    """r [S, A], and the entries where a reward depends on the next state or the observation.

    Args:
      T, O: probabilities [A, S, S] and [A, S, O].
      sign, ended: as of `RewardEntries`.

    Raises:
      DataError: the table of an action, or what the entries write, is too large.
    """
    A, S, n = O.shape
    by_o = [entry for entry, where, values in entries if where[3] != ALL or values.shape[3] > 1]
    by_next = by_o or [entry for entry, where, values in entries if where[2] != ALL or values.shape[2] > 1]
    if by_o and S * S * n > limits.POMDP_TABLE:
        raise by_o[0].stop(f"rewards that depend on the observation make {S * S * n} numbers; at most {limits.POMDP_TABLE}")
    shape = (A, S, S if by_next else 1, n if by_o else 1)
    rewards = RewardEntries(entries=tuple(entries), shape=shape, sign=sign, ended=ended)
    r = np.array([[expected(table[s], T[a, s], O[a]) for s in range(S)] for a, table in enumerate(rewards.tables())]).T
    return r.copy(), rewards if by_next else None


def expected(R: np.ndarray, following: np.ndarray, observed: np.ndarray) -> float:
    """The expectation of R [S|1, O|1] under probabilities of the next state [S], and of the observation given it [S, O]."""
    if R.size == 1:
        return R[0, 0]
    weight = following[:, None] * (observed if R.shape[1] > 1 else 1.0)
    possible = R[weight > 0]
    # a reward that is the same everywhere is exact
    return possible[0] if (possible == possible[0]).all() else (weight * R).sum()


def count_writes(before: int, size: int, entry: "Section") -> int:
    """The numbers that have been written. Raises: DataError above the limit: a short entry may write a whole table."""
    if (after := before + size + 100) > limits.POMDP_WRITES:  # an entry takes the time of about a hundred numbers
        raise entry.stop(f"the entries up to this one write too many numbers, more than {limits.POMDP_WRITES:,}")
    return after
