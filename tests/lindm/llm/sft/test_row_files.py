"""Files of rows: each kind gives the rows that were written, part by part, and errors name file and row."""

import contextlib
import gzip
import itertools
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given

from lindm.errors import DataError, UsageError
from lindm.llm.sft import row_files
from lindm.llm.sft.row_files import Part, find_files, find_parts
from tests.lindm.hostile.mutations import change_bytes, changes

ROWS = [
    {"messages": [{"role": "user", "content": f"zażółć {i} 🎲"}, {"role": "assistant", "content": "x" * i}]} for i in range(1, 30)
]
LINES = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS)).encode()


def write_stream(path, rows, batch=4):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as f, pyarrow.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def write_file(path, rows):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as f, pyarrow.ipc.new_file(f, table.schema) as writer:
        writer.write_table(table)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


WRITERS = {
    "rows.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "lines.json": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + lines(rows)),
    "rows.parquet": write_parquet,
    "rows.arrow": write_stream,
    "file.arrow": write_file,
}


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path) -> list:
    return [row for part in find_parts(find_files(path)) for _, row in part.rows()]


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_file_gives_its_rows(tmp_path, name, monkeypatch):
    WRITERS[name](tmp_path / name, ROWS)
    assert read(tmp_path / name) == ROWS
    for step in (1, 5, 100):
        monkeypatch.setattr(row_files, "PART_BYTES", 13 * step)
        monkeypatch.setattr(row_files, "PART_ROWS", step)
        assert read(tmp_path / name) == ROWS


def test_lines_belong_to_the_part_in_which_they_start_and_are_counted_from_the_start_of_the_file(tmp_path):
    content = b"{}\r\n\n[1]\n  \n" + b'{"a": "' + "ż".encode() * 9 + b'"}\n7'
    (tmp_path / "rows.jsonl").write_bytes(content)
    wanted = [(f"{tmp_path}/rows.jsonl:{n}", row) for n, row in ((1, {}), (3, [1]), (5, {"a": "ż" * 9}), (6, 7))]
    for first, second in itertools.combinations(range(len(content) + 1), 2):
        bounds = [0, first, second, len(content)]
        parts = [Part(tmp_path / "rows.jsonl", *pair) for pair in itertools.pairwise(bounds)]
        assert [(str(place), row) for part in parts for place, row in part.rows()] == wanted


def test_a_file_has_a_bounded_number_of_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "PART_BYTES", 1)
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    assert len(find_parts([tmp_path / "rows.jsonl"])) <= row_files.MAX_PARTS and read(tmp_path / "rows.jsonl") == ROWS
    (tmp_path / "rows.jsonl").write_bytes(b"")
    assert find_parts([tmp_path / "rows.jsonl"]) == []


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_null_of_a_table_is_a_field_that_the_row_does_not_have(tmp_path, name):
    WRITERS[name](tmp_path / name, [{"text": "a", "n": [{"x": 1, "y": None}, {"x": None, "y": "b"}]}, {"text": None, "n": []}])
    assert read(tmp_path / name) == [{"text": "a", "n": [{"x": 1}, {"y": "b"}]}, {"n": []}]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_of_a_table_the_columns_that_matter_are_read(tmp_path, name):
    WRITERS[name](tmp_path / name, [{"text": "a", "embedding": [0.5]}])
    (part,) = find_parts([tmp_path / name])
    assert [row for _, row in part.rows(("text", "messages"))] == [{"text": "a"}]
    assert [row for _, row in part.rows(("messages",))] == [{"text": "a", "embedding": [0.5]}]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet", ".arrow"])
def test_a_directory_has_its_shards_in_the_order_of_their_names(tmp_path, ending):
    for name, part in (("b", ROWS[9:]), ("a", ROWS[:9])):
        WRITERS[f"rows{ending}"](tmp_path / f"train-{name}{ending}", part)
    for name in ("README.md", ".hidden.jsonl", "_SUCCESS"):
        (tmp_path / name).write_text("# rows")
    assert read(tmp_path) == ROWS


def saved(directory, names=("data-00000-of-00002.arrow", "data-00001-of-00002.arrow")):
    """A directory as `Dataset.save_to_disk` of Hugging Face writes it."""
    directory.mkdir(parents=True)
    for name, rows in zip(names, (ROWS[:20], ROWS[20:]), strict=True):
        write_stream(directory / name, rows)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1f", "_format_type": None, "_split": "train"}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text(json.dumps({"features": {}, "description": ""}))


def test_a_saved_dataset_of_hugging_face_is_read_and_of_several_splits_the_one_named_train(tmp_path):
    saved(tmp_path / "one")
    saved(tmp_path / "several" / "train")
    (tmp_path / "several" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert read(tmp_path / "one") == read(tmp_path / "several") == ROWS
    (tmp_path / "several" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(DataError, match=r"several: must have the split train, .* got \['test'\]"):
        find_files(tmp_path / "several")
    for names in ([{"filename": "../x.arrow"}], [{}], [], None, ["a.arrow"], [{"filename": "/etc/x.arrow"}]):
        (tmp_path / "one" / "state.json").write_text(json.dumps({"_data_files": names}))
        with pytest.raises(DataError, match=r"state\.json: _data_files must name \.arrow files of its own directory"):
            find_files(tmp_path / "one")


@pytest.mark.fault("F13")
@pytest.mark.parametrize(
    "names, rule",
    [
        (("a.jsonl", "b.parquet"), r"the shards must be of one kind; got a\.jsonl and b\.parquet"),
        (("train-0.jsonl", "test-0.jsonl"), r"the shards must be of one split; got test-0\.jsonl and train-0\.jsonl"),
        (("train.json", "rows.json"), r"the shards must be of one split"),
    ],
)
def test_shards_of_several_kinds_or_splits_raise_an_error(tmp_path, names, rule):
    for name in names:
        (tmp_path / name).write_bytes(LINES)
    with pytest.raises(DataError, match=rule):
        find_files(tmp_path)


@pytest.mark.fault("F13")
@pytest.mark.parametrize(
    "name, content, why",
    [
        ("rows.json", b"[1, {]", r"rows\.json: not JSON: "),
        ("rows.jsonl.gz", gzip.compress(LINES)[:-9], r"cannot read .*rows\.jsonl\.gz: "),
        ("rows.jsonl.gz", LINES, r"cannot read .*rows\.jsonl\.gz: Not a gzipped file"),
        ("rows.parquet", LINES, r"cannot read .*rows\.parquet: "),
        ("rows.arrow", LINES, r"cannot read .*rows\.arrow: "),
        ("rows.arrow", b"", r"cannot read .*rows\.arrow: "),
        ("rows.parquet", b"", r"cannot read .*rows\.parquet: "),
    ],
)
def test_a_damaged_file_raises_an_error_that_names_it(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=why):
        read(tmp_path / name)


@pytest.mark.fault("F13")
def test_a_line_that_is_too_long_raises_an_error_and_is_not_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("lindm.io.limits.LINE", 1000)
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * 2000 + b'"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: a line must have at most 1,000 bytes"):
        read(tmp_path / "rows.jsonl")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / "rows.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"Parquet files need pyarrow: pip install -e '.\[data\]'"):
        read(tmp_path / "rows.parquet")


@pytest.mark.fault("F13")
@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "file.arrow", "rows.jsonl.gz"])
@given(changed=changes)
def test_damage_of_any_kind_ends_in_rows_or_in_an_error(name, changed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / name
    WRITERS[name](path, ROWS)
    path.write_bytes(change_bytes(path.read_bytes(), changed))
    with contextlib.suppress(DataError):
        read(path)
