"""Examples as batches of one shape, and the order in which they come.

Short examples share a row: each is a segment, attention stays within it, and its positions start at 0, so it trains as if it had
the row to itself. Which examples share a row is settled once, so that one compiled program serves every step: best fit, longest
first, at most 11/9 of the fewest rows possible. Only the positions that train carry logits; `label_positions` holds them.

The order of the rows is a function of the seed and the step and of nothing else, so a resumed run goes on with what would have
come, at once. Each epoch is a permutation of all rows, sorted by random bits of a Philox generator with the key (seed, epoch);
a batch may begin in one epoch and end in the next.
"""

import bisect
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax import Array

from lindm.llm.tokens import Example


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """R rows of T tokens, of which at most L a row train; int32 throughout. What fills up a row is a segment of its own, -1."""

    ids: Array | np.ndarray  # [R, T]
    positions: Array | np.ndarray  # [R, T] within the example
    segments: Array | np.ndarray  # [R, T] number of the example in its row
    label_positions: Array | np.ndarray  # [R, L] positions whose hidden state predicts
    targets: Array | np.ndarray  # [R, L] what it predicts; -1 where a row has fewer


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of examples, by number, of at most `room` tokens each; the same for the same lengths.

    Raises:
      ValueError: an example is longer than a row.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (tokens left, row), sorted: the first that suffices fits best
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not 0 < lengths[i] <= room:
            raise ValueError(f"lengths must be at least 1 and at most room = {room}; got {lengths[i]} for example {i}")
        k = bisect.bisect_left(left, (lengths[i], 0))
        free, row = left.pop(k) if k < len(left) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(left, (free - lengths[i], row))
    return rows


def one_per_row(lengths: Sequence[int]) -> list[list[int]]:
    """A row for each example."""
    return [[i] for i in range(len(lengths))]


def batch_shape(rows: Iterable[Sequence[Example]], T: int | None = None) -> tuple[int, int]:
    """(T, L) that hold every row, T rounded up to a multiple of 64 unless it is given, L to one of 8.

    Raises:
      ValueError: no rows, or one that is longer than the given T.
    """
    sizes = [(sum(len(e.ids) for e in row), sum(int((e.target >= 0).sum()) for e in row)) for row in rows]
    if not sizes:
        raise ValueError("rows must not be empty")
    longest, most = (max(column) for column in zip(*sizes, strict=True))
    if T is not None and longest > T:
        raise ValueError(f"T must be at least {longest}, the length of the longest row; got {T}")
    return T or _rounded(longest, 64), _rounded(most, 8)


def _rounded(n: int, unit: int) -> int:
    return -(-max(n, 1) // unit) * unit


def make_batch(rows: Sequence[Sequence[Example]], T: int, L: int) -> Batch:
    """The batch of these rows, as numpy arrays; a row may be empty. ValueError where a row does not fit."""
    R = len(rows)
    ids, positions, segments = (np.full((R, T), blank, np.int32) for blank in (0, 0, -1))
    at, target = (np.full((R, L), blank, np.int32) for blank in (0, -1))
    for r, row in enumerate(rows):
        start, labels = 0, 0
        for k, example in enumerate(row):
            n, (places,) = len(example.ids), np.nonzero(example.target >= 0)
            end, upto = start + n, labels + len(places)
            if end > T or upto > L:
                raise ValueError(
                    f"rows must have at most T = {T} tokens and L = {L} targets; row {r} has {end} and {upto} or more"
                )
            ids[r, start:end], positions[r, start:end], segments[r, start:end] = example.ids, np.arange(n), k
            at[r, labels:upto], target[r, labels:upto] = start + places, example.target[places]
            start, labels = end, upto
        positions[r, start:] = np.arange(T - start)
    return Batch(ids=ids, positions=positions, segments=segments, label_positions=at, targets=target)


def philox_permutation(n: int, seed: int, number: int) -> np.ndarray:
    """0 .. n-1 [n] sorted by the raw bits of a Philox generator, which are the same in every version of numpy.

    Raises:
      ValueError: a seed that is no unsigned integer of 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be at least 0 and below 2^64; got {seed}")
    return np.argsort(np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(n), kind="stable")


def batch_order(n_rows: int, rows_per_step: int, seed: int) -> Callable[[int], np.ndarray]:
    """step -> the rows [rows_per_step] of that step; the rows of all steps, put together, are epoch after epoch.

    Raises:
      ValueError: no rows, none per step, or a bad seed.
    """
    if n_rows < 1 or rows_per_step < 1:
        raise ValueError(f"n_rows and rows_per_step must be at least 1; got {n_rows} and {rows_per_step}")
    philox_permutation(0, seed, 0)  # a bad seed is refused now
    epoch = functools.lru_cache(maxsize=2)(lambda number: philox_permutation(n_rows, seed, number))

    def rows(step: int) -> np.ndarray:
        if step < 0:
            raise ValueError(f"step must be at least 0; got {step}")
        places = range(step * rows_per_step, (step + 1) * rows_per_step)
        return np.array([epoch(place // n_rows)[place % n_rows] for place in places], np.int64)

    return rows
