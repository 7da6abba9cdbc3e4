"""What other tools get: texts that read back, labels that answer them, transitions that Minari loads."""

import json
import re
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from lindm.datasets import Dataset, Episode, export, exports, make_dataset
from lindm.datasets.text import with_names
from lindm.errors import LindmError, StorageError, UsageError
from lindm.families.registry import NamedProblem
from lindm.text import COMPACT, READABLE, Document, Template, parse, render
from lindm.types import MDP
from tests.lindm.datasets.conftest import config


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def queries(directory):
    for task in Dataset(directory):
        yield from ((task, task.demonstrations, query) for query in task.queries)


def shown(row, steps, apomdp):
    """What the first steps of an episode look like in a document; rewards of a hidden state are in the demonstrations alone."""
    keys = {"model": "model", "observation": "observation"} if apomdp else {"state": "state"}
    keys |= {"action": "action"} | ({} if apomdp and row.role == "query" else {"reward": "reward"})
    return [{k: getattr(row, c)[t] for k, c in keys.items()} for t in range(steps)]


def fields_of(steps):
    fields = ("state", "model", "observation", "action", "reward")
    return [{k: getattr(step, k) for k in fields if getattr(step, k) is not None} for step in steps]


@pytest.mark.parametrize("name", ["mdp", "apomdp"])
@pytest.mark.parametrize("template", [COMPACT, READABLE], ids=lambda t: t.name)
def test_a_prompt_reads_back_as_demonstrations_and_history_and_the_completion_is_the_label(made, tmp_path, name, template):
    directory, apomdp, end = getattr(made, name), name == "apomdp", ".\n" if template is READABLE else ""
    paths = export(directory, "trl", tmp_path, template=template)
    assert paths == [tmp_path / name for name in ("prompt_completion.jsonl", "messages.jsonl", "README.md")]
    rows = iter(lines(paths[0]))
    for _, demos, query in queries(directory):
        for t, label in enumerate(query.label):
            row = next(rows)
            assert set(row) == {"prompt", "completion"}
            prompt, completed = parse(row["prompt"], template), parse(row["prompt"] + row["completion"] + end, template)
            assert [fields_of(episode) for episode in prompt.demonstrations] == [shown(d, len(d.action), apomdp) for d in demos]
            *history, last = prompt.query
            assert fields_of(history) == shown(query, t, apomdp)
            assert last.action is None and last.state == (None if apomdp else query.state[t])
            assert completed.query[-1] == replace(last, action=label)
    assert next(rows, None) is None


def test_a_conversation_holds_the_steps_and_its_answers_are_the_labels(made, tmp_path):
    _, path, _ = export(made.mdp, "trl", tmp_path)
    rows, deviations = iter(lines(path)), 0
    for _, demos, query in queries(made.mdp):
        labels, length = list(query.label), 0
        while labels:
            system, *turns = next(rows)["messages"]
            assert system == {"role": "system", "content": exports.SYSTEM}
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
            length += len(turns) // 2
            # with the space back that a symbol brings, the conversation is a document: what happened, and then one answer
            text = "".join(turn["content"] if turn["role"] == "user" else f" {turn['content']}" for turn in turns)
            document = parse(text, COMPACT)
            assert len(document.demonstrations) == len(demos)
            *history, last = document.query
            assert fields_of(history) == shown(query, length - 1, False)
            assert last.action == query.label[length - 1] and last.state == query.state[length - 1]
            answers = ["ABC".index(turn["content"]) for turn in turns[1::2]]
            assert answers == [labels.pop(0) for _ in answers]
            if labels:
                assert query.action[length - 1] != last.action
                deviations += 1
    assert next(rows, None) is None and deviations > 5


def test_the_oracles_own_query_is_one_conversation(made, tmp_path):
    row = episode(action=[0, 1, 1], label=[0, 1, 1], reward=[0.5, 1.0, 2.0], state=[0, 1, 2])
    pieces = render(Document((), row.steps()), COMPACT)
    (turns,) = exports._conversations(pieces, 0, row)
    assert turns == ["#\n0", 0, ":0.5\n1", 1, ":1.0\n2", 1]
    row = replace(row, action=[0, 0, 1])
    pieces = render(Document((), row.steps()), COMPACT)
    first, second = exports._conversations(pieces, 0, row)
    assert first == ["#\n0", 0, ":0.5\n1", 1] and second == ["#\n0 A:0.5\n1 A:1.0\n2", 1]


def test_a_hidden_state_is_in_no_text(made, tmp_path):
    for path in export(made.apomdp, "trl", tmp_path, template=READABLE)[:2]:
        assert "The state is" not in path.read_text() and "The observation is" in path.read_text()


def test_rewards_names_and_the_system_message_are_options(made, tmp_path):
    paths = export(made.mdp, "trl", tmp_path, template=READABLE, rewards="hidden", names=True, system="")
    text = paths[0].read_text()
    assert "reward" not in text and {row["completion"] for row in lines(paths[0])} <= {" wait", " go", " turn"}
    assert set(re.findall(r"The state is (\w+)", text)) == {"left", "middle", "right"}
    assert all(row["messages"][0]["role"] == "user" for row in lines(paths[1]))
    template = with_names(READABLE, {"states": ["left", "middle", "right"], "actions": ["wait", "go", "turn"]})
    assert parse(lines(paths[0])[0]["prompt"], template).demonstrations


def test_a_template_must_show_what_the_problem_needs_and_have_its_symbols(made, tmp_path):
    bare = Template(name="bare", step=("\n", "?{action}"), closing=";", actions=("A", "B", "C"))
    with pytest.raises(ValueError, match=r"template must have \{state\} in its step for this dataset; 'bare' does not have it"):
        export(made.mdp, "trl", tmp_path, template=bare)
    with pytest.raises(ValueError, match=r"\{model\}"):
        export(made.apomdp, "trl", tmp_path, template=bare)
    few = Template(name="few", step=("\n", "{state}", "?{action}"), closing=";", actions=("A", "B"), states="{}")
    message = "template 'few' has 2 action symbols and the dataset 3 actions; use names or a template of your own"
    with pytest.raises(ValueError, match=f"^{message}$"):
        export(made.mdp, "trl", tmp_path, template=few)
    with pytest.raises(ValueError, match="to must be one of trl, minari; got 'csv'"):
        export(made.mdp, "csv", tmp_path)
    assert list(tmp_path.iterdir()) == []


def many(actions, **names):
    """A problem with many actions."""
    r = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, actions)))
    return NamedProblem(problem=MDP(P=jnp.full((1, 2, actions, 2), 0.5), r=r, rho=jnp.asarray([0.5, 0.5])), **names)


def test_a_problem_with_more_actions_than_symbols_is_refused_before_anything_is_written(tmp_path):
    directory = tmp_path / "many"
    make_dataset(directory, many(30), config(tasks=1))
    for template in (None, READABLE):
        message = rf"template '{template.name if template else 'compact'}' has 26 action symbols and the dataset 30 actions; "
        with pytest.raises(ValueError, match=f"^{message}use a template of your own$"):
            export(directory, "trl", tmp_path / "out", template=template)
    assert not (tmp_path / "out").exists()
    enough = Template(name="enough", step=("\n", "{state}", "?{action}", ":{reward}"), closing=";", actions="{}", states="{}")
    assert len(export(directory, "trl", tmp_path / "out", template=enough)) == 3


def test_names_are_written_as_whole_words(made, tmp_path):
    """Without a template: COMPACT would write "middle wait:0.5"."""
    chosen, readable = (tmp_path / name for name in ("chosen", "readable"))
    export(made.mdp, "trl", chosen, names=True)
    export(made.mdp, "trl", readable, names=True, template=READABLE)
    for name in ("prompt_completion.jsonl", "messages.jsonl"):
        assert (chosen / name).read_bytes() == (readable / name).read_bytes()


def test_names_that_can_be_read_in_two_ways_are_refused_with_what_to_do(tmp_path):
    names = {"actions": ["up", "up:1.0"]}
    with pytest.raises(ValueError, match=r"^with names .* is ambiguous: .*; try another template, such as readable$"):
        with_names(COMPACT, names)
    assert with_names(READABLE, names).actions == (" up", " up:1.0")
    with pytest.raises(ValueError, match=r"'readable' is ambiguous: .*; try a template of your own$"):
        with_names(READABLE, {"actions": ["up", "up.\nThe decision is up"]})


def test_options_without_use_are_refused(made, tmp_path):
    for option, message in (
        ({"names": True}, "names must be left out for minari, which has no text; got True"),
        ({"rewards": "hidden"}, "rewards must be left out for minari, which has no text; got 'hidden'"),
        ({"template": READABLE}, "template must be left out for minari, which has no text; got 'readable'"),
        ({"system": ""}, "system must be left out for minari, which has no text; got ''"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            export(made.mdp, "minari", tmp_path, **option)
    with pytest.raises(ValueError, match=r"^dataset_id must be left out for trl, which has none; got 'a-v0'$"):
        export(made.mdp, "trl", tmp_path, dataset_id="a-v0")
    with pytest.raises(ValueError, match=r"^names must be left out: the dataset .*apomdp has no names; got True$"):
        export(made.apomdp, "trl", tmp_path, names=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", exports.FORMATS)
def test_out_may_be_relative(made, tmp_path, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    written = export(made.mdp, to, Path("some") / "out")
    listed = {"manifest.json"} if to == "trl" else set()  # that of a Minari dataset is inside it
    assert {path.name for path in written} | listed == {path.name for path in (tmp_path / "some" / "out").iterdir()}
    assert all(not path.is_absolute() and path.exists() for path in written)


@pytest.mark.fault("F27")
@pytest.mark.parametrize("to", exports.FORMATS)
def test_an_interrupted_export_leaves_nothing(made, tmp_path, to):
    def progress(done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(made.mdp, to, tmp_path, progress=progress)
    assert list(tmp_path.iterdir()) == []
    assert export(made.mdp, to, tmp_path)


@pytest.mark.fault("F27")
@pytest.mark.parametrize("to, function", [("trl", "_new_files"), ("minari", "_minari")])
def test_a_signal_before_any_line_leaves_all_or_nothing(made, tmp_path, to, function):
    """In a notebook the handler of a signal raises between two lines of the function that writes, once for each of its lines."""
    code = vars(exports)[function]
    code = getattr(code, "__wrapped__", code).__code__
    whole, seen, stops = {path.name for path in export(made.mdp, to, tmp_path / "whole")}, 0, 0
    for n in range(100):
        out, count = tmp_path / str(n), 0

        def line(frame, event, arg, n=n):
            nonlocal count
            count += event == "line"
            if count > n:
                raise KeyboardInterrupt
            return line

        before = sys.gettrace()
        sys.settrace(lambda frame, event, arg: line if frame.f_code is code else None)
        try:
            export(made.mdp, to, out)
            break
        except KeyboardInterrupt:
            stops += 1
        finally:
            sys.settrace(before)
        left = {path.name for path in out.iterdir()} if out.exists() else set()
        assert left in (set(), whole), n
        seen += left == set()
        shutil.rmtree(out, ignore_errors=True)
    assert 10 < seen <= stops < 100


@pytest.mark.fault("F18")
def test_exports_replace_no_file_and_leave_no_partial_file(made, tmp_path):
    (tmp_path / "messages.jsonl").write_text("mine")
    with pytest.raises(LindmError, match=r"messages\.jsonl already exists") as e:
        export(made.mdp, "trl", tmp_path)
    assert isinstance(e.value, UsageError) and [p.name for p in tmp_path.iterdir()] == ["messages.jsonl"]
    with pytest.raises(LindmError, match="cannot write") as e:
        export(made.mdp, "trl", tmp_path / "messages.jsonl" / "out")
    assert isinstance(e.value, StorageError)


@pytest.mark.fault("F26")
@pytest.mark.parametrize("missing", ["", "messages.jsonl", "prompt_completion.jsonl"])
def test_an_export_that_is_there_in_whole_or_in_part_is_completed_and_one_that_differs_is_refused(made, tmp_path, missing):
    whole = {path: path.read_bytes() for path in export(made.mdp, "trl", tmp_path)}
    (tmp_path / missing).unlink() if missing else None
    export(made.mdp, "trl", tmp_path)
    assert whole == {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "manifest.json"}
    for path, content in whole.items():
        for other in (content[:-1], content + b"\n", content.replace(b"A", b"B", 1)):
            path.write_bytes(other)
            with pytest.raises(UsageError, match=rf"{path.name} already exists with other content and is not replaced"):
                export(made.mdp, "trl", tmp_path)
            assert path.read_bytes() == other
        path.write_bytes(content)


@pytest.mark.fault("F28")
def test_a_damaged_dataset_is_not_exported(made, tmp_path):
    for path in made.mdp.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "episodes-00002.jsonl").open("a") as f:
        f.write("{}\n")
    for to in exports.FORMATS:
        with pytest.raises(LindmError, match=r"episodes-00002\.jsonl is damaged"):
            export(tmp_path, to, tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["mdp", "apomdp"])
def test_minari_loads_every_episode(made, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(socket, "socket", None)  # a socket would be an error
    directory = getattr(made, name)
    calls = []
    (path,) = export(directory, "minari", tmp_path, progress=lambda done, total: calls.append(done))
    assert calls == list(range(11)) and not (tmp_path / "home").exists()
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = minari.load_dataset(path.name)
    assert path.name == ("lindm-mdp-4-v0" if name == "mdp" else "lindm-apomdp-3-v0")
    expected = [(task, row) for task in Dataset(directory) for row in task.episodes]
    assert dataset.total_episodes == len(expected) == 60
    assert dataset.action_space.n == (3 if name == "mdp" else 2) and dataset.observation_space.n == (4 if name == "mdp" else 5)
    facts = list(dataset.storage.get_episode_metadata(range(60)))
    for (task, row), episode, fact in zip(expected, dataset, facts, strict=True):
        H = len(row.action)
        assert fact["options"] == {"task": task.task, "role": row.role}
        pairs = zip(row.model or (), row.observation or (), strict=True)
        seen = [*row.state, 3] if name == "mdp" else [4, *(2 * m + o for m, o in pairs)]
        assert episode.observations.tolist() == seen
        assert episode.actions.tolist() == row.action and episode.rewards.tolist() == row.reward
        assert episode.terminations.tolist() == [False] * (H - 1) + [True] and not episode.truncations.any()
        assert episode.infos["label"].tolist() == [*row.label, -1] and episode.infos["state"].tolist() == [*row.state, -1]
        np.testing.assert_array_equal(episode.infos["Q"], [*row.Q, [0] * len(row.Q[0])])
        assert episode.infos["certificate"].tolist() == [*row.certificate, -1]
        assert episode.infos["regret"].tolist() == [*row.regret, 0]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert export(directory, "minari", tmp_path) == [path for path in tmp_path.iterdir() if path.name.endswith("-v0")]
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (target,) = {path.relative_to(tmp_path).parts[0] for path in before}
    with pytest.raises(UsageError, match="already exists"):
        export(made.mdp if name == "apomdp" else made.apomdp, "minari", tmp_path, dataset_id=target)


def test_minari_exports_have_the_required_fields(made, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"dataset_id must be .*; got 'a/b-v0'"):
        export(made.mdp, "minari", tmp_path, dataset_id="a/b-v0")
    (path,) = export(made.mdp, "minari", tmp_path, dataset_id="mine-v3")
    assert (path / "data").is_dir() and [p.name for p in tmp_path.iterdir()] == ["mine-v3"]
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(LindmError, match=r"pip install -e '.\[minari\]'"):
        export(made.mdp, "minari", tmp_path, dataset_id="other-v0")


def episode(**columns):
    H = len(columns["action"])
    columns["discounted_mean_reward"] = columns["reward"]
    rest = {"task": 0, "episode": 0, "role": "query", "Q": [[0.0, 0.0]] * H, "certificate": [0] * H, "regret": [0.0] * H}
    return Episode(**(rest | columns))


def test_a_pomdp_starts_with_nothing_seen():
    row = episode(action=[0, 1], observation=[1, 0], state=[0, 0], reward=[0.0, 1.0], label=[0, 1])
    sizes = SimpleNamespace(kind="pomdp", num_actions=2, num_observations=2)
    assert exports._transitions(row, sizes, 2)["observations"].tolist() == [2, 1, 0]
