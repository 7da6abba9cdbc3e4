"""What writers and killed writers have under a temporary name."""

import contextlib
import os
import stat
import subprocess
import sys
import tempfile

import pytest

from lindm.errors import StorageError, UsageError
from lindm.io import signals, temporaries
from lindm.io.directories import atomic_directory
from lindm.io.files import append_line, write_atomic
from lindm.io.temporaries import remove_leftovers, scratch_directory, temporary_file, temporary_path

pytestmark = pytest.mark.fault("F1", "F26")


def make_file(path):
    path.write_text("part")


def make_directory(path):
    (path / "below").mkdir(parents=True)
    (path / "below" / "a").write_text("part")


def make_link(path):
    path.symlink_to(path.parent / "elsewhere")


def make_fifo(path):
    os.mkfifo(path)


LEFTOVERS = (make_file, make_directory, make_link, make_fifo)


@pytest.mark.parametrize("leave", LEFTOVERS)
def test_a_leftover_of_any_kind_stops_no_writer(tmp_path, leave):
    leave(temporary_path(tmp_path / "a"))
    write_atomic(tmp_path / "a", "whole")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "whole"
    leave(temporary_path(tmp_path / "b"))
    with atomic_directory(tmp_path / "b") as temporary:
        write_atomic(temporary / "c", "whole")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and os.listdir(tmp_path / "b") == ["c"]


def test_leftovers_are_removed_and_what_a_live_writer_has_or_a_user_named_so_stays(tmp_path):
    for number, leave in enumerate(LEFTOVERS):
        leave(temporary_path(tmp_path / f"a{number}"))
    (tmp_path / "mine.lindm-tmp").write_text("not hidden")
    (tmp_path / ".mine").write_text("hidden")
    with temporary_file(tmp_path / "b"), atomic_directory(tmp_path / "c"):
        remove_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [".b.lindm-tmp", ".c.lindm-tmp", ".mine", "mine.lindm-tmp"]
    assert sorted(os.listdir(tmp_path)) == [".mine", "c", "mine.lindm-tmp"]


def test_two_writers_of_one_file_or_directory_are_one_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(temporaries, "LOCK_PATIENCE", 0)
    with temporary_file(tmp_path / "a"), pytest.raises(UsageError, match="a is being written by another process"):
        write_atomic(tmp_path / "a", "second")
    with (
        atomic_directory(tmp_path / "b") as first,
        pytest.raises(UsageError, match="b is being written by another process"),
        atomic_directory(tmp_path / "b"),
    ):
        pass
    assert first == temporary_path(tmp_path / "b") and os.listdir(tmp_path) == ["b"]


def test_the_lock_of_a_killed_writer_is_free(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from lindm.io.temporaries import temporary_file, scratch_directory\n"
        "with temporary_file(Path(sys.argv[1])) as fd, scratch_directory() as scratch:\n"
        "    os.write(fd, b'part'); (scratch / 'a').write_text('part'); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], env=environment, check=False)
    left = sorted(os.listdir(tmp_path))
    assert done.returncode == -9 and left[0] == ".a.lindm-tmp" and len(left) == 2
    write_atomic(tmp_path / "a", "whole")
    assert len(os.listdir(tmp_path)) == 2 and (tmp_path / "a").read_text() == "whole"


def test_scratch_directories_of_killed_processes_are_removed_and_those_of_live_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_directory(tmp_path / ".lindm-killed.lindm-tmp")
    with scratch_directory() as first, scratch_directory() as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second])
        (first / "a").write_text("x")
        assert stat.S_IMODE(first.stat().st_mode) == 0o700
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", ["while it is removed", "made anew"])
def test_a_directory_that_a_stop_removes_beside_its_writer_never_gets_its_name(tmp_path, monkeypatch, moment):
    """The clean-up runs in another thread than the writer of a checkpoint, which may rename at any moment."""
    rmtree, final = temporaries.shutil.rmtree, tmp_path / "b"

    def remove_while_the_writer_renames(path, **options):
        (path / "a").unlink()
        with contextlib.suppress(FileNotFoundError):
            os.rename(temporary_path(final), final)
        rmtree(path, **options)

    with pytest.raises(StorageError, match=r"cannot write .*b: "), atomic_directory(final) as temporary:
        for name in ("a", "c"):
            write_atomic(temporary / name, "part")
        with monkeypatch.context() as patch:
            patch.setattr(temporaries.shutil, "rmtree", remove_while_the_writer_renames)
            signals._clean_ups[-1]()
        if moment == "made anew":
            temporary.mkdir()
            write_atomic(temporary / "c", "part")
    assert not final.exists()


@pytest.mark.fault("F33")
@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_files_and_directories_have_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "new").mkdir()
        write_atomic(tmp_path / "new" / "a", "x")
        append_line(tmp_path / "new" / "b", "x")
        with atomic_directory(tmp_path / "new" / "c") as temporary:
            write_atomic(temporary / "d", "x")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new", *(tmp_path / "new").rglob("*"))}
    assert modes == {name: (0o777 if name in ("new", "c") else 0o666) & ~umask for name in ("new", "a", "b", "c", "d")}
