"""`lindm export`: a language model for transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lindm.cli.arguments import Command, Positional
from lindm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a model as a Hugging Face directory that transformers loads, with an adapter merged into it."""

    directory: Annotated[Path, Positional("DIR")]
    """A Hugging Face directory, or the directory of a finished `lindm sft` run."""
    out: Path
    """Directory of the export."""
    adapter: Path | None = None
    """A PEFT adapter of this model, to be merged."""
    dtype: Literal["f32", "bf16"] = "f32"
    """Type of the weights."""


def run(options: Export) -> int:
    from lindm.io.signals import stop_on_signals
    from lindm.llm.io.peft import load_adapter
    from lindm.llm.io.weights import load, save

    stop_on_signals()
    directory = options.directory
    if (directory / "metrics.jsonl").exists():  # a run of `lindm sft` keeps its model in model/
        if not (directory / "model").is_dir():
            raise DataError(f"{directory} is a run that is not finished; the same `lindm sft` command resumes it")
        directory = directory / "model"
    model = load(directory)
    if options.adapter is not None:
        load_adapter(model, options.adapter)
    save(model, options.out, like=directory, dtype=options.dtype)
    print(f"{model.config.model_type} with {model.config.num_parameters:,} parameters in {options.out}")
    return 0


COMMAND = Command(
    name="export",
    options=Export,
    run=run,
    examples=("lindm export runs/tiny --out exported", "lindm export models/smollm2 --adapter runs/lora/adapter --out merged"),
)
