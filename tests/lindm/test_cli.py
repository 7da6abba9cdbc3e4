"""The door: how fast it opens, and what it says to what it cannot take."""

import json
import subprocess
import sys
import time

import pytest

from experiments import harness
from lindm import doctor
from lindm.cli import main


def lindm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lindm", *arguments], capture_output=True, text=True, timeout=60)


def test_help_answers_in_under_a_second():
    seconds = []
    for _ in range(3):  # the best of three: other processes may be using the machine
        start = time.perf_counter()
        done = lindm("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and all(word in done.stdout for word in ("verify", "run", "plot", "doctor", "bench"))
    assert min(seconds) < 1


def test_help_imports_nothing_heavy():
    code = (
        "import sys, lindm.cli\n"
        "try: lindm.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'optax', 'scipy', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["verify", "--only", "nonsense"], "--only must name claims"),
        (["verify", "--preset", "huge"], "--preset must be one of quick, full; got 'huge'"),
        (["verify", "--seeds", "-1"], "--seeds must be >= 1; got -1"),
        (["verify", "--seeds", "many"], "Error parsing --seeds"),
        (["verify", "--workers", "0"], "--workers must be >= 1; got 0"),
        (["verify", "--colour", "red"], "--colour"),
        (["run", "nonsense"], "EXPERIMENT must be one of"),
        (["bench", "nonsense"], "WHAT must be attention"),
        (["plot"], "lindm plot"),
    ],
)
def test_a_usage_error_is_exit_2_and_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("lindm: error: ") and error.count("\n") == 1


def test_a_directory_without_records_is_exit_3(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 3
    assert "DIR must hold records.jsonl" in capsys.readouterr().err


def test_an_unknown_claim_is_answered_with_the_known_ones(capsys):
    main(["verify", "--only", "nonsense"])
    error = capsys.readouterr().err
    owned = [claim for claims in harness.discover().values() for claim in claims]
    assert all(claim in error for claim in owned) and "'nonsense'" in error


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __import__("lindm").__version__


def test_doctor_looks_at_versions_devices_precision_disk_and_fonts(tmp_path, capsys):
    code = main(["doctor", "--out", str(tmp_path / "not" / "there")])
    lines = capsys.readouterr().out.splitlines()
    named = {line[6:20].strip() for line in lines}
    assert {"python", "jax", "lock", "devices", "64-bit floats", "cores", "output", "free disk", "fonts"} <= named
    assert code == int(any(line.startswith("FAIL") for line in lines))
    assert not (tmp_path / "not").exists()


def test_doctor_names_a_package_that_is_not_as_locked(tmp_path, monkeypatch):
    lock = tmp_path / f"py{sys.version_info.major}{sys.version_info.minor}.txt"
    lock.write_text("numpy==0.0.1 \\\n    --hash=sha256:00\nnot-a-package==1.0 \\\n    --hash=sha256:00\n")
    monkeypatch.setattr(doctor, "LOCKS", tmp_path)
    check = doctor.check_lock()
    assert not check.ok and "locked 0.0.1" in check.found and "not-a-package missing" in check.found


def test_doctor_says_so_when_results_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert not doctor.check_output(tmp_path / "file" / "below")[0].ok


def test_the_debug_switch_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("LINDM_DEBUG", "1")
    with pytest.raises(Exception, match="EXPERIMENT must be one of"):
        main(["run", "nonsense"])


def test_bench_json_is_passed_on(monkeypatch, capsys):
    import types

    bench = types.ModuleType("lindm.attention.bench")
    bench.main = lambda as_json: print(json.dumps([{"json": as_json}]))  # pyright: ignore
    monkeypatch.setitem(sys.modules, "lindm.attention.bench", bench)
    monkeypatch.setattr("lindm.attention.bench", bench, raising=False)
    assert main(["bench", "attention", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"json": True}]
