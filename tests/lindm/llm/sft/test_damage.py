"""A damaged training run: each damage is listed, refused with the name of the file, or repaired to the same bits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import lindm as ld
from lindm.cli.main import main
from lindm.errors import DataError
from lindm.io import verification
from lindm.llm.io import safetensors_files, weights
from lindm.llm.policy import load_policy
from lindm.llm.sft import metrics, trainer
from lindm.llm.sft.options import SFTConfig
from lindm_experiments.harness.check import check
from tests.experiments.harness.test_check import HARMS, files_below


def options(micro, out, **changes) -> SFTConfig:
    given = {"model": micro.model, "data": micro.mdp, "out": out, "steps": 4, "eval_tasks": 0, "eval_every": 2, "held_out": 0.2}
    return SFTConfig(**given | changes)


@pytest.fixture(scope="module")
def finished(micro, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    trainer.train(options(micro, out))
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path) -> None:
    path.write_bytes(HARMS["flipped"](path.read_bytes()))


@pytest.mark.fault("F5", "F6", "F28", "F30")
def test_every_damage_to_every_file_of_a_run_is_listed_with_its_name(run, capsys):
    before = files_below(run)
    assert main(["check", str(run)]) == 0
    assert "training run, finished, 2 of 2 checkpoints usable" in capsys.readouterr().out
    for name, good in before.items():
        path = run / name
        for harm, change in HARMS.items():
            bad = change(good)
            if bad == good or (harm, name) == ("missing", "manifest.json"):  # then the run is not finished
                continue
            path.unlink() if bad is None else path.write_bytes(bad)
            (checked,) = check(run)
            named = path if not name.startswith("checkpoints") else run / "checkpoints" / name.split("/")[1]
            assert any(str(named) in problem.what and problem.repair for problem in checked.problems), (name, harm)
            path.write_bytes(good)
    assert check(run)[0].problems == [] and files_below(run) == before


@pytest.mark.fault("F6")
def test_a_run_without_a_usable_checkpoint_is_exit_4(run, capsys):
    for step in ("00000002", "00000004"):
        (run / "checkpoints" / step / "progress.json").unlink()
    assert main(["check", str(run)]) == 4
    assert f"{run / 'checkpoints'} has no usable checkpoint" in capsys.readouterr().out


@pytest.mark.fault("F28")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
def test_a_damaged_model_is_refused_wherever_it_is_read_and_no_hash_is_written_over_it(micro, run, tmp_path, capsys, name):
    flip(run / "model" / name)
    before = files_below(run)
    readers = [
        ["model", "show", str(run / "model")],
        ["export", str(run), "--out", str(tmp_path / "exported")],
        ["eval", "mdp", "--tasks", "1", "--policy", f"sft:{run}"],
        ["sft", "--model", str(run / "model"), "--data", str(micro.mdp), "--out", str(tmp_path / "next"), "--steps", "1"],
    ]
    for words in readers[name == "tokenizer.json" :]:  # `model show` reads headers and config
        assert main(words) == 3, words
        assert str(run / "model" / name) in capsys.readouterr().err, words
    with pytest.raises(DataError, match=f"{name}.*the same command writes it again from its checkpoint"):
        trainer.train(options(micro, run))
    assert files_below(run) == before and not (tmp_path / "exported").exists()


@pytest.mark.fault("F28")
def test_a_damaged_model_is_refused_before_tasks_are_made(run):
    flip(run / "model" / "model.safetensors")
    made = []
    with pytest.raises(DataError, match=r"policy sft:.*model\.safetensors is not what was written"):
        ld.evaluate(ld.suite("mdp", horizon=4), [f"sft:{run}"], tasks=2, demos=1, progress=lambda *counts: made.append(counts))
    assert not made


@pytest.mark.fault("F28", "F30")
def test_damaged_files_of_a_run_are_refused_by_name(micro, run, tmp_path):
    before = files_below(run)
    for name in ("config.json", "metrics.jsonl", "manifest.json"):
        for harm in ("flipped", "truncated", "empty"):
            (run / name).write_bytes(HARMS[harm](before[name]))
            harmed = files_below(run)
            if name != "config.json":
                with pytest.raises(DataError, match=name):
                    metrics.MetricsLogger(run, 4, 4, enabled=True)
            else:
                with pytest.raises(DataError, match=name):
                    trainer.train(options(micro, run))
            assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 3, (name, harm)
            assert files_below(run) == harmed
            (run / name).write_bytes(before[name])
    (run / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json is missing, although .*checkpoints is there"):
        trainer.train(options(micro, run))


@pytest.mark.fault("F30")
def test_metrics_of_an_unfinished_run_are_repaired_or_refused_with_their_line(run):
    (run / "manifest.json").unlink()
    path = run / "metrics.jsonl"
    good, logger = path.read_bytes(), lambda: metrics.MetricsLogger(run, 4, 4, enabled=True)
    with path.open("ab") as f:
        f.write(b'{"checksum": "torn by a')
    logger()
    assert path.read_bytes() == good
    lines = good.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"loss", b"lost"), *lines[3:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl:3: .*without .*metrics\.jsonl .* goes on from its last checkpoint"):
        logger()
    for lost in ([6, 5], [1], [2], [6]):  # the last step and its evaluation, the first step, one between, the last evaluation
        path.write_bytes(b"".join(line for i, line in enumerate(lines) if i not in lost))
        with pytest.raises(DataError, match=r"metrics\.jsonl: lines are missing"):
            logger()
    path.unlink()
    logger()  # as the message advises
    assert path.read_bytes() == b""


@pytest.mark.slow
@pytest.mark.fault("F5", "F28", "F30")
def test_a_run_that_goes_on_after_the_advised_repair_ends_with_the_same_model(micro, run):
    model = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    flip(run / "checkpoints" / "00000004" / "progress.json")  # the newest checkpoint, too
    trainer.train(options(micro, run))
    assert (run / "model" / "model.safetensors").read_bytes() == model and check(run)[0].problems == []


def test_a_change_that_is_meant_is_accepted_without_the_manifest(run):
    (run / "model" / "chat_template.jinja").write_text("mine")  # a file that is not listed
    weights.load(run / "model")
    content = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps(content))  # without the line breaks
    with pytest.raises(DataError, match=r"if the change is intended, remove .*manifest\.json"):
        weights.load(run / "model")
    (run / "model" / "manifest.json").unlink()
    weights.load(run / "model")
    with pytest.raises(DataError, match=r"manifest\.json"):  # lindm wrote the model of a run
        load_policy(run)


# --- weights that are not finite -------------------------------------------------------------------------------------------


def poison(directory: Path, name: str, value: float) -> None:
    """Write a value into a tensor; the manifest is that of the new file."""
    path = directory / "model.safetensors"
    with safetensors_files.open_file(path) as f:
        tensors = {key: f.get_tensor(key).copy() for key in f.keys()}  # noqa: SIM118
    tensors[name].reshape(-1)[-1] = value
    shapes = {key: x.shape for key, x in tensors.items()}
    stored = safetensors_files.require_finite
    safetensors_files.require_finite = lambda *_: None
    try:
        safetensors_files.write_file(path, shapes, iter(tensors.values()), "f32")
    finally:
        safetensors_files.require_finite = stored
    (directory / "manifest.json").unlink()
    verification.write_file_list(directory)


@pytest.mark.fault("F31")
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_where_they_are_read(micro, run, tmp_path, capsys, name, value):
    poison(run / "model", name, value)
    readers = [
        ["export", str(run), "--out", str(tmp_path / "exported")],
        ["eval", "mdp", "--tasks", "1", "--policy", f"sft:{run}"],
        ["model", "import", str(run / "model"), "--out", str(tmp_path / "imported")],
        ["sft", "--model", str(run / "model"), "--data", str(micro.mdp), "--out", str(tmp_path / "next"), "--steps", "1"],
    ]
    for words in readers:
        assert main(words) == 5, words
        error = capsys.readouterr().err
        assert f"model.safetensors: {name} is not finite: 1 of" in error, words
    assert not (tmp_path / "exported").exists() and not (tmp_path / "imported").exists()


@pytest.mark.fault("F31")
def test_weights_that_do_not_fit_the_type_of_an_export_are_refused(run, tmp_path, capsys):
    poison(run / "model", "model.norm.weight", 3.4e38)  # finite in f32, infinity in bf16
    assert main(["export", str(run), "--out", str(tmp_path / "exported"), "--dtype", "bf16"]) == 5
    assert "model.norm.weight is not finite" in capsys.readouterr().err and not (tmp_path / "exported").exists()
