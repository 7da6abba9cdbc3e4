"""Packing of examples into batches of one shape, and the order in which batches are trained.

Several short examples may share a row. Each is a segment: attention stays within it and its positions start at 0, so it trains as
if it had the row to itself. Which examples share a row is decided once, so one compiled program serves every step: best-fit
decreasing, at most 11/9 of the fewest possible rows. Logits are computed at the labeled positions only (`label_positions`).

The order of the rows is a function of the seed and the step alone, so a resumed run continues with the batch that it would have
seen, without replaying. Each epoch is a permutation of all rows, the argsort of random bits of a Philox generator with the key
(seed, epoch); a batch may start in one epoch and end in the next.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax import Array

from lindm.llm.tokens import Example

SEQ_LEN_MULTIPLE, MAX_LABELS_MULTIPLE = 64, 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """R rows of T tokens with at most L labels each; int32 but for the values. Padding is a segment of its own, -1."""

    ids: Array | np.ndarray  # [R, T] tokens
    positions: Array | np.ndarray  # [R, T] position within the example
    segments: Array | np.ndarray  # [R, T] number of the example within its row
    label_positions: Array | np.ndarray  # [R, L] positions whose hidden state predicts a target
    targets: Array | np.ndarray  # [R, L] the token to predict; -1 where a row has fewer than L labels
    weights: Array | np.ndarray | None = None  # [R, L] float32, factors of the loss; 0 where no target stands. None: 1
    action_values: Array | np.ndarray | None = None  # [R, L, A] float32, the oracle's Q where a target stands; for losses of Q


def pack(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Rows of example indices with at most `max_tokens` tokens each (best-fit decreasing); deterministic.

    Raises:
      ValueError: an example is empty or longer than a row.
    """
    members, starts = pack_rows(np.array(lengths, np.int64), max_tokens)
    return [members[start:end].tolist() for start, end in itertools.pairwise(starts.tolist())]


def pack_rows(lengths: np.ndarray, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """`pack` as arrays (members [n], starts [R + 1]): row r has members[starts[r] : starts[r + 1]].

    Best-fit decreasing fills the row that leaves the least space, and of equal ones the first. So examples of one length fill one
    row after the other of the smallest sufficient space, and are placed at once.
    """
    if len(bad := np.flatnonzero((lengths < 1) | (lengths > max_tokens))):
        rule = f"lengths must be at least 1 and at most max_tokens = {max_tokens}"
        raise ValueError(f"{rule}; got {lengths[bad[0]]} for example {bad[0]}")
    order = np.argsort(-lengths, kind="stable")
    row_of, num_rows = np.zeros(len(lengths), np.int64), 0
    rows_by_space: dict[int, list[np.ndarray]] = {}
    spaces = 0  # bit f is set where rows have f free tokens

    def add(space: int, rows: np.ndarray) -> None:
        nonlocal spaces
        if len(rows) and space:
            rows_by_space.setdefault(space, []).append(rows)
            spaces |= 1 << space

    changes = np.flatnonzero(np.diff(lengths[order], prepend=0, append=0))  # where another length begins
    for start, stop in itertools.pairwise(changes.tolist()):
        length = int(lengths[order[start]])
        while start < stop:
            space = max_tokens
            if enough := spaces >> length:
                space = length + (enough & -enough).bit_length() - 1
                rows, spaces = np.sort(np.concatenate(rows_by_space.pop(space))), spaces ^ 1 << space
            else:
                rows = np.arange(num_rows, num_rows - (start - stop) // (space // length))
                num_rows += len(rows)
            each = space // length
            count = min(stop - start, each * len(rows))
            row_of[start : start + count] = np.repeat(rows, each)[:count]
            full, rest = divmod(count, each)
            add(space - each * length, rows[:full])
            add(space - rest * length, rows[full : full + 1])
            add(space, rows[full + 1 :])
            start += count
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return order[np.argsort(row_of, kind="stable")], starts


def one_per_row(lengths: Sequence[int] | np.ndarray) -> list[list[int]]:
    """Rows of example indices without packing: one example each."""
    return [[i] for i in range(len(lengths))]


def batch_shape(rows: Iterable[Sequence[Example]], seq_len: int | None = None) -> tuple[int, int]:
    """(seq_len, max_labels) that hold every row; seq_len is rounded up to a multiple of 64 unless given, max_labels to one of 8.

    Raises:
      ValueError: no rows, or a row longer than the given seq_len.
    """
    sizes = [(sum(len(e.ids) for e in row), sum(int((e.target >= 0).sum()) for e in row)) for row in rows]
    if not sizes:
        raise ValueError("rows must not be empty")
    longest, most_labels = (max(column) for column in zip(*sizes, strict=True))
    if seq_len is not None and longest > seq_len:
        raise ValueError(f"seq_len must be at least {longest}, the length of the longest row; got {seq_len}")
    rounded = round_up_shape(longest, most_labels)
    return seq_len or rounded[0], rounded[1]


def round_up_shape(longest: int, most_labels: int) -> tuple[int, int]:
    """(seq_len, max_labels) of rows of at most so many tokens and labels."""
    return round_up(longest, SEQ_LEN_MULTIPLE), round_up(most_labels, MAX_LABELS_MULTIPLE)


def round_up(n: int, unit: int) -> int:
    return -(-max(n, 1) // unit) * unit


def make_batch(rows: Sequence[Sequence[Example]], seq_len: int, max_labels: int) -> Batch:
    """The batch [R, seq_len] of these rows, as numpy arrays; a row may be empty. Weights and action values: all examples or none.

    Raises:
      ValueError: a row has more tokens than seq_len or more labels than max_labels.
    """
    R = len(rows)
    ids, positions, segments = (np.full((R, seq_len), blank, np.int32) for blank in (0, 0, -1))
    label_positions, targets = (np.full((R, max_labels), blank, np.int32) for blank in (0, -1))
    first = next((example for row in rows for example in row), None)
    weights = None if first is None or first.weights is None else np.zeros((R, max_labels), np.float32)
    action_values = None
    if first is not None and first.action_values is not None:
        action_values = np.zeros((R, max_labels, first.action_values.shape[1]), np.float32)
    for r, row in enumerate(rows):
        start, first_label = 0, 0
        for segment, example in enumerate(row):
            n, (labeled,) = len(example.ids), np.nonzero(example.target >= 0)
            end, last_label = start + n, first_label + len(labeled)
            if end > seq_len or last_label > max_labels:
                limits = f"seq_len = {seq_len} tokens and max_labels = {max_labels} labels"
                raise ValueError(f"rows must have at most {limits}; row {r} has {end} and {last_label} or more")
            ids[r, start:end], positions[r, start:end], segments[r, start:end] = example.ids, np.arange(n), segment
            label_positions[r, first_label:last_label] = start + labeled
            targets[r, first_label:last_label] = example.target[labeled]
            if weights is not None:
                weights[r, first_label:last_label] = example.weights
            if action_values is not None:
                action_values[r, first_label:last_label] = example.action_values
            start, first_label = end, last_label
        positions[r, start:] = np.arange(seq_len - start)
    labels = {"label_positions": label_positions, "targets": targets, "weights": weights, "action_values": action_values}
    return Batch(ids=ids, positions=positions, segments=segments, **labels)


def philox_permutation(n: int, seed: int, number: int) -> np.ndarray:
    """Permutation [n] number `number` of a seed: the argsort of raw Philox bits, which are the same in every version of numpy.

    Raises:
      ValueError: a seed that is no unsigned 64-bit integer.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be at least 0 and below 2^64; got {seed}")
    return np.argsort(np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(n), kind="stable")


def batch_order(num_rows: int, rows_per_step: int, seed: int) -> Callable[[int], np.ndarray]:
    """step -> indices [rows_per_step] of the rows of that step. The steps together run through one epoch after the other.

    Raises:
      ValueError: num_rows or rows_per_step below 1, or a bad seed.
    """
    if num_rows < 1 or rows_per_step < 1:
        raise ValueError(f"num_rows and rows_per_step must be at least 1; got {num_rows} and {rows_per_step}")
    philox_permutation(0, seed, 0)  # check the seed now
    epoch = functools.lru_cache(maxsize=2)(lambda number: philox_permutation(num_rows, seed, number))

    def rows_of_step(step: int) -> np.ndarray:
        if step < 0:
            raise ValueError(f"step must be at least 0; got {step}")
        places = range(step * rows_per_step, (step + 1) * rows_per_step)
        return np.array([epoch(place // num_rows)[place % num_rows] for place in places], np.int64)

    return rows_of_step
