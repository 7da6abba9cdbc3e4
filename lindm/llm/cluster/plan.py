r"""Whether a fine-tuning step fits a machine that is not here, and what it would have to do there.

The step is the one that `lindm sft` runs (`lindm.llm.sft.step`), lowered from shapes alone and compiled by XLA for the devices
of a TPU slice, or for those of this machine. The compiler says what memory a device needs; `lindm.llm.cluster.program_cost` reads
from its program how many operations, bytes and messages a step takes. Over what a chip can do at most
(`lindm.llm.parallel.chips`, and `LINKS`) that gives the time that no step can be shorter than: a bound, no prediction.

A plan fits if XLA compiled it (it refuses what exceeds the memory it may use) and it leaves `HEADROOM` of the device's memory
free: the runtime, evaluation and fragments need some.
"""

import importlib.util
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from lindm.choices import check_choices
from lindm.errors import UsageError
from lindm.llm.cluster.program_cost import Work, work
from lindm.llm.config import BaseFormat, ModelConfig, Remat
from lindm.llm.lora import add_lora, quantize
from lindm.llm.model import Decoder
from lindm.llm.parallel import chips
from lindm.llm.parallel.sharding import AXES, check_batch_size, make_mesh
from lindm.llm.sft.evaluator import flops_of_step
from lindm.llm.sft.loss import ComputeConfig
from lindm.llm.sft.optimizer import OptimizerConfig, make_optimizer
from lindm.llm.sft.options import Method
from lindm.llm.sft.packing import Batch
from lindm.llm.sft.step import TrainState, init_train_state, jit_train_step, make_train_step, step_shardings

HEADROOM = 0.05
TRIED = 6  # meshes that are compiled where none is asked for
HOST = "host"
SLICES = {"v5e": 2, "v5p": 3, "v6e": 2}  # kinds and how many sides a slice has
# bytes a second that a chip can send over all its links together, from the maker's data sheets
LINKS = {"TPU v5 lite": 200e9, "TPU v5e": 200e9, "TPU v5p": 600e9, "TPU v5": 600e9, "TPU v6 lite": 400e9, "TPU v6e": 400e9}
LINKS |= {"TPU v4": 300e9}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step of a run."""

    model_config: ModelConfig
    batch: int  # rows of a micro-batch, over all devices
    seq: int  # tokens of a row
    labels: int = 64  # of a row, at most
    accumulate: int = 1
    method: Method = "full"
    lora_rank: int = 16
    base: BaseFormat = "f32"
    dtype: Literal["f32", "bf16"] = "bf16"  # of the activations
    remat: Remat = "selective"

    def __post_init__(self):
        for name in ("batch", "seq", "labels", "accumulate", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.labels <= self.seq <= self.model_config.max_position_embeddings:
            limit = f"at least labels = {self.labels} and at most the model's {self.model_config.max_position_embeddings}"
            raise ValueError(f"seq must be {limit}; got {self.seq}")
        bases = {"full": ("f32",), "lora": get_args(BaseFormat), "qlora": ("int8", "nf4")}
        check_choices(self)
        if self.base not in bases[self.method]:
            raise ValueError(f"base must be one of {', '.join(bases[self.method])} with method {self.method}; got {self.base!r}")


class Memory(NamedTuple):
    """Bytes on one device, as the compiler says."""

    arguments: int  # weights, optimizer state, batch
    outputs: int  # beyond the arguments whose memory they take
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        return sum(self)


class Limits(NamedTuple):
    """What a device can do at most, a second; None where it is not known."""

    kind: str
    memory: int | None  # bytes
    flops: float
    bandwidth: float | None
    links: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One mesh, compiled; all numbers are of one device and one step."""

    mesh: dict[str, int]
    fits: bool
    memory: Memory | None = None  # None: refused
    refusal: str = ""  # the compiler's words
    needs: int | None = None  # bytes, where it was refused and says so
    work: Work | None = None
    seconds: dict[str, float] | None = None  # at least, for each of compute, memory, links
    compiling: float = 0.0  # seconds that the compiler took

    @property
    def bound(self) -> float:
        """Seconds that a step takes at least."""
        return max(self.seconds.values()) if self.seconds else math.inf


# --- devices ---------------------------------------------------------------------------------------------------------------


def devices_of(topology: str) -> list[Any]:
    """The devices of a slice such as v5e:4x4, described by its compiler, or this host's own.

    Raises:
      ValueError: no such slice.
      LindmError: 2, the TPU compiler is not installed.
    """
    if topology == HOST:
        return list(jax.devices())
    kind, _, sides = topology.partition(":")
    if kind not in SLICES or not re.fullmatch(r"\d+(x\d+)" + "{" + str(SLICES[kind] - 1) + "}", sides):
        known = "host, or a slice such as v5e:4x4, v6e:2x4 (chips along two sides) or v5p:2x2x4 (three)"
        raise ValueError(f"topology must be {known}; got {topology!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("to plan for TPUs, their compiler is needed: pip install 'lindm[tpu]'")
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(map(int, sides.split("x"))) == 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices)
    except Exception as e:
        raise ValueError(f"topology {topology} is not one that exists: {str(e).splitlines()[0]}") from e


def limits_of(devices: Sequence[Any]) -> Limits:
    """Of one of these devices. CPU devices share one machine: each has its part of it.

    Raises:
      ValueError: a device whose figures are not known.
    """
    chip = chips.chip_of(devices[0])
    if chip is not None:
        return Limits(devices[0].device_kind, chip.memory, chip.peak, chip.bandwidth, LINKS.get(chip.kind))
    if devices[0].platform != "cpu":
        raise ValueError(f"topology must have devices whose figures are known; got {devices[0].device_kind}")
    memory = chips.host_memory()
    return Limits("CPU", memory and memory // len(devices), chips.measured_peak() / len(devices), None, None)


# --- the program -----------------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A step that can be lowered, and the shapes of what it takes: state, frozen weights, batch, stop."""

    step: Any
    arguments: tuple[TrainState, nnx.State, Batch, jax.ShapeDtypeStruct]
    shardings: tuple[Any, ...]  # how they lie


def abstract(job: Job) -> Decoder:
    """The model of a job with shapes in the place of weights."""

    def build() -> Decoder:
        model = Decoder(job.model_config, nnx.Rngs(0), jnp.float32)
        if job.method != "full":
            quantize(model, job.base)
            add_lora(model, job.lora_rank, 2.0 * job.lora_rank, jax.random.key(0))
        return model

    return nnx.eval_shape(build)


def program(job: Job, mesh: Mesh) -> Program:
    """The training step of a job on a mesh; nothing is allocated.

    Raises:
      ValueError: the mesh does not divide a weight or the batch.
    """
    check_batch_size(job.batch, mesh)
    graphdef, params, frozen = nnx.split(abstract(job), nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(steps=1000))
    state = jax.eval_shape(lambda p: init_train_state(p, optimizer), params)
    shardings = step_shardings(state, frozen, mesh)
    compute = ComputeConfig(dtype=jnp.bfloat16 if job.dtype == "bf16" else jnp.float32, remat=job.remat)

    def ints(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    whole, few = ((job.accumulate, job.batch, n) for n in (job.seq, job.labels))
    batch = Batch(ids=ints(*whole), positions=ints(*whole), segments=ints(*whole), label_positions=ints(*few), targets=ints(*few))
    return Program(
        jit_train_step(make_train_step(graphdef, optimizer, compute, mesh), shardings),
        (state, frozen, batch, ints(mesh.size)),
        shardings,
    )


def compile_plan(job: Job, mesh: Mesh, limits: Limits) -> Plan:
    """Compile, and read what came out; a program that XLA refuses for its memory is a plan that does not fit."""
    sizes = {axis: int(mesh.shape[axis]) for axis in AXES}
    found = program(job, mesh)
    begun = time.perf_counter()
    try:
        done = found.step.lower(*found.arguments).compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        seconds = time.perf_counter() - begun
        return Plan(mesh=sizes, fits=False, refusal=_first_line(str(e)), needs=needed(str(e)), compiling=seconds)
    return read(done, sizes, limits, time.perf_counter() - begun)


def read(done: Any, sizes: dict[str, int], limits: Limits, compiling: float = 0.0) -> Plan:
    """The plan that a compiled step is."""
    said, counted = done.memory_analysis(), work(done.as_text())
    memory = Memory(
        arguments=said.argument_size_in_bytes,
        outputs=said.output_size_in_bytes - said.alias_size_in_bytes,
        temporaries=said.temp_size_in_bytes,
        code=said.generated_code_size_in_bytes,
    )
    fits = limits.memory is None or memory.peak <= (1 - HEADROOM) * limits.memory
    return Plan(mesh=sizes, fits=fits, memory=memory, work=counted, seconds=bounds(counted, limits), compiling=compiling)


def bounds(counted: Work, limits: Limits) -> dict[str, float]:
    """Seconds that a step takes at least for its products, for its memory traffic and for what a device sends."""
    times = {"compute": counted.flops / limits.flops}
    if limits.bandwidth:
        times["memory"] = counted.bytes / limits.bandwidth
    if limits.links:
        times["links"] = counted.sent / limits.links
    return times


def needed(message: str) -> int | None:
    """Bytes of "Used 21.53G of 15.75G hbm", or of "required ... (149.06G) exceeds available", in what XLA refuses with."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available", message)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else None


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:300]


# --- which mesh ------------------------------------------------------------------------------------------------------------


def sensible(job: Job, devices: Sequence[Any]) -> list[dict[str, int]]:
    """Meshes of all devices that divide heads, weights and batch, those that should fit and send least first; `fsdp` alone, which
    `lindm sft` takes if told nothing, is among them where it divides these.

    Raises:
      ValueError: none does.
    """
    n, config, found = len(devices), job.model_config, []
    state = program(job, make_mesh({}, devices[:1])).arguments
    for data, fsdp, tensor in itertools.product(range(1, n + 1), repeat=3):
        if data * fsdp * tensor != n or tensor > 8 or config.num_kv_heads % tensor or config.num_heads % tensor:
            continue
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
        mesh = make_mesh(sizes, devices)
        try:
            check_batch_size(job.batch, mesh)
            shardings = step_shardings(*state[:2], mesh)
        except ValueError:
            continue
        held = sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in _pairs(state[:2], shardings[:2]))
        found.append((held, sizes))
    if not found:
        raise ValueError(
            f"batch must be a multiple of data x fsdp of a mesh of {n} devices that divides the model; got {job.batch}"
        )
    chip = chips.chip_of(devices[0])
    ranked = sorted(found, key=lambda f: (chip is not None and _guess(job, *f) > 1.25 * chip.memory, _wire(job, f[1]), f[0]))
    plain = {"data": 1, "fsdp": n, "tensor": 1}
    ordered = [sizes for _, sizes in ranked]
    if plain in ordered[TRIED:]:
        ordered[TRIED - 1] = plain
    return ordered[:TRIED]


def _pairs(values: Any, shardings: Any) -> list[tuple[Any, Any]]:
    return list(zip(jax.tree.leaves(values), jax.tree.leaves(shardings), strict=True))


def _guess(job: Job, held: int, sizes: dict[str, int]) -> float:
    """Bytes on a device, roughly: what is held, weights as they are computed with, gradients, activations, logits."""
    config, tensor, width = job.model_config, sizes["tensor"], 2 if job.dtype == "bf16" else 4
    shard = config.num_parameters / (sizes["fsdp"] * tensor)
    rows = job.batch / (sizes["data"] * sizes["fsdp"])
    layer = (
        rows * job.seq * width * (4 * config.intermediate_size / tensor + 6 * config.hidden_size)
        + 12 * rows * config.num_heads / tensor * job.seq**2
    )
    products = (
        2 * config.intermediate_size + (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    ) / tensor + config.hidden_size
    one = rows * job.seq * width * (config.hidden_size + (products if job.remat == "selective" else 0))
    kept = layer * config.num_layers if job.remat == "none" else one * config.num_layers + layer
    head = (
        config.vocab_size / (tensor * sizes["fsdp"]) * (config.hidden_size * width + 8 * job.batch / sizes["data"] * job.labels)
    )
    return held + shard * (width + 4 * (job.method == "full")) + kept + head


def _wire(job: Job, sizes: dict[str, int]) -> float:
    """Bytes that a device sends, roughly: weights gathered three times, gradients once, and activations of a tensor axis."""
    config, rows = job.model_config, job.batch / (sizes["data"] * sizes["fsdp"])
    times = 3 * (sizes["fsdp"] > 1) + (job.method == "full") * (1 + (sizes["data"] > 1))
    weights = times * 2.0 * config.num_parameters / sizes["tensor"]
    return job.accumulate * (weights + (sizes["tensor"] > 1) * 12 * config.num_layers * rows * job.seq * config.hidden_size * 2.0)


def plans(
    job: Job,
    devices: Sequence[Any],
    limits: Limits,
    meshes: Sequence[dict[str, int]],
    tell: Callable[[str], None] = lambda line: None,
) -> list[Plan]:
    """Every mesh compiled; those that fit first, and then by the bound on their time.

    Raises:
      ValueError: a mesh that does not fit the devices, the weights or the batch.
    """
    found = []
    built = [make_mesh(sizes, devices) for sizes in meshes]  # all of them, before the first takes a minute
    for number, mesh in enumerate(built, start=1):
        tell(f"compiling {named(dict(mesh.shape))} ({number} of {len(built)})")
        found.append(compile_plan(job, mesh, limits))
    return sorted(found, key=lambda p: (not p.fits, p.bound))


def named(sizes: dict[str, int]) -> str:
    """fsdp=8,tensor=2; axes of one device are left out."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "fsdp=1"


def model_flops(job: Job) -> float:
    """Operations of the model's own arithmetic in a step over all devices, by formula; recomputation is not counted."""
    return job.accumulate * flops_of_step(job.model_config, job.method, job.batch, job.seq, job.labels)


def described(p: Plan) -> dict[str, Any]:
    """A plan for JSON; bytes, operations and seconds."""
    found: dict[str, Any] = {"mesh": p.mesh, "fits": p.fits, "compile_seconds": round(p.compiling, 1)}
    if p.memory is None or p.work is None:
        return found | {"refusal": p.refusal, "needs": p.needs}
    counted = {"flops": p.work.flops, "bytes": p.work.bytes, "sent": p.work.sent, "unread_loops": p.work.unread}
    messages = [c._asdict() for c in p.work.listed()]
    memory = p.memory._asdict() | {"peak": p.memory.peak}
    return found | {"memory": memory, **counted, "seconds": p.seconds, "bound_seconds": p.bound, "collectives": messages}
