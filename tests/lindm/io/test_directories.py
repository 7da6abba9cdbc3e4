"""Directories that are written as a whole, and one writer at a time."""

import os
import subprocess
import sys

import pytest

from lindm.errors import DataError, StorageError, UsageError
from lindm.io import temporaries
from lindm.io.directories import atomic_directory, copy_file, sole_writer
from lindm.io.files import append_line, write_atomic
from lindm.io.provenance import write_provenance
from tests.limits import read_only


@pytest.mark.fault("F26")
def test_a_directory_appears_as_a_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), atomic_directory(tmp_path / "out") as temporary:
        (temporary / "a").write_text("part")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()  # an empty directory may exist
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "a").write_text("whole")
        assert list((tmp_path / "out").iterdir()) == []
    assert (tmp_path / "out" / "a").read_text() == "whole" and os.listdir(tmp_path) == ["out"]


def test_a_directory_with_files_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists and is not replaced; choose another --out"), atomic_directory(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.fault("F26")
def test_what_the_same_command_wrote_stays_if_it_would_be_the_same_and_anything_else_is_refused(tmp_path, monkeypatch):
    def write(content):
        with atomic_directory(tmp_path / "out") as temporary:
            (temporary / "below").mkdir()
            (temporary / "below" / "a").write_text(content)
            write_provenance(temporary)

    write("same")
    before = (tmp_path / "out" / "provenance.json").stat().st_ino
    write("same")
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "provenance.json").stat().st_ino == before
    with pytest.raises(UsageError, match="out already exists with other content and is not replaced"):
        write("other")
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="out already exists with other content and is not replaced"):
        write("same")
    monkeypatch.setattr(sys, "argv", ["lindm", "another", "command"])
    with pytest.raises(UsageError, match="out already exists and is not replaced"):
        write("same")
    assert sorted(os.listdir(tmp_path / "out")) == ["below", "mine", "provenance.json"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.fault("F15", "F26")
def test_one_writer_at_a_time_and_its_leftovers_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(temporaries, "LOCK_PATIENCE", 0)
    (tmp_path / ".a.json.lindm-tmp").write_text("part")
    (tmp_path / ".model.lindm-tmp" / "below").mkdir(parents=True)
    with sole_writer(tmp_path):
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(UsageError, match="is being written by another process"), sole_writer(tmp_path):
            pass
    with sole_writer(tmp_path):
        pass


@pytest.mark.fault("F8")
def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    for enter in (sole_writer, atomic_directory):
        with pytest.raises(StorageError, match="cannot write"), enter(tmp_path / "file" / "below"):
            pass
    with pytest.raises(StorageError, match="cannot write"):
        copy_file(tmp_path / "file", tmp_path / "file" / "below")
    copy_file(tmp_path / "file", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == ""


@pytest.mark.fault("F8")
@pytest.mark.parametrize("then", ["removed", "replaced"])
def test_a_directory_that_vanishes_while_it_is_written_is_a_storage_error(tmp_path, then):
    with pytest.raises(StorageError, match="cannot write"), sole_writer(tmp_path / "out"):
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        with pytest.raises(StorageError, match="cannot write"):
            write_atomic(tmp_path / "out" / "a.json", "{}")
        with pytest.raises(StorageError, match="cannot write"):
            append_line(tmp_path / "out" / "a.jsonl", "{}")
        if then == "replaced":
            (tmp_path / "out").mkdir()


@pytest.mark.fault("F15")
def test_the_lock_of_a_killed_writer_is_free(tmp_path, trials):
    code = (
        "import sys, time; from pathlib import Path; from lindm.io.directories import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])): print('locked', flush=True); time.sleep(100)"
    )
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="is being written by another process"), sole_writer(tmp_path):
            pass
        process.kill()
        with sole_writer(tmp_path):  # also before the killed process was collected
            pass
        process.wait()
        process.stdout.close()
        trials.add()


@pytest.mark.fault("F8", "F13")
def test_a_copy_says_which_of_its_two_files_is_at_fault(tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "source").write_text("x")
    with read_only(tmp_path / "closed"):
        with pytest.raises(StorageError, match=r"cannot write .*closed/copy: Permission denied"):
            copy_file(tmp_path / "source", tmp_path / "closed" / "copy")
        (tmp_path / "source").chmod(0)
        with pytest.raises(DataError, match=r"cannot read .*source: Permission denied"):
            copy_file(tmp_path / "source", tmp_path / "copy")
