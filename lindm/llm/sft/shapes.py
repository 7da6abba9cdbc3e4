"""The shapes of batches: the documents of a step share rows, so that little of a batch is padding, and few programs are compiled.

A step trains `batch` x `accumulate` documents (with `--pack`: rows of documents). Which ones, and the weight of each label, does
not depend on the shape: a row holds several documents as segments that do not attend to each other, and the loss is the mean over
all labels of the step. A shape is a number of rows and their length. Beside the full shape, one document to a row of the greatest
length, at most `MAX_SHAPES` - 1 are chosen: each the one that saves most of the operations of the first `SAMPLED_STEPS` steps, as
long as it saves a twentieth of them. Short documents also share rows that are longer than each of them, up to `MAX_RATIO` times
the full length and `MAX_SHARED` tokens: documents of 78 tokens fill 61 % of rows of 128, and 98 % of rows of 320. A step takes
the cheapest shape into which best-fit decreasing brings its documents. All of it follows from the data, the options and the mesh,
so a resumed run has the same batches.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lindm.llm.sft import packing

MAX_SHAPES, SAMPLED_STEPS, MIN_SAVING = 6, 100, 0.05
LENGTH_RATIO = 2**0.5  # between the lengths of rows that are tried, up to the full one
MAX_RATIO, MAX_SHARED = 4, 512  # longer rows are tried up to so many times the full length, and so many tokens


class BatchShape(NamedTuple):
    """Of a micro-batch."""

    rows: int
    seq_len: int  # tokens of a row
    max_labels: int  # of a row


class Sizes(NamedTuple):
    """The documents of a step."""

    tokens: np.ndarray  # [n] of each
    labels: np.ndarray  # [n]


def group(sizes: Sizes, shape: BatchShape, accumulate: int) -> list[list[int]] | None:
    """Which documents share each of at most accumulate x shape.rows rows; None where they do not fit."""
    if sizes.tokens.max() > shape.seq_len:
        return None
    if len(sizes.tokens) <= accumulate * shape.rows:
        groups = packing.one_per_row(sizes.tokens)
    else:
        groups = packing.pack(sizes.tokens, shape.seq_len)
    fits = len(groups) <= accumulate * shape.rows and most_labels(sizes, groups) <= shape.max_labels
    return groups if fits else None


def first_fitting(sizes: Sizes, shapes: Sequence[BatchShape], accumulate: int) -> tuple[BatchShape, list[list[int]]]:
    """The first of the shapes, the cheapest, that holds the documents of a step, and which of them share a row."""
    grouped = ((shape, group(sizes, shape, accumulate)) for shape in shapes)
    return next((shape, groups) for shape, groups in grouped if groups is not None)


def most_labels(sizes: Sizes, groups: list[list[int]]) -> int:
    """Labels of the row that has most."""
    return max(int(sizes.labels[members].sum()) for members in groups)


def choose_shapes(
    steps: Sequence[Sizes],
    full: BatchShape,
    accumulate: int,
    shards: int,
    row_cost: Callable[[int], float],
    max_shared: int = MAX_SHARED,
) -> list[BatchShape]:
    """The shapes of a run, the cheapest first; `full` is the last.

    Args:
      steps: the documents of each sampled step.
      shards: of the rows of a micro-batch, whose number is a multiple of it.
      row_cost: tokens of a row -> its cost, in any unit; above all its attention makes a long row dearer than two short ones.
      max_shared: most tokens of a row that is longer than the full one.
    """
    lengths = _lengths(full.seq_len, max_shared)
    needed = np.array([[_rows_needed(sizes, T, accumulate, shards, full.rows) for T in lengths] for sizes in steps])
    costs_now = np.full(len(steps), full.rows * row_cost(full.seq_len))  # of each step, with the shapes chosen so far
    chosen: list[BatchShape] = []
    candidates = [(int(R), t) for t in range(len(lengths)) for R in np.unique(needed[:, t]) if np.isfinite(R)]
    while candidates and len(chosen) < MAX_SHAPES - 1:
        costs = [np.where(needed[:, t] <= R, np.minimum(costs_now, R * row_cost(lengths[t])), costs_now) for R, t in candidates]
        best = int(np.argmin([cost.sum() for cost in costs]))
        if costs[best].sum() > (1 - MIN_SAVING) * costs_now.sum():
            break
        (R, t), costs_now = candidates[best], costs[best]
        fitting = [sizes for sizes, n in zip(steps, needed[:, t], strict=True) if n <= R]
        chosen.append(_with_labels(fitting, R, lengths[t], accumulate))
    return [*sorted(chosen, key=lambda shape: shape.rows * row_cost(shape.seq_len)), full]


def evaluation_shape(
    sizes: Sizes, full: BatchShape, shards: int, row_cost: Callable[[int], float], max_shared: int = MAX_SHARED
) -> tuple[BatchShape, list[list[int]]]:
    """One shape for documents that are evaluated, all in one order, and which of them share a row.

    The length of the rows is the one whose rows cost least. A batch has at most about as many tokens as one of the full shape,
    and all batches have about as many rows.
    """
    lengths = [T for T in _lengths(full.seq_len, max_shared) if sizes.tokens.max() <= T]
    packed = [packing.pack(sizes.tokens, T) for T in lengths]
    best = int(np.argmin([len(groups) * row_cost(T) for groups, T in zip(packed, lengths, strict=True)]))
    most = max(full.rows * full.seq_len // lengths[best] // shards, 1) * shards
    rows = packing.round_up(-(-len(packed[best]) // -(-len(packed[best]) // most)), shards)
    labels = packing.round_up(most_labels(sizes, packed[best]), packing.MAX_LABELS_MULTIPLE)
    return BatchShape(rows, lengths[best], labels), packed[best]


def _lengths(full: int, max_shared: int) -> list[int]:
    """Lengths of rows that are tried, ascending: in about equal ratios up to the full one, and beyond it all multiples of 64."""
    lengths, length, unit = {full}, float(full), packing.SEQ_LEN_MULTIPLE
    while length > unit:
        length /= LENGTH_RATIO
        lengths.add(min(full, packing.round_up(math.ceil(length), unit)))
    lengths.update(range(packing.round_up(full + 1, unit), min(MAX_RATIO * full, max_shared) + 1, unit))
    return sorted(lengths)


def _rows_needed(sizes: Sizes, seq_len: int, accumulate: int, shards: int, most: int) -> float:
    """Rows of a micro-batch that the documents of a step need; infinite where they do not fit into `most`."""
    if sizes.tokens.max() > seq_len:
        return np.inf
    per_batch = -(-len(packing.pack(sizes.tokens, seq_len)) // accumulate)
    padded = -(-per_batch // shards) * shards
    return padded if padded <= most else np.inf


def _with_labels(steps: Sequence[Sizes], rows: int, seq_len: int, accumulate: int) -> BatchShape:
    """The shape with room for the labels of these steps."""
    shape = BatchShape(rows, seq_len, seq_len)  # a row has no more labels than tokens
    groups = [(sizes, group(sizes, shape, accumulate)) for sizes in steps]
    most = max(most_labels(sizes, members) for sizes, members in groups if members is not None)
    return shape._replace(max_labels=packing.round_up(most, packing.MAX_LABELS_MULTIPLE))
