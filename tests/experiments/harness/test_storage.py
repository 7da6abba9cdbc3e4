"""Experiments and reports on full and read-only disks, and in directories that vanish."""

import os
from pathlib import Path

import pytest

from lindm.cli.main import main
from lindm.io.manifest import read_records
from lindm_experiments.harness import run_directory
from tests.storage import check_full_disk, check_read_only, partial_files

COMMANDS = ["run", "verify", "report"]


@pytest.fixture
def out(tmp_path) -> Path:
    """In a directory of its own, which a test may close."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@pytest.fixture
def command(lab, finished, out):
    """command(name) -> a short command line that writes to `out`."""
    toy = str(lab.directory / "lab" / "toy.py")

    def words(name: str) -> list[str]:
        arguments = {
            "run": [toy],
            "verify": ["--preset", "quick", "--experiments", toy],
            "report": [str(finished)],
        }[name]
        return [name, *arguments, "--out", str(out)]

    return words


@pytest.mark.slow
@pytest.mark.fault("F7")
@pytest.mark.parametrize("name", COMMANDS)
def test_on_a_full_disk_a_command_is_exit_7_and_with_room_it_finishes(command, out, capsys, trials, name):
    check_full_disk(command(name), out, capsys, trials)


@pytest.mark.slow
@pytest.mark.fault("F8")
@pytest.mark.parametrize("name", COMMANDS)
def test_where_nothing_may_be_written_a_command_is_exit_7(command, out, capsys, trials, name):
    check_read_only(command(name), out, capsys, trials, [out, out.parent])


@pytest.mark.fault("F8")
@pytest.mark.parametrize("then", ["removed", "replaced"])
def test_a_run_whose_directory_vanishes_while_it_is_written_is_exit_7(command, out, monkeypatch, capsys, then):
    append = run_directory.append_record

    def vanish(path, record):
        append(path, record)
        if out.exists() and not out.with_name("elsewhere").exists() and read_records(out)[1:]:
            os.rename(out, out.with_name("elsewhere"))
            if then == "replaced":
                out.mkdir()

    monkeypatch.setattr(run_directory, "append_record", vanish)
    assert main(command("run")) == 7
    assert f"cannot write {out}" in capsys.readouterr().err
    assert out.exists() == (then == "replaced") and not partial_files(out.parent)
