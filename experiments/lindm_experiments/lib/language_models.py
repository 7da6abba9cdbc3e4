"""Fine-tuning for the experiments with language models: data, options and training as in `lindm sft`, and models of a run."""

import contextlib
import gc
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lindm.choices import Split
from lindm.datasets import DatasetConfig, make_dataset
from lindm.errors import DataError
from lindm.evaluation.environments import double_precision
from lindm.families.random_suites import RandomSuite, suite
from lindm.families.suites import Suite
from lindm.llm.config import read_model_config
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import make_mesh
from lindm.llm.sft import checkpoints, setup, trainer
from lindm.llm.sft.optimizer import OptimizerConfig, make_optimizer
from lindm.llm.sft.options import SFTConfig
from lindm.llm.sft.step import state_template

TINY = "tiny"  # in place of a model's directory: a small, randomly initialized model with its own vocabulary


@contextlib.contextmanager
def quiet_single_precision() -> Iterator[None]:
    """Context in single precision that hides what a training run prints; compiled programs are dropped at its end."""
    silent = io.StringIO()
    try:
        with jax.enable_x64(False), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            yield
    finally:
        jax.clear_caches()
        gc.collect()


def suite_at_horizon(name: str, horizon: int, split: Split = "id") -> RandomSuite:
    """A named suite at any horizon."""
    return suite(name, horizon, split)


def make_data(data: Path, source: Suite, config: DatasetConfig) -> Path:
    """Write a dataset to the directory `data`, in double precision; its path."""
    with double_precision():
        make_dataset(data, source, config)
    return data


def check_model(model: str) -> None:
    """Raises: DataError where there is no model in the directory `model`."""
    if model != TINY and not (Path(model) / "config.json").is_file():
        raise DataError(f"model must be {TINY} or the directory of a model; got {model} (make smollm2 brings SmolLM2)")


def sft_config(model: str, data: Path, out: Path, **options: Any) -> SFTConfig:
    """Options of a training run on all of the data: all weights of a tiny model, LoRA adapters of a pretrained one."""
    start = {"preset": TINY} if model == TINY else {"model": Path(model), "method": "lora"}
    return SFTConfig(data=data, out=out, held_out=0.0, eval_tasks=0, **start, **options)


def fine_tune(config: SFTConfig) -> Path:
    """Train, or finish a training that was killed; the run's directory. Its checkpoints are removed at the end."""
    trainer.train(config, save_on_stop=False)
    shutil.rmtree(config.out / trainer.CHECKPOINTS, ignore_errors=True)
    return config.out


def models_of_run(config: SFTConfig) -> Iterator[tuple[int, Decoder]]:
    """The models of one training of a preset, with their steps: the random weights that it starts from, then all its checkpoints.

    They are those of one run with one schedule, if it kept its checkpoints (`save_every`, `keep`).
    """
    saved, mesh = config.out / trainer.CHECKPOINTS, make_mesh({"fsdp": 1}, jax.devices()[:1])
    start = setup.random_model(read_model_config(config.out / trainer.MODEL), mesh, config.seed)
    yield 0, start
    graphdef, params, frozen = nnx.split(start, nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(steps=1, optimizer=config.optimizer, moments=config.moments))
    template = state_template(params, optimizer, mesh)
    for step in checkpoints.checkpoint_steps(saved):
        restored = checkpoints.restore(saved, template, step)
        assert restored is not None, "a step of the list has a checkpoint"
        yield step, nnx.merge(graphdef, restored.state.params, frozen)


def base_model(config: SFTConfig, out: Path) -> Path:
    """Directory of the model that the run starts from; a randomly initialized one is written to `out`, if it is not there."""
    if config.model is not None:
        return config.model
    if out.exists():
        return out
    prepared = setup.setup_training(config)
    tokenizer = out.with_name(f"{out.name}-tokenizer")
    prepared.tokenizer.save_pretrained(str(tokenizer))
    weights.save(setup.build_model(prepared), out, like=tokenizer)
    return out
