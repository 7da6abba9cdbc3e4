"""The batches of a run, by step, and the flag with which a process stops all processes."""

import hashlib
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from lindm.io import signals
from lindm.llm.parallel import sharding
from lindm.llm.sft import packing
from lindm.llm.sft.setup import TrainingSetup
from lindm.llm.tokens import Example


class LoadedBatch(NamedTuple):
    """The batch of one step."""

    step: int  # number of finished steps before it
    arrays: packing.Batch  # [accumulation, rows, ...] on the mesh
    sha256: str  # of the arrays, the first 16 digits
    examples: list[Example]


class BatchLoader:
    """Makes the batch of a step from the seed and the step alone."""

    def __init__(self, setup: TrainingSetup, batch_sharding: NamedSharding, flag_sharding: NamedSharding):
        self.setup, self.batch_sharding, self.flag_sharding = setup, batch_sharding, flag_sharding
        self.rows_per_step = setup.config.batch * setup.config.accumulate
        self.order = packing.batch_order(len(setup.train_rows), self.rows_per_step, setup.config.seed)

    def load(self, step: int) -> LoadedBatch:
        """The batch of a step; its arrays are on their way to the mesh."""
        config, rows = self.setup.config, [self.setup.train_rows[i] for i in self.order(step)]
        batch = packing.make_batch(rows, self.setup.seq_len, self.setup.max_labels)
        digest = hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(batch))).hexdigest()[:16]
        shaped = jax.tree.map(lambda x: x.reshape(config.accumulate, config.batch, *x.shape[1:]), batch)
        arrays = jax.tree.map(lambda x: sharding.shard_array(x, self.batch_sharding), shaped)
        return LoadedBatch(step, arrays, digest, [example for row in rows for example in row])

    def stop_flags(self) -> jax.Array:
        """[devices] 1 if this process has to stop."""
        flags = np.full(self.setup.mesh.size, signals.stop_requested(), np.int32)
        return sharding.shard_array(flags, self.flag_sharding)
