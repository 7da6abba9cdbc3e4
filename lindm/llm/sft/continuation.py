"""A run that goes on with a larger number of steps.

The state of the optimizer and the order of the data go on where they were: batches follow from the seed and the step alone. The
learning rate is a function of the step and of the number of all steps, so from here on it follows the schedule of the larger
number. The weights are not those of a run that was started with that number, whose earlier steps have other rates.

config.json has each schedule with the step from which it holds: {"schedules": [{"from_step": 0, "steps": 100}, ...]}.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lindm.errors import CheckpointError
from lindm.io import directories, files
from lindm.io.verification import MANIFEST
from lindm.llm.sft import checkpoints
from lindm.llm.sft.loop import CHECKPOINTS, EvalHistory
from lindm.llm.sft.metrics import CURVES
from lindm.llm.sft.optimizer import OptimizerConfig, learning_rate_schedule
from lindm.llm.sft.options import RUN_FORMAT

RESULTS = ("model", "adapter", *CURVES)  # of the shorter run, beside its manifest


def first_schedule(steps: int) -> dict[str, Any]:
    """What config.json of a new run has for its number of steps."""
    return {"schedules": [{"from_step": 0, "steps": steps}]}


def is_longer(old: dict[str, Any], steps: int) -> bool:
    """Whether `steps` are more than those of the run with this config.json."""
    return bool(schedules := old.get("schedules")) and steps > schedules[-1]["steps"]


def require_checkpoint(out: Path, steps: int) -> None:
    """CheckpointError where a run has results, and no checkpoint to go on from."""
    if not checkpoints.checkpoint_steps(out / CHECKPOINTS) and any((out / name).exists() for name in RESULTS):
        raise CheckpointError(f"{out} has no checkpoint from which a run of {steps} steps can continue; --fresh trains again")


def extend_run(out: Path, old: dict[str, Any], config: dict[str, Any], steps: int) -> None:
    """Remove the results of the shorter run, then write the config.json of the longer one.

    A kill between the two leaves the shorter run, whose command makes its results again.
    """
    saved = checkpoints.checkpoint_steps(out / CHECKPOINTS)
    for name in (MANIFEST, *RESULTS):
        directories.remove(out / name)
    schedules = [*old["schedules"], {"from_step": saved[-1] if saved else 0, "steps": steps}]
    files.write_json(out / "config.json", config | {"schedules": schedules}, format=RUN_FORMAT)


def begin_longer_schedule(out: Path, step: int, history: EvalHistory, optimizer: OptimizerConfig) -> tuple[EvalHistory, str]:
    """The history with which a run goes on after a step, and a sentence; empty where no longer schedule begins here.

    The best weights of the shorter run are not kept, so patience begins anew.
    """
    schedules = files.read_json(out / "config.json", format=RUN_FORMAT).get("schedules", [])
    if step == 0 or len(schedules) < 2 or step > schedules[-1]["from_step"]:
        return history, ""
    before = schedules[-2]["steps"]
    was = float(learning_rate_schedule(replace(optimizer, steps=before))(step - 1))  # pyright: ignore[reportArgumentType]
    now = float(learning_rate_schedule(optimizer)(step))  # pyright: ignore[reportArgumentType]
    rates = f"the learning rate was {was:.3g} and is now {now:.3g}, by the schedule of all {optimizer.steps} steps"
    return EvalHistory(last_step=history.last_step), f"goes on after step {step} of {before}: {rates}"
