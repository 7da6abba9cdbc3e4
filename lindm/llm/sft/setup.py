"""Everything that a run of `lindm sft` needs before its first step, checked before any time is spent on weights.

The tokenizer, the examples and their rows, the shape of a batch, the mesh and the schedule follow from the options and the data
alone; so they are the same in every process and in every resumed run.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lindm import datasets
from lindm.errors import DataError
from lindm.io import files, progress
from lindm.llm.config import ModelConfig, read_model_config
from lindm.llm.io import weights
from lindm.llm.lora import add_lora
from lindm.llm.model import Decoder
from lindm.llm.parallel import sharding
from lindm.llm.sft import examples as records
from lindm.llm.sft import packing
from lindm.llm.sft.loss import ComputeConfig
from lindm.llm.sft.optimizer import OptimizerConfig
from lindm.llm.sft.options import SFTConfig
from lindm.llm.tokens import Example, Tokenizer, load_tokenizer
from lindm.llm.train_tokenizer import small_tokenizer
from lindm.text import Step, Template

PASSES = 3  # over the data, where no number of steps is given
TINY = ModelConfig(  # 1.4 million weights
    model_type="llama",
    vocab_size=512,
    hidden_size=160,
    num_layers=4,
    num_heads=5,
    num_kv_heads=5,
    head_dim=32,
    intermediate_size=480,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
    init_std=0.08,  # 1 / sqrt(width): far more than large models begin with, and many times faster here
)
TINY_STEPS = 500
RATES = {"full": 2e-4, "lora": 1e-3, "qlora": 1e-3}
TINY_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Held-out tasks on which the model's decisions are measured."""

    tasks: list[dict]  # rows of `datasets.load`
    demonstrations: list[tuple[tuple[Step, ...], ...]]
    template: Template
    rewards: bool


@dataclass(frozen=True, kw_only=True)
class Prepared:
    options: SFTConfig
    tokenizer: Tokenizer
    model_config: ModelConfig
    train: list[list[Example]]  # rows
    held: list[list[Example]]
    T: int
    L: int
    mesh: Mesh
    compute: ComputeConfig
    optimizer_config: OptimizerConfig
    decisions: Decisions | None
    inputs: dict[str, Any]  # what identifies data and model


def prepare(options: SFTConfig) -> Prepared:
    """Read, check and lay out; nothing is allocated on a device.

    Raises:
      ValueError: an option that does not fit the data, the model or the machine.
      LindmError: bad data (3), with file and line.
    """
    how = _telling(options)
    data = options.data
    if options.preset == "tiny":
        tokenizer, model_config = _own_vocabulary(options, how), TINY
        model_config = replace(model_config, vocab_size=len(tokenizer))
    else:
        assert options.model is not None
        model_config = read_model_config(options.model)
        tokenizer = load_tokenizer(options.model)
        weights.check(options.model, model_config)
        if len(tokenizer) > model_config.vocab_size:
            rule = f"must have at most the {model_config.vocab_size} tokens of the model; got {len(tokenizer)}"
            raise DataError(f"{options.model}: the tokenizer {rule}")
    length = min(options.seq or model_config.max_position_embeddings, model_config.max_position_embeddings)
    if options.seq is not None and options.seq > model_config.max_position_embeddings:
        raise ValueError(f"seq must be at most the {model_config.max_position_embeddings} tokens of the model; got {options.seq}")
    every = _examples(options, data, tokenizer, how, length)
    if options.eval_data is not None:
        train, held = every, _examples(options, options.eval_data, tokenizer, _telling(options, options.eval_data), length)
    else:
        train, held = records.held_out(every, options.held_out, options.seed)
    room = options.seq or max(len(e.ids) for e in (*train, *held))
    train_rows, held_rows = (_rows(part, room, options.pack) for part in (train, held))
    T, L = packing.batch_shape([*train_rows, *held_rows], options.seq)
    sizes = sharding.parse_mesh(options.mesh) if options.mesh else {"fsdp": len(jax.devices())}
    mesh = sharding.make_mesh(sizes)
    sharding.check_batch_size(options.batch, mesh)
    accelerated = jax.devices()[0].platform != "cpu"
    wide = {"f32": jnp.float32, "bf16": jnp.bfloat16, "auto": jnp.bfloat16 if accelerated else jnp.float32}[options.dtype]
    steps = options.steps or (TINY_STEPS if options.preset else None)
    steps = steps or math.ceil(PASSES * len(train_rows) / (options.batch * options.accumulate))
    rate = options.learning_rate or (TINY_RATE if options.preset else RATES[options.method])
    return Prepared(
        options=options,
        tokenizer=tokenizer,
        model_config=model_config,
        train=train_rows,
        held=held_rows,
        T=T,
        L=L,
        mesh=mesh,
        compute=ComputeConfig(dtype=wide, remat=options.remat or ("none" if options.preset else "selective")),
        optimizer_config=OptimizerConfig(
            steps=steps,
            learning_rate=rate,
            warmup=options.warmup,
            weight_decay=options.weight_decay,
            clip=options.clip,
        ),
        decisions=_decisions(options, how, held),
        inputs=_inputs(options),
    )


def _rows(examples: Sequence[Example], room: int, pack: bool) -> list[list[Example]]:
    lengths = [len(e.ids) for e in examples]
    return [[examples[i] for i in row] for row in (packing.pack(lengths, room) if pack else packing.one_per_row(lengths))]


# --- data ------------------------------------------------------------------------------------------------------------------


def _telling(options: SFTConfig, data: Path | None = None) -> datasets.Telling | None:
    """How a dataset's episodes become text; None for a file, which has texts of its own."""
    data = data or options.data
    if not data.is_dir():
        return None
    manifest = datasets.read_manifest(data)
    template = records.template_of(options.template)
    return datasets.telling(data, manifest, template, rewards_told(options.rewards, manifest), options.names)


def rewards_told(word: str, manifest: dict) -> bool:
    """Whether texts of a dataset tell the rewards: shown, hidden, or auto, where the state is seen."""
    return word == "shown" or (word == "auto" and manifest["config"]["source"]["sizes"]["kind"] == "mdp")


def _examples(options: SFTConfig, data: Path, tokenizer: Tokenizer, how: datasets.Telling | None, length: int) -> list[Example]:
    """Of a file, whatever options it has no use for are refused there."""
    rewards = options.rewards != "hidden" if how is None else rewards_told(options.rewards, datasets.read_manifest(data))
    told = {"template": options.template, "rewards": rewards, "names": options.names, "supervise": options.supervise}
    with progress.progress_bar("reading") if jax.process_index() == 0 else contextlib.nullcontext() as tell:
        return records.examples(data, tokenizer, **told, length=length, progress=tell)


def _own_vocabulary(options: SFTConfig, how: datasets.Telling | None) -> Tokenizer:
    """A small tokenizer for the texts of a dataset."""
    if how is None:
        raise ValueError(f"data must be a directory of `lindm data make` with a preset; got {options.data}")
    every = records.documents(options.data, how)
    return small_tokenizer((piece.text for _, _, pieces, _ in every for piece in pieces), TINY.vocab_size)


def _decisions(options: SFTConfig, how: datasets.Telling | None, held: Sequence[Example]) -> Decisions | None:
    """The first held-out tasks of a dataset, if decisions are to be measured."""
    if how is None or not options.eval_tasks or not held:
        return None
    wanted = set(sorted({e.group for e in held})[: options.eval_tasks])
    tasks, demonstrations = [], []
    for i, (task, episodes) in enumerate(datasets.load(options.eval_data or options.data)):
        if i in wanted:
            demos = [row for row in episodes if row["role"] == "demo"]
            query = next(row for row in episodes if row["role"] == "query")
            tasks.append(task)
            demonstrations.append(datasets.document(demos, query, how.shown).demonstrations)
    return Decisions(tasks=tasks, demonstrations=demonstrations, template=how.template, rewards="reward" in how.shown)


def _inputs(options: SFTConfig) -> dict[str, Any]:
    """SHA-256 of what goes in."""
    found: dict[str, Any] = {}
    for name, path in (("data", options.data), ("eval_data", options.eval_data)):
        if path is not None:
            found[name] = datasets.read_manifest(path)["seal"] if path.is_dir() else files.sha256(path)
    if options.model is not None:
        inside = sorted(p for p in options.model.iterdir() if p.suffix in (".json", ".safetensors", ".jinja", ".model"))
        found["model"] = {p.name: files.sha256(p) for p in inside}
    return found


# --- model -----------------------------------------------------------------------------------------------------------------


def build(prepared: Prepared) -> Decoder:
    """The model before its first step, on the mesh."""
    options, mesh = prepared.options, prepared.mesh
    if options.model is None:
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(prepared.model_config, nnx.Rngs(0))))
        shardings = sharding.weight_shardings(shapes, mesh)
        draw = jax.jit(lambda key: nnx.state(Decoder(prepared.model_config, nnx.Rngs(key))), out_shardings=shardings)
        return nnx.merge(graphdef, draw(jax.random.key(options.seed)))
    model = weights.load(options.model, mesh=mesh, base=options.base_format)
    if options.method != "full":
        add_lora(model, options.lora_rank, options.lora_alpha, jax.random.key(options.seed))
    return model
