"""`lindm plan`: does a fine-tuning step fit a TPU slice, and what would it have to do there? Compiled here, without a TPU."""

import json as json_module
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lindm.cli.arguments import Command
from lindm.io.tables import format_table

if TYPE_CHECKING:
    from lindm.llm.cluster.plan import Job, Limits
    from lindm.llm.cluster.plan import Plan as Planned

GIB = 2**30
# a process that only compiles for TPUs looks for none, asks no metadata server, takes no lock, and is not warned of all that
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
    """Compile the step of `lindm sft` for a machine without running it: does it fit, and what does it take there?"""

    model: Path
    """A Hugging Face directory, or a config.json; weights are not read."""
    topology: str
    """A TPU slice such as v5e:4x4, v6e:2x4 or v5p:2x2x4 (extra: tpu); or host, the devices of this machine."""
    batch: int
    """Rows of a micro-batch, over all devices."""
    seq: int
    """Tokens per row."""
    labels: int = 64
    """Maximum number of tokens per row that are trained."""
    accumulate: int = 1
    """Micro-batches per step."""
    method: str = "full"
    """full, lora or qlora."""
    lora_rank: int = 16
    """Rank of the adapters."""
    base: str | None = None
    """Storage of the base weights with lora and qlora: f32, bf16, int8 or nf4. [default: f32, and nf4 with qlora]"""
    remat: str = "selective"
    """Activations that the backward pass computes again: full (all, least memory), selective (all but products with
    weights) or none."""
    mesh: str | None = None
    """Sizes of the axes data, fsdp and tensor, such as fsdp=8,tensor=2. [default: up to six meshes are compared]"""
    json: bool = False
    """Print one JSON object."""


def run(options: Plan) -> int:
    from lindm.io.signals import stop_on_signals

    stop_on_signals()
    if options.topology != "host":
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        os.environ["JAX_PLATFORMS"] = "cpu"
    from lindm.api.models import plan as plan_step
    from lindm.llm.cluster import plan

    result = plan_step(
        options.model,
        batch=options.batch,
        seq=options.seq,
        topology=options.topology,
        mesh=options.mesh,
        base=options.base,
        method=options.method,
        labels=options.labels,
        accumulate=options.accumulate,
        lora_rank=options.lora_rank,
        remat=options.remat,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    job, limits, found, flops = result.step, result.limits, result.plans, result.model_flops
    if options.json:
        about = {"topology": options.topology, "devices": result.devices, "limits": limits._asdict(), "headroom": plan.HEADROOM}
        about |= {"model_flops": flops, "step": _step(job), "plans": [plan.described(p) for p in found]}
        print(json_module.dumps(about))
        return 0
    for line in _introduced(job, options.topology, result.devices, limits):
        print(line)
    print()
    print(format_table([_HEAD, *(_row(p, job) for p in found)]))
    if found[0].work is not None:
        print(f"\nWhat a device sends in a step, with {plan.named(found[0].mesh)}:")
        print(format_table(_messages(found[0])))
    print()
    for line in _notes(found, flops, plan.HEADROOM):
        print(line)
    return 0


def _step(job: "Job") -> dict[str, Any]:
    names = ("batch", "seq", "labels", "accumulate", "method", "base", "dtype", "remat")
    step = {name: getattr(job, name) for name in names} | {"parameters": job.model_config.num_parameters}
    return step | ({} if job.method == "full" else {"lora_rank": job.lora_rank})


def _introduced(job: "Job", topology: str, devices: int, limits: "Limits") -> list[str]:
    how = "all weights" if job.method == "full" else f"adapters of rank {job.lora_rank} over {job.base} weights"
    kept = f", remat {job.remat}"
    parts = f"{job.accumulate} x " if job.accumulate > 1 else ""
    can = [f"{limits.flops / 1e12:.3g} TFLOP/s"]
    can += [f"{limits.memory / GIB:.1f} GiB"] if limits.memory else []
    can += [f"{limits.bandwidth / 1e9:.0f} GB/s memory"] if limits.bandwidth else []
    can += [f"{limits.links / 1e9:.0f} GB/s links"] if limits.links else []
    return [
        f"{job.model_config.model_type}, {job.model_config.num_parameters / 1e9:.3g} G parameters; {job.method}: {how}",
        f"a step: {parts}{job.batch} rows x {job.seq} tokens, {job.labels} labels a row, {job.dtype} activations{kept}",
        f"{topology}: {devices} x {limits.kind}, each {', '.join(can)}",
    ]


_HEAD = ("mesh", "fits", "peak GiB", "arguments", "temporaries", "outputs", "code")
_HEAD += ("TFLOP", "GB moved", "GB sent", "ms compute", "ms memory", "ms links", "ms at least", "tokens/s at most")


def _row(p: "Planned", job: "Job") -> tuple[str, ...]:
    from lindm.llm.cluster.plan import named

    if p.memory is None or p.work is None or p.seconds is None:
        return (named(p.mesh), "no", f"{p.needs / GIB:.2f}" if p.needs else "refused", *("-" for _ in _HEAD[3:]))
    memory = (f"{x / GIB:.2f}" for x in (p.memory.peak, *p.memory))
    work = f"{p.work.flops / 1e12:.3g}", f"{p.work.bytes / 1e9:.3g}", f"{p.work.sent / 1e9:.3g}"
    times = (f"{1e3 * p.seconds[name]:.3g}" if name in p.seconds else "-" for name in ("compute", "memory", "links"))
    ordered = dict(zip(("peak", "arguments", "outputs", "temporaries", "code"), memory, strict=True))
    shown = (ordered[name] for name in ("peak", "arguments", "temporaries", "outputs", "code"))
    rate = job.accumulate * job.batch * job.seq / p.bound
    return (named(p.mesh), "yes" if p.fits else "no", *shown, *work, *times, f"{1e3 * p.bound:.3g}", f"{rate:,.0f}")


def _messages(p: "Planned") -> list[tuple[str, ...]]:
    assert p.work is not None
    kinds: dict[tuple[str, int], list[float]] = {}
    for c in p.work.listed():
        total = kinds.setdefault((c.kind, c.group), [0.0, 0.0])
        total[0], total[1] = total[0] + c.count, total[1] + c.sent
    lines = [("kind", "devices", "count", "GB", "largest")]
    for (kind, group), (count, sent) in sorted(kinds.items(), key=lambda k: -k[1][1]):
        largest = next(c for c in p.work.listed() if (c.kind, c.group) == (kind, group))
        lines.append((kind, str(group), f"{count:.0f}", f"{sent / 1e9:.3g}", f"{largest.count:.0f} x {largest.shape}"))
    return lines if len(lines) > 1 else [("nothing",)]


def _notes(found: list["Planned"], flops: float, headroom: float) -> list[str]:
    notes = [
        f"fits: XLA compiled it and its peak leaves {100 * headroom:.0f} % of the memory free, for the runtime and evaluation",
        "TFLOP: products of the compiled program on one device, recomputation included; "
        f"the model's own arithmetic is {flops / 1e12:.3g}",
        "ms: what no step can be shorter than at the peak rates of the data sheet; a bound, not a prediction",
    ]
    if any(p.work is not None and p.work.unread for p in found):
        notes.append("some loops of the program say nothing of their turns and are counted once: the bounds are lower still")
    for p in found:
        if p.refusal:
            from lindm.llm.cluster.plan import named

            notes.append(f"{named(p.mesh)} was refused: {p.refusal}")
    return notes


COMMAND = Command(
    name="plan",
    options=Plan,
    run=run,
    examples=("lindm plan --model models/llama-3-8b --topology v5e:4x4 --batch 16 --seq 2048 --method lora",),
    sections={"labels": "Step", "mesh": "Output"},
)
