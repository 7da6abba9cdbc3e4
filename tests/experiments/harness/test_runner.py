"""Faults, each with a real process: kills, torn lines, second writers, changed configurations, NaN, full disks."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lindm.errors import DataError, LindmError
from lindm.io import directories, files, manifest
from lindm_experiments.harness import run_directory, runner
from tests.clock import HANGS


def content(directory: Path) -> dict[str, bytes]:
    """What must be the same however often a run was interrupted."""
    return {name: (directory / name).read_bytes() for name in ("records.jsonl", "config.json", "toy.png", "toy.pdf", "toy.svg")}


def wait_for(path: Path, lines: int = 1, seconds: float = HANGS) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not get {lines} lines")


def test_a_run_writes_records_config_metrics_manifest_and_figures(lab):
    code, out, err = lab.lindm("run", "toy", "--out", "r")
    assert code == 0, err
    run = lab.directory / "r"
    names = {p.name for p in run.iterdir()}
    drawn = {"toy.png", "toy.pdf", "toy.svg", "verdicts.json", "report.html"}
    assert names == {"records.jsonl", "config.json", "metrics.jsonl", "manifest.json"} | drawn
    records = manifest.read_records(run)
    assert [r["point"]["seed"] for r in records] == list(range(6))
    assert "seconds" not in records[0]
    content = json.loads((run / "manifest.json").read_text())
    assert content["outputs"]["records.jsonl"] == files.sha256(run / "records.jsonl")
    assert content["config"]["seeds"] == 6
    assert "toy-ratio" in out and "FAIL, as expected" in out


def test_workers_start_with_large_pages(monkeypatch):
    class Started(Exception):
        pass

    def start(*_):
        raise Started(os.environ["GLIBC_TUNABLES"])

    monkeypatch.setenv("GLIBC_TUNABLES", "before")
    monkeypatch.setattr(runner, "huge_page_environment", lambda: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    monkeypatch.setattr(runner, "TaskPool", start)
    with pytest.raises(Started, match="hugetlb=1"):
        runner.run_experiments([], contextlib.ExitStack())


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_killed_at_random_moments_it_ends_with_the_same_bytes(lab):
    options = ("run", "toy", "--seeds", "60", "--pause", "0.04")
    assert lab.lindm(*options, "--out", "whole")[0] == 0
    moments, kills = random.Random(0), 0
    for _ in range(60):
        process = lab.start(*options, "--out", "killed")
        try:
            process.communicate(timeout=moments.uniform(0.7, 1.8) if kills < 6 else HANGS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        if process.returncode == 0:
            break
    assert kills >= 3
    assert content(lab.directory / "killed") == content(lab.directory / "whole")
    assert not list((lab.directory / "killed").glob(".*"))


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_what_a_point_has_finished_outlives_a_kill_and_goes_with_its_record(lab):
    options = ("run", "toy", "--seeds", "6", "--parts", "30", "--out", "r")
    run, log = lab.directory / "r", lab.directory / "parts-0"
    process = lab.start(*options)
    wait_for(log, 5)
    process.kill()
    process.communicate()
    assert len(list((run / "unfinished").iterdir())) == 1 and not (run / "records.jsonl").exists()
    assert lab.lindm(*options)[0] == 0
    for seed in range(6):
        parts = (lab.directory / f"parts-{seed}").read_text().split()
        assert sorted(set(parts), key=int) == [str(i) for i in range(30)] and len(parts) <= 31  # the kill may repeat one
    assert len(manifest.read_records(run)) == 6 and not (run / "unfinished").exists()


@pytest.mark.fault("F14")
def test_what_a_point_has_finished_is_not_used_by_another_run(lab):
    options, run = ("run", "toy", "--parts", "3"), lab.directory / "r"

    def interrupted() -> None:
        lab.lindm(*options, "--out", "r", "--raise-at", "0", "--fresh")
        for log in lab.directory.glob("parts-*"):
            log.unlink()
        assert (run / "unfinished").is_dir()

    interrupted()
    assert lab.lindm(*options, "--out", "r", "--fresh")[0] == 0
    assert (lab.directory / "parts-0").read_text().split() == ["0", "1", "2"]
    interrupted()
    run.rename(lab.directory / "moved")
    lab.lindm(*options, "--out", "moved", "--raise-at", "0")
    assert (lab.directory / "parts-0").read_text().split() == ["0", "1", "2"]
    assert len(list((lab.directory / "moved" / "unfinished").iterdir())) == 1


@pytest.mark.fault("F17", "F30")
def test_a_torn_last_line_is_measured_again(lab, finished):
    shutil.copytree(finished, lab.directory / "torn")
    path = lab.directory / "torn" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:57])
    with (lab.directory / "torn" / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'{"point":{"se')
    assert lab.lindm("run", "toy", "--out", "torn")[0] == 0
    assert content(lab.directory / "torn") == content(finished)
    metrics = files.read_json_lines(lab.directory / "torn" / "metrics.jsonl")
    assert len(metrics) == 6 + 3  # only the missing points were measured again


@pytest.mark.fault("F17")
def test_points_missing_in_the_middle_are_filled_in_order(lab, finished):
    shutil.copytree(finished, lab.directory / "holes")
    path = lab.directory / "holes" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[3:5]))
    assert lab.lindm("run", "toy", "--out", "holes")[0] == 0
    assert content(lab.directory / "holes") == content(finished)


@pytest.mark.fault("F13", "F30")
@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"no point": 1}'])
def test_a_bad_line_is_exit_3_with_file_and_line(lab, finished, line):
    shutil.copytree(finished, lab.directory / "r")
    path = lab.directory / "r" / "records.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(LindmError) as stop:
        manifest.read_records(lab.directory / "r")
    assert isinstance(stop.value, DataError) and "records.jsonl:2:" in stop.value.message


@pytest.mark.fault("F30")
def test_a_record_that_is_there_twice_is_exit_3(lab, finished):
    shutil.copytree(finished, lab.directory / "r")
    path = lab.directory / "r" / "records.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    code, _, err = lab.lindm("run", "toy", "--out", "r")
    assert code == 3 and "there twice" in err


@pytest.mark.fault("F14")
def test_another_configuration_is_refused_with_the_difference(lab, finished):
    shutil.copytree(finished, lab.directory / "r")
    before = content(lab.directory / "r")
    code, _, err = lab.lindm("run", "toy", "--out", "r", "--seeds", "7")
    assert code == 2 and "config.seeds: 6 -> 7" in err
    assert content(lab.directory / "r") == before
    assert lab.lindm("run", "toy", "--out", "r", "--seeds", "7", "--fresh")[0] == 0


@pytest.mark.fault("F14")
def test_another_code_is_refused(lab, finished):
    shutil.copytree(finished, lab.directory / "r")
    source = lab.directory / "lab" / "toy.py"
    source.write_text(source.read_text().replace("1e-3 * r", "2e-3 * r"))
    code, _, err = lab.lindm("run", "toy", "--out", "r")
    assert code == 2 and "code: " in err


def test_fresh_keeps_files_that_are_not_ours(lab, finished):
    shutil.copytree(finished, lab.directory / "r")
    for name in ("notes.txt", ".hidden.yaml"):
        (lab.directory / "r" / name).write_text("mine")
    assert lab.lindm("run", "toy", "--out", "r", "--fresh")[0] == 0
    assert all((lab.directory / "r" / name).read_text() == "mine" for name in ("notes.txt", ".hidden.yaml"))


@pytest.mark.fault("F15")
def test_a_second_writer_is_refused_until_the_first_is_gone(lab):
    with directories.sole_writer(lab.directory / "r"):
        code, _, err = lab.lindm("run", "toy", "--out", "r")
    assert code == 2 and "another process" in err
    assert lab.lindm("run", "toy", "--out", "r")[0] == 0


@pytest.mark.fault("F9")
def test_a_non_finite_record_is_exit_5_and_not_written(lab):
    code, _, err = lab.lindm("run", "toy", "--out", "r", "--nan-at", "2")
    assert code == 5
    assert '"seed":2' in err and "curve.50 = nan" in err
    assert len(manifest.read_records(lab.directory / "r")) == 2


@pytest.mark.fault("F8")
def test_a_directory_that_cannot_be_written_is_exit_7(lab):
    (lab.directory / "file").write_text("")
    for command in (("run", "toy"), ("verify", "--preset", "smoke")):
        code, _, err = lab.lindm(*command, "--out", "file/below")
        assert code == 7 and "file" in err


@pytest.mark.slow
@pytest.mark.fault("F2")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_exit_75_and_the_run_resumes(lab, signum):
    options = ("--seeds", "8", "--pause", "0.3")
    process = lab.start("run", "toy", "--out", "r", *options)
    wait_for(lab.directory / "r" / "records.jsonl", 2)
    process.send_signal(signum)
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 75 and "resumes" in err
    assert lab.lindm("run", "toy", "--out", "r", *options)[0] == 0
    assert len(manifest.read_records(lab.directory / "r")) == 8


def test_an_error_in_an_experiment_is_one_line_and_a_log(lab):
    code, _, err = lab.lindm("run", "toy", "--out", "r", "--raise-at", "1")
    assert code == 70 and "the toy is broken" in err and "Traceback" not in err
    assert "RuntimeError: the toy is broken" in (lab.directory / "r" / "error.log").read_text()


def test_verify_decides_every_claim_and_resumes(lab):
    code, out, err = lab.lindm("verify", "--preset", "quick", "--out", "v")
    assert code == 0, err + out
    verdicts = json.loads((lab.directory / "v" / "verdicts.json").read_text())
    assert {"preset", "wall_s", "claims"} <= verdicts.keys()
    keys = {"id", "statement", "source", "predicted", "measured", "ci", "n", "criterion", "verdict", "expected", "figure"}
    assert all(keys <= c.keys() for c in verdicts["claims"])
    assert [(c["id"], c["verdict"]) for c in verdicts["claims"]] == [("toy-ratio", "PASS"), ("toy-control/swap", "FAIL")]
    assert (lab.directory / "v" / "report.html").exists() and (lab.directory / "v" / "manifest.json").exists()
    before = content(lab.directory / "v" / "toy")
    assert lab.lindm("verify", "--preset", "quick", "--out", "v")[0] == 0
    assert content(lab.directory / "v" / "toy") == before


def test_verify_of_one_claim_shows_only_that_claim(lab):
    code, out, _ = lab.lindm("verify", "--out", "v", "--only", "toy-control")
    assert code == 0 and "toy-control/swap" in out and "exactly" not in out


def test_a_seed_offset_moves_the_seeds_of_an_experiment_outside_the_package(lab):
    code, _, err = lab.lindm("verify", "--out", "v", "--seed-offset", "500")
    assert code == 0, err
    assert [r["point"]["seed"] for r in manifest.read_records(lab.directory / "v" / "toy")] == [500 + i for i in range(6)]


def test_too_few_seeds_decide_nothing(lab):
    code, out, _ = lab.lindm("verify", "--out", "v", "--seeds", "4")
    assert code == 1 and "INCONCLUSIVE" in out


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_a_worker_that_dies_costs_its_own_point(lab):
    source, claims = ((lab.directory / "lab" / f"toy.{kind}").read_text() for kind in ("py", "toml"))
    (lab.directory / "lab" / "other.py").write_text(source.replace("TOY_DIES", "OTHER").replace('"toy-', '"other-'))
    (lab.directory / "lab" / "other.toml").write_text(claims.replace('"toy-', '"other-'))
    code, out, _ = lab.lindm("verify", "--out", "v", TOY_DIES="1")
    assert code == 70 and "worker died (signal 9)" in out
    claims = {c["id"]: c for c in json.loads((lab.directory / "v" / "verdicts.json").read_text())["claims"]}
    assert claims["other-ratio"]["verdict"] == "PASS"
    assert claims["toy-ratio"]["measured"] is None and claims["toy-ratio"]["verdict"] == "INCONCLUSIVE"
    assert [r["point"]["seed"] for r in manifest.read_records(lab.directory / "v" / "toy")] == [0, 1, 2, 4, 5]
    assert lab.lindm("verify", "--out", "v")[0] == 0
    assert [r["point"]["seed"] for r in manifest.read_records(lab.directory / "v" / "toy")] == list(range(6))


@pytest.mark.slow
@pytest.mark.fault("F2", "F17")
def test_verify_killed_with_its_workers_resumes(lab):
    source = lab.directory / "lab" / "toy.py"
    source.write_text(source.read_text().replace("pause: float = 0.0", "pause: float = 0.2"))
    assert lab.lindm("verify", "--out", "whole")[0] == 0
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        process = lab.start("verify", "--out", "v")
        records = lab.directory / "v" / "toy" / "records.jsonl"
        wait_for(records, 1 if signum == signal.SIGKILL else records.read_bytes().count(b"\n") + 1)
        process.send_signal(signum)
        process.communicate(timeout=HANGS)
        assert process.returncode == code
    assert lab.lindm("verify", "--out", "v")[0] == 0
    assert content(lab.directory / "v" / "toy") == content(lab.directory / "whole" / "toy")


def test_plot_redraws_from_the_records_alone(lab):
    lab.lindm("verify", "--out", "v")
    before = content(lab.directory / "v" / "toy")
    for name in ("toy.png", "toy.pdf", "toy.svg"):
        (lab.directory / "v" / "toy" / name).unlink()
    (lab.directory / "v" / "report.html").unlink()
    assert lab.lindm("plot", "v", "--experiments", "toy")[0] == 0
    assert content(lab.directory / "v" / "toy") == before
    assert (lab.directory / "v" / "report.html").exists()


def test_differences_name_the_field():
    old = {"config": {"a": 1, "b": [1]}, "preset": "quick"}
    new = {"config": {"a": 2, "b": [1]}, "preset": "full"}
    assert run_directory.differences(old, new) == ["config.a: 1 -> 2", 'preset: "quick" -> "full"']
    assert run_directory.differences(old, old) == []


@pytest.mark.parity
def test_ray_gives_the_same_records_and_a_killed_worker_costs_its_point(lab):
    pytest.importorskip("ray")
    assert lab.lindm("verify", "--out", "local")[0] == 0
    code, out, err = lab.lindm("verify", "--executor", "ray", "--workers", "2", "--out", "ray")
    assert code == 0, err + out
    assert content(lab.directory / "ray" / "toy") == content(lab.directory / "local" / "toy")
    code, out, _ = lab.lindm("verify", "--executor", "ray", "--workers", "2", "--out", "killed", TOY_DIES="1")
    assert code == 70 and "worker died" in out
    assert len(manifest.read_records(lab.directory / "killed" / "toy")) == 5


@pytest.mark.slow
def test_compiled_programs_are_kept_and_change_no_record(lab):
    """Twice with one cache directory: the second run reads what the first one stored."""
    run = ("run", "controls", "--preset", "smoke")
    cache = lab.directory / "cache"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    stored = []
    for out in ("first", "second"):
        code, _, err = lab.lindm(*run, "--out", out, **kept)
        assert code in (0, 1), err
        stored.append({p.name for p in cache.iterdir() if p.name.endswith("-cache")})
    assert stored[0] and stored[1] == stored[0]
    assert lab.lindm(*run, "--out", "without", JAX_ENABLE_COMPILATION_CACHE="0")[0] in (0, 1)
    records = [(lab.directory / out / "records.jsonl").read_bytes() for out in ("first", "second", "without")]
    assert records[0] == records[1] == records[2]
