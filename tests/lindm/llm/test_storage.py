"""Commands of data and models on full and read-only disks, and in directories that vanish."""

import os
import shutil
from pathlib import Path

import pytest

from lindm.cli.main import main
from lindm.io import files
from tests.storage import check_full_disk, check_read_only, partial_files

COMMANDS = ["data make", "data export", "model import", "export", "eval"]  # the disks of `sft`: sft/test_full_disk.py


@pytest.fixture
def out(tmp_path) -> Path:
    """In a directory of its own, which a test may close."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@pytest.fixture
def command(micro, out):
    """command(name) -> a short command line that writes to `out`."""

    def words(name: str) -> list[str]:
        arguments = {
            "data make": ["mdp", "--horizon", "4", "--tasks", "4", "--demos", "1"],
            "data export": [micro.mdp, "--to", "trl"],
            "model import": [micro.model],
            "export": [micro.model],
            "sft": ["--model", micro.model, "--data", micro.mdp, "--steps", "1", "--eval-tasks", "0"],
            "eval": ["mdp", "--horizon", "4", "--tasks", "2", "--demos", "1", "--policy", "oracle"],
        }[name]
        return [*name.split(), *map(str, arguments), "--out", str(out)]

    return words


@pytest.mark.slow
@pytest.mark.fault("F7")
@pytest.mark.parametrize("name", COMMANDS)
def test_on_a_full_disk_a_command_is_exit_7_and_with_room_it_finishes(command, out, capsys, trials, name):
    check_full_disk(command(name), out, capsys, trials)


@pytest.mark.slow
@pytest.mark.fault("F8")
@pytest.mark.parametrize("name", [*COMMANDS, "sft"])
def test_where_nothing_may_be_written_a_command_is_exit_7(command, out, capsys, trials, name):
    whole = name in ("model import", "export")  # one rename replaces an empty directory
    check_read_only(command(name), out, capsys, trials, [out.parent] if whole else [out, out.parent])


@pytest.mark.fault("F8")
@pytest.mark.parametrize("then", ["removed", "replaced"])
def test_a_dataset_whose_directory_vanishes_while_it_is_written_is_exit_7(out, monkeypatch, capsys, then):
    """It does not come back with the files that were still to be written."""
    append = files.append_line

    def vanish(path, line):
        append(path, line)
        if not out.with_name("elsewhere").exists():
            os.rename(out, out.with_name("elsewhere"))
            if then == "replaced":
                out.mkdir()

    monkeypatch.setattr(files, "append_line", vanish)
    words = ["data", "make", "mdp", "--horizon", "4", "--tasks", "4", "--demos", "1", "--out", str(out)]
    assert main(words) == 7
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert out.exists() == (then == "replaced") and not partial_files(out.parent)
    monkeypatch.undo()
    shutil.rmtree(out, ignore_errors=True)
    assert main(words) == 0
