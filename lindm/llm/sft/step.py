r"""The training step: the program that `lindm sft` runs and that `lindm plan` compiles for another machine.

A step decides on the device whether it is applied: where its loss or the norm of its gradient is not finite, the state stays as
it was. So the caller may start the next step before it reads the metrics of this one. Weights that overflow although the gradient
was finite are reported as well, after the update: keeping all old weights until the new ones are checked would double their
memory. The caller saves no state before it has read that the last step was finite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lindm.llm.lora import draw_dropout
from lindm.llm.parallel.sharding import BATCH_SPEC, WEIGHT_AXES, weight_path, weight_shardings, weight_spec
from lindm.llm.sft.loss import ComputeConfig, Objective, label_weight, lm_loss
from lindm.llm.sft.packing import Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step changes and a checkpoint stores."""

    params: nnx.State  # trained weights, f32
    opt_state: Any  # optax's state
    step: Array  # [] int32, number of finished steps


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Scalars of one step."""

    loss: Array  # f32, mean over the labels of the step, by their weights
    accuracy: Array  # f32, share of the labels whose token is the most likely one
    num_labels: Array  # int32
    grad_norm: Array  # f32, before clipping
    finite: Array  # bool: the loss and the norms of the gradient and of the updated weights are finite; if not, do not save
    stop: Array  # int32, maximum of the stop flags of all processes


TrainStep = Callable[[TrainState, nnx.State, Batch, Array], tuple[TrainState, StepMetrics]]


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    compute: ComputeConfig,
    mesh: Mesh | None = None,
    objective: Objective | None = None,
    seed: int = 0,
) -> TrainStep:
    """train_step(state, frozen, batch [accumulation, rows, ...], stop_flags [devices]) -> (state, metrics).

    `frozen` holds the weights that are not trained. Where the loss or the gradient is not finite, the state is returned as it
    was. Compile the step with `jit_train_step`.

    Args: seed: of the dropout of adapters, whose masks depend on it, the step and the micro-batch.
    """

    def scaled_loss(params: nnx.State, frozen: nnx.State, batch: Batch, scale: Array, key: Array) -> tuple[Array, Array]:
        model = draw_dropout(nnx.merge(graphdef, params, frozen), key)
        loss_sum, num_correct = lm_loss(model, batch, compute, mesh, objective)
        return loss_sum * scale, num_correct

    loss_and_grad = jax.value_and_grad(scaled_loss, has_aux=True)

    def micro_batch(
        params: nnx.State, frozen: nnx.State, batch: Batch, scale: Array, key: Array
    ) -> tuple[tuple[Array, Array], nnx.State]:
        loss, grads = loss_and_grad(params, frozen, batch, scale, key)
        if mesh is not None:  # as the weights; otherwise XLA gives the optimizer's moments the sharding of the gradients
            grads = jax.lax.with_sharding_constraint(grads, weight_shardings(grads, mesh))
        return loss, grads

    def train_step(state: TrainState, frozen: nnx.State, batch: Batch, stop_flags: Array) -> tuple[TrainState, StepMetrics]:
        num_labels = (batch.targets >= 0).sum(dtype=jnp.int32)
        weight = label_weight(batch)
        scale = 1 / jnp.where(weight > 0, weight, 1)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), batch.ids.shape[0])
        if batch.ids.shape[0] == 1:
            (loss, num_correct), grads = micro_batch(state.params, frozen, jax.tree.map(lambda x: x[0], batch), scale, keys[0])
        else:

            def accumulate(total, part: tuple[Batch, Array]):
                return jax.tree.map(jnp.add, total, micro_batch(state.params, frozen, part[0], scale, part[1])), None

            zero = jnp.zeros((), jnp.float32)
            start = ((zero, zero), jax.tree.map(jnp.zeros_like, state.params))
            ((loss, num_correct), grads), _ = jax.lax.scan(accumulate, start, (batch, keys))
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        updated = TrainState(params=params, opt_state=opt_state, step=state.step + 1)
        is_applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        state = jax.tree.map(lambda new, old: jnp.where(is_applied, new, old), updated, state)  # fused with the update
        metrics = StepMetrics(
            loss=loss,
            accuracy=num_correct / jnp.maximum(num_labels, 1),
            num_labels=num_labels,
            grad_norm=grad_norm,
            finite=is_applied & jnp.isfinite(optax.tree.norm(state.params)),
            stop=stop_flags.max(),
        )
        return state, metrics

    return train_step


def init_train_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.zeros((), jnp.int32))


def state_template(params: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state of these weights with a `ShapeDtypeStruct`, and its sharding on the mesh, in place of each array."""
    shapes = jax.eval_shape(lambda p: init_train_state(p, optimizer), params)
    shardings = train_state_sharding(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


class StepShardings(NamedTuple):
    """The shardings of a step's arguments."""

    state: TrainState
    frozen: nnx.State
    batch: NamedSharding  # [accumulation, rows, ...]: rows over data and fsdp
    stop_flags: NamedSharding  # [devices]: one flag per device


def train_state_sharding(state: TrainState, mesh: Mesh) -> TrainState:
    """A `NamedSharding` for each array of the state. Optimizer moments are sharded as their weights: optax keeps their names."""
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    shapes = {weight_path(keys): leaf.shape for keys, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]}

    def moment(keys: Any, leaf: Any) -> NamedSharding:
        names = weight_path(keys).split(".")
        for start in range(len(names)):  # the path of the weight is the end of the path of its moment
            path = ".".join(names[start:])
            if path in WEIGHT_AXES and leaf.shape == shapes.get(path):  # sums over rows or columns (Adafactor) are small
                return NamedSharding(mesh, weight_spec(path, leaf.shape, mesh))
        return replicated

    opt_state = jax.tree_util.tree_map_with_path(moment, state.opt_state)
    return TrainState(params=weight_shardings(state.params, mesh), opt_state=opt_state, step=replicated)


def step_shardings(state: TrainState, frozen: nnx.State, mesh: Mesh) -> StepShardings:
    """The shardings of all arguments of a step; `state` and `frozen` may hold shapes in place of arrays."""
    return StepShardings(
        state=train_state_sharding(state, mesh),
        frozen=weight_shardings(frozen, mesh),
        batch=NamedSharding(mesh, PartitionSpec(None, *BATCH_SPEC)),
        stop_flags=NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
    )


def jit_train_step(train_step: TrainStep, shardings: StepShardings) -> Any:
    """The step as one compiled program; the state's memory is donated, and its sharding is kept."""
    replicated = NamedSharding(shardings.stop_flags.mesh, PartitionSpec())
    return jax.jit(train_step, in_shardings=tuple(shardings), out_shardings=(shardings.state, replicated), donate_argnums=0)
