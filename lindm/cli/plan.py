"""`lindm plan`: memory and least time of a training step on a TPU slice, compiled without a TPU, or estimated for GPUs."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lindm.choices import Moments, Optimizer
from lindm.cli.option_parser import Command
from lindm.io.files import strict_json
from lindm.io.limits import GIB
from lindm.io.progress import Progress
from lindm.io.tables import format_table
from lindm.llm.sft.options import BaseFormat, Method, Remat

if TYPE_CHECKING:
    from lindm.llm.cluster.plan import DeviceLimits, MeshPlan, StepSpec
    from lindm.llm.cluster.program_cost import Collective, ProgramCost

# a process that only compiles for TPUs must not search for devices, query a metadata server, take a lock, or print warnings
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Compile the step of `lindm sft` for other hardware without running it: does it fit, and what does it cost there?"""

    model: Path
    """A Hugging Face directory, or a config.json; weights are not read."""
    topology: str
    """The hardware: a TPU slice by chips or accelerator type (v5e:4x4 or v5e-16, v6e-8, v5p-32, tpu7x-8; extra: tpu); GPUs, for
    which the plan is an estimate (h100:8, h200:8, b200:8, a100:8, h100-pcie:2); or host, the devices of this machine."""
    batch: int
    """Rows of a micro-batch, over all devices."""
    seq: int
    """Tokens per row."""
    labels_per_row: int = 64
    """Maximum number of trained tokens in a row."""
    accumulate: int = 1
    """Micro-batches per step."""
    method: Method = "full"
    """What to train: all weights (full), adapters (lora), or adapters over a quantized base model (qlora)."""
    lora_rank: int = 16
    """Rank of the adapters."""
    base: BaseFormat | None = None
    """Storage format of the base weights with lora and qlora. [default: that of `lindm sft` on this hardware]"""
    remat: Remat = "selective"
    """What the backward pass recomputes: full (all activations, least memory), selective (all but products with weights) or
    none."""
    optimizer: Optimizer = "adamw"
    """Optimizer; its state takes memory."""
    moments: Moments = "f32"
    """Storage of AdamW's first moments."""
    mesh: str | None = None
    """Sizes of the axes data, fsdp and tensor, such as fsdp=8,tensor=2. [default: up to six meshes are compared]"""
    json: bool = False
    """Print one JSON object."""


def run(options: Plan) -> int:
    if options.topology != "host":
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        os.environ["JAX_PLATFORMS"] = "cpu"
    from lindm.api.models import plan as plan_step
    from lindm.llm.cluster import plan

    with Progress() as progress, progress.repeated(progress.add("meshes compiled")) as task:
        result = plan_step(
            options.model,
            batch=options.batch,
            seq=options.seq,
            topology=options.topology,
            mesh=options.mesh,
            base=options.base,
            method=options.method,
            labels_per_row=options.labels_per_row,
            accumulate=options.accumulate,
            lora_rank=options.lora_rank,
            remat=options.remat,
            optimizer=options.optimizer,
            moments=options.moments,
            progress=task.update,
        )
    spec, limits, plans = result.step, result.limits, result.plans
    if options.json:
        values = {"topology": options.topology, "devices": result.devices, "limits": limits._asdict(), "headroom": plan.HEADROOM}
        values |= {"estimated": any(p.estimated for p in plans)}
        values |= {"model_flops": result.model_flops, "step": _step(spec), "plans": [plan.plan_to_json(p) for p in plans]}
        print(strict_json(values))
        return 0
    for line in _description(spec, options.topology, result.devices, limits):
        print(line)
    print("\nESTIMATE by arithmetic: nothing was compiled for these devices" if plans[0].estimated else "")
    print(format_table([HEADER, *(_row(p, spec, limits) for p in plans)]))
    if plans[0].cost is not None:
        print(f"\nCommunication per device and step with {plan.format_mesh(plans[0].mesh)}:")
        print(format_table(_collectives(plans[0].cost)))
    print()
    for line in _notes(plans, result.model_flops, plan.HEADROOM):
        print(line)
    if options.mesh is None and options.batch % result.devices:
        print(f"meshes whose data x fsdp does not divide the {options.batch} rows of --batch are left out")
    return 0


def _step(spec: "StepSpec") -> dict[str, Any]:
    names = ("batch", "seq", "labels_per_row", "accumulate", "method", "base", "dtype", "remat", "optimizer", "moments")
    step = {name: getattr(spec, name) for name in names} | {"parameters": spec.model_config.num_parameters}
    return step | ({} if spec.method == "full" else {"lora_rank": spec.lora_rank})


def _description(spec: "StepSpec", topology: str, num_devices: int, limits: "DeviceLimits") -> list[str]:
    """Three lines: model and method, step, devices."""
    trained = "all weights" if spec.method == "full" else f"adapters of rank {spec.lora_rank} over {spec.base} weights"
    trained += ", Adafactor" if spec.optimizer == "adafactor" else ", first moments in bf16" if spec.moments == "bf16" else ""
    rows = f"{spec.accumulate} x {spec.batch} rows" if spec.accumulate > 1 else f"{spec.batch} rows"
    rates = [f"{limits.peak_flops / 1e12:.3g} TFLOP/s"]
    rates += [f"{limits.memory / GIB:.1f} GiB"] if limits.memory else []
    rates += [f"{limits.memory_bandwidth / 1e9:.0f} GB/s memory"] if limits.memory_bandwidth else []
    rates += [f"{limits.link_bandwidth / 1e9:.0f} GB/s links"] if limits.link_bandwidth else []
    size = f"{spec.model_config.num_parameters / 1e9:.3g} G parameters"
    trains = f"{spec.labels_per_row} labels per row, {spec.dtype} activations, remat {spec.remat}"
    return [
        f"model    {spec.model_config.model_type}, {size}; {spec.method}: {trained}",
        f"step     {rows} x {spec.seq} tokens, {trains}",
        f"devices  {topology}: {num_devices} x {limits.device_kind}, each {', '.join(rates)}",
    ]


GPU_SHARE = 0.75  # of a GPU's memory, which jax takes where XLA_PYTHON_CLIENT_MEM_FRACTION is not set
MORE_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION=.95"
ESTIMATE_ERROR = 1 / 3  # of the temporaries, where they are estimated
HEADER = ("mesh", "fits", "peak GiB", "arguments", "temporaries", "outputs", "code")
HEADER += ("TFLOP", "GB memory", "GB sent", "ms compute", "ms memory", "ms links", "min. ms", "max. tokens/s")


def _row(plan: "MeshPlan", spec: "StepSpec", limits: "DeviceLimits") -> tuple[str, ...]:
    from lindm.llm.cluster.plan import format_mesh

    mesh, memory, cost, bounds = format_mesh(plan.mesh), plan.memory, plan.cost, plan.time_bounds
    if memory is None or cost is None or bounds is None:
        needed = f"{plan.required_bytes / GIB:.2f}" if plan.required_bytes else "refused"
        return (mesh, "no", needed, *("-" for _ in HEADER[3:]))
    gib = (f"{x / GIB:.2f}" for x in (memory.peak, memory.arguments, memory.temporaries, memory.outputs, memory.code))
    traffic = "-" if plan.estimated else f"{cost.memory_bytes / 1e9:.3g}"
    costs = f"{cost.flops / 1e12:.3g}", traffic, f"{cost.sent_bytes / 1e9:.3g}"
    times = (f"{1e3 * bounds[name]:.3g}" if name in bounds else "-" for name in ("compute", "memory", "links"))
    rate = spec.accumulate * spec.batch * spec.seq / plan.bound_seconds
    fits = "yes" if plan.fits else "no"
    if plan.fits and plan.estimated and limits.memory is not None:
        most = memory.peak + memory.temporaries * ESTIMATE_ERROR
        if most > GPU_SHARE * limits.memory:
            fits = f"{'yes' if most <= limits.memory else 'perhaps'}, with {MORE_MEMORY}"
    return (mesh, fits, *gib, *costs, *times, f"{1e3 * plan.bound_seconds:.3g}", f"{rate:,.0f}")


def _collectives(cost: "ProgramCost") -> list[tuple[str, ...]]:
    """The rows of a table: collectives by kind and group size, those that send most first."""
    groups: dict[tuple[str, int], list[Collective]] = {}
    for c in cost.collectives:
        groups.setdefault((c.kind, c.group_size), []).append(c)
    rows = [("kind", "devices", "count", "GB", "largest")]
    for (kind, size), members in sorted(groups.items(), key=lambda g: -sum(c.sent_bytes for c in g[1])):
        count, sent = sum(c.count for c in members), sum(c.sent_bytes for c in members)
        rows.append((kind, str(size), f"{count:.0f}", f"{sent / 1e9:.3g}", f"{members[0].count:.0f} x {members[0].shape}"))
    return rows if len(rows) > 1 else [("none",)]


def _notes(plans: list["MeshPlan"], model_flops: float, headroom: float) -> list[str]:
    room = f"{100 * headroom:.0f} % of the memory free, for runtime and evaluation"
    program, own = "step" if plans[0].estimated else "compiled program", f"the model's own arithmetic is {model_flops / 1e12:.3g}"
    notes = [
        f"a step fits if {'its estimated peak leaves' if plans[0].estimated else 'XLA compiles it and its peak leaves'} {room}",
        f"TFLOP: products of the {program} on one device, recomputation included; {own}",
        "min. ms: lower bound on the time of a step at the peak rates of the data sheet, not a prediction",
    ]
    if plans[0].estimated:
        notes.append(
            "the estimate is of the state exactly, and of temporaries to about a third; fits supposes a third more of them"
        )
        notes.append(f"jax takes {100 * GPU_SHARE:.0f} % of a GPU's memory unless {MORE_MEMORY} is set")
    if any(p.cost is not None and p.cost.unknown_loops for p in plans):
        notes.append("some loops have an unknown trip count and count once: the true bounds are higher")
    for p in plans:
        if p.refusal:
            from lindm.llm.cluster.plan import format_mesh

            notes.append(f"{format_mesh(p.mesh)} was refused: {p.refusal}")
    return notes


COMMAND = Command(
    name="plan",
    options=Plan,
    run=run,
    examples=("lindm plan --model models/llama-3-8b --topology v5e:4x4 --batch 16 --seq 2048 --method lora",),
    sections={"labels_per_row": "Step", "mesh": "Output"},
)
