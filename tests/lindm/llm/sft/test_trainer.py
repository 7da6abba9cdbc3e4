"""A whole run, in this process: what it writes, what it refuses, and that what it exports is what it trained."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lindm import datasets
from lindm.errors import CheckpointError, DataError, LindmError, NonFiniteError, OutOfMemoryError, Preempted, UsageError
from lindm.io import files, signals
from lindm.llm.io import peft, weights
from lindm.llm.sft import checkpoints, compilation, metrics, trainer
from lindm.llm.sft.options import SFTConfig
from lindm.llm.sft.setup import setup_training
from lindm.llm.tokens import load_tokenizer


def options(micro, out, **changes) -> SFTConfig:
    given = {"model": micro.model, "data": micro.mdp, "out": out, "steps": 6, "eval_tasks": 2, "held_out": 0.2} | changes
    return SFTConfig(**given)


def logits(model, ids):
    ids = jnp.asarray(ids, jnp.int32)[None]
    return np.asarray(model.logits(model.last_hidden_state(ids, jnp.arange(ids.shape[1], dtype=jnp.int32)[None])))


@pytest.fixture(scope="module")
def finished(micro, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert trainer.train(options(micro, out, steps=30, learning_rate=5e-3)).is_dir()
    return out


def test_a_run_learns_and_writes_its_outputs(micro, finished, capsys):
    records = metrics.read_metrics(finished)
    train, looked = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
    assert [r["step"] for r in train] == list(range(1, 31)) and [r["step"] for r in looked] == [0, 8, 16, 24, 30]
    assert looked[-1]["loss"] < 0.5 * looked[0]["loss"]
    assert looked[-1]["n"] == 2 and looked[-1]["method"] == "exact" and looked[0]["gap_ci"][0] <= looked[0]["gap"]
    names = {p.name for p in finished.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "manifest.json",
        "curves.png",
        "curves.pdf",
        "curves.svg",
    }
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["outputs"]["model/manifest.json"] == files.sha256(finished / "model" / "manifest.json")
    assert manifest["inputs"]["data"] == datasets.Dataset(micro.mdp).checksum


@pytest.mark.fault("F18")
def test_the_exported_model_is_the_one_of_the_last_checkpoint_with_its_tokenizer(micro, finished):
    model = weights.load(finished / "model")
    start = weights.load(micro.model)
    assert np.abs(logits(model, range(12)) - logits(start, range(12))).max() > 0.1
    step = checkpoints.checkpoint_steps(finished / "checkpoints")[-1]
    assert step == 30 and checkpoints.find_damage(finished / "checkpoints" / checkpoints.checkpoint_name(step)) is None
    assert load_tokenizer(finished / "model").get_vocab() == load_tokenizer(micro.model).get_vocab()


def test_a_finished_run_does_nothing_more_and_keeps_its_bytes(micro, finished):
    before = files.sha256(finished / "model" / "model.safetensors"), (finished / "metrics.jsonl").read_bytes()
    assert trainer.train(options(micro, finished, steps=30, learning_rate=5e-3)).is_dir()
    assert before == (files.sha256(finished / "model" / "model.safetensors"), (finished / "metrics.jsonl").read_bytes())


def test_no_task_is_both_trained_and_held_out_and_decisions_are_measured_on_held_out_ones(micro, tmp_path):
    prepared = setup_training(options(micro, tmp_path))
    train, evaluated = ({e.group for row in rows for e in row} for rows in (prepared.train_rows, prepared.eval_rows))
    assert train and evaluated and not train & evaluated and train | evaluated == set(range(24))
    assert {task.task for task in prepared.decision_tasks.tasks} <= evaluated


@pytest.mark.slow
@pytest.mark.parametrize("method, base", [("lora", None), ("qlora", "int8")])
def test_adapters_are_trained_the_base_is_not_and_both_exports_compute_the_same(micro, tmp_path, method, base):
    run = options(micro, tmp_path / "out", method=method, base=base, lora_rank=4, learning_rate=1e-2)
    assert trainer.train(run).is_dir()
    merged, start = weights.load(tmp_path / "out" / "model"), weights.load(micro.model)
    apart = weights.load(micro.model, base=base or "f32")
    peft.load_adapter(apart, tmp_path / "out" / "adapter")
    np.testing.assert_allclose(logits(merged, range(9)), logits(apart, range(9)), atol=2e-4)
    np.testing.assert_array_equal(merged.embedding[...], start.embedding[...])
    assert np.abs(logits(merged, range(9)) - logits(start, range(9))).max() > 1e-3
    records = metrics.read_metrics(tmp_path / "out")
    assert [r["loss"] for r in records if r["kind"] == "eval"][-1] < next(r["loss"] for r in records if r["kind"] == "eval")


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_with_its_settings(micro, tmp_path):
    """The first evaluation of the second run, before its first step, is the last one of the first."""
    settings = {"lora_rank": 4, "lora_alpha": 6.0, "lora_scaling": "rslora", "lora_targets": "attention", "lora_dropout": 0.1}
    first = options(micro, tmp_path / "first", method="lora", learning_rate=1e-2, eval_tasks=0, **settings)
    trainer.train(first)
    config = json.loads((tmp_path / "first" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (4, 6, True, 0.1)
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    second = {"method": "lora", "steps": 2, "eval_tasks": 0, "seed": first.seed}
    for name in ("first", "first/adapter"):  # a run, and a directory in the layout of PEFT
        trainer.train(options(micro, tmp_path / f"of {name.replace('/', ' ')}", adapter=tmp_path / name, **second))
    records = [metrics.read_metrics(tmp_path / name) for name in ("first", "of first", "of first adapter")]
    before, after, again = ([r["loss"] for r in one if r["kind"] == "eval"] for one in records)
    assert after == again and after[0] == pytest.approx(before[-1], rel=1e-5) and after[-1] < after[0] < 0.9 * before[0]
    assert (tmp_path / "of first" / "adapter" / "adapter_config.json").read_bytes().count(b"rslora") == 1
    for given, message in (
        ({"lora_rank": 8}, "lora_rank must be left out with adapter, which has 4; got 8"),
        ({"lora_scaling": "standard"}, "lora_scaling must be left out with adapter, which has 'rslora'; got 'standard'"),
        ({"lora_targets": "all"}, "lora_targets must be left out with adapter, which has"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.train(options(micro, tmp_path / "no", adapter=tmp_path / "first", **second | given))


@pytest.mark.slow
def test_packing_and_accumulation_are_of_the_same_documents(micro, tmp_path):
    alone, packed = (
        setup_training(options(micro, tmp_path)),
        setup_training(options(micro, tmp_path, pack=True, max_length=192, accumulate=2)),
    )
    assert len(packed.train_rows) < len(alone.train_rows) and packed.seq_len == 192
    sources = [sorted(e.source for row in p.train_rows for e in row) for p in (alone, packed)]
    assert sources[0] == sources[1]
    assert trainer.train(options(micro, tmp_path / "out", pack=True, max_length=192, accumulate=2, steps=2)).is_dir()
    first = next(r for r in metrics.read_metrics(tmp_path / "out") if r["kind"] == "train")
    assert first["num_labels"] > 16 * 3


def test_patience_stops_early_and_keeps_the_best_model(micro, tmp_path):
    run = options(micro, tmp_path / "out", learning_rate=0.3, patience=1, eval_every=1, steps=20, eval_tasks=0)
    assert trainer.train(run).is_dir()
    looked = [r for r in metrics.read_metrics(tmp_path / "out") if r["kind"] == "eval"]
    assert len(looked) < 20 and looked[-1]["loss"] >= min(r["loss"] for r in looked)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    best = min(looked, key=lambda r: r["loss"])["step"]
    assert manifest["best_step"] == best
    if best == 0:
        exported, start = (logits(weights.load(d), range(9)) for d in (tmp_path / "out" / "model", micro.model))
        np.testing.assert_array_equal(exported, start)
    assert not (tmp_path / "out" / "best").exists()


@pytest.mark.fault("F5")
def test_the_best_weights_are_exported_or_the_run_says_that_they_are_not_there(micro, tmp_path, monkeypatch, capsys):
    run = options(micro, tmp_path / "out", patience=5, eval_every=2, steps=2, eval_tasks=0)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # stopped before it exports
        patch.setattr(trainer, "_export", stop)
        trainer.train(run)
    best = tmp_path / "out" / "best"
    os.rename(best, tmp_path / "aside")
    with pytest.raises(CheckpointError, match=r"out/best is missing, .* of step 2; --fresh trains again"):
        trainer.train(run)
    os.rename(tmp_path / "aside", best)
    (best / "00000002").rename(best / "00000001")  # of another evaluation
    manifest = files.read_json(best / "00000001" / "manifest.json", format=checkpoints.FORMAT)
    files.write_json(best / "00000001" / "manifest.json", manifest | {"step": 1}, format=checkpoints.FORMAT)
    assert trainer.train(run).is_dir()
    assert "the best weights that are kept are those of step 1, not of step 2" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["best_step"] == 1


INTERRUPTED = {"steps": 4, "eval_every": 2, "save_every": 3}


@pytest.fixture(scope="module")
def uninterrupted(micro, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert trainer.train(options(micro, out, **INTERRUPTED)).is_dir()
    return metrics.read_metrics(out)


@pytest.mark.fault("F2")
@pytest.mark.slow
@pytest.mark.parametrize("where, step", [("decisions", 0), ("loss", 2), ("decisions", 4)])
def test_a_stop_during_evaluation_saves_and_the_resumed_run_evaluates(micro, uninterrupted, tmp_path, monkeypatch, where, step):
    calls = {"evaluations": 0}
    name = "_evaluate_decisions" if where == "decisions" else "__call__"
    work = getattr(trainer.Evaluator, name)

    def interrupted(self, params, frozen):
        if calls["evaluations"] == step // 2:
            signals._stop_requested = True
        calls["evaluations"] += 1
        return work(self, params, frozen)

    monkeypatch.setattr(signals, "_stop_requested", False)
    monkeypatch.setattr(trainer.Evaluator, name, interrupted)
    with pytest.raises(Preempted):
        trainer.train(options(micro, tmp_path / "out", **INTERRUPTED))
    assert checkpoints.checkpoint_steps(tmp_path / "out" / "checkpoints")[-1:] == ([step] if step else [])
    assert not any(r["kind"] == "eval" and r["step"] == step for r in metrics.read_metrics(tmp_path / "out"))
    monkeypatch.undo()
    assert trainer.train(options(micro, tmp_path / "out", **INTERRUPTED)).is_dir()
    assert metrics.read_metrics(tmp_path / "out") == uninterrupted
    assert trainer.train(options(micro, tmp_path / "out", **INTERRUPTED)).is_dir(), "and once more, finished"
    assert metrics.read_metrics(tmp_path / "out") == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hidden", "ambiguous"])
def test_rewards_are_hidden_if_they_could_reveal_the_state(micro, tmp_path, kind):
    prepared = setup_training(options(micro, tmp_path, data=getattr(micro, kind)))
    assert "reward" not in prepared.decision_tasks.text.fields
    text = prepared.tokenizer.decode(prepared.train_rows[0][0].ids.tolist())
    assert ":" not in text and ":" in setup_training(options(micro, tmp_path)).tokenizer.decode(
        setup_training(options(micro, tmp_path)).train_rows[0][0].ids.tolist()
    )
    assert trainer.train(options(micro, tmp_path / "out", data=getattr(micro, kind), steps=1)).is_dir()
    looked = [r for r in metrics.read_metrics(tmp_path / "out") if r["kind"] == "eval"]
    assert looked[-1]["method"] == "exact" and np.isfinite(looked[-1]["gap"])


def test_prompts_and_completions_train_too(micro, tmp_path):
    rows = [{"prompt": f"#\n{i % 3}", "completion": " AB"[i % 2 :][:2]} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert trainer.train(options(micro, tmp_path / "out", data=data, steps=3)).is_dir()
    looked = [r for r in metrics.read_metrics(tmp_path / "out") if r["kind"] == "eval"]
    assert "gap" not in looked[-1] and looked[-1]["loss"] < looked[0]["loss"]


# --- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F9")
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_kept(micro, tmp_path):
    with pytest.raises(LindmError) as stop:
        trainer.train(
            options(micro, tmp_path / "out", learning_rate=1e30, clip=1e30, steps=6, save_every=1, eval_every=6, warmup=0.0)
        )
    assert isinstance(stop.value, NonFiniteError)
    assert "is not finite" in str(stop.value) and "task " in str(stop.value), "it names the records of the batch"
    assert not (tmp_path / "out" / "model").exists()
    assert len(checkpoints.checkpoint_steps(tmp_path / "out" / "checkpoints")) == max(
        r["step"] for r in metrics.read_metrics(tmp_path / "out")
    )


@pytest.mark.fault("F14")
def test_other_settings_or_other_data_are_refused_and_the_difference_is_shown(micro, finished, tmp_path):
    with pytest.raises(LindmError, match=r"run: learning_rate was 0\.005 and is now 0\.01; choose .*--fresh") as stop:
        trainer.train(options(micro, finished, steps=30, learning_rate=1e-2))
    assert isinstance(stop.value, UsageError)
    other = tmp_path / "model"
    shutil.copytree(micro.model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    (other / "manifest.json").unlink(missing_ok=True)  # of a model that the user changed on purpose
    shutil.copytree(finished, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    settings["options"]["model"] = str(other)
    files.write_json(tmp_path / "out" / "config.json", settings, format=settings["format"])
    with pytest.raises(LindmError, match=r"run: model has other files \(config\.json(, manifest\.json)?\); choose"):
        trainer.train(options(micro, tmp_path / "out", model=other, steps=30, learning_rate=5e-3))


@pytest.mark.slow
def test_fresh_starts_over(micro, tmp_path):
    out = tmp_path / "out"
    assert trainer.train(options(micro, out, steps=2)).is_dir()
    assert trainer.train(options(micro, out, steps=3, fresh=True)).is_dir()
    assert max(r["step"] for r in metrics.read_metrics(out)) == 3


def test_a_directory_with_something_else_in_it_is_not_touched(micro, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LindmError, match="is not empty and holds no run"):
        trainer.train(options(micro, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": None}, "one of model and preset must be given"),
        ({"preset": "tiny"}, "one of model and preset must be given"),
        ({"method": "half"}, "method must be one of full, lora, qlora; got 'half'"),
        ({"base": "nf4"}, "base must be left out with method full"),
        ({"method": "qlora", "base": "bf16"}, "base must be int8 or nf4"),
        ({"lora_rank": 4}, "lora_rank must be left out with method full, which trains all weights; got 4"),
        ({"adapter": Path("there")}, "adapter must be left out with method full, which trains all weights; got there"),
        ({"method": "lora", "lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\); got 1.0"),
        ({"method": "lora", "lora_targets": "q_prj"}, r"lora_targets .*'q_prj'"),
        ({"method": "lora", "lora_targets": "qkv_proj"}, r"lora_targets .*'qkv_proj'"),
        ({"method": "lora", "adapter": Path("nowhere")}, "cannot read nowhere/adapter_config.json"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\); got 1.0"),
        ({"max_length": 10_000}, "max_length must be at most the 256 tokens of the model; got 10000"),
        ({"mesh": "fsdp=3"}, "mesh must use all 8 devices; data=1,fsdp=3,tensor=1 uses 3"),
        ({"mesh": "rows=8"}, "mesh must be of the form fsdp=8,tensor=2"),
        ({"mesh": "tensor=8"}, "mesh must divide"),
        ({"batch": 6}, "batch must be a multiple of data x fsdp = 8; got 6"),
        ({"data": Path("nowhere")}, "data must be a directory of `lindm data make`, a file of rows"),
        ({"template": "nowhere.json"}, "cannot read nowhere.json"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0; got -1.0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\); got 1.0"),
    ],
)
def test_invalid_options_raise_errors_that_name_the_option(micro, tmp_path, changes, message):
    with pytest.raises((ValueError, LindmError), match=message):
        trainer.train(options(micro, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_document_longer_than_a_row_is_named(micro, tmp_path):
    with pytest.raises(LindmError, match=r"task 0, query 0.*must have at most 16 tokens") as stop:
        trainer.train(options(micro, tmp_path / "out", max_length=16))
    assert isinstance(stop.value, DataError)


@pytest.mark.fault("F16")
def test_a_step_that_does_not_fit_is_exit_6_before_it_is_taken(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation.devices, "available_memory", lambda device: 1000)
    with pytest.raises(LindmError, match=r"does not fit in memory.*--batch.*lindm plan") as stop:
        trainer.train(options(micro, tmp_path / "out"))
    assert isinstance(stop.value, OutOfMemoryError)


def test_a_finished_run_is_not_trained_or_compiled_again(micro, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(trainer, "TrainPrograms", None)
    settings = options(micro, tmp_path / "out", steps=30, learning_rate=5e-3)
    assert trainer.train(settings) == tmp_path / "out" / "model"
    assert "already finished, with --steps 30; more of them go on, --fresh trains again" in capsys.readouterr().err
    (tmp_path / "out" / "curves.png").unlink()
    with pytest.raises(TypeError):  # of the missing programs: what is missing is made again
        trainer.train(settings)


def test_answers_without_an_end_and_the_loss_without_held_out_rows_are_reported(micro, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "0", "completion": " A" * n}) + "\n" for n in (2, 3, 30, 30)))
    changes = {"data": data, "held_out": 0.0, "overlong": "truncate", "max_length": 12, "steps": 2}
    trainer.train(options(micro, tmp_path / "out", **changes))
    said = capsys.readouterr().err
    assert "2 truncated documents lose the end of a trained answer: the model does not learn to stop there" in said
    losses = [r["loss"] for r in metrics.read_metrics(tmp_path / "out") if r["kind"] == "train"]
    assert f"loss      {losses[-1]:.4g} in the last step of training; nothing is held out" in said and "answer    " in said
