"""A run that resumes: after any step, on other devices, after memory ran out; and the runs that may not resume."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.cli.main import main
from lindm.errors import LindmError
from lindm.io import files
from lindm.llm.parallel.sharding import weight_path
from lindm.llm.sft import checkpoints, compilation, setup, trainer
from lindm.llm.sft.options import SFTConfig

STEPS = 5
PACKED = {"pack": True, "max_length": 192, "accumulate": 2}  # three epochs in five steps
RUN = {"steps": STEPS, "save_every": 1, "eval_every": 3, "eval_tasks": 2, "held_out": 0.2, "keep": STEPS}


def words(micro, out: Path, **changes: object) -> list[str]:
    """The command line of a run."""
    options = {"model": micro.model, "data": micro.mdp, "out": out} | RUN | changes
    switches = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is True]
    return ["sft", *switches, *(w for k, v in options.items() if v is not True for w in (f"--{k.replace('_', '-')}", str(v)))]


def undone(whole: Path, out: Path, step: int) -> None:
    """A copy of a finished run as it was when the checkpoint of `step` was written."""
    shutil.copytree(whole, out)
    for later in checkpoints.checkpoint_steps(out / "checkpoints"):
        if later > step:
            shutil.rmtree(out / "checkpoints" / checkpoints.checkpoint_name(later))
    for name in ("model", "adapter"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("manifest.json", "curves.png", "curves.pdf", "curves.svg"):
        (out / name).unlink(missing_ok=True)


# --- after any step ----------------------------------------------------------------------------------------------------------


def train_and_record(config: SFTConfig, monkeypatch) -> dict[int, dict[str, str]]:
    """Train; SHA-256 of every array of the state (parameters, moments, counts) at every save."""
    saved: dict[int, dict[str, str]] = {}
    save = checkpoints.CheckpointWriter.save

    def record(self, directory, step, state, progress, keep):
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        arrays = {weight_path(keys): np.asarray(leaf) for keys, leaf in leaves}
        saved[step] = {
            path: hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest() for path, x in arrays.items()
        }
        save(self, directory, step, state, progress, keep)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.CheckpointWriter, "save", record)
        assert trainer.train(config) is not None
    return saved


@pytest.mark.slow
@pytest.mark.fault("F10", "F11")
@pytest.mark.parametrize(
    "options, steps",
    [(PACKED, range(STEPS)), ({"method": "lora", "lora_rank": 4, "lora_dropout": 0.3}, (2,))],
    ids=["full", "lora"],
)
def test_resumed_after_any_step_batches_losses_and_the_whole_state_have_the_same_bits(
    micro, tmp_path, monkeypatch, capsys, trials, options, steps
):
    def config(out: Path) -> SFTConfig:
        return SFTConfig(model=micro.model, data=micro.mdp, out=out, **RUN, **options)

    whole = train_and_record(config(tmp_path / "whole"), monkeypatch)
    assert list(whole) == list(range(1, STEPS + 1)) and len(whole[1]) > 30
    assert len({tuple(state.values()) for state in whole.values()}) == STEPS
    metrics = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert len({json.loads(line).get("batch_sha256") for line in metrics.splitlines()}) == STEPS + 1
    for step in steps:
        out = tmp_path / f"from-{step}"
        undone(tmp_path / "whole", out, step)
        capsys.readouterr()
        again = train_and_record(config(out), monkeypatch)
        assert ("left no checkpoint: it begins at step 0" in capsys.readouterr().err) == (step == 0)
        assert again == {later: state for later, state in whole.items() if later > step}, f"resumed after step {step}"
        assert (out / "metrics.jsonl").read_bytes() == metrics
        assert files.sha256(out / "model" / "model.safetensors") == files.sha256(
            tmp_path / "whole" / "model" / "model.safetensors"
        )
        trials.add()
        shutil.rmtree(out)


# --- on other devices --------------------------------------------------------------------------------------------------------


def run_on(num_devices: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`lindm` in a process that has so many virtual devices."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0",
    }
    command = [sys.executable, "-m", "lindm", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.fault("F12")
def test_a_run_of_eight_devices_goes_on_with_one_two_and_four(micro, tmp_path, trials):
    """The last checkpoint is exported: its parameters are equal bit by bit. From an earlier one, training goes on."""
    whole, small = tmp_path / "whole", {"steps": 3, "eval_tasks": 0}
    done = run_on(8, *words(micro, whole, **small))
    assert done.returncode == 0, done.stderr
    for num_devices in (1, 2, 4):
        out = tmp_path / f"exported-{num_devices}"
        undone(whole, out, STEPS)
        done = run_on(num_devices, *words(micro, out, **small))
        assert done.returncode == 0 and "resumed at step 3 of 3" in done.stderr, done.stderr
        assert files.sha256(out / "model" / "model.safetensors") == files.sha256(whole / "model" / "model.safetensors")
        trials.add()
    undone(whole, tmp_path / "trained", 1)
    done = run_on(2, *words(micro, tmp_path / "trained", **small))
    assert done.returncode == 0 and "resumed at step 1 of 3" in done.stderr, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "trained"), losses(whole), rtol=1e-4)
    trials.add()


# --- memory ------------------------------------------------------------------------------------------------------------------


def exhaust(*_: object, **__: object) -> None:
    """More memory than there is address space: XLA's own error."""
    jnp.zeros(2**46, jnp.float32).block_until_ready()


@pytest.mark.slow
@pytest.mark.fault("F16")
@pytest.mark.parametrize("where", ["step", "evaluation", "save"])
def test_memory_that_runs_out_while_running_is_exit_6_and_the_run_resumes(micro, tmp_path, monkeypatch, capsys, trials, where):
    small = {"steps": 3, "eval_tasks": 0, "eval_every": 1}
    calls = 0

    def failing(work):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 3:
                exhaust()
            return work(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if where == "step":
            compile_step = compilation.compile_train_step
            patch.setattr(compilation, "compile_train_step", lambda *args: failing(compile_step(*args)))
        elif where == "evaluation":
            patch.setattr(trainer.Evaluator, "__call__", failing(trainer.Evaluator.__call__))
        else:
            patch.setattr(checkpoints.ocp.AsyncCheckpointer, "save", failing(checkpoints.ocp.AsyncCheckpointer.save))
        assert main(words(micro, tmp_path / "out", **small)) == 6
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the run does not fit in memory: RESOURCE_EXHAUSTED" in error and "--batch" in error and "lindm plan" in error
    kept = {"step": 2, "evaluation": 1, "save": 2}[where]  # the evaluation before the first step was the first
    steps = checkpoints.checkpoint_steps(tmp_path / "out" / "checkpoints")
    assert steps[-1] == kept
    assert all(checkpoints.find_damage(tmp_path / "out" / "checkpoints" / checkpoints.checkpoint_name(s)) is None for s in steps)
    assert main(words(micro, tmp_path / "out", **small)) == 0
    assert f"resumed at step {kept} of 3" in capsys.readouterr().err
    trials.add()


@pytest.mark.slow
@pytest.mark.fault("F8")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax, for each array that is not written
def test_a_run_whose_directory_is_removed_ends_with_exit_7_and_does_not_come_back(micro, tmp_path, monkeypatch, capsys):
    log = trainer.MetricsLogger.log

    def log_and_remove(self, kind, step, **values):
        log(self, kind, step, **values)
        if (kind, step) == ("train", 2):
            (tmp_path / "out").rename(tmp_path / "away")  # at once, while a checkpoint is written
            shutil.rmtree(tmp_path / "away")

    monkeypatch.setattr(trainer.MetricsLogger, "log", log_and_remove)
    assert main(words(micro, tmp_path / "out", eval_tasks=0)) == 7
    assert f"cannot write {tmp_path / 'out'}" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.fault("F9")
def test_an_evaluation_that_is_not_finite_is_exit_5_before_its_step_is_saved(micro, tmp_path, monkeypatch, capsys):
    small, calls = {"steps": 3, "eval_tasks": 0, "eval_every": 1}, []

    def evaluate(self, params, frozen):
        calls.append(float("nan") if len(calls) == 2 else 1.0)  # before the first step, and after each
        return {"loss": calls[-1], "accuracy": 0.5}

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Evaluator, "__call__", evaluate)
        assert main(words(micro, tmp_path / "out", **small)) == 5
    assert "the evaluation after step 2 is not finite: loss = nan" in capsys.readouterr().err.splitlines()[-1]
    assert checkpoints.checkpoint_steps(tmp_path / "out" / "checkpoints") == [1]
    assert b"NaN" not in (tmp_path / "out" / "metrics.jsonl").read_bytes()


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"#\n{i % 3}", "completion": " AB"[i % 2 :][:2]}) + "\n" for i in range(40)))
    return path


@pytest.fixture
def begun(monkeypatch):
    """Runs end as soon as their settings are accepted and written."""
    monkeypatch.setattr(trainer, "_run", lambda *_: None)


@pytest.mark.fault("F14")
@pytest.mark.parametrize("change", ["data", "one value of the data", "evaluation data", "model", "option"])
def test_a_run_whose_data_model_or_options_changed_is_refused_and_the_difference_is_named(
    micro, rows, tmp_path, begun, capsys, change
):
    model, evaluation, out = tmp_path / "model", tmp_path / "evaluation.jsonl", tmp_path / "out"
    shutil.copytree(micro.model, model)
    shutil.copyfile(rows, evaluation)
    command = words(micro, out, model=model, data=rows, eval_data=evaluation)
    assert main(command) == 0 and main(command) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    if change == "model":
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-4}))
        (model / "manifest.json").unlink(missing_ok=True)  # of a model that the user changed on purpose
    elif change == "option":
        command += ["--learning-rate", "0.5"]
    else:
        path = evaluation if change == "evaluation data" else rows
        text = path.read_text()
        path.write_text(text.replace("A", "B", 1) if change == "one value of the data" else text + text.splitlines()[0] + "\n")
    assert main(command) == 2
    named = {"option": r"learning_rate was .* and is now 0\.5", "model": r"model has other files \(config\.json"}
    named["evaluation data"] = "eval_data was .* and is now"
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(named.get(change, " data was .* and is now"), error) and "--fresh" in error
    hashes = out / "tokens" / "hashes.json"  # the cache may have gained the tokens of the other rows
    assert {p: p.read_bytes() for p in before if p != hashes} == {p: before[p] for p in before if p != hashes}
    assert all(p in before or out / "tokens" in p.parents for p in out.rglob("*") if p.is_file())
    assert main([*command, "--fresh"]) == 0


@pytest.mark.fault("F14")
def test_base_weights_and_activations_keep_their_types_on_devices_of_another_kind(
    micro, rows, tmp_path, begun, capsys, monkeypatch
):
    """Their defaults are others there: the run is refused, or gets the options that name what it had."""
    dtype = setup._dtype
    command = words(micro, tmp_path / "out", data=rows, method="lora")
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["defaults"]["dtype"] == "f32"
    monkeypatch.setattr(setup, "default_base", lambda method, platform: "bf16")
    monkeypatch.setattr(setup, "_dtype", lambda name: dtype("bf16" if name == "auto" else name))
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "base was 'f32' and is now 'bf16'; dtype was 'f32' and is now 'bf16'" in error
    assert main([*command, "--base", "f32"]) == 2
    assert main([*command, "--base", "f32", "--dtype", "f32"]) == 0


@pytest.mark.parametrize("harm", ["another directory", "no settings", "no checkpoint", "damaged model"])
def test_all_processes_of_a_run_that_is_refused_give_the_reason(micro, rows, tmp_path, begun, harm):
    """Process 0 alone would leave the others waiting for a peer that is gone."""
    out = tmp_path / "out"
    if harm in ("no checkpoint", "damaged model"):
        assert main(words(micro, out, data=rows)) == 0
    (out / "model").mkdir(parents=True)
    (out / "model" / "config.json").write_text("{}")
    if harm == "another directory":
        (out / "model").rename(out / "mine")
    steps = STEPS + 1 if harm == "no checkpoint" else STEPS
    prepared = setup.setup_training(SFTConfig(model=micro.model, data=rows, out=out, **RUN | {"steps": steps}))
    before = sorted(out.rglob("*"))
    reason = {"another directory": "holds no run", "no settings": "config.json is missing", "no checkpoint": "no checkpoint from"}
    for is_main in (False, True):
        with pytest.raises(LindmError, match=reason.get(harm, "without .*model the same command writes it again")):
            trainer._check_same_run(prepared, is_main)
    assert sorted(out.rglob("*")) == before


@pytest.mark.fault("F13")
@pytest.mark.parametrize("line", [1, 17, 40])
@pytest.mark.parametrize("harm", ["torn", "another value", "zeros"])
def test_a_bad_row_anywhere_is_exit_3_with_its_line_before_anything_is_trained(
    micro, rows, tmp_path, begun, capsys, trials, line, harm
):
    """Also the last one: a torn row of the user's data is not the end of the data."""
    lines = rows.read_bytes().splitlines(keepends=True)
    good = lines[line - 1]
    lines[line - 1] = {"torn": good[: len(good) // 2], "another value": b"[1]\n", "zeros": b"\0" * len(good) + b"\n"}[harm]
    if harm == "torn" and line < len(lines):
        lines[line - 1] += b"\n"
    rows.write_bytes(b"".join(lines))
    assert main(words(micro, tmp_path / "out", data=rows)) == 3
    assert f"rows.jsonl:{line}: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "config.json").exists()
    trials.add()
