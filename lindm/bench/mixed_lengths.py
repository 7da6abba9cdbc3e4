"""The part of `lindm bench sft` on documents of very different lengths: useful tokens per CPU-second.

Batches of 8 documents, whose lengths are log-normal with median 200 and 95th percentile 1,200 tokens; the last quarter of each is
trained. Ours shares rows and chooses shapes as `lindm sft` does by default (`lindm.llm.sft.shapes`). The peer pads each batch to
its longest document, with an attention mask, as the collator of transformers does. The model has the width of SmolLM2-135M with
fewer layers and a smaller vocabulary, so that the peer's padded batches fit in memory.
"""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from lindm.bench import sft
from lindm.bench.timing import MORE, NEITHER, Row, answer, cpu_seconds, in_worker, row, timed
from lindm.io.huge_pages import huge_page_environment
from lindm.io.temporaries import scratch_directory
from lindm.llm.config import ModelConfig
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.parallel import sharding
from lindm.llm.sft import packing
from lindm.llm.sft.batches import place_rows
from lindm.llm.sft.example_table import ListedExamples
from lindm.llm.sft.flops import train_step_flops
from lindm.llm.sft.shapes import BatchShape, Sizes, choose_shapes, first_fitting
from lindm.llm.tokens import Example

MODULE = "lindm.bench.mixed_lengths"
BATCH, STEPS, TIMED_STEPS = 8, 32, (0, 1, 2, 3)  # documents of a step, steps that the shapes are chosen for, steps that are timed
MEDIAN, PERCENTILE_95, LONGEST = 200, 1200, 2048  # tokens of a document


def model_config() -> ModelConfig:
    """The shape of the model."""
    return replace(sft.MODEL, num_layers=3, vocab_size=4096, max_position_embeddings=LONGEST)


def documents() -> list[list[Example]]:
    """The documents of each step."""
    rng = np.random.default_rng(0)
    normal_95 = 1.6449  # 95th percentile of the standard normal distribution
    lengths = np.exp(rng.normal(np.log(MEDIAN), np.log(PERCENTILE_95 / MEDIAN) / normal_95, (STEPS, BATCH)))

    def document(length: int) -> Example:
        ids = rng.integers(0, model_config().vocab_size, length, np.int32)
        target = np.append(ids[1:], -1).astype(np.int32)
        target[: length - length // 4 - 1] = -1
        return Example(ids, target, "bench")

    return [[document(int(n)) for n in step] for step in np.clip(lengths, 8, LONGEST)]


def our_batches(batch_sharding: NamedSharding) -> list[packing.Batch]:
    """The batches [1, rows, ...] of the timed steps, in the shapes that `lindm sft` chooses."""
    table = ListedExamples([example for step in documents() for example in step])
    steps = [range(i, i + BATCH) for i in range(0, len(table), BATCH)]
    sizes = [Sizes(table.lengths[step], table.num_labels[step]) for step in steps]
    full = BatchShape(BATCH, *packing.round_up_shape(int(table.lengths.max()), int(table.num_labels.max())))
    row_flops = functools.partial(train_step_flops, model_config(), "full", 1, max_labels=0)
    shapes, batches = choose_shapes(sizes, full, 1, 1, row_flops), []
    for number in TIMED_STEPS:
        shape, groups = first_fitting(sizes[number], shapes, 1)
        rows = [[steps[number][i] for i in members] for members in groups]
        batches.append(place_rows(table, rows, shape, batch_sharding, (1,)))
    return batches


def run_ours(directory: Path) -> dict[str, Any]:
    """CPU-seconds of the timed steps, and the loss of the first."""
    step, state, frozen, shardings = sft.training_program("full", "selective", directory)
    batches = our_batches(shardings.batch)
    stop = sharding.shard_array(np.zeros(1, np.int32), shardings.stop_flags)
    seconds, programs = 0.0, {}
    for batch in batches:
        if batch.ids.shape not in programs:
            compiling, programs[batch.ids.shape] = timed(lambda b=batch: step.lower(state, frozen, b, stop).compile())
            seconds += compiling
    losses: list[float] = []

    def once() -> None:
        nonlocal state
        for batch in batches:
            state, metrics = programs[batch.ids.shape](state, frozen, batch, stop)
            losses.append(float(metrics.loss))

    once()
    return {"steps": cpu_seconds(once), "loss": losses[0], "compile": seconds}


def run_torch(directory: Path) -> dict[str, Any]:
    """The same with transformers and torch, on padded batches."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=sft.RATE, weight_decay=0.0, fused=True)
    steps, losses = documents(), []

    def once() -> None:
        for number in TIMED_STEPS:
            tensors = [torch.from_numpy(x) for x in padded(steps[number])]
            loss = model(input_ids=tensors[0], attention_mask=tensors[1], labels=tensors[2]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))

    once()
    return {"steps": cpu_seconds(once), "loss": losses[0]}


def padded(examples: list[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, attention mask and labels [BATCH, T] as in transformers: -100 where nothing is trained."""
    T = max(len(e.ids) for e in examples)
    ids, mask, labels = (np.full((len(examples), T), blank, np.int64) for blank in (0, 0, -100))
    for r, e in enumerate(examples):
        n = len(e.ids)
        ids[r, :n], mask[r, :n] = e.ids, 1
        labels[r, 1:n] = np.where(e.target[:-1] >= 0, e.target[:-1], -100)
    return ids, mask, labels


def measure(side: Literal["ours", "torch"], directory: str) -> dict[str, Any]:
    """One side, in this process."""
    return (run_ours if side == "ours" else run_torch)(Path(directory))


def benchmark(peer_name: str | None) -> list[Row]:
    """The rows of the table; `peer_name` is None where torch is not installed.

    Raises:
      RuntimeError: the losses of the first step differ.
    """
    with scratch_directory() as scratch:
        weights.save(Decoder(model_config(), nnx.Rngs(0)), scratch / "model")
        ours = in_worker(MODULE, "ours", str(scratch / "model"), variables=huge_page_environment())
        peer = in_worker(MODULE, "torch", str(scratch / "model")) if peer_name else None
    return rows(ours, peer, peer_name or sft.MISSING)


def rows(ours: dict[str, Any], peer: dict[str, Any] | None, peer_name: str) -> list[Row]:
    """The table of these measurements. RuntimeError where the losses of the first step differ."""
    if peer is not None and not abs(ours["loss"] - peer["loss"]) <= sft.LOSS_TOLERANCE:
        raise RuntimeError(f"{peer_name} and ours have different losses at the first step: {peer['loss']} and {ours['loss']}")
    steps = documents()
    tokens = sum(len(e.ids) for number in TIMED_STEPS for e in steps[number])
    work, name = f"full f32, {BATCH} documents of mixed lengths", peer_name if peer is None else f"{peer_name}, padded"
    rate = row(work, tokens / ours["steps"], tokens / peer["steps"] if peer else None, name, "useful tokens/CPU-s", MORE)
    return [rate, row(f"{work}: compile", ours["compile"], None, name, "CPU-s", NEITHER)]


if __name__ == "__main__":
    answer(measure)
