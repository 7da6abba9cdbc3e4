"""`lindm eval`: results of policies on the same tasks, what each problem costs, and what is refused."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.core import Tracer

import lindm as ld
from lindm.cli.main import main
from lindm.datasets import Dataset, DatasetConfig, make_dataset
from lindm.errors import UsageError
from lindm.evaluation import environments
from lindm.evaluation.compare import evaluate, read_tasks
from lindm.evaluation.policies.registry import POLICIES, default_policies, kind_of
from lindm.families.random_suites import RandomSuite, draw_task
from tests.lindm.llm.conftest import SUITE

FILES = Path(__file__).parents[1] / "problems" / "files"

DATASET = DatasetConfig(tasks=3, demos=2, seed=11)
POMDP = RandomSuite(name="hidden", horizon=3, states=3, actions=2, observations=2, concentration=0.5, quality=0.8)


@pytest.mark.parametrize("suite", [SUITE, POMDP], ids=["mdp", "pomdp"])
def test_each_problem_is_solved_once_for_all_policies(suite, monkeypatch):
    """`layer` and certainty equivalence solve others, of the training tasks and the estimated ones."""
    module, name = (environments.dp, "backward_induction") if suite.observations == 0 else (environments.tree, "tree")
    solve, solved = getattr(module, name), []

    def counting(problem):
        if not isinstance(problem.rho if suite.observations == 0 else problem.alpha, Tracer):
            solved.append(problem)
        return solve(problem)

    monkeypatch.setattr(module, name, counting)
    names = [n for n, info in POLICIES.items() if kind_of(suite) in info.kinds and n not in ("layer", "certainty-equivalence")]
    results = evaluate(suite, names, dataset=DATASET)
    assert len(results) == len(names) and len(solved) == DATASET.tasks


@pytest.mark.parametrize("suite", [SUITE, POMDP], ids=["mdp", "pomdp"])
def test_results_are_those_of_double_precision_whatever_the_precision_is(suite):
    names = default_policies(suite)
    wanted = evaluate(suite, names, dataset=DATASET)
    with jax.enable_x64(False):
        single_precision = evaluate(suite, names, dataset=DATASET)
    assert [result.gaps for result in single_precision] == [result.gaps for result in wanted]


def test_one_problem_is_solved_once_for_all_tasks(tmp_path):
    problem = draw_task(jax.random.key(0), POMDP)
    make_dataset(tmp_path, problem, DATASET)
    tasks = read_tasks(Dataset(tmp_path))
    assert len({id(task.environment) for task in tasks}) == 1 and len({str(task.demonstrations) for task in tasks}) > 1


def test_without_names_the_cheap_policies_are_evaluated():
    results = evaluate(POMDP, dataset=DATASET)
    assert tuple(result.policy for result in results) == default_policies(POMDP)
    assert [result.policy for result in results if result.method != "exact"] == []


def test_a_function_and_an_object_with_init_and_step_are_policies():
    class Second:
        def init(self, tasks):
            return 0

        def step(self, state, observation):
            probabilities = [[0.0, 1.0]] * len(observation.task)
            return state + 1, probabilities

    mine = {"function": lambda demonstrations, history: 1, "object": Second()}
    function, second = evaluate(POMDP, mine, dataset=DATASET)
    assert function.gaps == second.gaps and (function.gap or 0) > 0 and function.invalid is None
    with pytest.raises(TypeError, match="policy must have init and step, or be a function"):
        evaluate(POMDP, {"mine": 3}, dataset=DATASET)


def test_a_policy_that_these_tasks_do_not_have_is_refused_before_they_are_made(tmp_path):
    with pytest.raises(ValueError, match="for an MDP; got 'qmdp'"):
        evaluate(SUITE, ["oracle", "qmdp"], dataset=DATASET, data=tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "names, code, said",
    [
        (["clever"], 2, "policy must be one of oracle, random, .*base:MODELDIR, sft:RUNDIR for an MDP; got 'clever'"),
        (["bc", "oracle", "bc"], 2, "policy must be given once; got 'bc' twice"),
        (["llm:models/x"], 2, "policy must be base:MODELDIR, sft:RUNDIR or alpha:FILE where it has a colon; got 'llm:models/x'"),
        (["base:"], 2, "where it has a colon; got 'base:'"),
        (["base:nowhere"], 3, "policy base:nowhere: nowhere does not exist"),
        (["sft:nowhere"], 3, "policy sft:nowhere: nowhere holds no run of `lindm sft`"),
        (["qmdp"], 2, "policy must be one of oracle, .* for an MDP; got 'qmdp'"),
    ],
)
def test_unknown_policies_raise_an_error_of_one_line(capsys, names, code, said):
    arguments = [word for name in names for word in ("--policy", name)]
    assert main(["eval", "mdp", "--horizon", "4", "--tasks", "1", "--demos", "1", *arguments]) == code
    assert re.search(said, capsys.readouterr().err)


def test_a_problem_of_ones_own_is_one_problem_with_many_demonstrations(capsys):
    tiger = ["eval", "tests/lindm/problems/files/tiger.pomdp", "--horizon", "4", "--tasks", "3", "--demos", "2"]
    tiger += ["--behavior", "uniform"]
    assert main([*tiger, "--policy", "random", "--policy", "qmdp", "--policy", "bc", "--json"]) == 0
    random, qmdp, bc = json.loads(capsys.readouterr().out)
    assert (random["suite"], random["horizon"], random["split"]) == ("pomdp", 4, None)
    assert random["gap"] == pytest.approx(1) and 0 < qmdp["gap"] < 0.5
    assert qmdp["ci"] is None and qmdp["interval_over"] is None  # it does not look at the demonstrations: nothing varies
    assert bc["n"] == 3 and bc["interval_over"] == "demonstrations" and bc["ci"][0] < bc["gap"] < bc["ci"][1]
    assert bc["suboptimality"] == pytest.approx(bc["optimal_lower"] - bc["value"])
    assert bc["gap"] == pytest.approx(bc["suboptimality"] / (bc["optimal_lower"] - bc["uniform_value"]))


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("nothing", "PROBLEM must be one of mdp, pomdp, .*, a .pomdp file; got 'nothing'"),
        ("prostate --states 3", "an option of prostate must be one of horizon, .*; got 'states'"),
        ("mdp --horizon 0", "horizon must be a whole number of at least 1; got 0"),
        ("mdp --alpha 0.5", "an option of mdp must be one of horizon, .*; got 'alpha'"),
        ("mdp --episodes 0", "episodes must be"),
        ("mdp --effort 0", "effort must be"),
        ("mdp --tasks 0", "tasks must be"),
        ("mdp --template readable", "template must be left out without a language model; got 'readable'"),
    ],
)
def test_invalid_policies_raise_an_error_before_the_first_result(capsys, arguments, said):
    assert main(["eval", *arguments.split(), "--policy", "bc"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(said, err)


ZERO = """discount: 0.9
values: reward
states: wet dry
actions: wait look
observations: drip quiet
start: uniform
T: * identity
O: *
0.8 0.2
0.3 0.7
R: * : * : * : * {}
"""


@pytest.mark.parametrize("reward, share", [(0, None), (1, 0)])
def test_a_problem_that_every_policy_solves_has_rows_without_a_gap_and_a_note(tmp_path, capsys, reward, share):
    (tmp_path / "same.pomdp").write_text(ZERO.format(reward))
    words = ["eval", str(tmp_path / "same.pomdp"), "--horizon", "3", "--tasks", "2", "--policy", "bc"]
    assert main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["gap"], row["ci"], row["gap_of_value"]) == (None, None, share) and row["suboptimality"] == 0
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "V* = V^random in every task: there the normalized gap is undefined"
    assert lines[3].split()[:4] == ["bc", "-", "-", "0"]


def test_a_problem_beyond_the_tree_has_bounds_and_says_so(tmp_path, capsys):
    tiger = ["eval", "tests/lindm/problems/files/tiger.pomdp", "--horizon", "14", "--tasks", "2", "--demos", "1", "--effort", "4"]
    assert main([*tiger, "--policy", "qmdp", "--episodes", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"V\* between \S+ and \S+ \(certified\), V\^random = -310\.811", lines[1]) and " bounds " in lines[3]
    assert lines[-3:] == [
        "intervals: over demonstrations and episodes",
        "an interval that begins at 0 was cut there: no gap is below 0",
        "gaps: the middle of their range over the bounds of V*; the intervals hold for every V* between them",
    ]


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
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "pomdp, horizon 4, id; 3 tasks, 2 demonstrations each" and out[3].startswith("bc  ")
    assert re.fullmatch(r"V\* = \d.*, V\^random = \d.*, means over tasks", out[1])
    assert out[-2:] == ["intervals: over tasks", "an interval that begins at 0 was cut there: no gap is below 0"]
    kept = json.loads((tmp_path / "out" / "eval.json").read_text())["rows"]
    assert [{k: v for k, v in row.items() if k not in ("gaps", "decisions_per_s")} for row in kept] == [
        {k: v for k, v in row.items() if k != "decisions_per_s"} for row in printed
    ]


def test_differences_are_to_the_first_policy_and_probabilities_are_scored():
    bc, random, behavior = evaluate(POMDP, ["bc", "random", "behavior"], dataset=dataclasses.replace(DATASET, behavior="epsilon"))
    assert bc.difference is None and random.difference.baseline == "bc" and random.difference.n == 3
    assert random.difference.gap == pytest.approx(np.mean(np.subtract(random.gaps, bc.gaps)), rel=1e-12)
    assert random.value is not None and bc.value is not None and bc.action_agreement is not None
    assert random.difference.value == pytest.approx(random.value - bc.value, rel=1e-9)
    # behavior takes the oracle's action, but with probability 0.2 one of both at random
    assert behavior.calibration.scores.log_loss == pytest.approx(-math.log(0.9), rel=1e-9)
    assert behavior.calibration.scores.brier == pytest.approx(2 * 0.1**2, rel=1e-9)
    assert behavior.calibration.scores.calibration_error == pytest.approx(0.1, rel=1e-9)
    assert random.calibration.scores.log_loss == pytest.approx(math.log(2), rel=1e-9)
    assert bc.calibration.deterministic and bc.calibration.scores.brier == pytest.approx(2 * (1 - bc.action_agreement))


def test_the_command_shows_differences_and_scores_and_writes_the_figure(tmp_path, capsys):
    arguments = ["eval", "tests/lindm/problems/files/tiger.pomdp", "--horizon", "3", "--tasks", "2", "--demos", "1"]
    names = ["--policy", "bc", "--policy", "behavior", "--behavior", "epsilon"]
    assert main([*arguments, *names, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^difference from bc +normalized gap +95 %", out, re.MULTILINE)
    assert re.search(r"^probabilities of optimal actions +log-loss .*\nbehavior +0\.1431 ", out, re.MULTILINE)
    assert sorted(path.name for path in (tmp_path / "out").glob("calibration.*")) == [
        "calibration.pdf",
        "calibration.png",
        "calibration.svg",
    ]
    (checked,) = ld.check(tmp_path / "out")
    assert checked.problems == []
    (tmp_path / "out" / "calibration.png").write_bytes(b"damaged")
    (checked,) = ld.check(tmp_path / "out")
    assert "calibration.png" in checked.problems[0].what
    assert main([*arguments, "--policy", "oracle", "--policy", "qmdp", "--out", str(tmp_path / "two")]) == 0
    out = capsys.readouterr().out
    assert "less" not in out and "log-loss" not in out and not list((tmp_path / "two").glob("calibration.*"))


def test_what_another_command_wrote_and_another_evaluation_are_not_replaced(tmp_path):
    """Neither the data that a model was trained on nor the results of other policies."""
    tiger = ld.read_pomdp(FILES / "tiger.pomdp", horizon=2)
    ld.make_dataset(tiger, tmp_path / "data", tasks=2, demos=1)
    ld.evaluate(tiger, ["qmdp"], tasks=2, demos=1, out=tmp_path / "first")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(
        UsageError, match=r"data holds manifest.json but no eval.json: it is not an evaluation; choose another --out"
    ):
        ld.evaluate(tiger, ["qmdp"], tasks=2, demos=1, out=tmp_path / "data")
    with pytest.raises(
        UsageError, match=r"first holds another evaluation: policies was \['qmdp'\] and is now \['random'\]; choose"
    ):
        ld.evaluate(tiger, ["random"], tasks=2, demos=1, out=tmp_path / "first")
    with pytest.raises(UsageError, match=r"data holds manifest.json but no index.html: it is not a report"):
        ld.report([tmp_path / "first"], tmp_path / "data")
    with pytest.raises(UsageError, match=r"data holds manifest.json but no verdicts.json: it is not a verification"):
        ld.verify("smoke", tmp_path / "data", only=["controls/leak"])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert ld.evaluate(tiger, ["qmdp"], tasks=2, demos=1, out=tmp_path / "first")["qmdp"].n == 2
