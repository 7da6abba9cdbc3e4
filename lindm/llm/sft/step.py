r"""One step of fine-tuning: the very program that `lindm sft` runs and `lindm plan` compiles for another machine.

    loss = - sum_i log p(target_i | tokens before it) / number of targets

over the labelled positions of all micro-batches of the step alone: hidden states are gathered there, and only they meet the
vocabulary, at most `CHUNK` of them a row at a time, so that no array of batch x tokens x vocabulary ever exists. A micro-batch
divides by the labels of the whole step: accumulation gives the gradient of the big batch whatever each part's share of them.

A step says whether its loss and the norms of its gradient and of the weights after it are finite. Where they are not its state is
of no use, and the caller stops before anything of it is written: to keep the state before it as well would take its memory twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import ROWS, path_of, spec_of, state_shardings
from lindm.llm.sft.packing import Batch

CHUNK = 256  # labelled positions of a row whose logits exist at once
WORDS = ("tensor", "fsdp")  # what the vocabulary is cut along where logits are computed


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW (Loshchilov, Hutter, 2019) with linear warm-up and a cosine to `floor` times the peak, and clipping by global
    norm.
    """

    steps: int
    learning_rate: float = 2e-4
    warmup: float = 0.1
    """fraction of the steps"""
    floor: float = 0.1
    weight_decay: float = 0.0
    """of matrices; norms and biases are never decayed"""
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self):
        rules = {
            "steps": (self.steps >= 1, "at least 1"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "floor": (0 <= self.floor <= 1, "in [0, 1]"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "clip": (self.clip > 0, "above 0"),
            "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
            "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {rule}; got {getattr(self, name)}")

    def optimizer(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.stateless(lambda grads, _: _clipped(grads, self.clip)),
            optax.adamw(self.schedule(), self.beta1, self.beta2, weight_decay=self.weight_decay, mask=_matrices),
        )

    def schedule(self) -> optax.Schedule:
        warm = min(max(1, round(self.warmup * self.steps)), self.steps)
        rise = optax.linear_schedule(self.learning_rate / warm, self.learning_rate, max(warm - 1, 1))
        fall = optax.cosine_decay_schedule(self.learning_rate, max(self.steps - warm, 1), self.floor)
        return optax.join_schedules([rise, fall], [warm])


def _clipped(grads: Any, most: float) -> Any:
    """optax's `clip_by_global_norm` as one product, which XLA fuses with what follows; its division it would write out first."""
    scale = most / jnp.maximum(optax.tree.norm(grads), most)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def _matrices(params: Any) -> Any:
    """Which weights are matrices: by name, since stacked norms and biases have two axes too."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: path_of(keys).rpartition(".")[2] in ("kernel", "embedding", "head", "a", "b"), params
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class State:
    """What a step changes, and so what a checkpoint holds."""

    params: nnx.State  # every trained weight, in f32
    opt: Any  # optax's state
    step: Array  # [] int32, steps done


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Scalars of one step."""

    loss: Array  # f32, mean over the step's labels
    accuracy: Array  # f32, share of the labels whose token is the most likely one
    labels: Array  # int32, how many
    norm: Array  # f32, of the gradient before clipping
    finite: Array  # bool: loss, and the norms of the gradient and of the weights after the step
    stop: Array  # int32: the largest of what the processes put into `stop`


@dataclass(frozen=True, kw_only=True)
class Computing:
    """How a model computes; static."""

    dtype: DTypeLike = jnp.float32
    """of activations"""
    remat: str = "selective"
    """what the backward pass computes again: one of `lindm.llm.model.REMATS`"""


def sums(model: Decoder, batch: Batch, computing: Computing, mesh: Mesh | None = None) -> tuple[Array, Array]:
    """-log p summed over the labelled positions of a batch [R, T], and how many of them have the most likely token; f32 both."""

    def lie(*axes: Any) -> Callable[[Array], Array]:
        if mesh is None:
            return lambda x: x
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return lambda x: jax.lax.with_sharding_constraint(x, sharding)

    hidden = model.hidden(
        jnp.asarray(batch.ids),
        jnp.asarray(batch.positions),
        jnp.asarray(batch.segments),
        dtype=computing.dtype,
        remat=computing.remat,
        constrain=lie(*ROWS),
        found=lie("data", None, "fsdp"),  # as the table's columns lie; from there to rows is an exchange
    )
    at = jnp.maximum(batch.at, 0)
    hidden = jnp.take_along_axis(hidden, at[:, :, None], axis=1)

    def part(hidden: Array, target: Array) -> tuple[Array, Array]:
        # the labelled states are few: all of them go to each part of the vocabulary, and the head stays in parts
        logits = lie("data", None, WORDS)(model.logits(lie("data")(hidden), lie(None, WORDS)))
        labelled = target >= 0
        chosen = jnp.maximum(target, 0)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, chosen)
        right = logits.argmax(-1) == chosen
        return jnp.where(labelled, loss, 0).sum(), jnp.where(labelled, right, False).sum().astype(jnp.float32)

    R, L, D = hidden.shape
    if L <= CHUNK:
        return part(hidden, jnp.asarray(batch.target))
    short = -L % CHUNK
    hidden = jnp.pad(hidden, ((0, 0), (0, short), (0, 0))).reshape(R, -1, CHUNK, D).swapaxes(0, 1)
    target = jnp.pad(batch.target, ((0, 0), (0, short)), constant_values=-1).reshape(R, -1, CHUNK).swapaxes(0, 1)
    zero = jnp.zeros((), jnp.float32)

    def add(totals: tuple[Array, Array], chunk: tuple[Array, Array]):
        loss, right = jax.checkpoint(part)(*chunk)
        return (totals[0] + loss, totals[1] + right), None

    return jax.lax.scan(add, (zero, zero), (hidden, target))[0]


Step = Callable[[State, nnx.State, Batch, Array], tuple[State, Metrics]]


def make_step(graphdef: Any, optimizer: optax.GradientTransformation, computing: Computing, mesh: Mesh | None = None) -> Step:
    """step(state, frozen, batch [accumulation, rows, ...], stop [...]) -> (state, metrics); jit it with `jitted`."""

    def loss_of(params: nnx.State, frozen: nnx.State, batch: Batch, share: Array) -> tuple[Array, Array]:
        loss, right = sums(nnx.merge(graphdef, params, frozen), batch, computing, mesh)
        return loss * share, right

    differentiated = jax.value_and_grad(loss_of, has_aux=True)

    def gradient(params: nnx.State, frozen: nnx.State, batch: Batch, share: Array) -> tuple[tuple[Array, Array], nnx.State]:
        value, grads = differentiated(params, frozen, batch, share)
        if mesh is not None:  # as the weights, or XLA lets the optimizer's moments lie as the gradients
            grads = jax.lax.with_sharding_constraint(grads, state_shardings(grads, mesh))
        return value, grads

    def step(state: State, frozen: nnx.State, batch: Batch, stop: Array) -> tuple[State, Metrics]:
        labels = (batch.target >= 0).sum(dtype=jnp.int32)
        share = 1 / jnp.maximum(labels, 1).astype(jnp.float32)
        if batch.ids.shape[0] == 1:
            (loss, right), grads = gradient(state.params, frozen, jax.tree.map(lambda x: x[0], batch), share)
        else:

            def add(total, part: Batch):
                return jax.tree.map(jnp.add, total, gradient(state.params, frozen, part, share)), None

            zero = jnp.zeros((), jnp.float32)
            nothing = ((zero, zero), jax.tree.map(jnp.zeros_like, state.params))
            ((loss, right), grads), _ = jax.lax.scan(add, nothing, batch)
        norm = optax.tree.norm(grads)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        after = State(params=params, opt=opt, step=state.step + 1)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(params))
        metrics = Metrics(loss=loss, accuracy=right * share, labels=labels, norm=norm, finite=finite, stop=stop.max())
        return after, metrics

    return step


def initial(params: nnx.State, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return State(params=params, opt=optimizer.init(params), step=jnp.zeros((), jnp.int32))


def shardings(state: State, frozen: nnx.State, mesh: Mesh) -> tuple[State, nnx.State, NamedSharding, NamedSharding]:
    """How state, frozen weights, a batch [accumulation, rows, ...] and `stop` [devices] lie on the mesh.

    Optimizer moments lie as the weights that they belong to: optax keeps them under the same names.
    """
    whole: Any = NamedSharding(mesh, PartitionSpec())

    def moment(keys: Any, leaf: Any) -> NamedSharding:
        names = path_of(keys).split(".")
        for start in range(len(names)):  # the weight's own path is the end of the moment's
            if names[start] in ("blocks", "embedding", "head"):
                return NamedSharding(mesh, spec_of(".".join(names[start:]), leaf.shape, mesh))
        return whole

    opt = jax.tree_util.tree_map_with_path(moment, state.opt)
    placed = State(params=state_shardings(state.params, mesh), opt=opt, step=whole)
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return placed, state_shardings(frozen, mesh), NamedSharding(mesh, PartitionSpec(None, *ROWS)), everywhere


def jitted(step: Step, lies: tuple[State, nnx.State, NamedSharding, NamedSharding]) -> Any:
    """The step as one program; the state's memory is used again, and comes out lying as it went in."""
    state, frozen, batch, stop = lies
    whole = NamedSharding(stop.mesh, PartitionSpec())
    return jax.jit(step, in_shardings=(state, frozen, batch, stop), out_shardings=(state, whole), donate_argnums=0)
