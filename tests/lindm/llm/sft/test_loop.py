"""The order of the training loop: what happens while a step runs."""

import pytest

from lindm.errors import NonFiniteError
from lindm.llm.sft import checkpoints, trainer
from lindm.llm.sft.batches import BatchLoader
from tests.lindm.llm.sft.test_trainer import options


@pytest.fixture
def events(monkeypatch):
    """What a run does, in order: ("load", finished steps), ("log", step), ("eval", step)."""
    happened: list[tuple[str, int]] = []
    load, log = BatchLoader.load, trainer.MetricsLogger.log

    def recorded_load(self, step, *shape):
        happened.append(("load", step))
        return load(self, step, *shape)

    def recorded_log(self, kind, step, **values):
        happened.append(("log" if kind == "train" else "eval", step))
        log(self, kind, step, **values)

    monkeypatch.setattr(BatchLoader, "load", recorded_load)
    monkeypatch.setattr(trainer.MetricsLogger, "log", recorded_log)
    return happened


def test_a_step_is_started_and_the_next_batch_filled_before_the_metrics_of_the_step_before_are_read(micro, tmp_path, events):
    run = options(micro, tmp_path / "out", steps=5, eval_every=4, save_every=100, eval_tasks=0)
    assert trainer.train(run) is not None
    wanted = [("load", 0), ("eval", 0)]  # the first batch is there for the compiler
    wanted += [("load", 0), ("load", 1), ("load", 2), ("log", 1), ("load", 3), ("log", 2), ("load", 4), ("log", 3), ("log", 4)]
    wanted += [("eval", 4), ("log", 5), ("eval", 5)]  # an evaluation waits for the last step
    assert events == wanted


@pytest.mark.fault("F9")
def test_a_step_that_is_not_finite_ends_the_run_although_the_next_one_was_started(micro, tmp_path, events):
    run = options(micro, tmp_path / "out", steps=20, learning_rate=1e30, clip=1e30, warmup=0.0, eval_every=100, eval_tasks=0)
    with pytest.raises(NonFiniteError, match=r"is not finite .*; there is no checkpoint") as stop:
        trainer.train(run)
    failed = int(str(stop.value).split()[1])
    assert ("log", failed) not in events and ("load", failed + 1) in events
    assert not checkpoints.checkpoint_steps(tmp_path / "out" / "checkpoints")
