"""An estimate of a training step by arithmetic: where no compiler for the devices is at hand, and for the order of meshes.

    arguments     weights, moments and frozen weights by their shardings, exactly
    temporaries   weights in the compute dtype, gradients, the activations that `remat` keeps, the work of one layer, and the
                  logits of the labeled positions. Attention keeps no matrix of scores, as its kernels do not.
    flops         the model's own arithmetic and what the backward pass recomputes: attention with remat selective, the blocks
                  with remat full, and the logits where they are computed in parts
    sent_bytes    weights gathered once in each pass over the layers, gradients scattered or reduced once, and the activations of
                  tensor parallelism, with the algorithms that `lindm.llm.cluster.program_cost` assumes

Memory traffic is not estimated. XLA decides what is kept and when; `docs/plan.md` says how near its memory is.
"""

import jax.numpy as jnp

from lindm.llm.cluster.plan_types import DeviceMemory, StepSpec
from lindm.llm.cluster.program_cost import ProgramCost
from lindm.llm.sft.flops import train_step_flops
from lindm.llm.sft.loss import LOGITS_CHUNK


def model_flops(spec: StepSpec) -> float:
    """Operations of the model's own arithmetic in a step, over all devices, by formula; recomputation is not counted."""
    rows = spec.batch, spec.seq, spec.labels_per_row
    return spec.accumulate * train_step_flops(spec.model_config, spec.method, *rows)


def estimate_memory(spec: StepSpec, bytes_held: int, sizes: dict[str, int]) -> DeviceMemory:
    """Bytes on one device of a mesh, given those of the arguments."""
    config, tensor, width = spec.model_config, sizes["tensor"], _width(spec)
    shards = sizes["fsdp"] * tensor
    rows = spec.batch / (sizes["data"] * sizes["fsdp"])
    kernels = config.num_parameters / shards
    cast = width * kernels * (spec.base == "f32" and width < 4)
    gradients = 4 * kernels * (spec.method == "full") * (2 if spec.accumulate > 1 else 1)
    gathered = 2 * width * _layer_weights(spec) / tensor * (sizes["fsdp"] > 1)  # of one layer, and of the next one
    inner = config.intermediate_size / tensor
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim / tensor
    work = rows * spec.seq * width * (4 * inner + 6 * config.hidden_size + heads)
    products = 2 * inner + heads + config.hidden_size
    kept = {"full": config.hidden_size, "selective": config.hidden_size + products}
    layers = config.num_layers
    activations = work * layers if spec.remat == "none" else rows * spec.seq * width * kept[spec.remat] * layers + work
    vocabulary = config.vocab_size / shards
    labels = min(spec.labels_per_row, LOGITS_CHUNK)  # whose logits exist at once
    logits = vocabulary * 8 * spec.batch / sizes["data"] * labels  # in float32, and their gradient
    temporaries = cast + gradients + gathered + activations + logits
    return DeviceMemory(arguments=bytes_held, outputs=0, temporaries=round(temporaries), code=0)


def estimate_cost(spec: StepSpec, sizes: dict[str, int]) -> ProgramCost:
    """Operations and communication of one device of a mesh in a step; memory traffic is not counted."""
    config, tensor, width = spec.model_config, sizes["tensor"], _width(spec)
    flops = model_flops(spec) + spec.accumulate * _recomputed_flops(spec)
    weights = width * config.num_parameters / tensor  # that a device uses
    rows = spec.batch / (sizes["data"] * sizes["fsdp"])
    activations = rows * spec.seq * config.hidden_size * width
    passes = 3 if spec.remat == "full" else 2
    trains = spec.method == "full"
    cost = ProgramCost(flops=flops / (sizes["data"] * sizes["fsdp"] * tensor))
    for kind, axis, what, count, size, share in (
        ("all-gather", "fsdp", "weights", passes, weights, 1),
        ("reduce-scatter", "fsdp", "gradients", trains, weights, 1),
        ("all-reduce", "data", "gradients", trains, weights / sizes["fsdp"], 2),
        ("all-reduce", "tensor", "activations", 2 * passes * config.num_layers, activations, 2),
    ):
        n, times = sizes[axis], spec.accumulate * count
        if n > 1 and times:
            cost.totals[kind, n, what] = float(times), times * share * size * (n - 1) / n
    return cost


def _recomputed_flops(spec: StepSpec) -> float:
    """Operations that the backward pass of a micro-batch repeats, over all devices."""
    config, rows = spec.model_config, (spec.batch, spec.seq)
    full, lora = (train_step_flops(config, method, *rows, 0) for method in ("full", "lora"))
    weights = full - lora  # one forward pass of each
    attention = (lora - 2 * weights) / 3
    blocks = {"none": 0.0, "selective": attention, "full": attention + weights}[spec.remat]
    labels, passes = spec.labels_per_row, 3 if spec.method == "full" else 2
    if labels <= LOGITS_CHUNK:
        return blocks
    filled = -(-labels // LOGITS_CHUNK) * LOGITS_CHUNK  # the last part is filled up
    return blocks + 2.0 * spec.batch * ((passes + 1) * filled - passes * labels) * config.hidden_size * config.vocab_size


def _width(spec: StepSpec) -> int:
    return jnp.dtype("float32" if spec.dtype == "f32" else "bfloat16").itemsize


def _layer_weights(spec: StepSpec) -> float:
    config = spec.model_config
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
