r"""Does a training step fit a machine that is not present, and what is the least time that it takes there?

The step is the one of `lindm sft` (`lindm.llm.sft.step`), lowered from shapes alone and compiled by XLA for the devices of a TPU
slice, or for those of this machine. The compiler reports the memory that a device needs; `lindm.llm.cluster.program_cost` counts
operations, memory traffic and communication in the compiled program. Divided by the peak rates of the chip
(`lindm.llm.parallel.chips`), these give a lower bound on the time of a step, not a prediction.

A plan fits if XLA compiled it (XLA refuses programs that exceed the memory) and its peak leaves `HEADROOM` of the memory free,
which the runtime, evaluation and fragmentation need.
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
from lindm.llm.attention_kernels import SPLASH_LANES
from lindm.llm.cluster.program_cost import ProgramCost, program_cost
from lindm.llm.config import BaseFormat, ModelConfig, Remat
from lindm.llm.lora import add_lora, quantize
from lindm.llm.model import Decoder
from lindm.llm.parallel.chips import find_chip, topology_sizes
from lindm.llm.parallel.devices import available_host_memory, measured_peak_flops
from lindm.llm.parallel.sharding import AXES, check_batch_size, make_mesh
from lindm.llm.sft.flops import train_step_flops
from lindm.llm.sft.loss import ComputeConfig
from lindm.llm.sft.optimizer import OptimizerConfig, make_optimizer
from lindm.llm.sft.options import Method
from lindm.llm.sft.packing import Batch
from lindm.llm.sft.step import StepShardings, TrainState, init_train_state, jit_train_step, make_train_step, step_shardings

HEADROOM = 0.05  # fraction of the memory that a plan must leave free
MAX_MESHES = 6  # meshes that are compared where none is given
HOST = "host"


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """The training step of a run."""

    model_config: ModelConfig
    batch: int  # rows per micro-batch, over all devices
    seq: int  # tokens per row
    labels: int = 64  # maximum per row
    accumulate: int = 1  # micro-batches per step
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


class DeviceMemory(NamedTuple):
    """Bytes on one device, as reported by the compiler."""

    arguments: int  # weights, optimizer state, batch
    outputs: int  # that do not reuse the memory of arguments
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        return sum(self)


class DeviceLimits(NamedTuple):
    """Memory and peak rates of a device; None where not known."""

    device_kind: str
    memory: int | None  # bytes
    peak_flops: float  # operations per second
    memory_bandwidth: float | None  # bytes per second
    link_bandwidth: float | None  # bytes per second


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """The compiled step on one mesh; all numbers are per device and step."""

    mesh: dict[str, int]
    fits: bool
    memory: DeviceMemory | None = None  # None: the compiler refused the program
    refusal: str = ""  # the compiler's message
    required_bytes: int | None = None  # by that message
    cost: ProgramCost | None = None
    time_bounds: dict[str, float] | None = None  # least seconds for each of compute, memory, links
    compile_seconds: float = 0.0

    @property
    def bound_seconds(self) -> float:
        """Least seconds per step."""
        return max(self.time_bounds.values()) if self.time_bounds else math.inf


# --- devices ---------------------------------------------------------------------------------------------------------------


def topology_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice such as v5e:4x4, described by the TPU compiler, or with "host" those of this machine.

    Raises:
      ValueError: no such slice.
      UsageError: the TPU compiler is not installed.
    """
    if topology == HOST:
        return list(jax.devices())
    sizes = topology_sizes(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("a plan for TPUs needs their compiler: pip install 'lindm[tpu]'")
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices)
    except Exception as e:
        raise ValueError(f"topology {topology} does not exist: {str(e).splitlines()[0]}") from e


def device_limits(devices: Sequence[Any]) -> DeviceLimits:
    """The limits of one of these devices. Virtual CPU devices share one machine equally.

    Raises:
      ValueError: a device that is not in the table of chips.
    """
    chip = find_chip(devices[0].device_kind)
    if chip is not None:
        return DeviceLimits(devices[0].device_kind, chip.memory, chip.peak_flops, chip.memory_bandwidth, chip.link_bandwidth)
    if devices[0].platform != "cpu":
        raise ValueError(f"topology must have devices in the table of chips; got {devices[0].device_kind}")
    memory = available_host_memory()
    return DeviceLimits("CPU", memory and memory // len(devices), measured_peak_flops() / len(devices), None, None)


# --- the program -----------------------------------------------------------------------------------------------------------


class StepProgram(NamedTuple):
    """The jitted step, and the shapes and shardings of its arguments: state, frozen weights, batch, stop flags."""

    step: Any
    arguments: tuple[TrainState, nnx.State, Batch, jax.ShapeDtypeStruct]
    shardings: StepShardings


def abstract_model(spec: StepSpec) -> Decoder:
    """The model with shapes in place of weights."""

    def build() -> Decoder:
        model = Decoder(spec.model_config, nnx.Rngs(0), jnp.float32)
        if spec.method != "full":
            quantize(model, spec.base)
            add_lora(model, spec.lora_rank, 2.0 * spec.lora_rank, jax.random.key(0))
        return model

    return nnx.eval_shape(build)


def step_program(spec: StepSpec, mesh: Mesh) -> StepProgram:
    """The training step on a mesh; nothing is allocated.

    Raises:
      ValueError: the mesh does not divide a weight or the batch.
    """
    check_batch_size(spec.batch, mesh)
    graphdef, params, frozen = nnx.split(abstract_model(spec), nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(steps=1000))
    state = jax.eval_shape(lambda p: init_train_state(p, optimizer), params)
    shardings = step_shardings(state, frozen, mesh)
    compute = ComputeConfig(dtype=jnp.bfloat16 if spec.dtype == "bf16" else jnp.float32, remat=spec.remat)

    def ints(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    tokens, labels = ((spec.accumulate, spec.batch, n) for n in (spec.seq, spec.labels))
    batch = Batch(
        ids=ints(*tokens), positions=ints(*tokens), segments=ints(*tokens), label_positions=ints(*labels), targets=ints(*labels)
    )
    return StepProgram(
        jit_train_step(make_train_step(graphdef, optimizer, compute, mesh), shardings),
        (state, frozen, batch, ints(mesh.size)),
        shardings,
    )


def compile_plan(spec: StepSpec, mesh: Mesh, limits: DeviceLimits) -> MeshPlan:
    """Compile the step on a mesh; a program that XLA refuses for lack of memory is a plan that does not fit."""
    sizes = {axis: int(mesh.shape[axis]) for axis in AXES}
    program = step_program(spec, mesh)
    start = time.perf_counter()
    try:
        compiled = program.step.lower(*program.arguments).compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        seconds = time.perf_counter() - start
        refusal = str(e).strip().splitlines()[0][:300]
        return MeshPlan(
            mesh=sizes, fits=False, refusal=refusal, required_bytes=parse_required_bytes(str(e)), compile_seconds=seconds
        )
    return plan_from_compiled(compiled, sizes, limits, time.perf_counter() - start)


def plan_from_compiled(compiled: Any, sizes: dict[str, int], limits: DeviceLimits, compile_seconds: float = 0.0) -> MeshPlan:
    """The plan of a compiled step."""
    analysis, cost = compiled.memory_analysis(), program_cost(compiled.as_text())
    memory = DeviceMemory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )
    fits = limits.memory is None or memory.peak <= (1 - HEADROOM) * limits.memory
    return MeshPlan(
        mesh=sizes,
        fits=fits,
        memory=memory,
        cost=cost,
        time_bounds=time_lower_bounds(cost, limits),
        compile_seconds=compile_seconds,
    )


def time_lower_bounds(cost: ProgramCost, limits: DeviceLimits) -> dict[str, float]:
    """Least seconds of a step for its products, its memory traffic and its communication."""
    times = {"compute": cost.flops / limits.peak_flops}
    if limits.memory_bandwidth:
        times["memory"] = cost.memory_bytes / limits.memory_bandwidth
    if limits.link_bandwidth:
        times["links"] = cost.sent_bytes / limits.link_bandwidth
    return times


def parse_required_bytes(message: str) -> int | None:
    """Bytes of "Used 21.53G of 15.75G hbm" or "required ... (149.06G) exceeds available" in XLA's message; None for others."""
    match = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available", message)
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else None


# --- which mesh ------------------------------------------------------------------------------------------------------------


def candidate_meshes(spec: StepSpec, devices: Sequence[Any]) -> list[dict[str, int]]:
    """Up to `MAX_MESHES` meshes of all devices that divide heads, weights and batch.

    Meshes that should fit come first, then those that send least. `fsdp` alone, the default of `lindm sft`, is among them if it
    divides these.

    Raises:
      ValueError: no mesh divides them.
    """
    n, config = len(devices), spec.model_config
    candidates: list[tuple[int, dict[str, int]]] = []
    state = step_program(spec, make_mesh({}, devices[:1])).arguments
    for data, fsdp, tensor in itertools.product(range(1, n + 1), repeat=3):
        if data * fsdp * tensor != n or tensor > 8 or config.num_kv_heads % tensor or config.num_heads % tensor:
            continue
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
        mesh = make_mesh(sizes, devices)
        try:
            check_batch_size(spec.batch, mesh)
            shardings = step_shardings(*state[:2], mesh)
        except ValueError:
            continue
        bytes_held = sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in _pairs(state[:2], shardings[:2]))
        candidates.append((bytes_held, sizes))
    if not candidates:
        raise ValueError(
            f"batch must be a multiple of data x fsdp of a mesh of {n} devices that divides the model; got {spec.batch}"
        )
    chip = find_chip(devices[0].device_kind)

    def rank(candidate: tuple[int, dict[str, int]]) -> tuple[bool, float, int]:
        too_large = chip is not None and _estimated_memory(spec, *candidate) > 1.25 * chip.memory
        return too_large, _estimated_sent_bytes(spec, candidate[1]), candidate[0]

    default = {"data": 1, "fsdp": n, "tensor": 1}
    ordered = [sizes for _, sizes in sorted(candidates, key=rank)]
    if default in ordered[MAX_MESHES:]:
        ordered[MAX_MESHES - 1] = default
    return ordered[:MAX_MESHES]


def _pairs(values: Any, shardings: Any) -> list[tuple[Any, Any]]:
    return list(zip(jax.tree.leaves(values), jax.tree.leaves(shardings), strict=True))


def _estimated_memory(spec: StepSpec, bytes_held: int, sizes: dict[str, int]) -> float:
    """Approximate bytes on a device: state, weights in the compute dtype, gradients, activations, logits."""
    config, tensor, width = spec.model_config, sizes["tensor"], 2 if spec.dtype == "bf16" else 4
    shard = config.num_parameters / (sizes["fsdp"] * tensor)
    rows = spec.batch / (sizes["data"] * sizes["fsdp"])
    layer = (
        rows * spec.seq * width * (4 * config.intermediate_size / tensor + 6 * config.hidden_size)
        + 4 * SPLASH_LANES * rows * config.num_heads / tensor * spec.seq  # of the attention kernel: statistics of a query
    )
    products = (
        2 * config.intermediate_size + (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    ) / tensor + config.hidden_size
    one = rows * spec.seq * width * (config.hidden_size + (products if spec.remat == "selective" else 0))
    kept = layer * config.num_layers if spec.remat == "none" else one * config.num_layers + layer
    head = (
        config.vocab_size / (tensor * sizes["fsdp"]) * (config.hidden_size * width + 8 * spec.batch / sizes["data"] * spec.labels)
    )
    return bytes_held + shard * (width + 4 * (spec.method == "full")) + kept + head


def _estimated_sent_bytes(spec: StepSpec, sizes: dict[str, int]) -> float:
    """Approximate bytes that a device sends: weights gathered three times, gradients once, activations of a tensor axis."""
    config, rows = spec.model_config, spec.batch / (sizes["data"] * sizes["fsdp"])
    times = 3 * (sizes["fsdp"] > 1) + (spec.method == "full") * (1 + (sizes["data"] > 1))
    weights = times * 2.0 * config.num_parameters / sizes["tensor"]
    return spec.accumulate * (
        weights + (sizes["tensor"] > 1) * 12 * config.num_layers * rows * spec.seq * config.hidden_size * 2.0
    )


def compile_plans(
    spec: StepSpec,
    devices: Sequence[Any],
    limits: DeviceLimits,
    meshes: Sequence[dict[str, int]],
    progress: Callable[[int, int, str], None] = lambda done, total, mesh: None,
) -> list[MeshPlan]:
    """The plan of every mesh: those that fit first, then by their lower bound on time.

    Args:
      progress: called with the number of plans made, that of all, and the mesh that is compiled next.

    Raises:
      ValueError: a mesh that does not fit the devices, the weights or the batch.
    """
    plans = []
    built = [make_mesh(sizes, devices) for sizes in meshes]  # all of them first: each compilation takes a minute
    for mesh in built:
        progress(len(plans), len(built), format_mesh(dict(mesh.shape)))
        plans.append(compile_plan(spec, mesh, limits))
    return sorted(plans, key=lambda p: (not p.fits, p.bound_seconds))


def format_mesh(sizes: dict[str, int]) -> str:
    """A mesh as text, fsdp=8,tensor=2; axes of size 1 are left out."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "fsdp=1"


def model_flops(spec: StepSpec) -> float:
    """Operations of the model's own arithmetic in a step, over all devices, by formula; recomputation is not counted."""
    return spec.accumulate * train_step_flops(spec.model_config, spec.method, spec.batch, spec.seq, spec.labels)


def plan_to_json(plan: MeshPlan) -> dict[str, Any]:
    """A plan as JSON values: bytes, operations and seconds, per device and step."""
    values: dict[str, Any] = {"mesh": plan.mesh, "fits": plan.fits, "compile_seconds": round(plan.compile_seconds, 1)}
    if plan.memory is None or plan.cost is None:
        return values | {"refusal": plan.refusal, "required_bytes": plan.required_bytes}
    cost = plan.cost
    return values | {
        "memory": plan.memory._asdict() | {"peak": plan.memory.peak},
        "flops": cost.flops,
        "memory_bytes": cost.memory_bytes,
        "sent_bytes": cost.sent_bytes,
        "unknown_loops": cost.unknown_loops,
        "time_bounds": plan.time_bounds,
        "bound_seconds": plan.bound_seconds,
        "collectives": [c._asdict() for c in cost.collectives],
    }
