"""Training examples: documents of datasets, rows of files, and errors that name the row."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lindm import datasets
from lindm.errors import DataError, LindmError
from lindm.llm.sft.examples import (
    LengthLimit,
    check_file_options,
    dataset_examples,
    held_out_mask,
    open_data,
    part_examples,
    read_documents,
    split_indices,
)
from lindm.llm.sft.row_files import find_files, find_parts
from lindm.llm.tokens import decode
from lindm.text import COMPACT, READABLE, Template, parse
from tests.lindm.datasets.conftest import SUITE, config, fixed_mdp
from tests.lindm.llm.small import TURNS, byte_level, dummy_space, trained_texts

TOKENIZER = byte_level()
CONFIG = config(tasks=5, demos=2, queries=2, query_epsilon=0.5, shard_size=3)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    out = tmp_path_factory.mktemp("suite")
    datasets.make_dataset(out, SUITE, CONFIG)
    return out


@pytest.fixture(scope="module")
def with_names(tmp_path_factory):
    out = tmp_path_factory.mktemp("names")
    datasets.make_dataset(out, fixed_mdp(), CONFIG)
    return out


@pytest.fixture(scope="module")
def ambiguous(brute, tmp_path_factory):
    out = tmp_path_factory.mktemp("ambiguous")
    datasets.make_dataset(out, brute.random(5, S=2, A=2, O=2, M=2, H=3, alpha=0.7).problem(), CONFIG)
    return out


def queries(directory):
    """(task, demonstrations, query) as the rows have them, in order."""
    for task in datasets.Dataset(directory):
        yield from ((task.task, task.demonstrations, query) for query in task.queries)


def trained(tokenizer, example) -> list[str]:
    return [decode(tokenizer, [t]) for t in example.target.tolist() if t >= 0]


def file_examples(paths, tokenizer, limit, **options):
    """The examples of files of rows, in order."""
    return [e for part in find_parts(paths) for _, made in part_examples(part, tokenizer, limit, **options) for e in made]


def load_examples(
    data,
    tokenizer,
    *,
    template=None,
    rewards="auto",
    names=False,
    supervise="all",
    loss="action",
    max_tokens=None,
    progress=lambda done, total: None,
):
    """All examples of `data`, in order, with the options of a run."""
    data = data if isinstance(data, datasets.Dataset) else open_data(data)
    if isinstance(data, list):
        check_file_options(template, rewards, names, supervise)
        return file_examples(data, tokenizer, LengthLimit(max_tokens))
    text = datasets.text_format(data, template, rewards, names)
    return dataset_examples(
        data, read_documents(data, text, progress), tokenizer, text.template, supervise, LengthLimit(max_tokens), loss
    )


@pytest.mark.fault("F23")
@pytest.mark.parametrize("template", ["compact", "readable"])
@pytest.mark.parametrize("supervise", ["all", "query"])
def test_a_document_reads_back_as_its_rows_and_trains_their_labels(suite, template, supervise):
    examples = load_examples(suite, TOKENIZER, template=template, supervise=supervise)
    rows = list(queries(suite))
    assert len(examples) == len(rows) == 10
    for n, (example, (task, demos, query)) in enumerate(zip(examples, rows, strict=True)):
        text = decode(TOKENIZER, example.ids.tolist())
        document = parse(text, {"compact": COMPACT, "readable": READABLE}[template])
        for steps, row in zip((*document.demonstrations, document.query), (*demos, query), strict=True):
            assert [(s.state, s.action, s.reward) for s in steps] == list(zip(row.state, row.action, row.reward, strict=True))
        labeled = (*demos, query) if supervise == "all" else (query,)
        assert trained(TOKENIZER, example) == [f" {'AB'[label]}" for row in labeled for label in row.label]
        assert (example.source, example.group) == (f"{suite}: task {task}, query {n % 2}", task)


@pytest.mark.fault("F23")
def test_behavior_cloning_trains_the_actions_of_the_demonstrator_and_of_queries_with_the_same_policy(suite, tmp_path):
    def symbols(episodes):
        return [f" {'AB'[action]}" for episode in episodes for action in episode.action]

    own = [trained(TOKENIZER, example) for example in load_examples(suite, TOKENIZER, loss="behavior")]
    assert own == [symbols(demos) for _, demos, _ in queries(suite)], "queries have other random actions than demonstrations"
    with pytest.raises(ValueError, match=r"supervise must be all with loss behavior.*probability 0.5 in queries and 0.0 in dem"):
        load_examples(suite, TOKENIZER, loss="behavior", supervise="query")
    same = tmp_path / "same"
    datasets.make_dataset(same, SUITE, replace(CONFIG, behavior="epsilon", epsilon=0.5))
    for supervise in ("all", "query"):
        examples = load_examples(same, TOKENIZER, loss="behavior", supervise=supervise)
        rows = [(*demos, query) if supervise == "all" else (query,) for _, demos, query in queries(same)]
        assert [trained(TOKENIZER, example) for example in examples] == [symbols(row) for row in rows]
        assert examples[0].action_values is None
    oracle = [trained(TOKENIZER, example) for example in load_examples(same, TOKENIZER)]
    assert oracle != [symbols((*demos, query)) for _, demos, query in queries(same)], "half of the actions are random"


def test_actions_that_the_oracle_would_not_take_are_in_the_text_and_their_labels_in_the_targets(suite):
    differ = 0
    for example, (_, _, query) in zip(load_examples(suite, TOKENIZER, supervise="query"), queries(suite), strict=True):
        places = np.flatnonzero(example.target >= 0)
        taken = [decode(TOKENIZER, [t]) for t in example.ids[places + 1].tolist()]
        assert taken == [f" {'AB'[a]}" for a in query.action]
        differ += sum(a != b for a, b in zip(taken, trained(TOKENIZER, example), strict=True))
    assert differ > 3


def test_rewards_and_names_are_options(with_names):
    text = decode(TOKENIZER, load_examples(with_names, TOKENIZER, rewards="hidden")[0].ids.tolist())
    assert re.fullmatch(r"(#(\n[012] [ABC]){4}\n?){3}", text)
    example = load_examples(with_names, TOKENIZER, names=True)[0]
    text = decode(TOKENIZER, example.ids.tolist())
    assert set(re.findall(r"The state is (\w+)", text)) <= {"left", "middle", "right"} and "The reward is" in text
    assert set(re.findall(r"The decision is (\w+)", text)) <= {"wait", "go", "turn"}
    words = set("".join(trained(TOKENIZER, example)).split())  # of a label of several tokens as much as the text agrees with
    assert words and all(any(name.startswith(word) for name in ("wait", "go", "turn")) for word in words)


def test_a_hidden_state_is_in_no_document(ambiguous):
    tokenizer = dummy_space()
    text = decode(tokenizer, load_examples(ambiguous, tokenizer, template="readable")[0].ids.tolist())
    assert "The state is" not in text and "Nature takes model" in text and "The observation is" in text


def test_a_template_may_be_a_file_or_a_template(suite, tmp_path):
    own = {"name": "own", "step": ["|", "{state}", "{action}"], "closing": "\n", "states": "{}", "actions": ["x", "y"]}
    (tmp_path / "own.json").write_text(json.dumps(own))
    examples = load_examples(suite, TOKENIZER, template=str(tmp_path / "own.json"))
    assert [e.ids.tolist() for e in examples] == [
        e.ids.tolist() for e in load_examples(suite, TOKENIZER, template=Template(**own))
    ]
    assert set(trained(TOKENIZER, examples[0])) <= {"x", "y"}
    with pytest.raises(LindmError, match=r"cannot read none\.json"):
        load_examples(suite, TOKENIZER, template="none.json")


def test_progress_is_called_with_the_tasks_that_are_done(suite):
    calls = []
    load_examples(suite, TOKENIZER, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_the_documents_of_a_dataset_are_those_that_train(suite):
    dataset = datasets.Dataset(suite)
    rows = list(datasets.documents(dataset, datasets.text_format(dataset, rewards="hidden")))
    assert [(task.task, query) for task, query, _ in rows] == [(t, q) for t in range(5) for q in (0, 1)]
    texts = [decode(TOKENIZER, e.ids.tolist()) for e in load_examples(dataset, TOKENIZER, rewards="hidden")]
    assert ["".join(piece.text for piece in pieces) for _, _, pieces in rows] == texts


# --- files


def written(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A"}]}


def test_rows_of_a_file_are_prompts_with_completions_or_conversations(tmp_path):
    path = written(
        tmp_path / "rows.jsonl",
        {"prompt": "#\n0", "completion": " A", "id": 7},
        "",
        CHAT,
        {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
    )
    examples = load_examples(path, TOKENIZER)
    assert [decode(TOKENIZER, [t for t in e.target.tolist() if t >= 0]) for e in examples] == [" A<|im_end|>"] + [
        "A<|im_end|>"
    ] * 2
    assert [str(e.source) for e in examples] == [f"{path}:1", f"{path}:3", f"{path}:4"]


@pytest.mark.fault("F23")
def test_answers_of_the_completion_of_a_conversation_are_trained(tmp_path):
    path = written(tmp_path / "rows.jsonl", {"prompt": TURNS[:3], "completion": TURNS[3:]}, {"messages": TURNS})
    part, whole = load_examples(path, TOKENIZER)
    assert trained_texts(TOKENIZER, part) == ["B or C<|im_end|>"]
    assert trained_texts(TOKENIZER, whole) == ["A<|im_end|>", "B or C<|im_end|>"] and part.ids.tolist() == whole.ids.tolist()


def test_an_export_for_another_trainer_trains_the_same_answers_here(suite, tmp_path):
    prompts, conversations, _ = datasets.export(suite, "trl", tmp_path)
    labels = [label for _, _, query in queries(suite) for label in query.label]
    examples = load_examples(prompts, TOKENIZER)
    assert ["".join(trained(TOKENIZER, e)) for e in examples] == [f" {'AB'[label]}<|im_end|>" for label in labels]
    answers = "".join("".join(trained(TOKENIZER, e)) for e in load_examples(conversations, TOKENIZER))
    assert answers == "".join(f"{'AB'[label]}<|im_end|>" for label in labels)


GOOD = {"prompt": "x", "completion": " A"}
FORMATS = "{messages}, {conversations}, {prompt, completion}, {instruction, output}, {text}"


@pytest.mark.fault("F13")
@pytest.mark.parametrize(
    "row, why",
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ('{"prompt": "x", "completion": "\xff"}'.encode("latin-1"), "expected text in UTF-8; got the byte 0xff"),
        ('{"prompt": "x",', "not JSON: Expecting property name enclosed in double quotes at column 16"),
        (
            {"messages": [{"role": "user", "content": None}, *CHAT["messages"]]},
            "message 0 of role 'user' must have a content; got none",
        ),
        (
            {"messages": [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "A"}]},
            "message 0 has the role 'human', which the chat template does not name; use 'user'",
        ),
        ([1], "a row must be an object; got list"),
        ({"prompt": "x"}, f"a row must have the columns of one of {FORMATS}; got 'prompt'"),
        ({}, f"a row must have the columns of one of {FORMATS}; got none"),
        (GOOD | CHAT, "a row must have the columns of one format; got those of {messages} and {prompt, completion}"),
        ({"prompt": 1, "completion": "A"}, "prompt and completion must both be texts or both be lists of messages"),
        ({"prompt": "x", "completion": None}, "prompt and completion must both be texts or both be lists of messages"),
        ({"prompt": "", "completion": ""}, "prompt and completion must not both be empty"),
        ({"prompt": [], "completion": []}, "prompt and completion must not both be empty"),
        ({"prompt": "\ud800", "completion": "A"}, "text must be encodable as UTF-8"),
        ({"messages": "hi"}, "messages must be a list of messages; got 'hi'"),
        ({"messages": []}, "messages must be a list of messages"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no message of the assistant is trained"),
        ({"messages": [{"content": "hi"}]}, "message 0 must be an object with the string role"),
        (CHAT | {"tools": [{"name": "f"}]}, "the chat template does not render tools"),
        (CHAT | {"images": ["a.png"]}, "images must be left out: it has no effect here"),
        ({"prompt": "y" * 40, "completion": "A"}, "must have at most 20 tokens, or --overlong must be truncate or drop; got 42"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, why):
    path = written(tmp_path / "rows.jsonl", GOOD)
    assert len(load_examples(path, TOKENIZER, max_tokens=20)) == 1
    with path.open("ab") as f:
        f.write(row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode())
    with pytest.raises(LindmError, match=f"^{re.escape(f'{path}:2: {why}')}") as e:
        load_examples(path, TOKENIZER, max_tokens=20)
    assert isinstance(e.value, DataError)


def test_a_document_that_is_too_long_is_named_by_its_task_and_query(suite):
    sizes = [len(e.ids) for e in load_examples(suite, TOKENIZER)]
    assert len(load_examples(suite, TOKENIZER, max_tokens=max(sizes))) == 10
    n, (task, query) = sizes[0], (0, 0)
    with pytest.raises(LindmError, match=f": task {task}, query {query}: must have at most {n - 1} tokens, .*; got {n}") as e:
        load_examples(suite, TOKENIZER, max_tokens=n - 1)
    assert isinstance(e.value, DataError)


@pytest.mark.parametrize("name", ["nothing", "nothing.jsonl", "rows.csv", "", "folder.jsonl"])
def test_any_other_source_raises_an_error_with_the_accepted_ones(tmp_path, name):
    written(tmp_path / "rows.csv", GOOD)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"data must be a directory of `lindm data make`, a file of rows or .*; got /") as e:
        load_examples(tmp_path / name, TOKENIZER)
    assert str(e.value).endswith(", which does not exist") == name.startswith("nothing")


def test_an_unfinished_dataset_raises_an_error(suite, tmp_path):
    (tmp_path / "config.json").write_bytes((suite / "config.json").read_bytes())
    with pytest.raises(LindmError, match="is not finished") as e:
        load_examples(tmp_path, TOKENIZER)
    assert isinstance(e.value, DataError)


@pytest.mark.parametrize("option", [{"template": "compact"}, {"rewards": "hidden"}, {"names": True}, {"supervise": "query"}])
def test_an_option_of_datasets_raises_an_error_for_a_file(tmp_path, option):
    with pytest.raises(ValueError, match=rf"{next(iter(option))} must be left out for rows"):
        load_examples(written(tmp_path / "rows.jsonl", GOOD), TOKENIZER, **option)


def test_an_unknown_choice_raises_an_error(suite):
    with pytest.raises(ValueError, match="supervise must be one of all, query; got 'demos'"):
        load_examples(suite, TOKENIZER, supervise="demos")


# --- held out


def test_a_task_is_never_on_both_sides(suite):
    tasks = np.array([e.group for e in load_examples(suite, TOKENIZER)], np.uint64)
    for seed in range(5):
        mask = held_out_mask(tasks, 0.4, seed, hashed=False)
        assert (
            mask.sum() == 4
            and set(tasks[mask]) == set(split_indices(5, 0.4, seed)[1])
            and not set(tasks[mask]) & set(tasks[~mask])
        )


keys = st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=40, unique=True)


@given(keys=keys, copies=st.integers(1, 3), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_which_rows_are_held_out_does_not_depend_on_their_order(keys, copies, seed, data):
    groups = np.array(keys * copies, np.uint64)
    mask = held_out_mask(groups, 0.3, seed, hashed=True)
    assert len(set(groups[mask])) == max(round(0.3 * len(keys)), 1) and not set(groups[mask]) & set(groups[~mask])
    order = np.array(data.draw(st.permutations(range(len(groups)))))
    assert (held_out_mask(groups[order], 0.3, seed, hashed=True) == mask[order]).all()


def test_every_row_is_held_out_about_equally_often_and_one_more_row_moves_at_most_one_other():
    groups = np.random.default_rng(0).integers(0, 2**64, 200, np.uint64)
    masks = np.array([held_out_mask(groups, 0.3, seed, hashed=True) for seed in range(500)])
    assert (masks.sum(1) == 60).all() and np.abs(masks.sum(0) - 150).max() < 5 * np.sqrt(500 * 0.3 * 0.7)
    for seed in range(20):
        fewer = held_out_mask(groups[1:], 0.3, seed, hashed=True)
        assert (fewer != masks[seed][1:]).sum() <= 1


def test_rows_with_one_value_in_a_column_are_on_one_side(tmp_path):
    rows = [{"prompt": f"{i}", "completion": " A", "patient": f"p{i % 7}", "visit": i} for i in range(50)]
    paths = find_files(written(tmp_path / "rows.jsonl", *rows))
    examples = file_examples(paths, TOKENIZER, LengthLimit(), held_out_key="patient")
    by_patient = {(row["patient"], e.group) for row, e in zip(rows, examples, strict=True)}
    assert len(by_patient) == len(dict(by_patient)) == len({group for _, group in by_patient}) == 7
    with pytest.raises(DataError, match=r"rows\.jsonl:1: must have a value in the column 'sex', by which rows are held out"):
        file_examples(paths, TOKENIZER, LengthLimit(), held_out_key="sex")


def test_the_group_of_a_row_is_that_of_what_is_trained_on(tmp_path):
    texts = [GOOD, GOOD | {"id": 3}, GOOD | {"completion": " B"}, GOOD]
    a, b, c, d = [e.group for e in load_examples(written(tmp_path / "rows.jsonl", *texts), TOKENIZER)]
    assert a == b == d != c
