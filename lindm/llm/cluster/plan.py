r"""Does a training step fit a machine that is not present, and what is the least time that it takes there?

The step is the one of `lindm sft` (`lindm.llm.sft.step`), lowered from shapes alone and compiled by XLA for the devices of a TPU
slice, or for those of this machine. The compiler reports the memory that a device needs; `lindm.llm.cluster.program_cost` counts
operations, memory traffic and communication in the compiled program. Divided by the peak rates of the chip
(`lindm.llm.parallel.chips`), these give a lower bound on the time of a step, not a prediction.

A plan fits if XLA compiled it (XLA refuses programs that exceed the memory) and its peak leaves `HEADROOM` of the memory free,
which the runtime, evaluation and fragmentation need. There is no compiler for GPUs here: their plans are estimates by arithmetic
(`lindm.llm.cluster.estimate`) and say so.
"""

import importlib.util
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from lindm.errors import UsageError
from lindm.llm.cluster.estimate import estimate_cost, estimate_memory
from lindm.llm.cluster.plan_types import DeviceLimits, DeviceMemory, MeshPlan, StepSpec
from lindm.llm.cluster.program_cost import ProgramCost, program_cost
from lindm.llm.lora import add_lora, quantize
from lindm.llm.model import Decoder
from lindm.llm.parallel.chips import Chip, find_chip, tpu_topology
from lindm.llm.parallel.devices import available_host_memory, measured_peak_flops, memory_limit
from lindm.llm.parallel.sharding import AXES, check_batch_size, check_mesh_size, make_mesh
from lindm.llm.sft.loss import ComputeConfig
from lindm.llm.sft.optimizer import OptimizerConfig, make_optimizer
from lindm.llm.sft.packing import Batch
from lindm.llm.sft.step import StepShardings, TrainState, init_train_state, jit_train_step, make_train_step, step_shardings

HEADROOM = 0.05  # fraction of the memory that a plan must leave free
MAX_MESHES = 6  # meshes that are compared where none is given
HOST = "host"


# --- devices ---------------------------------------------------------------------------------------------------------------


def topology_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice such as v5e:4x4 or v5e-16, described by the TPU compiler, or with "host" those of this machine.

    Raises:
      ValueError: no such slice.
      UsageError: the TPU compiler is not installed.
    """
    if topology == HOST:
        return list(jax.devices())
    name = tpu_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("a plan for TPUs needs their compiler: pip install -e '.[tpu]'")
    alone = {"chips_per_host_bounds": (1, 1, 1)} if set(name.partition(":")[2]) <= set("1x") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **alone).devices)
    except Exception as e:
        raise ValueError(f"topology {topology} does not exist: {str(e).splitlines()[0]}") from e


def device_limits(devices: Sequence[Any]) -> DeviceLimits:
    """The limits of one of these devices: of one that is here at most the memory that jax may take. Virtual CPU devices share one
    machine equally.

    Raises:
      ValueError: a device that is not in the table of chips.
    """
    chip = find_chip(devices[0].device_kind)
    if chip is not None:
        limits, memory = chip_limits(chip, devices[0].device_kind), memory_limit(devices[0])
        return limits if memory is None else limits._replace(memory=min(chip.memory, memory))
    if devices[0].platform != "cpu":
        raise ValueError(f"topology must have devices in the table of chips; got {devices[0].device_kind}")
    memory = available_host_memory()
    return DeviceLimits("CPU", memory and memory // len(devices), measured_peak_flops() / len(devices), None, None)


def chip_limits(chip: Chip, device_kind: str) -> DeviceLimits:
    """The limits of a device of the table of chips."""
    return DeviceLimits(device_kind, chip.memory, chip.peak_flops, chip.memory_bandwidth, chip.link_bandwidth)


# --- the program -----------------------------------------------------------------------------------------------------------


class StepProgram(NamedTuple):
    """The jitted step, and the shapes and shardings of its arguments: state, frozen weights, batch, stop flags."""

    step: Any
    arguments: tuple[TrainState, nnx.State, Batch, jax.ShapeDtypeStruct]
    shardings: StepShardings


def abstract_model(spec: StepSpec) -> Decoder:
    """The model with shapes in place of weights."""

    def build() -> Decoder:
        model = Decoder(spec.model_config, nnx.Rngs(0), jnp.bfloat16 if spec.base == "bf16" else jnp.float32)
        if spec.method != "full":
            quantize(model, spec.base)
            add_lora(model, spec.lora_rank, 2.0 * spec.lora_rank, jax.random.key(0))
        return model

    return nnx.eval_shape(build)


def abstract_state(spec: StepSpec) -> tuple[nnx.GraphDef, optax.GradientTransformation, TrainState, nnx.State]:
    """The structure of the model, the optimizer, and shapes of the training state and of the frozen weights."""
    graphdef, params, frozen = nnx.split(abstract_model(spec), nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(steps=1000, optimizer=spec.optimizer, moments=spec.moments))
    return graphdef, optimizer, jax.eval_shape(lambda p: init_train_state(p, optimizer), params), frozen


def step_program(spec: StepSpec, mesh: Mesh) -> StepProgram:
    """The training step on a mesh; nothing is allocated.

    Raises:
      ValueError: the mesh does not divide a weight or the batch.
    """
    check_batch_size(spec.batch, mesh)
    graphdef, optimizer, state, frozen = abstract_state(spec)
    shardings = step_shardings(state, frozen, mesh)
    compute = ComputeConfig(dtype=jnp.bfloat16 if spec.dtype == "bf16" else jnp.float32, remat=spec.remat)

    def ints(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    tokens, labels = ((spec.accumulate, spec.batch, n) for n in (spec.seq, spec.labels_per_row))
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


def candidate_meshes(spec: StepSpec, devices: int, memory: int | None) -> list[dict[str, int]]:
    """Up to `MAX_MESHES` meshes of all devices that divide heads, weights and batch.

    Meshes that should fit the memory of a device come first, then those that send least. `fsdp` alone, the default of `lindm
    sft`, is among them if it divides these.

    Raises:
      ValueError: no mesh divides them.
    """
    config, candidates = spec.model_config, []
    state = abstract_state(spec)[2:]
    for data, fsdp, tensor in itertools.product(range(1, devices + 1), repeat=3):
        if data * fsdp * tensor != devices or tensor > 8 or config.num_kv_heads % tensor or config.num_heads % tensor:
            continue
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
        try:
            candidates.append((held_bytes(spec, state, sizes), sizes))
        except ValueError:
            continue
    if not candidates:
        raise ValueError(
            f"batch must be a multiple of data x fsdp of a mesh of {devices} devices that divides the model; got {spec.batch}"
        )

    def rank(candidate: tuple[int, dict[str, int]]) -> tuple[bool, float, int]:
        held, sizes = candidate
        too_large = memory is not None and estimate_memory(spec, held, sizes).peak > 1.25 * memory
        return too_large, estimate_cost(spec, sizes).sent_bytes, held

    default = {"data": 1, "fsdp": devices, "tensor": 1}
    ordered = [sizes for _, sizes in sorted(candidates, key=rank)]
    if default in ordered[MAX_MESHES:]:
        ordered[MAX_MESHES - 1] = default
    return ordered[:MAX_MESHES]


def held_bytes(spec: StepSpec, state: tuple[TrainState, nnx.State], sizes: dict[str, int]) -> int:
    """Bytes of training state and frozen weights on one device of a mesh of these sizes.

    Raises:
      ValueError: the mesh does not divide a weight or the batch.
    """
    mesh: Any = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    check_batch_size(spec.batch, mesh)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(step_shardings(*state, mesh)[:2]), strict=True)
    return sum(math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize for x, sharding in leaves)


def estimate_plans(spec: StepSpec, devices: int, limits: DeviceLimits, meshes: Sequence[dict[str, int]]) -> list[MeshPlan]:
    """The plan of every mesh by arithmetic, without a compiler: those that fit first, then by their lower bound on time.

    Raises:
      ValueError: a mesh that does not use all devices, or does not divide the weights or the batch.
    """
    state, plans = abstract_state(spec)[2:], []
    for sizes in meshes:
        check_mesh_size(sizes, devices)
        memory, cost = estimate_memory(spec, held_bytes(spec, state, sizes), sizes), estimate_cost(spec, sizes)
        fits = limits.memory is None or memory.peak <= (1 - HEADROOM) * limits.memory
        bounds = {name: seconds for name, seconds in time_lower_bounds(cost, limits).items() if name != "memory"}
        plans.append(MeshPlan(mesh=sizes, fits=fits, estimated=True, memory=memory, cost=cost, time_bounds=bounds))
    return sorted(plans, key=lambda p: (not p.fits, p.bound_seconds))


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


def plan_to_json(plan: MeshPlan) -> dict[str, Any]:
    """A plan as JSON values: bytes, operations and seconds, per device and step."""
    values: dict[str, Any] = {
        "mesh": plan.mesh,
        "fits": plan.fits,
        "estimated": plan.estimated,
        "compile_seconds": round(plan.compile_seconds, 1),
    }
    if plan.memory is None or plan.cost is None:
        return values | {"refusal": plan.refusal, "required_bytes": plan.required_bytes}
    cost = plan.cost
    if plan.estimated:
        values = {name: value for name, value in values.items() if name != "compile_seconds"}
    return values | {
        "memory": plan.memory._asdict() | {"peak": plan.memory.peak},
        "flops": cost.flops,
        "memory_bytes": None if plan.estimated else cost.memory_bytes,
        "sent_bytes": cost.sent_bytes,
        "unknown_loops": cost.unknown_loops,
        "time_bounds": plan.time_bounds,
        "bound_seconds": plan.bound_seconds,
        "collectives": [c._asdict() for c in cost.collectives],
    }
