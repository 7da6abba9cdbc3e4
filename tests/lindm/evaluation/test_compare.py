"""`lindm eval`: rows of policies on the same tasks, a model before and after training among them, and what is refused."""

import json
import re

import pytest

from lindm.cli.main import main
from lindm.datasets import Dataset, DatasetConfig, make_dataset
from lindm.errors import DataError, LindmError, UsageError
from lindm.evaluation import compare
from lindm.llm.sft import trainer
from lindm.llm.sft.options import SFTConfig
from lindm.text import COMPACT
from tests.lindm.llm.conftest import SUITE

RECIPE = DatasetConfig(tasks=5, demos=2, seed=11)


@pytest.fixture(scope="module")
def run(micro, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert trainer.train(SFTConfig(model=micro.model, data=micro.mdp, out=out, steps=2, eval_tasks=0, rewards="hidden")) == 0
    return out


@pytest.fixture(scope="module")
def rows(micro, run, tmp_path_factory):
    names = ["oracle", "random", "bc", f"icl:{micro.model}", f"sft:{run}"]
    told = []
    found = compare.compare(tmp_path_factory.mktemp("data"), SUITE, RECIPE, names, finished=told.append)
    assert told == found and [row["policy"] for row in found] == names
    return found


def test_every_policy_has_a_row_of_the_same_tasks(rows):
    for row in rows:
        assert (row["suite"], row["horizon"], row["split"], row["n"], row["method"]) == ("small", 3, "id", 5, "exact")
        assert len(row["gaps"]) == 5 and row["ci"][0] <= row["gap"] <= row["ci"][1]
        assert row["gap"] == pytest.approx(sum(row["gaps"]) / 5) and row["decisions_per_s"] > 0
        assert 0 <= row["action_agreement"] <= 1 + 1e-9
    assert abs(rows[0]["gap"]) < 1e-12 and rows[1]["gap"] == pytest.approx(1)


def test_only_language_models_can_answer_what_is_no_action(rows):
    assert [row["invalid"] is None for row in rows] == [True, True, True, False, False]
    assert all(0 <= row["invalid"] <= 1 for row in rows[3:])


def test_a_model_is_asked_as_it_was_trained(micro, run, tmp_path):
    """The run was not told the rewards, and is not told them here."""
    make_dataset(tmp_path, SUITE, RECIPE)
    dataset = Dataset(tmp_path)
    parts = ["\n", "{state}", "{action}", ":{reward}"]
    turned = {"name": "turned", "episode": "#", "step": parts, "closing": "\n", "actions": [" B", " C", " A"], "states": "{}"}
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    for kind, path, told in (("icl", micro.model, True), ("sft", run, False)):
        reader, answers, rewards = compare._language_model(kind, path, dataset, {})
        assert rewards is told and (answers.given[0][0][0].reward is not None) is told
        assert reader.template == COMPACT
        other = {"template": str(tmp_path / "turned.json"), "rewards": "hidden" if told else "shown"}
        reader, answers, rewards = compare._language_model(kind, path, dataset, other)
        assert rewards is not told and (answers.given[0][0][0].reward is not None) is not told
        assert reader.template.name == "turned"


def test_what_texts_tell_is_refused_where_nobody_reads_them(tmp_path):
    for option, value in (("template", "readable"), ("rewards", "shown")):
        with pytest.raises(ValueError, match=f"{option} must be left out without a language model; got '{value}'"):
            compare.compare(tmp_path / "data", SUITE, RECIPE, ["oracle", "bc"], **{option: value})
    assert not (tmp_path / "data").exists()


def test_a_word_for_rewards_that_is_none_is_refused(micro, tmp_path):
    with pytest.raises(ValueError, match="rewards must be one of auto, shown, hidden; got 'some'"):
        compare.compare(tmp_path / "data", SUITE, RECIPE, ["oracle", f"icl:{micro.model}"], rewards="some")
    assert not (tmp_path / "data").exists()


def test_a_task_with_more_histories_than_listed_is_sampled(micro, tmp_path):
    (row,) = compare.compare(tmp_path / "data", SUITE, RECIPE, [f"icl:{micro.model}"], listed=1, episodes=2)
    assert row["method"] == "rollout"


def test_texts_that_are_too_long_for_the_model_are_refused(micro, tmp_path):
    with pytest.raises(
        LindmError, match=r"policy icl:.*: texts must have at most the 256 tokens of the model; the longest has about \d+"
    ) as e:
        compare.compare(tmp_path / "data", SUITE, DatasetConfig(tasks=1, demos=30, seed=4), [f"icl:{micro.model}"])
    assert isinstance(e.value, DataError)


def test_a_policy_that_these_tasks_do_not_have_is_refused_before_they_are_made(tmp_path):
    with pytest.raises(ValueError, match="where the state is seen; got 'qmdp'"):
        compare.compare(tmp_path / "data", SUITE, RECIPE, ["oracle", "qmdp"])
    assert not (tmp_path / "data").exists()


def test_tasks_that_a_run_was_trained_on_are_refused(run, tmp_path):
    with pytest.raises(LindmError, match=r"seed must not be 0: .* was trained on these tasks") as e:
        compare.compare(tmp_path / "data", SUITE, DatasetConfig(tasks=5, demos=2), [f"sft:{run}"])
    assert isinstance(e.value, UsageError) and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "names, code, said",
    [
        (["clever"], 2, "policy must be one of oracle, random, .*icl:MODELDIR, sft:RUNDIR where the state is seen; got 'clever'"),
        (["bc", "oracle", "bc"], 2, "policy must be given once; got 'bc' twice"),
        (["llm:models/x"], 2, "policy must be icl:MODELDIR or sft:RUNDIR where it has a colon; got 'llm:models/x'"),
        (["icl:"], 2, "where it has a colon; got 'icl:'"),
        (["icl:nowhere"], 3, "policy icl:nowhere: nowhere is not there"),
        (["sft:nowhere"], 3, "policy sft:nowhere: nowhere holds no run of `lindm sft`"),
        (["qmdp"], 2, "policy must be one of oracle, .* where the state is seen; got 'qmdp'"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_line(capsys, names, code, said):
    arguments = [word for name in names for word in ("--policy", name)]
    assert main(["eval", "mdp", "--horizon", "4", "--tasks", "1", "--demos", "1", *arguments]) == code
    assert re.search(said, capsys.readouterr().err)


def test_a_problem_of_ones_own_is_one_problem_with_many_demonstrations(capsys):
    tiger = ["eval", "tests/lindm/problems/files/tiger.pomdp", "--horizon", "4", "--tasks", "3", "--demos", "2"]
    assert main([*tiger, "--policy", "random", "--policy", "qmdp", "--policy", "bc", "--json"]) == 0
    random, qmdp, bc = json.loads(capsys.readouterr().out)
    assert (random["suite"], random["horizon"], random["split"]) == ("pomdp", 4, None)
    assert random["gap"] == pytest.approx(1) and qmdp["ci"] == pytest.approx([qmdp["gap"]] * 2) and 0 < qmdp["gap"] < 0.5
    assert bc["n"] == 3


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            "prostate --horizon 8",
            r"horizon must be short enough that all histories fit in 2 GiB; they need 606,291",
        ),
        ("nothing", "PROBLEM must be one of mdp, pomdp, apomdp, prostate, a .pomdp file; got 'nothing'"),
        ("prostate", "horizon must be given for a problem that is not a suite"),
        ("mdp --horizon 5", "horizon of the suite mdp must be one of 4, 8, 16; got 5"),
        ("mdp --alpha 0.5", "discount and alpha must be left out for a suite"),
        ("mdp --episodes 0", "episodes must be"),
        ("mdp --tasks 0", "tasks must be"),
        ("mdp --template readable", "template must be left out without a language model; got 'readable'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_printed(capsys, arguments, said):
    assert main(["eval", *arguments.split(), "--policy", "bc"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(said, err)


def test_the_command_prints_a_table_or_json_and_keeps_what_it_found(tmp_path, capsys):
    arguments = [
        "eval",
        "pomdp",
        "--horizon",
        "4",
        "--tasks",
        "3",
        "--demos",
        "2",
        "--policy",
        "bc",
        "--policy",
        "qmdp",
    ]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in printed] == ["bc", "qmdp"] and all("gaps" not in row for row in printed)
    assert main([*arguments, "--out", str(tmp_path / "found")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "pomdp, horizon 4, id; 3 tasks, 2 demonstrations each" and out[2].startswith("bc  ")
    kept = json.loads((tmp_path / "found" / "eval.json").read_text())["rows"]
    assert [{k: v for k, v in row.items() if k not in ("gaps", "decisions_per_s")} for row in kept] == [
        {k: v for k, v in row.items() if k != "decisions_per_s"} for row in printed
    ]
