"""Shards: the same bytes whatever happens on the way, and nobody's files harmed."""

import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest

from lindm import datasets
from lindm.datasets import generate, writer
from lindm.datasets.writer import make_dataset
from lindm.errors import LindmError, StorageError, UsageError
from lindm.io import directories, files, provenance, temporaries
from lindm.io.verification import PROVENANCE
from tests.clock import HANGS
from tests.lindm.datasets.conftest import SUITE, config, fixed_mdp


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file whose bytes depend on the source and the config alone."""
    names = sorted(p for p in directory.iterdir() if p.name != PROVENANCE)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


@pytest.fixture
def source():
    return fixed_mdp()


@pytest.fixture
def reference(made):
    return contents(made.mdp)


CONFIG = config(query_epsilon=0.5)


def test_two_runs_write_the_same_bytes(tmp_path, source, reference):
    result = make_dataset(tmp_path / "again", source, CONFIG)
    assert contents(tmp_path / "again") == reference
    assert result.made == 3 and result.kept == 0 and result.damaged == ()
    names = {"config.json", "manifest.json", "README.md", "problem.jsonl", "problem.parquet"}
    stems = [f"{table}-{k:05d}" for table in ("tasks", "episodes") for k in range(3)]
    assert set(reference) == names | {stem + ending for stem in stems for ending in (".jsonl", ".parquet")}


def test_provenance_is_of_the_last_call_that_made_shards(tmp_path, source, monkeypatch):
    for command, shard in (("first", None), ("second", None), ("third", "tasks-00001.jsonl")):
        monkeypatch.setattr("sys.argv", ["lindm", command])
        if shard:
            (tmp_path / "d" / shard).unlink()
        make_dataset(tmp_path / "d", source, CONFIG)
        content = files.read_json(tmp_path / "d" / PROVENANCE, format=provenance.FORMAT)
        assert content["command"] == ("lindm third" if shard else "lindm first")
        assert content["date"] and {"lindm", "jax"} <= content["versions"].keys()


def test_a_finished_dataset_is_left_alone(tmp_path, source, reference):
    make_dataset(tmp_path / "d", source, CONFIG)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()}
    calls = []
    result = make_dataset(tmp_path / "d", source, CONFIG, progress=lambda done, total: calls.append((done, total)))
    assert (result.made, result.kept) == (0, 3) and calls == [(10, 10)]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()} == before


CHILD = """
import os, signal, sys
from pathlib import Path
from lindm_experiments.harness.xla import configure_xla
configure_xla()
import jax
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, sys.argv[1])
from tests.lindm.datasets.conftest import fixed_mdp, config
from lindm.datasets.writer import make_dataset
replace = os.replace
def dying(source, target):
    if Path(target).name == "episodes-00001.jsonl":  # the shard has its tasks and not its episodes
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying
make_dataset(Path(sys.argv[2]), fixed_mdp(), config(query_epsilon=0.5))
"""


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(tmp_path, source, reference):
    root, out = Path(__file__).parents[3], tmp_path / "d"
    env = os.environ | {"PYTHONPATH": str(root)}
    # conftest.py has put the settings of XLA there, which configure_xla puts there again: the same ones twice are the same ones
    child = subprocess.run([sys.executable, "-c", CHILD, str(root), str(out)], env=env, capture_output=True, timeout=HANGS)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    left = {p.name for p in out.iterdir()}
    assert "tasks-00001.parquet" in left and "episodes-00001.jsonl" not in left and "manifest.json" not in left
    assert any(name.endswith(temporaries.TEMPORARY_SUFFIX) for name in left)
    with pytest.raises(LindmError, match="not finished"):
        datasets.Dataset(out)
    with (out / "progress.jsonl").open("a") as f:
        f.write('{"point": {"shard": "000')  # a torn line too
    result = make_dataset(out, source, CONFIG)
    assert (result.kept, result.made) == (1, 2)
    assert contents(out) == reference


@pytest.mark.fault("F17")
def test_a_run_that_is_stopped_anywhere_goes_on(tmp_path, source, reference, monkeypatch):
    """Before every single write of a whole run, and before every one of the run that goes on."""

    class Stopped(BaseException):
        pass

    left = 0

    def counted(function):
        def call(*args):
            nonlocal left
            left -= 1
            if left < 0:
                raise Stopped
            return function(*args)

        return call

    monkeypatch.setattr(files, "write_atomic", counted(files.write_atomic))
    monkeypatch.setattr(files, "append_line", counted(files.append_line))
    out, stops = tmp_path / "d", 0
    for allowed in (0, 1, 2, 3, 4, 3, 2, 5, 6, 6, 6, *[2] * 12):  # each call writes the provenance first
        left = allowed
        try:
            make_dataset(out, source, CONFIG)
            break
        except Stopped:
            stops += 1
    assert stops > 8 and contents(out) == reference


def stopped(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.fault("F17")
def test_a_run_that_is_stopped_while_it_draws_goes_on(tmp_path, source, reference):
    out = tmp_path / "d"
    with pytest.raises(KeyboardInterrupt):
        make_dataset(out, source, CONFIG, progress=lambda done, total: stopped() if done > 4 else None)
    left = {p.name for p in out.iterdir()}
    assert "progress.jsonl" in left and not any(name.startswith(".") for name in left)
    assert make_dataset(out, source, CONFIG).kept == 1
    assert contents(out) == reference


@pytest.mark.fault("F27")
@pytest.mark.parametrize("place", ["read_manifest", "read_json", "read_json_lines"])
def test_a_signal_is_not_taken_for_a_damaged_file(tmp_path, source, reference, monkeypatch, place):
    """In a notebook the handler may raise anywhere, also where a file that cannot be read would be passed over."""
    out = tmp_path / "d"
    with pytest.raises(KeyboardInterrupt):
        make_dataset(out, source, CONFIG, progress=lambda done, total: stopped() if done > 4 else None)
    before = contents(out)
    monkeypatch.setattr(files if place in ("read_json", "read_json_lines") else writer, place, stopped)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(out, source, CONFIG)
    assert contents(out) == before
    monkeypatch.undo()
    assert make_dataset(out, source, CONFIG).kept == 1 and contents(out) == reference


@pytest.mark.fault("F28")
@pytest.mark.parametrize(
    "name", ["tasks-00001.jsonl", "episodes-00002.parquet", "problem.jsonl", "progress.jsonl", "manifest.json"]
)
def test_a_flipped_bit_is_found_and_repaired(tmp_path, source, reference, monkeypatch, name):
    out = tmp_path / "d"
    if name == "progress.jsonl":  # a run that did not come to its manifest
        monkeypatch.setattr(writer, "card", lambda manifest: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_dataset(out, source, CONFIG)
        monkeypatch.undo()
    else:
        make_dataset(out, source, CONFIG)
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 4
    (out / name).write_bytes(data)
    result = make_dataset(out, source, CONFIG)
    assert contents(out) == reference
    if name not in ("progress.jsonl", "manifest.json"):
        assert result.damaged == (name,) and (result.kept, result.made) == ((3, 0) if name == "problem.jsonl" else (2, 1))


@pytest.mark.fault("F28")
def test_a_missing_and_a_truncated_file_are_made_again(tmp_path, source, reference):
    out = tmp_path / "d"
    make_dataset(out, source, CONFIG)
    (out / "episodes-00000.jsonl").unlink()
    with (out / "tasks-00002.parquet").open("r+b") as f:
        f.truncate(100)
    (out / "README.md").unlink()
    assert make_dataset(out, source, CONFIG).made == 2
    assert contents(out) == reference


@pytest.mark.fault("F14")
def test_another_configuration_is_refused_and_the_difference_shown(tmp_path, made, source):
    before = contents(made.mdp)
    with pytest.raises(
        LindmError, match=r"dataset.query_epsilon is 0.5 there and 0.2 here, dataset.seed is 0 there and 1 here;"
    ) as e:
        make_dataset(made.mdp, source, config(seed=1))
    assert isinstance(e.value, UsageError)
    with pytest.raises(LindmError, match=r"source.problem.sha256 is "):
        make_dataset(made.mdp, jax.tree.map(lambda x: x[..., ::-1], source.problem), CONFIG)
    assert contents(made.mdp) == before


@pytest.mark.fault("F14")
def test_other_versions_may_read_a_dataset_but_not_go_on_with_it(tmp_path, source, monkeypatch):
    out = tmp_path / "d"
    make_dataset(out, source, CONFIG)
    before = contents(out)
    monkeypatch.setattr(writer, "_versions", lambda: json.loads((out / "config.json").read_text())["versions"] | {"jax": "9"})
    assert make_dataset(out, source, CONFIG).made == 0 and contents(out) == before
    (out / "tasks-00000.jsonl").unlink()
    with pytest.raises(LindmError, match=r'jax is "0\.\d+\.\d+.*" there and "9" here'):
        make_dataset(out, source, CONFIG)


def test_a_directory_with_other_files_is_left_as_it_is(tmp_path, source):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(LindmError, match=r"is not empty and holds no dataset \(thesis.tex\)") as e:
        make_dataset(tmp_path, source, CONFIG)
    assert isinstance(e.value, UsageError) and [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
@pytest.mark.parametrize("content", ['{"lr": 3e-4}', '{"config": {"format": 1}}', "{}", "[1]", "lr: 3e-4"])
def test_a_directory_with_files_of_the_same_name_is_left_as_it_is(tmp_path, source, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(
        LindmError,
        match=r"holds something that is not a dataset of this version and is not replaced: .*; choose another directory",
    ) as e:
        make_dataset(tmp_path, source, CONFIG)
    assert isinstance(e.value, UsageError) and [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_files_of_a_user_in_a_dataset_survive(tmp_path, source):
    out = tmp_path / "d"
    make_dataset(out, source, CONFIG)
    (out / "notes.txt").write_text("mine")
    (out / "tasks-00000.jsonl").unlink()
    make_dataset(out, source, CONFIG)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.fault("F8")
def test_a_place_that_cannot_be_written_is_exit_7(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(LindmError, match="cannot write") as e:
        make_dataset(tmp_path / "file" / "d", source, CONFIG)
    assert isinstance(e.value, StorageError)


@pytest.mark.fault("F15")
def test_a_second_writer_is_refused(tmp_path, source):
    with directories.sole_writer(tmp_path / "d"), pytest.raises(LindmError, match="written by another process"):
        make_dataset(tmp_path / "d", source, CONFIG)


def test_without_pyarrow_the_extra_is_named(tmp_path, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LindmError, match=r"pip install -e '.\[data\]'"):
        make_dataset(tmp_path / "d", source, CONFIG)
    assert not (tmp_path / "d").exists()


def test_names_must_fit_the_problem(tmp_path, source):
    for part, names in (("states", ("a", "b")), ("actions", ("a", "a", "b")), ("models", ("m",))):
        with pytest.raises(ValueError, match=f"names of {part} must be"):
            make_dataset(tmp_path / "d", replace(source, **{part: names}), CONFIG)


def test_parquet_and_json_lines_hold_the_same_values(made):
    for directory in (made.suite, made.mdp, made.apomdp):
        manifest = datasets.Dataset(directory).manifest
        for record in manifest["shards"]:
            for name, file in record["files"].items():
                assert file["sha256"] == hashlib.sha256((directory / name).read_bytes()).hexdigest()
                if name.endswith(".jsonl"):
                    rows = [json.loads(line) for line in (directory / name).read_text().splitlines()]
                    table = pyarrow.parquet.read_table(directory / name.replace(".jsonl", ".parquet"))
                    assert table.to_pylist() == rows and len(rows) == file["rows"]


def test_one_shard_at_a_time_is_in_memory(tmp_path, source, monkeypatch):
    alive, draw = [], generate.TaskGenerator.generate

    def watched(self, first, last, tick):
        assert not any(ref() is not None for ref in alive)
        drawn = draw(self, first, last, tick)
        alive.append(weakref.ref(drawn.episodes.s))
        assert len(drawn.episodes.s) == last - first <= 4
        return drawn

    monkeypatch.setattr(generate.TaskGenerator, "generate", watched)
    make_dataset(tmp_path / "d", source, CONFIG)
    assert len(alive) == 3


def test_a_shard_is_sized_by_its_bytes_and_not_by_the_number_of_tasks():
    for n in (1, 10**6):
        assert generate.TaskGenerator(SUITE, config(tasks=n, shard_size=None)).shard_size == 256
    big = generate.TaskGenerator(SUITE, config(demos=40_000, shard_size=None))
    assert 1 <= big.shard_size < 256 and big.shard_size * 40_002 * 3 * 9 * 8 <= 2**26


def test_a_suite_is_drawn_by_its_task_numbers(made, tmp_path):
    """A longer run begins with a shorter one: the same tasks, and the same files where these are full."""
    make_dataset(tmp_path / "d", SUITE, config(tasks=6, query_epsilon=0.5))
    short, long = (datasets.Dataset(path).load() for path in (tmp_path / "d", made.suite))
    assert len(short) == 6 and short == long[:6]
    assert len({json.dumps(task.arrays["P"]) for task in long}) == 10  # and every task is another one
    for name in ("tasks-00000.parquet", "episodes-00000.jsonl"):
        assert (tmp_path / "d" / name).read_bytes() == (made.suite / name).read_bytes()


def test_no_file_but_the_provenance_holds_a_time_or_a_path(made):
    today = datetime.date.today()
    for directory in (made.suite, made.mdp, made.apomdp):
        for path in (path for path in directory.iterdir() if path.name != "provenance.json"):
            data = path.read_bytes()
            for word in (str(directory.parent), os.uname().nodename, f"{today:%Y-%m}"):
                assert word.encode() not in data, path


def test_the_card_describes_every_column_and_no_other(made):
    for directory in (made.suite, made.mdp, made.apomdp):
        card = (directory / "README.md").read_text()
        for table in ("episodes", "tasks", "problem"):
            path = directory / ("problem.parquet" if table == "problem" else f"{table}-00000.parquet")
            if not path.exists():
                assert f"### {table}" not in card
                continue
            part = card.split(f"### {table}\n")[1].split("\n#")[0]
            described = [line.split("`")[1] for line in part.splitlines() if line.startswith("| `")]
            assert described == pyarrow.parquet.read_schema(path).names


def test_the_card_states_that_a_label_can_differ_from_the_argmax_of_Q(made):
    row = next(line for line in (made.apomdp / "README.md").read_text().splitlines() if line.startswith("| `label` |"))
    assert "greedy in the lower bounds, so where the certificate is bounded it may differ from the argmax of Q" in row


def test_the_totals_are_those_of_the_rows(made):
    totals = datasets.Dataset(made.apomdp).manifest["totals"]
    tasks = datasets.Dataset(made.apomdp).load()
    steps = [c for task in tasks for row in task.episodes for c in row.certificate]
    assert totals["steps"] == len(steps) == 10 * 6 * 3 and totals["episodes"] == 60
    assert totals["certificates"] == {"exact": len(steps), "certified": 0, "bounded": 0}
    np.testing.assert_allclose(totals["mean_value"], np.mean([task.value for task in tasks]), rtol=1e-12)
    assert "| labeled steps | 180 |" in (made.apomdp / "README.md").read_text()
