"""`lindm export`: a language model for transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lindm.cli.option_parser import Command, Positional


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a model as a Hugging Face directory for transformers and vLLM, or as a GGUF file for llama.cpp. An adapter is
    merged."""

    directory: Annotated[Path, Positional("DIR")]
    """A Hugging Face directory, or the directory of a finished `lindm sft` run."""
    out: Path
    """Directory of the export, or a .gguf file."""
    adapter: Path | None = None
    """A PEFT adapter of this model to merge, or the `lindm sft` run that trained it."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32"
    """Type of the weights. q8_0 (8 bits, with one scale for each 32 weights) is for GGUF files."""


def run(options: Export) -> int:
    from lindm.api.models import export

    config = export(options.directory, options.out, adapter=options.adapter, dtype=options.dtype)
    print(f"{config.model_type} with {config.num_parameters:,} parameters in {options.out}")
    return 0


COMMAND = Command(
    name="export",
    options=Export,
    run=run,
    examples=(
        "lindm export runs/tiny --out exported",
        "lindm export models/smollm2 --adapter runs/lora/adapter --out merged",
        "lindm export runs/chat --out chat.gguf --dtype q8_0",
    ),
)
