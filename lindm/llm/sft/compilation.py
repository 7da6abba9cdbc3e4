"""Compilation of the training step, and the check that it fits in memory."""

import time
from typing import Any

import jax
from flax import nnx

from lindm.errors import OutOfMemoryError, library_errors
from lindm.llm.parallel import devices
from lindm.llm.sft.batches import BatchLoader, LoadedBatch
from lindm.llm.sft.packing import Batch
from lindm.llm.sft.shapes import BatchShape
from lindm.llm.sft.step import StepMetrics, TrainState

TRAINING_STEP = "the training step"
ADVICE = "a smaller --batch with --accumulate, --method lora or qlora, or more devices (`lindm plan` shows what fits)"


class TrainPrograms:
    """The training step, compiled at the start for each shape that a batch of the run may have. Later, a lack of memory would end
    the run at the first rare batch, again and again, and a signal would find the main thread compiling.

    Args:
      train_step: of `jit_train_step`; state: a `ShapeDtypeStruct` with its sharding in place of each array.

    Raises:
      OutOfMemoryError: a program does not fit in the memory that is free now.
    """

    def __init__(self, train_step: Any, state: TrainState, frozen: nnx.State, loader: BatchLoader):
        self.loader = loader
        self.programs: dict[BatchShape, Any] = {}
        self.seconds = 0.0  # of compiling; little where the programs are in the compilation cache
        for shape, step in loader.first_steps.items():
            batch, start = loader.load(step, shape), time.perf_counter()
            self.programs[shape] = compile_train_step(train_step, state, frozen, batch.arrays, loader.stop_flags())
            self.seconds += time.perf_counter() - start

    def __call__(self, state: TrainState, frozen: nnx.State, batch: LoadedBatch) -> tuple[TrainState, StepMetrics]:
        """Start a step."""
        return self.programs[batch.shape](state, frozen, batch.arrays, self.loader.stop_flags())

    def texts(self) -> list[str]:
        """The compiled programs in XLA's language."""
        return [program.as_text() for program in self.programs.values()]


def compile_train_step(train_step: Any, state: TrainState, frozen: nnx.State, batch: Batch, stop_flags: jax.Array) -> Any:
    """The compiled step.

    Args:
      train_step: of `jit_train_step`; state: a `ShapeDtypeStruct` with its sharding in place of each array.

    Raises:
      OutOfMemoryError: the program does not fit in the memory that is free now.
    """
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (frozen, batch, stop_flags))
    with library_errors(TRAINING_STEP, ADVICE):
        compiled = train_step.lower(state, *arguments).compile()
    memory, device = compiled.memory_analysis(), jax.local_devices()[0]
    free = devices.available_memory(device)
    if memory is not None and free is not None:
        held = bytes_on((frozen, batch, stop_flags), device)
        needed = bytes_needed(memory, state, held, device.platform)
        if needed > free:
            reason = f"it needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
            raise OutOfMemoryError(f"{TRAINING_STEP} does not fit in memory: {reason}; try {ADVICE}")
    return compiled


def bytes_needed(memory: Any, state: TrainState, held: int, platform: str) -> int:
    """Bytes that a step needs on a device, besides the arguments that are there already (`held` bytes): of its state and of what
    it computes. Virtual devices of a CPU share one memory.

    Args:
      memory: the analysis of the compiled step, for one device.
    """
    if platform == "cpu":
        state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        return len(jax.local_devices()) * memory.temp_size_in_bytes + state_bytes
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes - held


def bytes_on(arrays: Any, device: Any) -> int:
    """Bytes of the shards of arrays on a device."""
    shards = (shard for x in jax.tree.leaves(arrays) for shard in x.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)
