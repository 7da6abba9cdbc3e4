"""Everything that a run of `lindm sft` needs before its first step, checked before any time is spent on weights.

The tokenizer, the examples and their rows, the shape of a batch, the mesh and the schedule follow from the options and the data
alone; so they are the same in every process and in every resumed run.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lindm.datasets import Dataset, Task, TextFormat, documents, text_format
from lindm.errors import DataError
from lindm.io import files
from lindm.io.progress import progress_bar
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
from lindm.llm.train_tokenizer import train_tokenizer
from lindm.text import Step

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

    tasks: list[Task]
    text: TextFormat

    @property
    def demonstrations(self) -> list[tuple[tuple[Step, ...], ...]]:
        """Of each task, as the texts show them."""
        return [self.text.demonstrations(task) for task in self.tasks]


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
    data = {"data": _open(options.data)}
    if options.eval_data is not None:
        data["eval_data"] = _open(options.eval_data)
    text = _text_format(options, data["data"])
    if options.preset == "tiny":
        tokenizer, model_config = _own_vocabulary(data["data"], text), TINY
        model_config = replace(model_config, vocab_size=len(tokenizer))
    else:
        assert options.model is not None
        model_config = read_model_config(options.model)
        tokenizer = load_tokenizer(options.model)
        weights.check_tensors(options.model, model_config)
        if len(tokenizer) > model_config.vocab_size:
            rule = f"must have at most the {model_config.vocab_size} tokens of the model; got {len(tokenizer)}"
            raise DataError(f"{options.model}: the tokenizer {rule}")
    length = min(options.seq or model_config.max_position_embeddings, model_config.max_position_embeddings)
    if options.seq is not None and options.seq > model_config.max_position_embeddings:
        raise ValueError(f"seq must be at most the {model_config.max_position_embeddings} tokens of the model; got {options.seq}")
    train = _examples(options, data["data"], tokenizer, length)
    if "eval_data" in data:
        held = _examples(options, data["eval_data"], tokenizer, length)
    else:
        train, held = records.held_out(train, options.held_out, options.seed)
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
        decisions=_decisions(options, data.get("eval_data", data["data"]), text, held),
        inputs=_inputs(options, data),
    )


def _rows(examples: Sequence[Example], room: int, pack: bool) -> list[list[Example]]:
    lengths = [len(e.ids) for e in examples]
    return [[examples[i] for i in row] for row in (packing.pack(lengths, room) if pack else packing.one_per_row(lengths))]


# --- data ------------------------------------------------------------------------------------------------------------------


def _open(path: Path) -> Dataset | Path:
    """A dataset with all its tasks in memory, so that its files are read once; any other path as it is."""
    if not path.is_dir():
        return path
    dataset = Dataset(path)
    with _progress("reading") as progress:
        dataset.load(progress)
    return dataset


def _progress(name: str) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    if jax.process_index() == 0:
        return progress_bar(name)
    return contextlib.nullcontext(lambda done, total: None)


def _text_format(options: SFTConfig, data: Dataset | Path) -> TextFormat | None:
    """How a dataset's episodes become text; None for a file, which has texts of its own."""
    if not isinstance(data, Dataset):
        return None
    return text_format(data, options.template, options.rewards, options.names)


def _examples(options: SFTConfig, data: Dataset | Path, tokenizer: Tokenizer, length: int) -> list[Example]:
    """All examples; options that do not apply to a file raise an error."""
    text = {"template": options.template, "rewards": options.rewards, "names": options.names}
    with _progress("tokenizing") as progress:
        return records.examples(data, tokenizer, **text, supervise=options.supervise, length=length, progress=progress)


def _own_vocabulary(data: Dataset | Path, text: TextFormat | None) -> Tokenizer:
    """A small tokenizer for the texts of a dataset."""
    if not isinstance(data, Dataset) or text is None:
        raise ValueError(f"data must be a directory of `lindm data make` with a preset; got {data}")
    return train_tokenizer((piece.text for _, _, pieces in documents(data, text) for piece in pieces), TINY.vocab_size)


def _decisions(options: SFTConfig, data: Dataset | Path, text: TextFormat | None, held: Sequence[Example]) -> Decisions | None:
    """The first held-out tasks of a dataset, if decisions are to be measured."""
    if not isinstance(data, Dataset) or text is None or not options.eval_tasks or not held:
        return None
    wanted = set(sorted({e.group for e in held})[: options.eval_tasks])
    return Decisions(tasks=[task for i, task in enumerate(data) if i in wanted], text=text)


def _inputs(options: SFTConfig, data: dict[str, Dataset | Path]) -> dict[str, Any]:
    """SHA-256 of the input files."""
    found: dict[str, Any] = {
        name: each.checksum if isinstance(each, Dataset) else files.sha256(each) for name, each in data.items()
    }
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
