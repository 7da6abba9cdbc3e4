"""Commands on disks that are full or read-only, and in directories that vanish: exit code 7, and with room they finish.

The disks of `lindm sft`: tests/lindm/llm/sft/test_full_disk.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lindm.cli.main import main
from lindm.io import files
from lindm.io.manifest import read_records
from lindm.io.temporaries import TEMPORARY_SUFFIX
from lindm_experiments.harness import run_directory
from tests.faults.conftest import COMMAND, ROOT
from tests.limits import largest_file, read_only

MAX_LIMITS = 4
COMMANDS = ("run", "verify", "report", "data make", "data export", "model import", "export", "eval")
WHOLE = ("model import", "export")  # one rename replaces an empty directory


def below(size: int) -> int:
    """A limit that stops a file of about so many bytes near its end: reports and metrics show times, whose length varies."""
    return max(size - 1 - size // 50 - 50, size // 2)


def partial_files(directory: Path) -> list[Path]:
    return list(directory.rglob(f"*{TEMPORARY_SUFFIX}*"))


@pytest.fixture
def out(tmp_path) -> Path:
    """In a directory of its own, which a test may close."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@pytest.fixture
def command(request, toy, out):
    """command(name) -> a short command line that writes to `out`."""

    def micro(name: str) -> str:
        return str(getattr(request.getfixturevalue("micro"), name))

    def words(name: str) -> list[str]:
        arguments = {
            "run": lambda: [toy],
            "verify": lambda: ["--preset", "quick", "--experiments", toy],
            "report": lambda: [str(request.getfixturevalue("finished"))],
            "data make": lambda: ["mdp", "--horizon", "4", "--tasks", "4", "--demos", "1"],
            "data export": lambda: [micro("mdp"), "--to", "trl"],
            "model import": lambda: [micro("model")],
            "export": lambda: [micro("model")],
            "sft": lambda: ["--model", micro("model"), "--data", micro("mdp"), "--steps", "1", "--eval-tasks", "0"],
            "eval": lambda: ["mdp", "--horizon", "4", "--tasks", "2", "--demos", "1", "--policy", "oracle"],
        }[name]
        return [*name.split(), *arguments(), "--out", str(out)]

    return words


@pytest.mark.slow
@pytest.mark.fault("F7")
@pytest.mark.parametrize("name", COMMANDS)
def test_on_a_full_disk_a_command_is_exit_7_and_with_room_it_finishes(command, out, capsys, trials, name):
    """The disk is full at the start, and near the end of files of every size that the command writes."""
    words = command(name)
    assert main(words) == 0, capsys.readouterr().err
    limits = [0, *sorted({below(p.stat().st_size) for p in out.rglob("*") if p.is_file() and p.stat().st_size > 1})]
    shutil.rmtree(out)
    for limit in sorted({limits[round(i * (len(limits) - 1) / (MAX_LIMITS - 1))] for i in range(MAX_LIMITS)}):
        with largest_file(limit):
            code = main(words)
        error = capsys.readouterr().err
        assert code == 7 and "cannot write" in error, f"files of at most {limit} bytes: {code}, {error}"
        assert TEMPORARY_SUFFIX not in error and not partial_files(out.parent)
        assert main(words) == 0, capsys.readouterr().err
        shutil.rmtree(out)
        trials.add()


@pytest.mark.slow
@pytest.mark.fault("F8")
@pytest.mark.parametrize("name", [*COMMANDS, "sft"])
def test_where_nothing_may_be_written_a_command_is_exit_7(command, out, capsys, trials, name):
    words = command(name)
    for directory in [out.parent] if name in WHOLE else [out, out.parent]:
        out.mkdir(exist_ok=True)
        if directory != out:
            out.rmdir()
        with read_only(directory):
            code = main(words)
        error = capsys.readouterr().err
        assert code == 7 and f"cannot write {out}" in error, f"{directory}: {code}, {error}"
        trials.add()
    assert main(words) == 0, capsys.readouterr().err


@pytest.mark.fault("F7")
def test_a_disk_that_is_full_before_the_first_import_is_exit_7_in_one_line(tmp_path):
    """Libraries look for a directory of temporary files when they are imported, and write to it."""
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    words = [sys.executable, "-c", full + COMMAND, "solve", "prostate", "--horizon", "2"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 7 and done.stderr.startswith("lindm: error: cannot write temporary files ("), done.stderr
    assert done.stderr.count("\n") == 1


def vanish(out: Path, then: str) -> None:
    os.rename(out, out.with_name("elsewhere"))
    if then == "replaced":
        out.mkdir()


@pytest.mark.fault("F8")
@pytest.mark.parametrize("then", ["removed", "replaced"])
def test_a_run_whose_directory_vanishes_while_it_is_written_is_exit_7(command, out, monkeypatch, capsys, then):
    append = run_directory.append_record

    def append_and_vanish(path, record):
        append(path, record)
        if out.exists() and not out.with_name("elsewhere").exists() and read_records(out)[1:]:
            vanish(out, then)

    monkeypatch.setattr(run_directory, "append_record", append_and_vanish)
    assert main(command("run")) == 7
    assert f"cannot write {out}" in capsys.readouterr().err
    assert out.exists() == (then == "replaced") and not partial_files(out.parent)


@pytest.mark.fault("F8")
@pytest.mark.parametrize("then", ["removed", "replaced"])
def test_a_dataset_whose_directory_vanishes_while_it_is_written_is_exit_7(command, out, monkeypatch, capsys, then):
    """It does not come back with the files that were still to be written."""
    append, words = files.append_line, command("data make")

    def append_and_vanish(path, line):
        append(path, line)
        if not out.with_name("elsewhere").exists():
            vanish(out, then)

    monkeypatch.setattr(files, "append_line", append_and_vanish)
    assert main(words) == 7
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert out.exists() == (then == "replaced") and not partial_files(out.parent)
    monkeypatch.undo()
    shutil.rmtree(out, ignore_errors=True)
    assert main(words) == 0
