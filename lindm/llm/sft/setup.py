"""Setup of a run: everything that `lindm sft` needs before its first step, checked before weights are loaded.

Tokenizer, examples and rows, batch shape, mesh and schedule follow from the options and the data alone, so they are the same in
every process and in every resumed run. Each file of a dataset is read once, and each document is tokenized once.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lindm.datasets import Dataset, Task, TextFormat, text_format
from lindm.errors import DataError
from lindm.io import files, limits
from lindm.io.inputs import read_text
from lindm.io.progress import progress_bar
from lindm.llm.config import BaseFormat, ModelConfig, read_model_config
from lindm.llm.io import peft, weights
from lindm.llm.lora import add_lora, set_dropout
from lindm.llm.model import Decoder
from lindm.llm.model_families import FAMILIES, parse_lora_targets
from lindm.llm.parallel import sharding
from lindm.llm.sft import packing, presets
from lindm.llm.sft.drawn_tasks import DrawnTasks
from lindm.llm.sft.example_table import ExampleTable, ListedExamples, Rows
from lindm.llm.sft.examples import (
    VALUE_LOSSES,
    LengthLimit,
    TaskDocument,
    check_dataset_options,
    check_file_options,
    dataset_examples,
    held_out_mask,
    open_data,
    read_documents,
    split_indices,
)
from lindm.llm.sft.loss import ComputeConfig, Objective
from lindm.llm.sft.optimizer import OptimizerConfig, default_learning_rate
from lindm.llm.sft.options import TOKENS, SFTConfig, default_base, run_options
from lindm.llm.sft.token_cache import Tokenizing, tokenized
from lindm.llm.tokens import Example, Tokenizer, action_tokens, load_tokenizer
from lindm.llm.train_tokenizer import train_tokenizer
from lindm.text import Step

DEFAULT_EPOCHS = 3
TOKENIZER_DOCUMENTS = 4096  # the first of a dataset, on which the vocabulary of a preset is trained


@dataclass(frozen=True, kw_only=True)
class DecisionTasks:
    """Held-out tasks on which the model's decisions are evaluated."""

    tasks: list[Task]
    text: TextFormat

    @property
    def demonstrations(self) -> list[tuple[tuple[Step, ...], ...]]:
        """Of each task, as the texts show them."""
        return [self.text.demonstrations(task) for task in self.tasks]


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """Everything that a run needs before its first step."""

    config: SFTConfig
    tokenizer: Tokenizer
    model_config: ModelConfig
    train_rows: Rows
    eval_rows: Rows
    seq_len: int  # tokens per row
    max_labels: int  # per row
    mesh: Mesh
    compute: ComputeConfig
    objective: Objective
    optimizer: OptimizerConfig
    decision_tasks: DecisionTasks | None
    lora: peft.AdapterSettings | None  # of the adapters; None: all weights are trained
    base: BaseFormat  # storage of the base weights under adapters
    end_tokens: tuple[int, ...]  # with which the answers of a file end; of a dataset, whose labels have no end, none
    inputs: dict[str, Any]  # SHA-256 of data and model, and numbers of documents that were too long
    endless: int = 0  # documents of a file whose last answer is truncated
    drawn: dict[str, Any] | None = None  # what drawn tasks are, which are on no disk

    @property
    def platform_options(self) -> dict[str, str]:
        """The options whose defaults follow from the kind of the devices, with the values that they have."""
        return {"base": self.base, "dtype": "bf16" if self.compute.dtype == jnp.bfloat16 else "f32"}


def setup_training(config: SFTConfig, draw: Callable[[], DrawnTasks] | None = None) -> TrainingSetup:
    """Read and check data and model; nothing is allocated on a device.

    Args:
      draw: of a config with `draw`, the tasks that it names.

    Raises:
      ValueError: an option that does not fit the data, the model or the machine.
      DataError: bad data, with file and line.
    """
    tokenizer, model_config = _starting_point(config)
    lora = _lora_settings(config, model_config)
    if config.chat_template is not None and tokenizer is not None:
        tokenizer.chat_template = read_text(config.chat_template, limits.JSON_FILE)
    most = model_config.max_position_embeddings
    if config.max_length is not None and config.max_length > most:
        raise ValueError(f"max_length must be at most the {most} tokens of the model; got {config.max_length}")
    training_data = _training_data(config, draw)
    if config.eval_data is None:
        data = evaluation = _load(config, training_data, tokenizer, config.max_length or most, config.held_out)
        is_held_out = held_out_mask(data.examples.groups, config.held_out, config.seed, hashed=not data.is_dataset)
        chosen = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    else:
        data = _load(config, training_data, tokenizer, config.max_length or most, None)
        evaluation = _load(config, open_data(config.eval_data, "eval_data"), data.tokenizer, config.max_length or most, 1.0)
        chosen = np.arange(len(data.examples)), np.arange(len(evaluation.examples))
    tables = data.examples, evaluation.examples
    longest = max(int(table.lengths.max(initial=1)) for table in tables)
    row_tokens = config.max_length or longest
    train_rows, eval_rows = (Rows(table, part, row_tokens, config.pack) for table, part in zip(tables, chosen, strict=True))
    seq_len, max_labels = _batch_shape((train_rows, eval_rows), config)
    mesh = sharding.make_mesh(sharding.parse_mesh(config.mesh) if config.mesh else {"fsdp": len(jax.devices())})
    sharding.check_batch_size(config.batch, mesh)
    inputs: dict[str, Any] = {"data": data.sha256} | data.overlong
    if config.chat_template is not None:
        inputs["chat_template"] = files.sha256(config.chat_template)
    if config.eval_data is not None:
        inputs |= {"eval_data": evaluation.sha256} | {f"eval_{name}": n for name, n in evaluation.overlong.items()}
    if config.model is not None:
        inputs["model"] = _model_hashes(config.model)
    if config.adapter is not None:
        inputs["adapter"] = _model_hashes(adapter_directory(config.adapter))
    return TrainingSetup(
        config=config,
        tokenizer=data.tokenizer,
        model_config=replace(model_config, vocab_size=len(data.tokenizer)) if config.preset else model_config,
        train_rows=train_rows,
        eval_rows=eval_rows,
        seq_len=seq_len,
        max_labels=max_labels,
        mesh=mesh,
        compute=ComputeConfig(dtype=_dtype(config.dtype), remat=config.remat or ("none" if config.preset else "selective")),
        objective=Objective(loss=config.loss, actions=data.actions, temperature=config.loss_temperature),
        optimizer=_optimizer_config(config, model_config, len(train_rows)),
        decision_tasks=evaluation.decision_tasks,
        lora=lora,
        base=config.base or default_base(config.method, jax.devices()[0].platform),
        end_tokens=() if data.is_dataset else data.examples.end_tokens(),
        inputs=inputs,
        endless=data.endless,
        drawn=training_data.description if isinstance(training_data, DrawnTasks) else None,
    )


def _training_data(config: SFTConfig, draw: Callable[[], DrawnTasks] | None) -> Dataset | list[Path]:
    if config.data is not None:
        return open_data(config.data)
    if draw is None:
        raise ValueError(f"draw must be given with the tasks that it names, as ld.draw_tasks does; got {config.draw!r}")
    return draw()


def _optimizer_config(config: SFTConfig, model_config: ModelConfig, num_rows: int) -> OptimizerConfig:
    if config.preset is not None:
        default_steps, default_rate = presets.STEPS, presets.PRESETS[config.preset].learning_rate
    else:
        default_steps = math.ceil(DEFAULT_EPOCHS * num_rows / (config.batch * config.accumulate))
        default_rate = default_learning_rate(config.method, model_config)
    return OptimizerConfig(
        steps=config.steps or default_steps,
        optimizer=config.optimizer,
        moments=config.moments,
        learning_rate=default_rate if config.learning_rate is None else config.learning_rate,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
    )


def _dtype(name: str) -> Any:
    """dtype of the activations; auto is bf16 on accelerators."""
    if name == "auto":
        name = "f32" if jax.devices()[0].platform == "cpu" else "bf16"
    return jnp.float32 if name == "f32" else jnp.bfloat16


def _batch_shape(parts: Sequence[Rows], config: SFTConfig) -> tuple[int, int]:
    """(seq_len, max_labels) of the rows: packed rows have `max_length` tokens, others those of the longest document."""
    longest, most_labels = (
        max(int(x.max(initial=0)) for x in (getattr(p, name) for p in parts)) for name in ("tokens", "labels")
    )
    seq_len, max_labels = packing.round_up_shape(longest, most_labels)
    if config.max_length is not None:
        seq_len = config.max_length if config.pack else min(seq_len, config.max_length)
    return seq_len, max_labels


# --- data ------------------------------------------------------------------------------------------------------------------


class LoadedData(NamedTuple):
    """What one pass over the data of `--data` or `--eval-data` gives."""

    tokenizer: Tokenizer
    examples: ExampleTable
    decision_tasks: DecisionTasks | None
    sha256: str
    is_dataset: bool
    overlong: dict[str, int]  # numbers of truncated and dropped documents
    actions: tuple[int, ...] = ()  # of a loss of action values: the token of each action
    endless: int = 0


def _load(
    config: SFTConfig, data: Dataset | list[Path], tokenizer: Tokenizer | None, max_tokens: int, held_out: float | None
) -> LoadedData:
    """Read data; without a tokenizer, one is trained on the first texts of the dataset.

    Args:
      data: of `open_data`, or drawn tasks.
      held_out: fraction of the tasks that is held out; decisions are evaluated on the first of these. None: on no task.
    """
    limit = LengthLimit(max_tokens, config.overlong)
    no_progress = contextlib.nullcontext(lambda done, total: None)
    with progress_bar("reading") if jax.process_index() == 0 else no_progress as progress:
        if isinstance(data, list):
            if tokenizer is None:
                rule = "must be a directory of `lindm data make` with a preset, whose vocabulary is trained on its texts"
                raise ValueError(f"data {rule}; files of rows need --model DIR in place of --preset; got {config.data}")
            check_file_options(config.template, config.rewards, config.names, config.supervise, config.loss)
            how = Tokenizing(
                tokenizer=tokenizer,
                limit=limit,
                chat_template_kwargs=config.template_variables,
                held_out_key=config.held_out_key,
            )
            cached, sha256 = tokenized(data, how, config.token_cache or config.out / TOKENS, progress)
            return LoadedData(tokenizer, cached, None, sha256, False, cached.counts, endless=cached.endless)
        check_dataset_options(config.chat_template, config.chat_template_kwargs, config.held_out_key)
        text = text_format(data, config.template, config.rewards, config.names)
        evaluated = _evaluated_tasks(config, len(data), held_out)
        tasks: list[Task] = []

        def collect_tasks(documents: Iterator[TaskDocument]) -> Iterator[TaskDocument]:
            for task, query, pieces in documents:
                if query == 0 and task.task in evaluated:
                    tasks.append(task)
                yield task, query, pieces

        documents = collect_tasks(read_documents(data, text, progress))
        if tokenizer is None:
            assert config.preset is not None
            first = list(itertools.islice(documents, TOKENIZER_DOCUMENTS))
            vocab_size = presets.PRESETS[config.preset].config.vocab_size
            tokenizer = train_tokenizer((piece.text for _, _, pieces in first for piece in pieces), vocab_size)
            documents = itertools.chain(first, documents)
            del first
        examples = dataset_examples(data, documents, tokenizer, text.template, config.supervise, limit, config.loss)
        tokens = action_tokens(tokenizer, text.template, data.num_actions) if config.loss in VALUE_LOSSES else ()
    decision_tasks = DecisionTasks(tasks=tasks, text=text) if tasks else None
    listed = _listed(examples, data.directory, limit)
    return LoadedData(tokenizer, listed, decision_tasks, data.checksum, True, limit.counts, tuple(ids[0] for ids in tokens))


def _listed(examples: Sequence[Example], path: Path, limit: LengthLimit) -> ListedExamples:
    if not examples:
        raise DataError(f"{path}: {limit.nothing_left}")
    return ListedExamples(examples)


def _evaluated_tasks(config: SFTConfig, num_tasks: int, held_out: float | None) -> set[int]:
    """The first `eval_tasks` held-out tasks."""
    if held_out is None:
        return set()
    tasks = list(range(num_tasks)) if held_out == 1 else split_indices(num_tasks, held_out, config.seed)[1]
    return set(tasks[: config.eval_tasks])


# --- model -----------------------------------------------------------------------------------------------------------------


def _starting_point(config: SFTConfig) -> tuple[Tokenizer | None, ModelConfig]:
    """Tokenizer and config of the base model; of a preset no tokenizer, which is trained on the data."""
    if config.preset is not None:
        return None, presets.PRESETS[config.preset].config
    assert config.model is not None
    return _read_model(config.model)


def _read_model(directory: Path) -> tuple[Tokenizer, ModelConfig]:
    """Tokenizer and config of a base model, checked against its weights."""
    model_config, tokenizer = read_model_config(directory), load_tokenizer(directory)
    weights.check_tensors(directory, model_config)
    if len(tokenizer) > model_config.vocab_size:
        rule = f"must have at most the {model_config.vocab_size} tokens of the model; got {len(tokenizer)}"
        raise DataError(f"{directory}: the tokenizer {rule}")
    return tokenizer, model_config


def _model_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of the files of a base model."""
    suffixes = (".json", ".safetensors", ".jinja", ".model")
    return {p.name: files.sha256(p) for p in sorted(directory.iterdir()) if p.suffix in suffixes}


def build_model(setup: TrainingSetup) -> Decoder:
    """The model before its first step, on the mesh: randomly initialized, or the base model with new adapters."""
    config, mesh = setup.config, setup.mesh
    if config.model is None:
        return random_model(setup.model_config, mesh, config.seed)
    model = weights.load(config.model, mesh=mesh, base=setup.base, dtype=jnp.bfloat16 if setup.base == "bf16" else jnp.float32)
    if setup.lora is None:
        return model
    if config.adapter is not None:
        peft.load_adapter(model, adapter_directory(config.adapter), mesh=mesh)
    else:
        rank, alpha, scaling, targets = setup.lora
        add_lora(model, rank, alpha, jax.random.key(config.seed), targets, scaling)
    return set_dropout(model, config.lora_dropout)


def random_model(model_config: ModelConfig, mesh: Mesh, seed: int) -> Decoder:
    """A randomly initialized model on a mesh: that of a run with a preset and this seed, before its first step."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(model_config, nnx.Rngs(0))))
    shardings = sharding.weight_shardings(shapes, mesh)
    init = jax.jit(lambda key: nnx.state(Decoder(model_config, nnx.Rngs(key))), out_shardings=shardings)
    return nnx.merge(graphdef, init(jax.random.key(seed)))


def adapter_directory(directory: Path) -> Path:
    """The adapter of a run of `lindm sft`, or the directory itself. DataError where a run has none."""
    if run_options(directory) is None:
        return directory
    if not (directory / "adapter").is_dir():
        raise DataError(f"{directory} has no adapter: the run is not finished, or it trained all weights")
    return directory / "adapter"


def _lora_settings(config: SFTConfig, model_config: ModelConfig) -> peft.AdapterSettings | None:
    """Those of the options, or of the adapter that is trained on, which options must not contradict."""
    if config.method == "full":
        return None
    family = FAMILIES[model_config.model_type]
    targets = parse_lora_targets(config.lora_targets or "all", (family,))
    given = {"rank": config.lora_rank, "alpha": config.lora_alpha, "scaling": config.lora_scaling}
    given["targets"] = targets if config.lora_targets else None
    if config.adapter is None:
        defaults = peft.AdapterSettings(16, 32.0, "standard", targets)
        return defaults._replace(**{name: value for name, value in given.items() if value is not None})
    settings = peft.read_adapter_settings(adapter_directory(config.adapter), model_config)
    for name, value in given.items():
        if value is not None and value != (there := getattr(settings, name)):
            raise ValueError(f"lora_{name} must be left out with adapter, which has {there!r}; got {value!r}")
    return settings
