"""The batches of a run, by step, and the flag with which a process stops all processes.

Which documents a batch has, their rows and its SHA-256 follow from numbers that every process has of all documents. The documents
themselves are read by the processes on whose devices their rows lie.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from lindm.io import signals
from lindm.llm.parallel import sharding
from lindm.llm.sft import packing
from lindm.llm.sft.example_table import ExampleTable
from lindm.llm.sft.flops import train_step_flops
from lindm.llm.sft.setup import TrainingSetup
from lindm.llm.sft.shapes import MAX_SHARED, SAMPLED_STEPS, BatchShape, Sizes, choose_shapes, first_fitting, group


class LoadedBatch(NamedTuple):
    """The batch of one step."""

    step: int  # number of finished steps before it
    arrays: packing.Batch  # [accumulation, rows, ...] on the mesh
    shape: BatchShape
    sha256: str  # of the digests of its documents, in their order; the first 16 digits
    documents: np.ndarray  # [n] their numbers


class BatchLoader:
    """Makes the batch of a step from the seed and the step alone."""

    def __init__(self, setup: TrainingSetup, batch_sharding: NamedSharding, flag_sharding: NamedSharding):
        self.setup, self.batch_sharding, self.flag_sharding = setup, batch_sharding, flag_sharding
        config = setup.config
        self.order = packing.batch_order(len(setup.train_rows), config.batch * config.accumulate, config.seed)
        sample = [self._sizes(step) for step in range(SAMPLED_STEPS)]  # whatever the number of steps: a run may go on
        full, shards, row_flops, max_shared = shape_limits(setup)
        self.shapes = choose_shapes(sample, full, config.accumulate, shards, row_flops, max_shared)
        sample = sample[: setup.optimizer.steps]
        taken = [self._group(sizes)[0] for sizes in sample]
        needed = self.shapes if setup.optimizer.steps > SAMPLED_STEPS else taken
        self.first_steps = {shape: self._first_step(shape, sample, taken) for shape in reversed(self.shapes) if shape in needed}
        """of each shape that a step may take, the largest first: a step that takes it, or at least fits into it"""
        tokens = sum(sizes.tokens.sum() for sizes in sample)
        self.useful_fraction = float(tokens / sum(config.accumulate * shape.rows * shape.seq_len for shape in taken))

    def __str__(self) -> str:
        shapes = ", ".join(f"{shape.rows} x {shape.seq_len}" for shape in reversed(self.first_steps))
        return f"of {shapes} tokens, {self.useful_fraction:.0%} of them of documents"

    def load(self, step: int, shape: BatchShape | None = None) -> LoadedBatch:
        """The batch of a step, in the cheapest shape or in this one; its arrays are on their way to the mesh."""
        shape, groups = self._group(self._sizes(step), shape)
        table, rows = self.setup.train_rows.table, [self.setup.train_rows.numbers(i) for i in self.order(step).tolist()]
        documents = np.array([number for row in rows for number in row], np.int64)
        digests = np.array([table.digest(number) for number in documents.tolist()], "<u8")
        joined = [[number for i in members for number in rows[i]] for members in groups]
        arrays = place_rows(table, joined, shape, self.batch_sharding, (self.setup.config.accumulate,))
        return LoadedBatch(step, arrays, shape, hashlib.sha256(digests.tobytes()).hexdigest()[:16], documents)

    def _sizes(self, step: int) -> Sizes:
        rows = self.order(step)
        return Sizes(self.setup.train_rows.tokens[rows], self.setup.train_rows.labels[rows])

    def _first_step(self, shape: BatchShape, sample: list[Sizes], taken: list[BatchShape]) -> int:
        if shape in taken:
            return taken.index(shape)
        return next(i for i, sizes in enumerate(sample) if group(sizes, shape, self.setup.config.accumulate) is not None)

    def _group(self, sizes: Sizes, only: BatchShape | None = None) -> tuple[BatchShape, list[list[int]]]:
        """The cheapest shape that holds the documents of a step, and which of them share a row."""
        return first_fitting(sizes, self.shapes if only is None else [only], self.setup.config.accumulate)

    def stop_flags(self) -> jax.Array:
        """[devices] 1 if this process has to stop."""
        flags = np.full(self.setup.mesh.size, signals.stop_requested(), np.int32)
        return sharding.shard_array(flags, self.flag_sharding)


def shape_limits(setup: TrainingSetup) -> tuple[BatchShape, int, Callable[[int], float], int]:
    """What shapes of batches follow from: the full shape, the shards of its rows, the cost of a row, and the most tokens of one
    that is longer than the full one.
    """
    config, mesh = setup.config, setup.mesh.shape
    full = BatchShape(config.batch, setup.seq_len, setup.max_labels)
    row_flops = functools.partial(train_step_flops, setup.model_config, config.method, 1, max_labels=0)
    max_shared = setup.seq_len if config.pack and config.max_length is not None else MAX_SHARED
    return full, mesh["data"] * mesh["fsdp"], row_flops, max_shared


def place_rows(
    table: ExampleTable,
    rows: Sequence[Sequence[int]],
    shape: BatchShape,
    batch_sharding: NamedSharding,
    leading: tuple[int, ...] = (),
) -> packing.Batch:
    """The batch [*leading, shape.rows, ...] of these rows, and empty ones, on the mesh.

    Args:
      rows: the numbers of the examples that share each row. A process reads those of the rows that lie on its devices.
    """

    def make_rows(own: np.ndarray) -> packing.Batch:
        made = [[table[i] for i in rows[r]] if r < len(rows) else [table.empty] for r in own.tolist()]
        return packing.make_batch(made, shape.seq_len, shape.max_labels)

    return sharding.shard_rows((*leading, shape.rows), batch_sharding, make_rows)
