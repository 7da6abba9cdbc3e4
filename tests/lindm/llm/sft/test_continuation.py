"""A run that goes on with a larger number of steps."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from lindm.errors import CheckpointError, UsageError
from lindm.io.directories import remove
from lindm.io.files import read_json_lines
from lindm.llm.sft import continuation, optimizer, trainer
from lindm.llm.sft.loop import EvalHistory
from lindm.llm.sft.options import SFTConfig
from tests.lindm.llm.io.tensors import everything

pytestmark = pytest.mark.slow
SHORT, LONG = 4, 7


def options(micro, out, steps, **changes):
    settings = {
        "eval_every": 2,
        "eval_tasks": 0,
        "learning_rate": 1e-2,
        "warmup": 0.25,
        "held_out": 0.2,
    } | changes
    return SFTConfig(model=micro.model, data=micro.mdp, out=out, steps=steps, **settings)


def rates(steps):
    """The learning rates of the steps of a run: a line up to the peak, then half a cosine down to a tenth of it."""
    up = max(1, round(0.25 * steps))
    after = (np.arange(steps) - up) / (steps - up)
    down = 1e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi * after)) / 2)
    return np.where(np.arange(steps) < up, 1e-2 * (np.arange(steps) + 1) / up, down)


@pytest.fixture(scope="module")
def runs(micro, tmp_path_factory):
    """A run of four steps that went on to seven, its records and model before, what it printed, and one run of seven steps."""
    root = tmp_path_factory.mktemp("longer")
    trainer.train(options(micro, root / "run", SHORT))
    before = read_json_lines(root / "run" / "metrics.jsonl"), everything(root / "run" / "model")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Progress, "print", lambda self, line: said.append(line))
        trainer.train(options(micro, root / "run", LONG))
    with pytest.MonkeyPatch.context() as patch:  # the rates of the short run, then those of the long one
        both = jnp.array([*rates(SHORT), *rates(LONG)[SHORT:]], jnp.float32)
        patch.setattr(optimizer, "learning_rate_schedule", lambda config: lambda step: both[step])
        trainer.train(options(micro, root / "whole", LONG))
    return root, before, said


def test_optimizer_and_data_go_on_and_the_rate_follows_the_longer_schedule(runs):
    root, (records, _), said = runs
    after = read_json_lines(root / "run" / "metrics.jsonl")
    assert after[: len(records)] == records
    train, whole = (
        [r for r in read_json_lines(root / name / "metrics.jsonl") if r["kind"] == "train"] for name in ("run", "whole")
    )
    assert [r["step"] for r in train] == list(range(1, LONG + 1))
    assert [r["batch_sha256"] for r in train] == [r["batch_sha256"] for r in whole]
    np.testing.assert_allclose([r["loss"] for r in train], [r["loss"] for r in whole], rtol=1e-4)
    ours, theirs = everything(root / "run" / "model"), everything(root / "whole" / "model")
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=1e-4, err_msg=name)
    was, now = rates(SHORT)[-1], rates(LONG)[SHORT]
    expected = f"goes on after step 4 of 4: the learning rate was {was:.3g} and is now {now:.3g}, by the schedule of all 7 steps"
    assert expected in said and now > was


def test_the_results_and_the_settings_are_those_of_the_longer_run(runs):
    root, (_, model), _ = runs
    config = json.loads((root / "run" / "config.json").read_text())
    assert config["options"]["steps"] == LONG
    assert config["schedules"] == [{"from_step": 0, "steps": SHORT}, {"from_step": SHORT, "steps": LONG}]
    assert json.loads((root / "run" / "manifest.json").read_text())["steps"] == LONG
    weights = everything(root / "run" / "model")
    assert any(not np.array_equal(weights[name], model[name]) for name in model)
    evaluated = [r["step"] for r in read_json_lines(root / "run" / "metrics.jsonl") if r["kind"] == "eval"]
    assert evaluated == [0, 2, 4, 6, 7]


def test_fewer_steps_are_another_run(runs, micro):
    root, _, _ = runs
    with pytest.raises(UsageError, match="holds another run: steps was 7 and is now 5"):
        trainer.train(options(micro, root / "run", 5))
    with pytest.raises(UsageError, match=r"seed was 0 and is now 1; choose"):
        trainer.train(options(micro, root / "run", 9, seed=1))


def test_a_stop_before_the_first_further_step_changes_nothing(runs):
    """The longer run begins where the shorter one ended, whichever command found it there."""
    root, _, _ = runs
    config = optimizer.OptimizerConfig(steps=LONG, learning_rate=1e-2)
    history = EvalHistory(last_step=4, best_loss=0.5, best_step=2, evals_since_best=1)
    fresh, sentence = continuation.begin_longer_schedule(root / "run", SHORT, history, config)
    assert fresh == EvalHistory(last_step=4) and sentence.startswith("goes on after step 4 of 4")
    for step in (5, 7):
        assert continuation.begin_longer_schedule(root / "run", step, history, config) == (history, "")
    assert continuation.begin_longer_schedule(root / "run", 0, history, config) == (history, "")
    whole = root / "whole"
    assert continuation.begin_longer_schedule(whole, SHORT, history, replace(config, steps=9)) == (history, "")


def test_a_run_without_checkpoints_cannot_go_on(runs, micro):
    root, _, _ = runs
    remove(root / "whole" / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint from which a run of 9 steps can continue"):
        trainer.train(options(micro, root / "whole", 9))
    assert (root / "whole" / "model").is_dir() and (root / "whole" / "manifest.json").exists()
