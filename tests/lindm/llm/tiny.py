"""A decoder with nine thousand weights, random batches, and the training step on one device or on a mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from lindm.choices import Optimizer
from lindm.llm.config import ModelConfig
from lindm.llm.lora import add_lora, set_dropout
from lindm.llm.model import Decoder
from lindm.llm.parallel import sharding
from lindm.llm.sft.loss import ComputeConfig
from lindm.llm.sft.optimizer import OptimizerConfig, make_optimizer
from lindm.llm.sft.packing import Batch
from lindm.llm.sft.step import TrainState, init_train_state, jit_train_step, make_train_step, step_shardings

TINY = ModelConfig(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    rms_norm_eps=1e-5,
    init_std=0.3,
    qkv_bias=True,
)


def decoder(seed: int = 0, model_config: ModelConfig = TINY) -> Decoder:
    return Decoder(model_config, nnx.Rngs(seed), jnp.float32)


def batch(
    seed: int, accumulate: int = 1, rows: int = 8, T: int = 12, L: int = 5, labels: tuple[int, ...] = (), vocabulary: int = 64
) -> Batch:
    """Random tokens [accumulate, rows, ...], two documents a row; `labels`: how many of each row [default: 0 to L]."""
    rng = np.random.default_rng(seed)
    shape = (accumulate, rows)
    cut = rng.integers(1, T, shape)[..., None]
    order = np.broadcast_to(np.arange(T), (*shape, T))
    counts = np.broadcast_to(labels, shape) if labels else rng.integers(0, L + 1, shape)
    at = np.sort(rng.permuted(order, axis=-1)[..., :L], axis=-1)
    target = np.where(np.arange(L) < counts[..., None], rng.integers(0, vocabulary, (*shape, L)), -1)
    arrays = {
        "ids": rng.integers(0, vocabulary, (*shape, T)),
        "positions": np.where(order < cut, order, order - cut),
        "segments": (order >= cut).astype(int),
        "label_positions": np.where(target >= 0, at, 0),
        "targets": target,
    }
    return Batch(**{name: x.astype(np.int32) for name, x in arrays.items()})


class Trained(NamedTuple):
    """What some steps did, as numpy arrays."""

    metrics: list[dict[str, Any]]  # a dict of scalars a step
    before: dict[str, np.ndarray]  # trained weights by path
    after: dict[str, np.ndarray]
    frozen: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # the others, before and after
    states: tuple[TrainState, TrainState]  # everything that steps change, before and after, as numpy arrays


def weights(state: nnx.State) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {sharding.weight_path(keys): np.array(leaf) for keys, leaf in flat if leaf.is_fully_addressable}


def train(
    batches: list[Batch],
    mesh: Mesh | None = None,
    model: Decoder | None = None,
    lora: int = 0,
    dropout: float = 0.0,
    compute: ComputeConfig | None = None,
    stops: list[Any] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_name: Optimizer = "adamw",
    **settings: Any,
) -> Trained:
    """A step for each batch, on a mesh of these devices [default: one device] with adapters of rank `lora` if it is above 0.

    Args:
      stops: what this process puts into the flags of each step.
      optimizer: in place of that of `OptimizerConfig`, whose `settings` are the rest.
    """
    mesh = sharding.make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
    model = decoder() if model is None else model
    if lora:
        set_dropout(add_lora(model, lora, 2.0 * lora, jax.random.key(7)), dropout)
    given = {"steps": 2 * len(batches), "learning_rate": 1e-2, "optimizer": optimizer_name} | settings
    optimizer_config = OptimizerConfig(**given)
    optimizer = optimizer or make_optimizer(optimizer_config)
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    state = init_train_state(params, optimizer)
    shardings = step_shardings(state, frozen, mesh)

    def put(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda x, s: sharding.shard_array(np.asarray(x), s), tree, where)

    before, still, first = weights(params), weights(frozen), jax.tree.map(np.array, state)
    state, frozen = put(state, shardings.state), put(frozen, shardings.frozen)
    step = jit_train_step(make_train_step(graphdef, optimizer, compute or ComputeConfig(), mesh), shardings)
    metrics, compiled = [], None
    for i, one in enumerate(batches):
        placed = jax.tree.map(lambda x: sharding.shard_array(x, shardings.batch), one)
        stop = np.broadcast_to(np.int32(stops[i] if stops else 0), mesh.size)
        stop = sharding.shard_array(stop, shardings.stop_flags)
        if compiled is None:  # five times faster without optimizations, which are not needed at this size
            compiled = step.lower(state, frozen, placed, stop).compile(compiler_options={"xla_backend_optimization_level": 0})
        state, step_metrics = compiled(state, frozen, placed, stop)
        metrics.append({name: np.asarray(value).item() for name, value in vars(step_metrics).items()})
    last = jax.tree.map(lambda x: np.array(x) if x.is_fully_addressable else None, state)
    return Trained(metrics, before, weights(state.params), (still, weights(frozen)), (first, last))


def largest(value: int) -> int:
    """The largest of what the processes bring, by the reduction that a step's flag goes through."""
    mesh = sharding.make_mesh({"data": len(jax.devices())})
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return int(jax.jit(jnp.max)(sharding.shard_array(np.full(mesh.size, value, np.int32), everywhere)))
