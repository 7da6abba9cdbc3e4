"""Compilation of the training step, and the check that it fits in memory."""

from typing import Any

import jax
from flax import nnx

from lindm.errors import OutOfMemoryError, library_errors
from lindm.llm.parallel import devices
from lindm.llm.sft.packing import Batch
from lindm.llm.sft.step import TrainState

TRAINING_STEP = "the training step"
ADVICE = "a smaller --batch with --accumulate, --method lora or qlora, or more devices (`lindm plan` shows what fits)"


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
        if device.platform == "cpu":  # virtual devices share one memory
            state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
            needed = len(jax.local_devices()) * memory.temp_size_in_bytes + state_bytes
        else:
            needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        if needed > free:
            reason = f"it needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
            raise OutOfMemoryError(f"{TRAINING_STEP} does not fit in memory: {reason}; try {ADVICE}")
    return compiled
