"""What the experiments with language models share: fine-tuning as `lindm sft` does it, and the model before that."""

import contextlib
import gc
import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lindm.datasets import DatasetConfig, make_dataset
from lindm.errors import DataError
from lindm.evaluation.environments import double_precision
from lindm.families.suites import Suite, suite
from lindm.io import signals
from lindm.llm.io import weights
from lindm.llm.sft import setup, trainer
from lindm.llm.sft.options import SFTConfig

TINY = "tiny"  # in place of a model's directory: one from nothing, with a vocabulary of its own


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """In single precision, without the lines that a training run prints, and with no compiled program left behind."""
    silent = io.StringIO()
    try:
        with jax.enable_x64(False), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            yield
    finally:
        jax.clear_caches()
        gc.collect()


def law(name: str, horizon: int, split: str = "id") -> Suite:
    """A suite at any horizon."""
    return replace(suite(name, split=split), horizon=horizon)


def make(data: Path, source: Suite, data_config: DatasetConfig) -> Path:
    with double_precision():
        make_dataset(data, source, data_config)
    return data


def check(model: str) -> None:
    """DataError where the model is not there."""
    if model != TINY and not (Path(model) / "config.json").is_file():
        raise DataError(f"model must be {TINY} or the directory of a model; got {model} (make smollm2 brings SmolLM2)")


def options(model: str, data: Path, out: Path, **how: Any) -> SFTConfig:
    """Of a training run on all of the data: every weight of a tiny model, adapters of a given one."""
    start = {"preset": TINY} if model == TINY else {"model": Path(model), "method": "lora"}
    return SFTConfig(data=data, out=out, held_out=0.0, eval_tasks=0, **start, **how)


def fine_tuned(asked: SFTConfig) -> Path:
    """The directory of a finished run. Its checkpoints are removed: it is not resumed."""
    trainer.train(asked)
    signals.stop_on_signals()  # training only notes them; nothing is unsaved any more
    shutil.rmtree(asked.out / trainer.CHECKPOINTS, ignore_errors=True)
    return asked.out


def before(asked: SFTConfig, out: Path) -> Path:
    """The model that the run starts from, as a directory."""
    if asked.model is not None:
        return asked.model
    prepared = setup.setup_training(asked)
    tokenizer = out.with_name(f"{out.name}-tokenizer")
    prepared.tokenizer.save_pretrained(str(tokenizer))
    weights.save(setup.build_model(prepared), out, like=tokenizer)
    return out
