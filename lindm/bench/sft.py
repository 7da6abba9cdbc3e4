"""`lindm bench sft [--json]`: the cost of a fine-tuning step, beside transformers and torch.

A model of the shape of SmolLM2-135M (random weights: the cost does not depend on them) is trained in f32 on documents of the
shape of a decision dataset: 32 labels in 251 tokens, two documents per step. Ours is the program of `lindm.llm.sft.step`, as
`lindm sft` runs it, with each of the three remat settings. The peer is `LlamaForCausalLM` with scaled-dot-product attention,
which keeps all activations, its own loss with -100 for tokens without a label, clipping and the fused AdamW; adapters are peft's
where it is installed. Both sides read the same weights and train on the same sequences, and the loss of the first step must agree
to 1e-4.

The usual recipe makes one prompt and one completion of every decision: each is the end of a sequence of its own, a prefix of the
document. Decisions per CPU-second of both recipes are compared. Four decisions represent all of a document: the middles of four
equal parts, since the cost of a sequence grows with its length. Neither side pads: ours packs two prefixes into a row, the peer
takes the same prefix of two documents at once.

Ours runs with large pages of memory, as `lindm sft` starts itself; torch runs as its user starts it.

Costs, processes and rows are those of `lindm.bench.timing`. A process measures one side in one variant, from loading the weights
on, so its peak memory covers weights, optimizer and activations, and ours the compiler too. Compilation is a row of its own. The
share of the matmul peak counts the necessary work (no recomputation, logits at labels only) on both sides, relative to the rate
of f32 matrix products in the same process. Where torch is not installed the peer is null.
"""

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from lindm.bench.timing import LESS, MORE, NEITHER, Row, answer, cpu_seconds, in_worker, peak_growth, row, timed
from lindm.io.huge_pages import huge_page_environment
from lindm.io.temporaries import scratch_directory
from lindm.llm.config import ModelConfig, Remat
from lindm.llm.io import weights
from lindm.llm.lora import TARGET_MODULES, add_lora
from lindm.llm.model import Decoder
from lindm.llm.parallel import sharding
from lindm.llm.parallel.devices import measured_peak_flops
from lindm.llm.rope import RopeParameters
from lindm.llm.sft import packing
from lindm.llm.sft.flops import train_step_flops
from lindm.llm.sft.loss import ComputeConfig
from lindm.llm.sft.optimizer import OptimizerConfig, make_optimizer
from lindm.llm.sft.options import Method
from lindm.llm.sft.step import StepShardings, init_train_state, jit_train_step, make_train_step, step_shardings
from lindm.llm.tokens import Example

MODULE = "lindm.bench.sft"
MODEL = ModelConfig(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    rope_parameters=RopeParameters(rope_theta=100_000.0),
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
ROWS, TOKENS, LABELS = 2, 251, 32  # per step; tokens and labels of a document of the mdp suite
LABEL_POSITIONS = np.round(np.linspace(4, TOKENS - 2, LABELS)).astype(int)  # positions that predict an action
SAMPLED_DECISIONS = (4, 12, 19, 27)  # decisions that represent all of a document
RANK, ALPHA, RATE = 16, 32.0, 1e-4
WARM_UP, REPEATS = 1, 3
METHODS: tuple[Method, ...] = ("full", "lora")
Variant = Literal["selective", "full", "none", "single"]
VARIANTS: tuple[Variant, ...] = (
    "selective",
    "full",
    "none",
    "single",
)  # remat setting with whole documents; one decision per sequence
LOSS_TOLERANCE = 1e-4
MISSING = "torch (not installed)"
PEERS = ("transformers", "torch", "peft")


def token_ids() -> np.ndarray:
    """Token ids [ROWS, TOKENS]."""
    return np.random.default_rng(0).integers(0, MODEL.vocab_size, (ROWS, TOKENS), np.int32)


def peer_batches(variant: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The batches of the peer, one per step: ids and labels [rows, T] as in transformers, -100 for tokens without a label."""
    batches = []
    for positions in LABEL_POSITIONS[list(SAMPLED_DECISIONS), None] if variant == "single" else [LABEL_POSITIONS]:
        ids = token_ids()[:, : positions[-1] + 2]
        labels = np.full_like(ids, -100)
        labels[:, positions + 1] = ids[:, positions + 1]
        batches.append((ids, labels))
    return batches


def packed_rows(variant: str) -> list[list[Example]]:
    """Our packed rows of the same sequences; with one decision per sequence, of the first document only."""
    examples = []
    for ids, labels in peer_batches(variant):
        for i, y in list(zip(ids, labels, strict=True))[: 1 if variant == "single" else ROWS]:
            target = np.append(np.where(y[1:] >= 0, y[1:], -1), -1).astype(np.int32)
            end = int(np.nonzero(target >= 0)[0][-1]) + 1 if variant == "single" else len(i)
            examples.append(Example(i[:end], target[:end], "bench"))
    lengths = [len(e.ids) for e in examples]
    return [[examples[i] for i in row] for row in packing.pack(lengths, -(-TOKENS // 64) * 64 if variant == "single" else TOKENS)]


# --- ours ---------------------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """The step of `lindm sft` and its first arguments."""

    step: Any
    state: Any
    frozen: Any
    shardings: StepShardings


def training_program(method: Method, remat: Remat, directory: Path) -> Program:
    """The step on one device, with the weights of a model directory."""
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    model = weights.load(directory, mesh=mesh)
    if method == "lora":
        add_lora(model, RANK, ALPHA, jax.random.key(0))
    optimizer = make_optimizer(OptimizerConfig(steps=1000, learning_rate=RATE))
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    del model
    shardings = step_shardings(jax.eval_shape(lambda p: init_train_state(p, optimizer), params), frozen, mesh)
    step = jit_train_step(make_train_step(graphdef, optimizer, ComputeConfig(remat=remat), mesh), shardings)
    state = jax.jit(lambda p: init_train_state(p, optimizer), out_shardings=shardings.state)(params)
    return Program(step, state, frozen, shardings)


def run_ours(method: Method, variant: Variant, directory: Path) -> dict[str, Any]:
    """Train as `lindm sft` does: CPU-seconds of a step (the best of several) and of compilation, and the first loss."""
    rows = packed_rows(variant)
    step, state, frozen, shardings = training_program(method, "selective" if variant == "single" else variant, directory)
    filled = packing.make_batch(rows, *packing.batch_shape(rows))
    batch = jax.tree.map(lambda x: sharding.shard_array(x[None], shardings.batch), filled)
    stop = sharding.shard_array(np.zeros(1, np.int32), shardings.stop_flags)
    compiling, compiled = timed(lambda: step.lower(state, frozen, batch, stop).compile())
    losses: list[float] = []

    def once() -> None:
        nonlocal state
        state, metrics = compiled(state, frozen, batch, stop)
        losses.append(float(metrics.loss))

    cpu_seconds(once, WARM_UP)
    return {"compile": compiling, "step": cpu_seconds(once, REPEATS), "loss": losses[0]}


# --- the peer -------------------------------------------------------------------------------------------------------------


def run_torch(method: Method, variant: Variant, directory: Path) -> dict[str, Any]:
    """The same with transformers and torch; a step of the variant `single` runs all four batches of `peer_batches`."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    if method == "lora":
        model = _with_adapters(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    batches = [tuple(torch.from_numpy(x.astype(np.int64)) for x in batch) for batch in peer_batches(variant)]
    losses: list[float] = []

    def once() -> None:
        for ids, labels in batches:
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))

    cpu_seconds(once, WARM_UP)
    return {"step": cpu_seconds(once, REPEATS), "loss": losses[0]}


def _with_adapters(model: Any) -> Any:
    """peft's adapters on the seven linear layers; where peft is not installed, plain adapters."""
    import torch  # pyright: ignore[reportMissingImports]

    names = [f"{name}_proj" for name in TARGET_MODULES]
    if importlib.util.find_spec("peft") is not None:
        from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM"))

    class LoRALinear(torch.nn.Module):
        def __init__(self, base: Any):
            super().__init__()
            self.base = base
            self.a = torch.nn.Linear(base.in_features, RANK, bias=False)
            self.b = torch.nn.Linear(RANK, base.out_features, bias=False)
            torch.nn.init.zeros_(self.b.weight)

        def forward(self, x: Any) -> Any:
            return self.base(x) + self.b(self.a(x)) * (ALPHA / RANK)

    model.requires_grad_(False)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in names:
                if hasattr(part, name):
                    setattr(part, name, LoRALinear(getattr(part, name)))
    return model


# --- the table ------------------------------------------------------------------------------------------------------------


def measure(side: Literal["ours", "torch"], method: Method, variant: Variant, directory: str) -> dict[str, Any]:
    """One side (`ours`, `torch`) in one variant, in this process: its costs, peak memory in MiB, and the peak FLOP/s."""
    result: dict[str, Any] = {}
    run = run_ours if side == "ours" else run_torch
    memory = peak_growth(lambda: result.update(run(method, variant, Path(directory))))
    return result | {"memory": memory, "peak": measured_peak_flops(seconds=1.0, clock=time.process_time)}


Sides = dict[tuple[str, str], dict[str, Any]]
"""Measurements by method and variant."""


def rows(ours: Sides, peer: Sides, names: dict[str, str]) -> list[Row]:
    """The table. RuntimeError where the losses of the first step differ: the sides did not do the same work."""
    table: list[Row] = []
    tokens, shape = ROWS * TOKENS, f"{ROWS} x {TOKENS} tokens"
    shape_of_batch = packing.batch_shape(packed_rows("selective"))
    for method in METHODS:
        name, what = names[method], "full" if method == "full" else f"LoRA r{RANK}"
        mine, theirs = ours[method, "selective"], peer.get((method, "selective"))
        _check_losses(mine, theirs, name)
        work = f"{what} f32, {shape}"
        useful = train_step_flops(MODEL, method, ROWS, *shape_of_batch)

        def add(text: str, mine: float, value: Callable[[dict], float], unit: str, better: int, theirs=theirs, name=name) -> None:
            table.append(row(text, mine, value(theirs) if theirs else None, name, unit, better))

        for variant in VARIANTS[:3]:
            text, one = work if variant == VARIANTS[0] else f"{work}, remat {variant}", ours[method, variant]
            add(text, tokens / one["step"], lambda r: tokens / r["step"], "tokens/CPU-s", MORE)
            add(f"{text}: peak memory", one["memory"], lambda r: r["memory"], "MiB", LESS)
            at_peak = useful / one["peak"]  # seconds
            add(f"{text}: of the matmul peak", at_peak / one["step"], lambda r, s=at_peak: s / r["step"], "share", MORE)
            table.append(row(f"{text}: compile", one["compile"], None, name, "CPU-s", NEITHER))
        add(f"{work}: loss of the first step", mine["loss"], lambda r: r["loss"], "nats", NEITHER)
    labels = ROWS * LABELS / ours["full", "selective"]["step"]
    single, theirs = ours["full", "single"], peer.get(("full", "single"))
    work = f"full f32, a document's {LABELS} decisions in one sequence"
    table.append(
        row(work, labels, len(SAMPLED_DECISIONS) / single["step"], "ours, one decision per sequence", "decisions/CPU-s", MORE)
    )
    them = ROWS * len(SAMPLED_DECISIONS) / theirs["step"] if theirs else None
    name = f"{names['full']}, one decision per sequence" if theirs else MISSING
    table.append(row(work, labels, them, name, "decisions/CPU-s", MORE))
    return table


def _check_losses(ours: dict[str, Any], peer: dict[str, Any] | None, name: str) -> None:
    if peer is not None and not abs(ours["loss"] - peer["loss"]) <= LOSS_TOLERANCE:
        raise RuntimeError(f"{name} and ours have different losses at the first step: {peer['loss']} and {ours['loss']}")


def _peer_names(installed: dict[str, str | None]) -> dict[str, str]:
    """The peer of each method, with versions."""
    if not (installed["transformers"] and installed["torch"]):
        return dict.fromkeys(METHODS, MISSING)
    core = f"transformers {installed['transformers']}, torch {installed['torch']}"
    return {"full": core, "lora": f"peft {installed['peft']}, {core}" if installed["peft"] else f"plain adapters, {core}"}


def _version(library: str) -> str | None:
    return importlib.metadata.version(library) if importlib.util.find_spec(library) is not None else None


def benchmark() -> list[Row]:
    """The rows of the table. Takes about six minutes and 5 GB of memory."""
    from lindm.bench import mixed_lengths  # which imports this module

    names = _peer_names({library: _version(library) for library in PEERS})
    ours: Sides = {}
    peer: Sides = {}
    with scratch_directory() as scratch:
        directory = scratch / "model"
        weights.save(Decoder(MODEL, nnx.Rngs(0)), directory)
        for method, variant in (*((m, w) for m in METHODS for w in VARIANTS[:3]), ("full", "single")):
            ours[method, variant] = in_worker(MODULE, "ours", method, variant, str(directory), variables=huge_page_environment())
            if variant in ("selective", "single") and names[method] != MISSING:  # right after ours
                peer[method, variant] = in_worker(MODULE, "torch", method, variant, str(directory))
    return rows(ours, peer, names) + mixed_lengths.benchmark(names["full"] if names["full"] != MISSING else None)


if __name__ == "__main__":
    answer(measure)
