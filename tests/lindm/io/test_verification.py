"""Checksums: a flipped bit anywhere is seen where the file is read, and SHA-256 is computed once in a process."""

import json
import os
import time

import pytest

from lindm.errors import DataError, NonFiniteError
from lindm.io import files, manifest, verification


def flipped(data: bytes, bit: int) -> bytes:
    """The data with one other bit."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.fault("F5", "F28")
def test_every_flipped_bit_of_a_json_file_is_an_error_or_changes_nothing(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": [1, 2.5, "x"], "c": {"d": None}}, format="lindm-test-1")
    content, data = files.read_json(path, format="lindm-test-1"), path.read_bytes()
    seen = 0
    for bit in range(8 * len(data)):
        path.write_bytes(flipped(data, bit))
        try:
            assert files.read_json(path, format="lindm-test-1") == content  # white space
        except DataError as e:
            assert str(path) in e.message
            seen += 1
    assert seen > 6 * len(data)


@pytest.mark.fault("F5", "F30")
def test_every_flipped_bit_of_a_line_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "records.jsonl"
    for n in range(3):
        files.append_record(path, {"point": {"seed": n}, "value": n / 3})
    lines = path.read_bytes().splitlines(keepends=True)
    start, length = len(lines[0]), len(lines[1]) - 1
    for bit in range(8 * start, 8 * (start + length)):
        path.write_bytes(flipped(b"".join(lines), bit))
        with pytest.raises(DataError, match=r"records\.jsonl:2: "):
            files.read_json_lines(path)
    assert [r["point"]["seed"] for r in files.read_json_lines(path, skip_damaged=True)] == [0, 2]


@pytest.mark.fault("F30")
@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_torn_last_line_is_cut_off_and_the_others_stay(tmp_path, cut):
    path = tmp_path / "records.jsonl"
    for n in range(3):
        files.append_record(path, {"point": {"seed": n}})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-cut])
    assert [r["point"]["seed"] for r in files.read_json_lines(path, repair=True)] == [0, 1]
    assert path.read_bytes() == b"".join(lines[:2])


def test_a_line_without_a_checksum_is_of_another_version(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"point":{"seed":0}}\n')
    with pytest.raises(DataError, match=r"records\.jsonl:1: the line has no checksum: another version of lindm wrote it"):
        files.read_json_lines(tmp_path / "records.jsonl")


def test_a_file_is_hashed_once_in_a_process_and_again_after_a_change(tmp_path, monkeypatch):
    path, calls = tmp_path / "shard", []
    path.write_bytes(b"a" * 1000)
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0.0)
    time.sleep(0.05)  # the time of the last change of the inode cannot be set
    digest = files.hashlib.file_digest
    monkeypatch.setattr(files.hashlib, "file_digest", lambda f, kind: calls.append(f.name) or digest(f, kind))
    first = files.sha256(path)
    assert files.sha256(path) == first and len(calls) == 1
    path.write_bytes(b"b" * 1000)
    assert files.sha256(path) != first and len(calls) == 2


def test_a_file_that_has_just_changed_is_hashed_again(tmp_path):
    path = tmp_path / "shard"
    hashes = set()
    for content in (b"a", b"b", b"c"):
        path.write_bytes(content)
        hashes.add(files.sha256(path))
    assert len(hashes) == 3


@pytest.fixture
def model(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    verification.write_file_list(tmp_path)
    return tmp_path


@pytest.mark.fault("F5", "F6", "F28")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("harm", ["changed", "empty", "missing"])
def test_a_listed_file_that_is_changed_empty_or_missing_is_an_error_with_its_name(model, name, harm):
    verification.verify_file_list(model)
    (model / name).unlink() if harm == "missing" else (model / name).write_text("" if harm == "empty" else "x" + name[1:])
    with pytest.raises(DataError, match=f"{name} is {'missing' if harm == 'missing' else 'not what was written'}"):
        verification.verify_file_list(model)
    verification.verify_file_list(model, lambda other: other != name)


def test_a_directory_of_another_program_is_not_verified_unless_lindm_wrote_it(tmp_path):
    verification.verify_file_list(tmp_path)
    with pytest.raises(DataError, match=r"manifest\.json"):
        verification.verify_file_list(tmp_path, required=True)
    (tmp_path / "manifest.json").write_text('{"version": 3}')
    verification.verify_file_list(tmp_path)


@pytest.mark.fault("F19")
@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b"])
def test_a_manifest_that_names_a_file_outside_its_directory_is_refused(tmp_path, name):
    files.write_json(tmp_path / "manifest.json", {"outputs": {name: "0" * 64}}, format=verification.FILES_FORMAT)
    with pytest.raises(DataError, match="must name files of its own directory"):
        verification.verify_file_list(tmp_path)


@pytest.mark.fault("F28")
def test_files_that_are_written_again_enter_the_manifest_only_if_the_others_are_intact(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    manifest.write_manifest(tmp_path, ["a", "b"], preset="quick")
    (tmp_path / "a").write_text("new")
    with pytest.raises(DataError, match="a is not what was written"):
        manifest.read_output(tmp_path, "a")
    manifest.update_outputs(tmp_path, ["a"])
    assert manifest.read_output(tmp_path, "a") == b"new"
    (tmp_path / "b").write_text("damaged")
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="b is not what was written"):
        manifest.update_outputs(tmp_path, ["a"])
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.fault("F34")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_json_with_a_number_that_is_not_finite_is_an_error_that_names_it(tmp_path, bad):
    value = {"rows": [{"gap": 1.0}, {"gap": bad}]}
    for write in (files.strict_json, files.canonical_json, lambda v: files.write_json(tmp_path / "a.json", v)):
        with pytest.raises(NonFiniteError, match=rf"rows\.1\.gap = {bad}"):
            write(value)
    with pytest.raises(NonFiniteError, match=r"rows\.1\.gap"):
        files.append_record(tmp_path / "a.jsonl", value)
    assert list(tmp_path.iterdir()) == []
    assert json.loads(files.strict_json({"a": None})) == {"a": None}
