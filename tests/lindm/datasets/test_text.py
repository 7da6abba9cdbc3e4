"""What the texts of a dataset show, decided in one place; and a dataset whose files are read once."""

from dataclasses import replace

import numpy as np
import pytest

import lindm as ld
from lindm.datasets import Dataset, documents, is_dataset, text_format
from lindm.io import inputs
from lindm.text import COMPACT, READABLE, Step, parse, text


@pytest.mark.parametrize(
    "name, rewards, in_demonstrations, in_query",
    [
        ("mdp", "auto", True, True),
        ("mdp", "shown", True, True),
        ("mdp", "hidden", False, False),
        ("apomdp", "auto", False, False),
        ("apomdp", "shown", True, False),  # a reward may reveal of a hidden state what no label uses
        ("apomdp", "hidden", False, False),
    ],
)
def test_rewards_are_shown_where_the_option_and_the_problem_allow(made, name, rewards, in_demonstrations, in_query):
    dataset = Dataset(getattr(made, name))
    how, task = text_format(dataset, rewards=rewards), dataset.load()[0]
    assert ("reward" in how.fields) is in_demonstrations and ("reward" in how.query_fields) is in_query
    document = how.document(task, task.queries[0])
    assert all((step.reward is not None) is in_demonstrations for steps in document.demonstrations for step in steps)
    assert all((step.reward is not None) is in_query for step in document.query)
    assert how.demonstrations(task) == document.demonstrations


def test_an_episode_in_progress_is_shown_as_the_query_of_a_document(made):
    for name in ("mdp", "apomdp"):
        dataset = Dataset(getattr(made, name))
        task = dataset.load()[0]
        for rewards in ("shown", "hidden"):
            how = text_format(dataset, rewards=rewards)
            assert how.query_steps(task.queries[0].steps()) == how.document(task, task.queries[0]).query
    assert how.query_steps([Step(None, state=1)]) == (Step(None),)


def test_the_template_has_a_name_a_path_or_a_default(made):
    dataset = Dataset(made.mdp)
    assert text_format(dataset).template == COMPACT and text_format(dataset, "readable").template == READABLE
    assert text_format(dataset, names=True).template == replace(
        READABLE, states=("left", "middle", "right"), actions=(" wait", " go", " turn")
    )
    with pytest.raises(ValueError, match=r"^rewards must be one of auto, shown, hidden; got 'some'"):
        text_format(dataset, rewards="some")


def test_texts_show_the_legal_actions_where_some_are_not(made, tmp_path):
    P = np.full((1, 2, 3, 2), 0.5)
    P[0, 0, 1] = [0, 1]
    legal = np.array([[False, True, True], [True, True, True]])
    fields = {"r": np.arange(18.0).reshape(3, 2, 3), "rho": [0.5, 0.5], "legal": legal}
    observed = ld.mdp(P, **fields)
    hidden = ld.pomdp(P, np.broadcast_to(np.eye(2)[None, None], (1, 3, 2, 2)), **fields)
    for name, problem in (("mdp", observed), ("pomdp", hidden)):
        ld.make_dataset(problem, tmp_path / name, tasks=2, demos=2, behavior="uniform")
        dataset = Dataset(tmp_path / name)
        for template in (None, "readable", replace(COMPACT, legal=None, step=("\n", "{state}", "<{legal}>", *COMPACT.step[2:]))):
            how = text_format(dataset, template)
            for task, number, pieces in documents(dataset, how):
                read, episodes = parse(text(pieces), how.template), (*task.demonstrations, task.queries[number])
                for steps, episode in zip((*read.demonstrations, read.query), episodes, strict=True):
                    assert episode.legal is not None
                    rows = [tuple(np.flatnonzero(row).tolist()) for row in episode.legal]
                    assert [step.legal for step in steps] == rows and all(s.action in s.legal for s in steps if s.legal)
        assert ("0[ B, C]" if name == "mdp" else "\n[ B, C]") in text(next(documents(dataset, text_format(dataset)))[2])
        # templates without the field, and problems without illegal actions, write what they wrote before
        plain = text_format(dataset, replace(COMPACT, legal=None))
        assert "[" not in text(next(documents(dataset, plain))[2])
    assert text_format(Dataset(made.mdp)).template == COMPACT


def test_documents_are_those_of_every_query_in_order(made):
    dataset = Dataset(made.suite)
    how = text_format(dataset)
    rows = list(documents(dataset, how))
    assert [(task.task, number) for task, number, _ in rows] == [(t, q) for t in range(10) for q in range(2)]
    task, number, pieces = rows[3]
    assert text(pieces) == text(how.pieces(task, task.queries[number]))


def test_files_are_read_when_tasks_are_reached_and_once_after_load(made, monkeypatch):
    read, real = [], inputs.open_file
    monkeypatch.setattr(inputs, "open_file", lambda path, *args: read.append(path.name) or real(path, *args))
    dataset, seen = Dataset(made.suite), []
    assert read == ["manifest.json"] and len(dataset) == 10
    next(iter(dataset))
    assert read[1:] == ["episodes-00000.jsonl", "tasks-00000.jsonl"]
    read.clear()
    tasks = dataset.load(lambda done, total: seen.append((done, total)))
    assert len(read) == 6 and seen == [(n, 10) for n in range(1, 11)]
    assert dataset.load() is tasks and list(dataset) == tasks and len(dataset.problems()) == 10
    assert len(read) == 6


def test_a_handle_knows_the_sizes_the_config_and_the_names(made):
    dataset = Dataset(made.mdp)
    assert (dataset.kind, dataset.horizon, dataset.num_states, dataset.num_actions) == ("mdp", 4, 3, 3)
    assert dataset.config.demos == 4 and dataset.suite is None and dataset.names["actions"] == ["wait", "go", "turn"]
    problems = dataset.problems()
    assert len(problems) == 10 and all(problem is problems[0] for problem in problems)
    suite, apomdp = Dataset(made.suite), Dataset(made.apomdp)
    assert suite.suite is not None and suite.suite["name"] == "small" and suite.checksum != dataset.checksum
    assert (apomdp.kind, apomdp.num_observations, apomdp.num_models) == ("apomdp", 2, 2)
    assert is_dataset(made.suite) and not is_dataset(made.suite / "manifest.json") and not is_dataset(made.root)
