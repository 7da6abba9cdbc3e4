"""The shapes of batches: the documents of a step share rows, so that little of a batch is padding, and few programs are compiled.

A step trains `batch` x `accumulate` documents (with `--pack`: rows of documents). Which ones, and the weight of each label, does
not depend on the shape: a row holds several documents as segments that do not attend to each other, and the loss is the mean over
all labels of the step. A shape is a number of rows and their length. Beside the full shape, one document to a row of the greatest
length, at most `MAX_SHAPES` - 1 are chosen: each the one that saves most of the operations of the first `SAMPLED_STEPS` steps, as
long as it saves a twentieth of them. A step takes the cheapest shape into which best-fit decreasing brings its documents. All of
it follows from the data, the options and the mesh, so a resumed run has the same batches.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lindm.llm.sft import packing
from lindm.llm.tokens import Example

MAX_SHAPES, SAMPLED_STEPS, MIN_SAVING = 6, 256, 0.05
LENGTH_RATIO = 2**0.5  # between the lengths of rows that are tried
Row = Sequence[Example]


class BatchShape(NamedTuple):
    """Of a micro-batch."""

    rows: int
    seq_len: int  # tokens of a row
    max_labels: int  # of a row

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len


def num_tokens(row: Row) -> int:
    return sum(len(e.ids) for e in row)


def num_labels(row: Row) -> int:
    return sum(int((e.target >= 0).sum()) for e in row)


def fill(rows: Sequence[Row], shape: BatchShape, accumulate: int) -> list[list[Example]] | None:
    """The rows of a step joined into at most accumulate x shape.rows rows; None where they do not fit."""
    if len(rows) <= accumulate * shape.rows:
        joined = [list(row) for row in rows]  # as they come
    else:
        lengths = [num_tokens(row) for row in rows]
        if max(lengths) > shape.seq_len:
            return None
        groups = packing.pack(lengths, shape.seq_len)
        joined = [[example for i in group for example in rows[i]] for group in groups]
    fits = len(joined) <= accumulate * shape.rows
    fits = fits and all(num_tokens(row) <= shape.seq_len and num_labels(row) <= shape.max_labels for row in joined)
    return joined if fits else None


def choose_shapes(
    steps: Sequence[Sequence[Row]], full: BatchShape, accumulate: int, shards: int, row_cost: Callable[[int], float]
) -> list[BatchShape]:
    """The shapes of a run, the cheapest first; `full` is the last.

    Args:
      steps: the rows of each sampled step.
      shards: of the rows of a micro-batch, whose number is a multiple of it.
      row_cost: tokens of a row -> its cost, in any unit; above all its attention makes a long row dearer than two short ones.
    """
    lengths = _lengths(full.seq_len)
    needed = np.array([[_rows_needed(rows, T, accumulate, shards, full.rows) for T in lengths] for rows in steps])
    costs_now = np.full(len(steps), full.rows * row_cost(full.seq_len))  # of each step, with the shapes chosen so far
    chosen: list[BatchShape] = []
    candidates = [(int(R), t) for t in range(len(lengths)) for R in np.unique(needed[:, t]) if np.isfinite(R)]
    while candidates and len(chosen) < MAX_SHAPES - 1:
        costs = [np.where(needed[:, t] <= R, np.minimum(costs_now, R * row_cost(lengths[t])), costs_now) for R, t in candidates]
        best = int(np.argmin([cost.sum() for cost in costs]))
        if costs[best].sum() > (1 - MIN_SAVING) * costs_now.sum():
            break
        (R, t), costs_now = candidates[best], costs[best]
        fitting = [rows for rows, n in zip(steps, needed[:, t], strict=True) if n <= R]
        chosen.append(_with_labels(fitting, R, lengths[t], accumulate))
    return [*sorted(chosen, key=lambda shape: shape.rows * row_cost(shape.seq_len)), full]


def _lengths(longest: int) -> list[int]:
    """Lengths of rows that are tried, ascending, in about equal ratios up to the longest."""
    lengths, length = {longest}, float(longest)
    while length > packing.SEQ_LEN_MULTIPLE:
        length /= LENGTH_RATIO
        lengths.add(min(longest, packing.round_up(math.ceil(length), packing.SEQ_LEN_MULTIPLE)))
    return sorted(lengths)


def _rows_needed(rows: Sequence[Row], seq_len: int, accumulate: int, shards: int, most: int) -> float:
    """Rows of a micro-batch that the rows of a step need; infinite where they do not fit into `most`."""
    sizes = [num_tokens(row) for row in rows]
    if max(sizes) > seq_len:
        return np.inf
    per_batch = -(-len(packing.pack(sizes, seq_len)) // accumulate)
    padded = -(-per_batch // shards) * shards
    return padded if padded <= most else np.inf


def _with_labels(steps: Sequence[Sequence[Row]], rows: int, seq_len: int, accumulate: int) -> BatchShape:
    """The shape with room for the labels of these steps."""
    shape = BatchShape(rows, seq_len, seq_len)
    filled = [fill(step, shape, accumulate) for step in steps]
    most = max(num_labels(row) for step in filled if step is not None for row in step)
    return shape._replace(max_labels=packing.round_up(most, packing.MAX_LABELS_MULTIPLE))
