r"""The losses at the labeled positions of a language model.

    action    - sum_i log p(target_i | tokens before it) / number of targets
    behavior    the same, with the demonstrator's action as target_i
    soft      - sum_i sum_a w_ia log p(token of a | ...) / number of targets,  w_i = softmax(Q_i / temperature)
    regret      sum_i sum_a p_i(a) (max Q_i - Q_ia) / number of targets,       p_i = softmax of the logits of the actions' tokens

Where answers have weights w_i, each term is multiplied by its own, and the number of targets becomes the sum of the weights: a
mean with weights, as in torch. So a weight of 0 is the same as no label, and the same weight for all is the same as none.

Q_i are the oracle's action values where target i stands, in units of reward. The first is that of any text; soft and regret need
data with action values and actions of one token each. An action that is not legal there has the value -inf and probability 0.

Only labeled positions meet the vocabulary: their hidden states are gathered first, and logits exist for at most `LOGITS_CHUNK`
positions of a row at a time, so no array of batch x tokens x vocabulary is ever allocated. `lm_loss` returns the sum; the step
divides it by the labels (`label_weight`) of all micro-batches, so gradient accumulation gives the gradient of the large batch
even where micro-batches have different numbers of labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lindm.choices import Loss
from lindm.llm.attention_kernels import attention_for
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


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimized at a labeled position (static)."""

    loss: Loss = "action"
    actions: tuple[int, ...] = ()
    """token of each action, for soft and regret"""
    temperature: float = 1.0
    """of soft, in units of reward"""


def lm_loss(
    model: Decoder, batch: Batch, compute: ComputeConfig, mesh: Mesh | None = None, objective: Objective | None = None
) -> tuple[Array, Array]:
    """Sum of the loss over the labeled positions of a batch [R, T], and the number of targets that are the argmax.

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
        attention=attention_for(mesh),
        constrain=constrain(*BATCH_SPEC),
        constrain_embedded=constrain("data", None, "fsdp"),  # as the columns of the table; an all-to-all then shards the rows
    )
    label_positions = jnp.maximum(batch.label_positions, 0)
    hidden = jnp.take_along_axis(hidden, label_positions[:, :, None], axis=1)

    position_loss = _position_loss(objective or Objective())

    def chunk_loss(hidden: Array, targets: Array, weights: Array | None, action_values: Array | None) -> tuple[Array, Array]:
        # labeled states are few: each vocabulary shard receives all of them, and the head stays sharded
        logits = constrain("data", None, VOCAB_AXES)(model.logits(constrain("data")(hidden), constrain(None, VOCAB_AXES)))
        labeled = targets >= 0
        token = jnp.maximum(targets, 0)
        loss = position_loss(logits, token, action_values)
        loss = loss if weights is None else loss * weights
        correct = logits.argmax(-1) == token
        return jnp.where(labeled, loss, 0).sum(), jnp.where(labeled, correct, False).sum().astype(jnp.float32)

    optional = (None if x is None else jnp.asarray(x) for x in (batch.weights, batch.action_values))
    per_label = (hidden, jnp.asarray(batch.targets), *optional)
    L = hidden.shape[1]
    if L <= LOGITS_CHUNK:
        return chunk_loss(*per_label)

    def chunks(x: Array, blank: int) -> Array:
        """[R, L, ...] -> [chunks, R, LOGITS_CHUNK, ...]"""
        padding = [(0, 0), (0, -L % LOGITS_CHUNK), *[(0, 0)] * (x.ndim - 2)]
        padded = jnp.pad(x, padding, constant_values=blank)
        return padded.reshape(x.shape[0], -1, LOGITS_CHUNK, *x.shape[2:]).swapaxes(0, 1)

    zero = jnp.zeros((), jnp.float32)

    def add_chunk(totals: tuple[Array, Array], chunk: tuple[Array | None, ...]):
        loss, correct = jax.checkpoint(chunk_loss)(*chunk)
        return (totals[0] + loss, totals[1] + correct), None

    blanks = (0, -1, 0, 0)
    chunked = tuple(None if x is None else chunks(x, blank) for x, blank in zip(per_label, blanks, strict=True))
    return jax.lax.scan(add_chunk, (zero, zero), chunked)[0]


def label_weight(batch: Batch) -> Array:
    """Sum of the weights of the labels, f32: their number where the batch has no weights."""
    if batch.weights is None:
        return (jnp.asarray(batch.targets) >= 0).sum(dtype=jnp.int32).astype(jnp.float32)
    return jnp.asarray(batch.weights).sum()


def _position_loss(objective: Objective) -> Callable[[Array, Array, Array | None], Array]:
    """(logits [..., V], target [...], action values [..., A]) -> loss [...]."""
    tokens = np.array(objective.actions, np.int32)

    def soft(logits: Array, target: Array, values: Array) -> Array:
        weights = jax.nn.softmax(values / objective.temperature)
        return -(weights * jax.nn.log_softmax(logits)[..., tokens]).sum(-1)

    def regret(logits: Array, target: Array, values: Array) -> Array:
        legal = jnp.isfinite(values)
        probabilities = jax.nn.softmax(jnp.where(legal, logits[..., tokens], -jnp.inf))
        regrets = jnp.where(legal, values.max(-1, keepdims=True) - values, 0)  # before the product: its gradient would be 0 x inf
        return (probabilities * regrets).sum(-1)

    def action(logits: Array, target: Array, values: Array | None) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, target)

    return {"action": action, "behavior": action, "soft": soft, "regret": regret}[objective.loss]
