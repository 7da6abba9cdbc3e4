"""Files that survive interruptions: atomic writes, whole lines, values that JSON can hold."""

import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest

from lindm.errors import DataError, LindmError, StorageError
from lindm.io import files


@pytest.mark.fault("F7")
def test_a_full_disk_is_exit_7_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"point":{}}\n')
    files.append_line(path, '{"point":{"a":1}}')
    assert path.read_text() == '{"point":{}}\n{"point":{"a":1}}\n'
    if os.path.exists("/dev/full"):
        with pytest.raises(LindmError) as stop:
            files.append_line(Path("/dev/full"), "x")
        assert isinstance(stop.value, StorageError)


def test_the_directory_of_a_file_is_created_with_those_above_it_unless_one_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("here", "a/b/c", "a/b/d"):
        files.make_parent(Path(path))
        Path(path).write_text("x")
    with pytest.raises(StorageError, match=r"^cannot write here/c: File exists$"):
        files.make_parent(Path("here/c"))
    with pytest.raises(StorageError, match=r"^cannot write here/b/c: Not a directory$"):
        files.make_parent(Path("here/b/c"))


def test_non_finite_values_are_found_wherever_they_are():
    assert files.find_non_finite({"a": [1.0, {"b": float("inf")}]}) == "a.1.b = inf"
    assert files.find_non_finite({"a": [1.0, 2], "b": "nan", "c": None}) is None


@pytest.mark.fault("F26")
def test_an_interrupted_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(LindmError) as stop:
        files.write_atomic(path, "new")
    assert isinstance(stop.value, StorageError) and path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_hash_needs_no_memory_of_the_size_of_the_file(tmp_path):
    with (tmp_path / "large").open("wb") as f:
        f.truncate(64 * 2**20)
    tracemalloc.start()
    digest = files.sha256(tmp_path / "large")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20 and digest == hashlib.sha256(bytes(64 * 2**20)).hexdigest()


@pytest.mark.parametrize(
    "content, message", [(None, "cannot read"), ("{", "not JSON"), ("[1]", "not a JSON object")], ids=["missing", "torn", "list"]
)
def test_a_file_that_is_no_json_object_is_a_data_error_with_its_path(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=f"{message}.*a.json|a.json: {message}"):
        files.read_json(path)
    files.write_json(path, {"b": 1})
    assert files.read_json(path) == {"b": 1}


def test_a_file_carries_its_format_and_another_one_is_a_data_error(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": 1}, format="lindm-test-1")
    assert files.read_json(path, format="lindm-test-1") == {"format": "lindm-test-1", "b": 1}
    with pytest.raises(DataError, match=r"a\.json: must have the format 'lindm-test-2'; got 'lindm-test-1': another version"):
        files.read_json(path, format="lindm-test-2")
    files.write_json(path, {"b": 1})
    with pytest.raises(DataError, match="got None"):
        files.read_json(path, format="lindm-test-1")
