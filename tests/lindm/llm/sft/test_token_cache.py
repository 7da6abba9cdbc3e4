"""The cache of tokens: what is read is what the rows give, each row is tokenized once, and damage is noticed."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import lindm
from lindm.errors import DataError
from lindm.io import temporaries
from lindm.llm.sft import row_files, token_cache
from lindm.llm.sft.example_table import ListedExamples, Rows
from lindm.llm.sft.examples import LengthLimit, part_examples
from lindm.llm.sft.row_files import find_parts
from lindm.llm.sft.token_cache import Tokenizing, tokenized
from tests.clock import HANGS
from tests.lindm.llm.parallel.test_processes import ROOT, free_port
from tests.lindm.llm.small import byte_level

TOKENIZER = byte_level()
ROWS = [
    {"prompt": "x" * (1 + i % 7), "completion": f"A{i}"}
    if i % 3
    else {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "B", "weight": [0.5, 1][i % 2]}]}
    for i in range(60)
]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Rows in two shards of several parts."""
    monkeypatch.setattr(row_files, "PART_BYTES", 400)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, rows in zip(paths, (ROWS[:37], ROWS[37:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Places of the rows that are tokenized in this process."""
    places: list[str] = []
    row_examples = token_cache.part_examples

    def counting(*arguments):
        for place, examples in row_examples(*arguments):
            places.append(str(place))
            yield place, examples

    monkeypatch.setattr(token_cache, "part_examples", counting)
    monkeypatch.setattr(token_cache, "available_cores", lambda: 1)
    return places


def how(**options) -> Tokenizing:
    default = {"tokenizer": TOKENIZER, "limit": LengthLimit(), "chat_template_kwargs": {}, "held_out_key": None}
    return Tokenizing(**default | options)


def cached(paths, directory, **options):
    return tokenized(paths, how(**options), directory, lambda done, total: None)[0]


def listed(paths):
    parts = row_files.find_parts(paths)
    return [e for part in parts for _, made in part_examples(part, TOKENIZER, LengthLimit()) for e in made]


def assert_same(example, other):
    for name in ("ids", "target"):
        x, y = getattr(example, name), getattr(other, name)
        assert x.dtype == y.dtype and x.tolist() == y.tolist()
    ones = np.ones((other.target >= 0).sum())
    assert example.weights.tolist() == (ones if other.weights is None else other.weights).tolist()
    assert (str(example.source), example.group) == (str(other.source), other.group)


def test_the_examples_of_the_cache_are_those_of_the_rows_and_made_once(data, tmp_path, made):
    wanted = listed(data)
    for _ in range(2):
        examples = cached(data, tmp_path / "tokens")
        assert len(examples) == len(wanted) == len(made) == 60 and len(examples.parts) > 8
        for i in np.random.default_rng(0).permutation(60).tolist():
            assert_same(examples[i], wanted[i])
        table = ListedExamples(wanted)
        for name in ("lengths", "num_labels", "groups"):
            assert getattr(examples, name).tolist() == getattr(table, name).tolist()
        assert [examples.digest(i) for i in range(60)] == [table.digest(i) for i in range(60)]
        assert examples.end_tokens() == table.end_tokens() and examples.num_rows == 60
    assert sorted(made) == sorted(set(made))
    with pytest.raises(IndexError):
        examples[60]


@pytest.mark.parametrize("pack", [True, False])
def test_rows_are_read_from_the_cache_as_from_memory(data, tmp_path, made, pack):
    chosen = np.array([3, 8, 9, 22, 41, 59, 5])
    lists, files = (Rows(table, chosen, 64, pack) for table in (ListedExamples(listed(data)), cached(data, tmp_path / "tokens")))
    assert len(lists) == len(files) and (len(lists) < 7) == pack
    assert lists.tokens.tolist() == files.tokens.tolist() and lists.labels.tolist() == files.labels.tolist()
    for row, other, tokens in zip(files, lists, files.tokens, strict=True):
        assert sum(len(e.ids) for e in row) == tokens <= 64
        for example, same in zip(row, other, strict=True):
            assert_same(example, same)


def test_another_tokenizer_file_or_option_has_examples_of_its_own_and_the_same_files_elsewhere_have_not(data, tmp_path, made):
    cached(data, tmp_path / "tokens")
    (tmp_path / "elsewhere").mkdir()
    cached([shutil.copy2(path, tmp_path / "elsewhere" / path.name) for path in data], tmp_path / "tokens")
    assert len(made) == 60
    changes = [
        {"tokenizer": byte_level(bos="<|begin|>")},
        {"limit": LengthLimit(9, "drop")},
        {"limit": LengthLimit(9, "truncate")},
        {"tokenizer": byte_level("{{ a }}" + str(TOKENIZER.chat_template)), "chat_template_kwargs": {"a": 1}},
    ]
    for n, options in enumerate(changes):
        cached(data, tmp_path / "tokens", **options)
        assert len(made) == 60 * (n + 2)
    data[0].write_text(data[0].read_text().replace("A1", "A7"))
    assert cached(data, tmp_path / "tokens")[1].ids.tolist() == listed(data)[1].ids.tolist()
    assert len(made) == 60 * 6


def test_other_code_that_makes_tokens_and_other_libraries_have_examples_of_their_own(data, tmp_path, made, monkeypatch):
    """A change of labels must not be hidden by a cache that an earlier version wrote."""
    copy = shutil.copytree(token_cache.LLM, tmp_path / "llm", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(token_cache, "LLM", copy)
    keys = []
    for change in (None, *token_cache.MAKERS):
        if change is not None:
            (copy / change).write_text((copy / change).read_text() + "\n# another rule")
        token_cache.code_hash.cache_clear()
        keys.append(how().key(["0"], []))
    for library in token_cache.LIBRARIES:
        monkeypatch.setattr(token_cache.importlib.metadata, "version", lambda name, changed=library: str(name == changed))
        token_cache.code_hash.cache_clear()
        keys.append(how().key(["0"], []))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    token_cache.code_hash.cache_clear()


def test_the_key_names_every_module_that_makes_examples(data):
    """The modules of lindm in which a function runs while rows become examples."""
    used = set()
    sys.setprofile(lambda frame, event, value: used.add(frame.f_code.co_filename))
    try:
        listed(data)
    finally:
        sys.setprofile(None)
    package = Path(lindm.__file__).parent
    found = {Path(name).relative_to(package).as_posix() for name in used if Path(name).is_relative_to(package)}
    assert {"llm/tokens.py", "llm/chats.py", "llm/sft/rows.py"} <= found
    assert {name for name in found if not name.startswith("io/")} <= {f"llm/{name}" for name in token_cache.MAKERS}


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_waits_for_another_one_that_writes_and_makes_what_is_missing_then(data, tmp_path, made, monkeypatch, fails):
    monkeypatch.setattr(temporaries, "LOCK_PATIENCE", 0)
    writing, waited, counts = threading.Event(), threading.Event(), []

    def first(done, total):
        writing.set()
        waited.wait(HANGS)
        if fails:
            raise DataError("stopped")

    def second(done, total):
        counts.append((done, total))
        waited.set()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(tokenized, data, how(), tmp_path / "tokens", first)
        try:
            assert writing.wait(HANGS)
            examples, _ = tokenized(data, how(), tmp_path / "tokens", second)
        finally:
            waited.set()
    assert isinstance(other.exception(), DataError) == fails
    assert counts[0] == (1, len(examples.parts)) and counts[-1] == (len(examples.parts),) * 2
    for example, wanted in zip((examples[i] for i in range(60)), listed(data), strict=True):
        assert_same(example, wanted)
    assert len(made) == len(set(made)) == 60


def test_entries_of_other_options_are_removed_and_those_of_the_given_examples_stay(data, tmp_path, made):
    tokens = tmp_path / "tokens"
    one, other, third = (cached(data, tokens, limit=LengthLimit(n, "truncate")) for n in (40, 41, 42))
    token_cache.remove_other_entries(tokens, (one, third, ListedExamples(listed(data))))
    names = {table.paths[0].parent.name for table in (one, third)}
    assert {path.name for path in tokens.iterdir()} == names | {token_cache.HASHES}
    count = len(made)
    assert cached(data, tokens, limit=LengthLimit(42, "truncate"))[0].ids.tolist() == third[0].ids.tolist()
    assert len(made) == count and not other.paths[0].exists()
    token_cache.remove_other_entries(tmp_path / "none", (one,))


@pytest.mark.fault("F23")
def test_counts_of_truncated_and_dropped_documents_are_kept(data, tmp_path, made):
    for _ in range(2):
        limit = LengthLimit(20, "truncate")
        examples = cached(data, tmp_path / "tokens", limit=limit)
        assert examples.counts == {"dropped": 20} and len(examples) == 40 and examples.num_rows == 60
    with pytest.raises(DataError, match="nothing is left to train: all 60 documents have more than 2 tokens"):
        cached(data, tmp_path / "tokens", limit=LengthLimit(2, "drop"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "yyyyyy", "completion": "A"}))
    with pytest.raises(DataError, match="nothing is left to train: after truncation to 2 tokens no document has a trained token"):
        cached([prompts], tmp_path / "tokens", limit=LengthLimit(2, "truncate"))


@pytest.mark.fault("F1")
def test_after_a_stop_the_parts_that_are_there_are_not_made_again(data, tmp_path, made, monkeypatch):
    write, written = token_cache.files.write_atomic, []

    def stopping(path, content):
        if path.name.endswith(".safetensors"):
            if len(written) == 4:
                raise KeyboardInterrupt
            written.append(path)
        write(path, content)

    monkeypatch.setattr(token_cache.files, "write_atomic", stopping)
    with pytest.raises(KeyboardInterrupt):
        cached(data, tmp_path / "tokens")
    monkeypatch.setattr(token_cache.files, "write_atomic", write)
    twice = len(made)
    examples = cached(data, tmp_path / "tokens")
    repeated = [place for place in made[twice:] if place in made[:twice]]
    assert 0 < len(repeated) < 12 and len(set(made)) == 60  # of the part that was not written
    for example, other in zip((examples[i] for i in range(60)), listed(data), strict=True):
        assert_same(example, other)


def test_a_bad_row_is_named_and_the_rows_before_it_stay(data, tmp_path, made):
    lines = data[1].read_text().splitlines()
    data[1].write_text("\n".join([*lines[:9], '{"prompt": 3}', *lines[10:]]))
    with pytest.raises(DataError, match=r"b\.jsonl:10: a row must have the columns of one of"):
        cached(data, tmp_path / "tokens")
    before = len(made)
    data[1].write_text("\n".join(lines))
    assert len(cached(data, tmp_path / "tokens")) == 60 and before < len(made)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_rows_raises_an_error(tmp_path, made, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"rows\.jsonl has no rows"):
        cached([tmp_path / "rows.jsonl"], tmp_path / "tokens")


@pytest.mark.fault("F28")
def test_damage_of_any_byte_is_noticed_when_the_part_is_opened_or_the_example_read(data, tmp_path, made):
    wanted = listed(data)
    cached(data, tmp_path / "tokens")
    path = sorted((tmp_path / "tokens").rglob("part-*"))[2]
    content = path.read_bytes()
    made_again, refused = 0, 0
    for at in range(0, len(content), 29):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        count = len(made)
        examples = cached(data, tmp_path / "tokens")
        made_again += len(made) > count
        try:
            for i, other in enumerate(wanted):
                assert_same(examples[i], other)
        except DataError as e:
            assert "part-00002.safetensors is damaged; remove it, and the same command makes it again" in e.message
            refused += 1
    assert made_again > 5 and refused > 5
    path.unlink()
    assert_same(cached(data, tmp_path / "tokens")[0], wanted[0])


def test_a_second_start_hashes_no_file_that_did_not_change(data, tmp_path, made, monkeypatch):
    hashed = []
    sha256 = token_cache.files.sha256
    monkeypatch.setattr(token_cache.files, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    os.utime(data[0], (1e9, 1e9))
    cached(data, tmp_path / "tokens")
    hashed.clear()
    cached(data, tmp_path / "tokens")
    assert set(hashed) == {"b.jsonl"}  # it was written just now, and may change without a new time


@pytest.mark.slow
def test_worker_processes_write_the_same_cache(data, tmp_path, monkeypatch):
    for name, cores in (("one", 1), ("two", 2)):
        monkeypatch.setattr(token_cache, "available_cores", lambda cores=cores: cores)
        cached(data, tmp_path / name)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).rglob("part-*")} for name in ("one", "two"))
    assert one == two and len(one) > 8


CHILD = """
import json, sys
from pathlib import Path
from lindm.errors import DataError
from lindm.llm.parallel import processes
processes.initialize(sys.argv[1], 2, int(sys.argv[2]))
from lindm.llm.sft import row_files, token_cache
from tests.lindm.llm.sft.test_token_cache import how
row_files.PART_BYTES, token_cache.available_cores = 400, lambda: 1
written, write_part = [], token_cache._write_part
token_cache._write_part = lambda task: written.append(task[1].name) or write_part(task)
try:
    paths = [Path(path) for path in sys.argv[4:]]
    examples, sha256 = token_cache.tokenized(paths, how(), Path(sys.argv[3]), lambda done, total: None)
    said = {"sha256": sha256, "ids": [examples[i].ids.tolist() for i in range(len(examples))]}
except DataError as e:
    said = {"error": e.message}
print(json.dumps(said | {"written": written}))
"""


@pytest.mark.slow
@pytest.mark.fault("F13")
def test_each_of_two_processes_tokenizes_its_share_and_an_error_of_one_is_that_of_both(data, tmp_path):
    def run(cache) -> list[dict]:
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        arguments = [f"127.0.0.1:{free_port()}", *(str(x) for x in (tmp_path / cache, *data))]
        options = {"cwd": ROOT, "env": environment | {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.PIPE, "text": True}
        started = [
            subprocess.Popen([sys.executable, "-c", CHILD, arguments[0], str(rank), *arguments[1:]], **options) for rank in (0, 1)
        ]
        try:
            return [json.loads(process.communicate(timeout=HANGS)[0].splitlines()[-1]) for process in started]
        finally:
            for process in started:
                process.kill()

    one, two = run("both")
    parts = len(find_parts(data))
    assert sorted(one["written"] + two["written"]) == [f"part-{i:05d}.safetensors" for i in range(parts)]
    assert abs(len(one["written"]) - len(two["written"])) <= 1 and one["sha256"] == two["sha256"]
    assert one["ids"] == two["ids"] == [e.ids.tolist() for e in listed(data)]
    lines = data[0].read_text().splitlines()
    data[0].write_text("\n".join([*lines[:-1], '{"prompt": 3}']))
    bad = run("bad")
    assert all(said["error"].startswith(f"{data[0]}:37: a row must have the columns of one of") for said in bad)
