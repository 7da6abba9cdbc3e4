"""`lindm check` sees every damage to every file of whatever lindm wrote, names the file, and writes nothing."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

import lindm as ld
from lindm import datasets
from lindm.cli.lifecycle import LIFECYCLES
from lindm.cli.main import main
from lindm.families.random_suites import RandomSuite
from lindm.io import manifest
from lindm.llm.config import ModelConfig
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm_experiments.harness.check import CHECKS, check

SIZES = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 8}
HARMS = {
    "flipped": lambda data: bytes([*data[: len(data) // 2], data[len(data) // 2] ^ 4, *data[len(data) // 2 + 1 :]]),
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "missing": lambda data: None,
}
# what is not damage: a directory without a manifest is not finished, and provenance is a note beside the data
FINE = {(name, "manifest.json") for name in ("verified", "toy", "evaluated")} | {("verified", "toy/manifest.json")}
FINE |= {("data", "provenance.json"), ("evaluated", "data/provenance.json")}


@pytest.fixture(scope="module")
def written(tmp_path_factory, finished) -> Path:
    """A directory with one of each kind; copied by each test that harms it."""
    root = tmp_path_factory.mktemp("written")
    suite = RandomSuite(name="small", horizon=2, states=2, actions=2, concentration=0.5, step=0.25)
    datasets.make_dataset(root / "data", suite, datasets.DatasetConfig(tasks=3, demos=1))
    ld.export_dataset(root / "data", root / "exported")
    ld.evaluate(suite, ["random"], tasks=2, demos=1, out=root / "evaluated")
    ld.report([root / "evaluated"], root / "report")
    ld.solve(ld.mdp([[[[1, 0], [0, 1]], [[0, 1], [1, 0]]]], [[[0, 0], [1, 1]]] * 2, [1, 0])).save(root / "solution.npz")
    ld.solve(ld.stationary_mdp([[[1, 0]], [[0, 1]]], [[0], [1]], [1, 0], discount=0.5)).save(root / "policy.json")
    tiger = ld.read_stationary_pomdp(Path(__file__).parents[2] / "lindm/problems/files/tiger.pomdp")
    ld.solve_stationary(tiger, tolerance=1.0).save(root / "graph.json")
    log = tmp_path_factory.mktemp("log") / "log.csv"
    log.write_text("episode,step,state,action\n1,0,on,run\n1,1,off,run\n")
    ld.estimate(log).save(root / "estimated.pomdp")
    model = Decoder(ModelConfig(model_type="llama", vocab_size=16, **SIZES), nnx.Rngs(0), jnp.float32)
    weights.save(model, root / "model")
    shutil.copytree(finished, root / "toy")
    shutil.copytree(finished, root / "verified" / "toy")
    for name in ("verdicts.json", "report.html"):  # of `lindm run`: a verification has them above
        shutil.copy(finished / name, root / "verified" / name)
    manifest.write_manifest(root / "verified", ["verdicts.json", "report.html", "toy/config.json", "toy/records.jsonl"])
    return root


def files_below(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_what_is_intact_is_reported_with_its_kind_and_state(written, capsys):
    before = files_below(written)
    assert main(["check", str(written)]) == 0
    printed = capsys.readouterr().out
    for line in ("data: dataset, finished, 1 shards", "toy: experiment run, finished, 6 records", "model: model, complete"):
        assert f"ok      {written / line}\n" in printed
    assert files_below(written) == before
    assert {one.kind for one in check(written)} == set(CHECKS) - {
        "training run",
        "checkpoint",
    }  # tests/lindm/llm/sft/test_damage.py


@pytest.mark.fault("F5", "F6", "F28", "F30")
@pytest.mark.parametrize(
    "name",
    ["data", "exported", "evaluated", "report", "solution.npz", "policy.json", "graph.json", "model", "toy", "verified"],
)
def test_every_damage_to_every_file_is_listed_with_its_name(written, tmp_path, name):
    source, copy = written / name, tmp_path / name
    shutil.copy(source, copy) if source.is_file() else shutil.copytree(source, copy)
    contents = files_below(copy)
    for file, good in contents.items():
        path = copy if copy.is_file() else copy / file
        for harm, change in HARMS.items():
            bad = change(good)
            may_be_missing = (name, file) in FINE or "/losses/" in file or copy.is_file()  # losses are computed again
            if bad == good or (harm == "missing" and may_be_missing):
                continue
            if bad == b"" and copy.suffix == ".json":  # nothing tells that it was ours
                continue
            path.unlink() if bad is None else path.write_bytes(bad)
            (checked,) = check(copy)
            assert any(str(path) in problem.what and problem.repair for problem in checked.problems), (file, harm)
            assert main(["check", str(copy)]) == 3
            path.write_bytes(good)
    assert check(copy)[0].problems == [] and files_below(copy) == contents


def test_check_knows_every_kind_that_a_command_writes():
    assert {cycle.writes for cycle in LIFECYCLES.values()} - {None} <= set(CHECKS)


def test_a_directory_without_anything_of_lindm_or_that_does_not_exist_is_exit_3(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["check", str(tmp_path)]) == 3 and "contains nothing that lindm wrote" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "none")]) == 3 and "does not exist" in capsys.readouterr().err
    ld.solve(ld.make("mdp", horizon=2)).save(tmp_path / "s" / "mdp.npz")
    assert main(["check", str(tmp_path / "none"), str(tmp_path / "s"), str(tmp_path / "other")]) == 3
    out, err = capsys.readouterr()
    assert "mdp.npz: solution, " in out and "none does not exist; " in err and err.count("does not exist") == 2


@pytest.mark.fault("F29")
def test_a_directory_that_is_being_written_is_refused(written, capsys):
    from lindm.io.directories import sole_writer

    with sole_writer(written / "toy"):
        assert main(["check", str(written / "toy")]) == 2
    assert "is being written by another process: check it when that has ended" in capsys.readouterr().err
    assert main(["check", str(written / "toy")]) == 0


def test_an_unfinished_run_and_dataset_are_not_damaged(written, tmp_path):
    shutil.copytree(written / "toy", tmp_path / "toy")
    (tmp_path / "toy" / "manifest.json").unlink()
    with (tmp_path / "toy" / "records.jsonl").open("ab") as f:
        f.write(b'{"checksum": "torn by a ki')
    (one,) = check(tmp_path / "toy")
    assert one.state == "not finished, 6 records" and one.problems == []
