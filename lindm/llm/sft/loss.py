r"""The language-model loss: cross-entropy of the next token at the labeled positions.

    loss = - sum_i log p(target_i | tokens before it) / number of targets

Only labeled positions meet the vocabulary: their hidden states are gathered first, and logits exist for at most `LOGITS_CHUNK`
positions of a row at a time, so no array of batch x tokens x vocabulary is ever allocated. `lm_loss` returns the sum; the step
divides it by the number of labels in all micro-batches, so gradient accumulation gives the gradient of the large batch even where
micro-batches have different numbers of labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lindm.llm.config import Remat
from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import BATCH_SPEC
from lindm.llm.sft.packing import Batch

LOGITS_CHUNK = 256  # labeled positions of a row whose logits exist at once
VOCAB_AXES = ("tensor", "fsdp")  # mesh axes over which the vocabulary is sharded where logits are computed


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model computes (static)."""

    dtype: DTypeLike = jnp.float32
    """of the activations"""
    remat: Remat = "selective"
    """activations that the backward pass recomputes"""


def lm_loss(model: Decoder, batch: Batch, compute: ComputeConfig, mesh: Mesh | None = None) -> tuple[Array, Array]:
    """Sum of -log p(target) over the labeled positions of a batch [R, T], and the number of targets that are the argmax.

    Returns:
      (loss_sum, num_correct), both f32 scalars.
    """

    def constrain(*axes: Any) -> Callable[[Array], Array]:
        if mesh is None:
            return lambda x: x
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return lambda x: jax.lax.with_sharding_constraint(x, sharding)

    hidden = model.last_hidden_state(
        jnp.asarray(batch.ids),
        jnp.asarray(batch.positions),
        jnp.asarray(batch.segments),
        dtype=compute.dtype,
        remat=compute.remat,
        constrain=constrain(*BATCH_SPEC),
        constrain_embedded=constrain("data", None, "fsdp"),  # as the columns of the table; an all-to-all then shards the rows
    )
    label_positions = jnp.maximum(batch.label_positions, 0)
    hidden = jnp.take_along_axis(hidden, label_positions[:, :, None], axis=1)

    def chunk_loss(hidden: Array, targets: Array) -> tuple[Array, Array]:
        # labeled states are few: each vocabulary shard receives all of them, and the head stays sharded
        logits = constrain("data", None, VOCAB_AXES)(model.logits(constrain("data")(hidden), constrain(None, VOCAB_AXES)))
        labeled = targets >= 0
        token = jnp.maximum(targets, 0)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, token)
        correct = logits.argmax(-1) == token
        return jnp.where(labeled, loss, 0).sum(), jnp.where(labeled, correct, False).sum().astype(jnp.float32)

    R, L, D = hidden.shape
    if L <= LOGITS_CHUNK:
        return chunk_loss(hidden, jnp.asarray(batch.targets))
    padding = -L % LOGITS_CHUNK
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(R, -1, LOGITS_CHUNK, D).swapaxes(0, 1)
    targets = jnp.pad(batch.targets, ((0, 0), (0, padding)), constant_values=-1).reshape(R, -1, LOGITS_CHUNK).swapaxes(0, 1)
    zero = jnp.zeros((), jnp.float32)

    def add_chunk(totals: tuple[Array, Array], chunk: tuple[Array, Array]):
        loss, correct = jax.checkpoint(chunk_loss)(*chunk)
        return (totals[0] + loss, totals[1] + correct), None

    return jax.lax.scan(add_chunk, (zero, zero), (hidden, targets))[0]
