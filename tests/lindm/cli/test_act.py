"""`lindm act`: one decision on the command line; and every wrong input is named."""
# of a POMDP the solution has vectors
# pyright: reportAttributeAccessIssue=false

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lindm as ld
from lindm.cli.main import main
from lindm.datasets import Dataset
from lindm.evaluation.environments import double_precision
from lindm.evaluation.policy import Observation
from lindm.families.registry import NamedProblem
from lindm.io import files
from lindm.llm.named_policies import text_notes, training_notes
from lindm.llm.sft import trainer
from lindm.llm.sft.options import SFTConfig
from tests.lindm.llm.conftest import SUITE

TIGER = "tests/lindm/problems/files/tiger.pomdp"
ORACLE = ["act", "oracle", TIGER, "--horizon", "3"]


def asked(capsys, *words):
    """The answer to one question as JSON."""
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    """The exit code and the message of an error."""
    code = main(list(words))
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lindm: error: ") and err.count("\n") == 1
    return code, err.removeprefix("lindm: error: ").strip()


# --- policies and problems ---------------------------------------------------------------------------------------------------


def test_an_answer_has_the_action_its_probability_the_values_and_the_belief(capsys):
    found = asked(capsys, *ORACLE, "--history", "listen hear-left")
    assert found["action"] == "listen" and found["stage"] == 1
    assert found["probabilities"] == {"listen": 1.0, "open-left": 0.0, "open-right": 0.0}
    np.testing.assert_allclose(list(found["belief"].values()), [0.85, 0.15], rtol=1e-12)
    # two decisions are left, discounted from the start: listen again, or open and then listen once more
    wanted = {"open-left": 0.95 * (-100 * 0.85 + 10 * 0.15) - 0.9025, "open-right": 0.95 * (10 * 0.85 - 100 * 0.15) - 0.9025}
    for action, value in wanted.items():
        assert found["Q"][action] == pytest.approx(value, rel=1e-12)


def test_the_page_has_the_same_numbers(capsys):
    assert main([*ORACLE, "--history", "listen hear-left"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["next action  listen", "belief       left 0.8500, right 0.1500", "action      probability  Q"]
    assert [row.split()[:2] for row in out[3:]] == [["listen", "1.0000"], ["open-left", "0.0000"], ["open-right", "0.0000"]]


def test_saved_solutions_are_policies(capsys, tmp_path):
    problem = ld.read_pomdp(TIGER, horizon=3)
    ld.solve(problem).save(tmp_path / "tiger.npz")
    history = ["--history", "listen hear-left"]
    assert asked(capsys, "act", str(tmp_path / "tiger.npz"), *history) == asked(capsys, *ORACLE, *history)
    solution = ld.solve_stationary(ld.read_stationary_pomdp(TIGER), tolerance="1%")
    solution.save(tmp_path / "tiger.alpha")
    found = asked(capsys, "act", str(tmp_path / "tiger.alpha"), TIGER, *history)
    belief = np.array([0.85, 0.15])
    assert found["action"] == problem.actions[solution.act(belief)] and "upper" not in found and "Q" not in found
    assert max(found["lower"].values()) >= (solution.vectors @ belief).max() - 1e-9


def test_saved_graphs_and_tables_are_followed(capsys, tmp_path):
    tiger = ld.read_stationary_pomdp(TIGER)
    graph, alpha = str(tmp_path / "tiger.json"), str(tmp_path / "tiger.alpha")
    solution = ld.solve_stationary(tiger, tolerance=1e-6)
    solution.save(graph)
    solution.save(alpha)
    heard = ["", "listen hear-left", "listen hear-left listen hear-left", "listen hear-right listen hear-right"]
    heard.append(f"{heard[2]} open-right hear-left listen hear-right")
    for history in heard:
        wanted = asked(capsys, "act", alpha, TIGER, "--history", history)
        assert asked(capsys, "act", graph, "--history", history)["action"] == wanted["action"]
        assert asked(capsys, "act", graph, TIGER, "--history", history)["belief"] == wanted["belief"]
    code, said = refused(capsys, "act", graph, "--history", "open-left hear-left")
    assert code == 2 and "step 1: a policy graph goes on after its own action alone, 'listen'; got 'open-left'" in said
    sure = "listen hear-left listen hear-left listen hear-left"  # the graph opens a door before the third one
    for left in ("open-left hear-left", "open-right hear-left listen hear-left listen hear-left", sure):
        found, wanted = (asked(capsys, "act", policy, TIGER, "--history", left) for policy in (graph, alpha))
        assert found["action"] == wanted["action"] and found["lower"] == pytest.approx(wanted["lower"], abs=1e-5)
    code, said = refused(capsys, "act", graph, "tests/lindm/problems/files/4x3.pomdp", "--history", "")
    assert code == 2 and "problem must have the states of" in said
    forest = "tests/lindm/problems/files/forest.pomdp"
    for horizon, history in (("inf", "{0}"), ("2", "{0}")):
        table = str(tmp_path / f"forest-{horizon}.json")
        found = ld.solve_stationary(ld.read_stationary_pomdp(forest), float(horizon))
        found.save(table)
        for state in found.problem.states or map(str, range(found.problem.num_states)):
            got = asked(capsys, "act", table, "--history", history.format(state))["action"]
            assert got == found.act(state if found.problem.states else int(state))


def test_policies_of_a_finite_horizon_earn_their_value_over_all_histories(capsys, tmp_path):
    """Every kind of file that `solve` saves is read back, and asked for a whole policy: it earns what was printed."""
    for horizon, path in (("4", tmp_path / "stages.json"), ("1000", tmp_path / "far.json"), ("inf", tmp_path / "inf.json")):
        assert main(["solve", TIGER, "--horizon", horizon, "--tolerance", "1e-6", "--json", "--save", str(path)]) == 0
        printed, problem = json.loads(capsys.readouterr().out)["graph_value"], ld.read_stationary_pomdp(TIGER)
        policy = ld.load_saved_policy(path, problem)
        stages = 4 if horizon == "4" else 3

        def value(weights, steps, stages=stages, policy=policy, problem=problem, ends=horizon == "4"):
            """What the policy earns from a history on, weighted by its probability; at the end, what its node says."""
            if len(steps) == stages:
                if ends:
                    return 0.0
                return float(policy.values[follow(policy, steps)[0][0]] @ weights)
            a = problem.actions.index(policy.act((), steps).action)
            total = float(weights @ problem.r[:, a])
            for o in range(2):
                after = ((weights @ problem.P[a].toarray())[:, None] * problem.O[a].toarray())[:, o]
                total += 0.95 * value(after, [*steps, {"action": a, "observation": o}])
            return total

        if horizon != "1000":  # its values are those of 1000 stages
            assert value(problem.rho, []) == pytest.approx(printed, abs=1e-6)
        decision = policy.act((), "listen hear-left")
        assert (decision.lower is None) == (horizon == "1000")
    stages = ld.load_saved_policy(tmp_path / "stages.json")
    with pytest.raises(ValueError, match="at most 3 steps before the next action, since the horizon is 4; got 4"):
        stages.act((), "listen hear-left " * 4)
    result = ld.evaluate(ld.read_pomdp(TIGER, horizon=4), {"graph": stages, "alpha": policy}, tasks=1, demos=1)
    assert result["graph"].gap == pytest.approx(0, abs=1e-9) and result["graph"].method == "exact"
    with pytest.raises(ValueError, match="a policy graph of 4 stages makes no decision after 4 steps"):
        ld.evaluate(ld.read_pomdp(TIGER, horizon=5), {"graph": stages}, tasks=1, demos=1)


def follow(policy, steps) -> Any:
    """The state of a policy graph after a history."""
    state, zero = policy.init([]), np.zeros(1, int)
    for t in range(len(steps) + 1):
        given = {k: np.array([v]) for k, v in (steps[t - 1] if t else {}).items()}
        state, _ = policy.step(state, Observation(stage=t, task=zero, parent=zero, **given))
    return state


@pytest.mark.parametrize("name", ["tree", "hsvi", "net", "mdp"])
def test_every_kind_of_solution_in_a_file_acts_as_in_memory(tmp_path, name):
    family = {"net": "dosing", "mdp": "mdp"}.get(name)
    problem = ld.make(family, horizon=3) if family else ld.read_pomdp(TIGER, horizon=3)
    solution = ld.solve(problem, "auto" if name == "mdp" else name, **({"effort": 40} if name in ("hsvi", "net") else {}))
    solution.save(tmp_path / "s.npz")
    history = "0 1 2" if name == "mdp" else [{"action": 0, "model": 1, "observation": 0}] if name == "net" else "listen hear-left"
    one, other = (policy.act((), history) for policy in (solution.policy, ld.load_solution(tmp_path / "s.npz").policy))
    assert one.action == other.action and one.stage == other.stage == 1
    np.testing.assert_array_equal(one.lower, other.lower)
    np.testing.assert_array_equal(one.upper, other.upper)


def test_a_policy_of_another_problem_is_refused_or_its_bounds_are_those_of_this_one(capsys, tmp_path):
    text = Path(TIGER).read_text()
    changed = tmp_path / "changed.pomdp"
    changed.write_text(text.replace("discount: 0.95", "discount: 0.9"))
    solution = ld.solve_stationary(ld.read_stationary_pomdp(TIGER), tolerance=1e-6)
    graph, alpha = tmp_path / "p.json", tmp_path / "p.alpha"
    solution.save(graph)
    solution.save(alpha)
    code, said = refused(capsys, "act", str(graph), str(changed), "--history", "")
    assert code == 2 and said == f"problem must be the one for which {graph} was made; these parts differ: discount"
    assert main(["act", str(alpha), str(changed), "--history", "", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    best = ld.solve_stationary(ld.read_stationary_pomdp(changed), tolerance=1e-6)
    assert max(found["lower"].values()) <= best.upper + 1e-9 < (solution.vectors @ [0.5, 0.5]).max()
    assert "they are of another problem or discount" in err and found["notes"][0] in err
    assert "notes" not in asked(capsys, "act", str(alpha), TIGER, "--history", "")
    forest = "tests/lindm/problems/files/forest.pomdp"
    ld.solve_stationary(ld.read_stationary_pomdp(forest)).save(tmp_path / "forest.json")
    assert main(["act", str(tmp_path / "forest.json"), forest, "--history", "0"]) == 0
    capsys.readouterr()
    code, said = refused(capsys, "act", str(tmp_path / "forest.json"), forest, "--discount", "0.5", "--history", "0")
    assert code == 2 and "these parts differ: discount" in said


def test_a_node_that_leads_to_an_action_that_is_not_legal_bounds_nothing(tmp_path):
    """In a file the value of such a state is null: it is no 0, which would be above what the other node earns."""
    tiger = ld.read_stationary_pomdp(TIGER)
    ld.solve_stationary(tiger, tolerance=1e-6).save(tmp_path / "p.json")
    content = {k: v for k, v in json.loads((tmp_path / "p.json").read_text()).items() if k not in ("checksum", "format")}
    nodes = [node | {"values": [None, None] if i else [-20.0, -20.0]} for i, node in enumerate(content["nodes"])]
    files.write_json(tmp_path / "q.json", content | {"nodes": nodes}, format="lindm-policy-1")
    decision = ld.load_saved_policy(tmp_path / "q.json", tiger).act((), "")
    np.testing.assert_allclose(decision.lower, np.array([0.5, 0.5]) @ tiger.r + 0.95 * -20, rtol=1e-12)


def test_an_unseen_observation_is_noted_where_demonstrations_are_copied(capsys, tmp_path):
    rows = ["episode,step,action,observation", "a,0,listen,hear-left", "a,1,open-right,hear-left", "a,2,listen,hear-left"]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    words = ["act", "bc", TIGER, "--horizon", "3", "--demonstrations", str(tmp_path / "log.csv"), "--history"]
    assert "notes" not in asked(capsys, *words, "listen hear-left")
    found = asked(capsys, *words, "listen hear-right")
    assert found["action"] == "listen" and "no demonstration has this last observation" in found["notes"][0]
    assert main([*words, "listen hear-right"]) == 0
    assert f"note         {found['notes'][0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"nodes": []}, "not a policy of `lindm solve --save`"),
        ({"nodes": [{"action": "jump", "next": {}}]}, "not a policy of `lindm solve --save`"),
        ({"nodes": [{"action": "listen", "next": {"hear-left": 7}}]}, "an edge to node 7"),
        ({"nodes": [{"action": "listen", "next": {"hear-left": 0}, "values": [1, 2]}]}, "must be 1 finite numbers"),
        ({"states": None}, "not a policy of `lindm solve --save`"),
        ({"format": "lindm-policy-0"}, "must have the format 'lindm-policy-1'"),
    ],
)
def test_a_damaged_policy_file_is_refused(capsys, tmp_path, change, message):
    content = {"horizon": None, "states": ["a"], "actions": ["listen"], "observations": ["hear-left"]}
    content |= {"nodes": [{"action": "listen", "next": {"hear-left": 0}, "values": [-20.0]}]} | change
    files.write_json(tmp_path / "p.json", content, format=content.pop("format", "lindm-policy-1"))
    code, said = refused(capsys, "act", str(tmp_path / "p.json"), "--history", "")
    assert code == 3 and message in said
    (tmp_path / "p.json").write_text((tmp_path / "p.json").read_text().replace("hear", "hera"))
    assert refused(capsys, "act", str(tmp_path / "p.json"), "--history", "")[0] == 3


def test_a_dataset_gives_the_problem_the_names_and_the_demonstrations(capsys, micro):
    task = Dataset(micro.mdp).load()[1]
    steps = [step for episode in task.demonstrations for step in episode.steps()]
    for s in range(task.num_states):
        found = asked(capsys, "act", "bc", str(micro.mdp), "--task", "1", "--history", str(s))
        counts = np.bincount([x.action for x in steps if x.state == s] or [x.action for x in steps], minlength=task.num_actions)
        assert found["action"] == int(counts.argmax())
    assert "Q" in asked(capsys, "act", "lsvi", str(micro.mdp), "--history", "0")


def test_policies_of_the_posterior_know_the_law_of_a_dataset(capsys, tmp_path):
    sizes = ["--states", "2", "--actions", "2", "--horizon", "2"]
    assert main(["data", "make", "mdp", *sizes, "--tasks", "1", "--demos", "2", "--out", str(tmp_path / "data")]) == 0
    capsys.readouterr()
    for policy in ("bayes", "bayes-demo", "thompson"):
        assert len(asked(capsys, "act", policy, str(tmp_path / "data"), "--history", "0")["Q"]) == 2
    assert "source must be a family" in refused(capsys, "act", "bayes", TIGER, "--horizon", "3", "--history", "")[1]


def test_demonstrations_of_ones_own_take_the_place_of_those_of_a_dataset(capsys, micro, tmp_path):
    for action in (0, 1):
        rows = [f"{e},{t},{s},{action},0.5" for e in range(2) for t, s in enumerate((0, 1, 0))]
        (tmp_path / "mine.csv").write_text("\n".join(["episode,step,state,action,reward", *rows]))
        mine = ["--demonstrations", str(tmp_path / "mine.csv"), "--history", "0"]
        assert asked(capsys, "act", "bc", str(micro.mdp), *mine)["action"] == action


@pytest.fixture(scope="module")
def run(micro, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    trainer.train(SFTConfig(model=micro.model, data=micro.mdp, out=out, steps=1, eval_tasks=0))
    return out


def test_a_language_model_gives_the_probability_of_every_action(capsys, micro, run):
    task = Dataset(micro.mdp).load()[0]
    demonstrations = [episode.steps(("state", "reward")) for episode in task.demonstrations]
    words = ["act", f"sft:{run}", str(micro.mdp), "--history", "0 1 0"]
    warm, hot = asked(capsys, *words), asked(capsys, *words, "--temperature", "2")
    problem = task.problem()
    p = ld.load_policy(run, temperature=1.0).act(demonstrations, "0 1 0", problem).probabilities
    np.testing.assert_allclose(list(warm["probabilities"].values()), p, rtol=1e-6)
    root = np.sqrt(p) / np.sqrt(p).sum()
    np.testing.assert_allclose(list(hot["probabilities"].values()), root, rtol=1e-5)
    assert warm["action"] == int(p.argmax()) and isinstance(warm["invalid"], bool) and p.min() > 0


def test_a_run_knows_its_own_names_and_sizes_and_warns_where_it_has_no_demonstrations(capsys, run):
    assert main(["act", f"sft:{run}", "--history", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert set(json.loads(out)["probabilities"]) == {"0", "1"}
    assert "warning: the model was trained with 2 demonstrations of each task, and is asked without any" in err
    assert main(["act", f"sft:{run}", "--history", "7"]) == 2
    assert "history: step 1: state must be one of 0, 1" in capsys.readouterr().err


def test_a_run_that_is_asked_about_another_problem_says_in_what_it_differs(capsys, micro, run, tmp_path):
    """The same tasks and another seed of the same suite raise no note; other sizes, names, rules and a fixed problem do."""
    assert "notes" not in asked(capsys, "act", f"sft:{run}", str(micro.mdp), "--history", "0")
    suite = dataclasses.replace(SUITE, split="ood")
    trained = Dataset(micro.mdp)
    assert training_notes("sft:x", trained, suite) == [] == training_notes("sft:x", None, suite)
    wanted = {
        "horizon 3, here 4": dataclasses.replace(SUITE, horizon=4),
        "concentration 0.5, here 2.0": dataclasses.replace(SUITE, concentration=2.0),
        "the suite small, here one problem": NamedProblem(problem=trained.problems()[0]),
        "states without names, here a b c": NamedProblem(problem=trained.problems()[0], states=("a", "b", "c")),
        "num_states 3, here 2": Dataset(micro.hidden),
    }
    for words, source in wanted.items():
        (note,) = training_notes("sft:x", trained, source)
        assert note.startswith(f"sft:x was trained on another problem ({micro.mdp}): ") and words in note
    hidden = Dataset(micro.hidden)
    with double_precision():
        same, other = hidden.problems()[0], hidden.problems()[0]
        assert training_notes("sft:x", hidden, same) == []
        other = dataclasses.replace(other, r=other.r + 0.5)
    assert "one problem, here another one, with other numbers" in training_notes("sft:x", hidden, other)[0]
    (note,) = text_notes(f"sft:{run}", "readable", "auto")
    assert note == f"sft:{run} was trained on other texts: template of lindm sft, here readable"
    assert text_notes(f"sft:{run}", None, None) == [] != text_notes(f"sft:{run}", None, "hidden")
    words = ["act", f"sft:{run}", "mdp", "--states", "3", "--actions", "2", "--horizon", "3", "--history", "0", "--json"]
    mine = tmp_path / "mine.csv"
    mine.write_text("episode,step,state,action,reward\na,0,0,1,0.5\n")
    assert main([*words, "--demonstrations", str(mine)]) == 0
    out, err = capsys.readouterr()
    (note,) = json.loads(out)["notes"]
    assert "was trained on another problem" in note and err == f"lindm: warning: {note}\n"


def test_a_context_that_is_too_long_is_refused(capsys, micro, run, tmp_path):
    rows = [f"{e},{t},0,1,0.125" for e in range(40) for t in range(3)]
    (tmp_path / "long.csv").write_text("\n".join(["episode,step,state,action,reward", *rows]))
    words = ["act", f"sft:{run}", str(micro.mdp), "--demonstrations", str(tmp_path / "long.csv"), "--history", "0"]
    code, message = refused(capsys, *words)
    assert code == 3 and "texts must have at most the 256 tokens of the model; the longest has about" in message


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, code, message",
    [
        ("oracl TIGER --horizon 3", 2, "got 'oracl'; did you mean oracle?"),
        ("oracle TIGER", 2, "horizon must be given for a .pomdp file"),
        ("oracle", 2, "PROBLEM must be given for the policy 'oracle', which computes from it"),
        ("oracle nowhere --horizon 3", 2, "PROBLEM must be one of mdp, pomdp"),
        ("TIGER", 2, "POLICY must be given before PROBLEM, such as oracle or sft:RUN; got 'tests/lindm"),
        (
            "maintenance",
            2,
            "POLICY must be given before PROBLEM, such as oracle or sft:RUN; got 'maintenance', which is a problem",
        ),
        (
            "policy.svg TIGER",
            2,
            "POLICY must be a name or a saved policy (.json, .alpha, .policy, .npz); policy.svg is a picture",
        ),
        ("tests TIGER", 2, "POLICY must be a name or a saved policy; tests is a directory: a run of `lindm sft` is sft:DIR"),
        ("bc tests", 2, "PROBLEM must be a .pomdp file or a family; tests is a directory, and there is no dataset in it"),
        ("lsvi TIGER --horizon 3", 2, "for a POMDP; got 'lsvi'"),
        ("oracle TIGER --horizon 3 --task 1", 2, "--task needs a directory of `lindm data make` as PROBLEM; got 1"),
        ("oracle TIGER --horizon 3 --temperature 2", 2, "--temperature is an option of language models; got 2.0"),
        ("sft:nowhere TIGER --horizon 3", 3, "policy sft:nowhere: nowhere holds no run of `lindm sft`"),
        ("nowhere.npz", 3, "cannot read nowhere.npz"),
        ("nowhere.alpha TIGER", 3, "cannot read nowhere.alpha"),
        ("nowhere.npz TIGER", 2, "PROBLEM must be left out: nowhere.npz has its own"),
        ("nowhere.alpha TIGER --horizon 3", 2, "--horizon does not apply to the solution nowhere.alpha; got 3"),
        ("bc TIGER --horizon 3", 2, "demonstrations must be given: this policy learns from them; got none"),
        ("bc TIGER --horizon 3 --demonstrations none.csv", 3, "cannot read none.csv"),
        ("oracle TIGER --horizon 3 --history listen", 2, "history must repeat 'action observation'; got 1 word"),
    ],
)
def test_wrong_words_raise_an_error_of_one_line(capsys, words, code, message):
    given = words.replace("TIGER", TIGER).split()
    found, said = refused(capsys, "act", *given, *([] if "--history" in given else ["--history", ""]))
    assert found == code and message in said


def test_a_directory_with_the_name_of_a_policy_does_not_hide_it(capsys, tmp_path, monkeypatch):
    tiger = Path(TIGER).resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "oracle").mkdir()
    assert asked(capsys, "act", "oracle", str(tiger), "--horizon", "2", "--history", "")["action"] == "listen"


def test_demonstrations_longer_than_the_horizon_are_refused_with_their_line(capsys, tmp_path):
    rows = ["episode,step,action,observation", *(f"a,{t},listen,hear-left" for t in range(4))]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    mine = ["--demonstrations", str(tmp_path / "log.csv"), "--history", ""]
    code, said = refused(capsys, "act", "bc", TIGER, "--horizon", "3", *mine)
    assert code == 3 and said == f"{tmp_path}/log.csv:2: an episode must have at most 3 steps, the horizon; got 4"
