"""`lindm solve` and `lindm data` as users type them: what they print and write, and their errors."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from lindm.cli.main import main

TIGER = Path(__file__).parents[1] / "problems" / "files" / "tiger.pomdp"
FOREST = TIGER.with_name("forest.pomdp")


def test_solve_prints_bounds_of_an_infinite_horizon_and_saves_the_policy(tmp_path, capsys):
    saved = tmp_path / "policy.alpha"
    assert main(["solve", str(TIGER), "--horizon", "inf", "--tolerance", "1e-6", "--save", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert "value         at least 19.371368" in printed and "first action  listen  (certified to be best)" in printed
    assert f"alpha vectors, in {saved}" in printed and saved.read_text().split()[0] in ("0", "1", "2")


def test_solve_prints_the_infinite_horizon_as_null_in_json(capsys):
    assert main(["solve", str(TIGER), "--horizon", "inf", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["horizon"] is None and answer["first_action"] == "listen" and answer["regret"] == 0
    assert answer["value"] == answer["lower"] <= 19.3713691 and answer["upper"] >= 19.3713679
    assert answer["upper"] - answer["lower"] <= 0.001 * answer["upper"]


@pytest.mark.parametrize("method", ["auto", "value-iteration"])
def test_an_mdp_without_an_end_is_solved_and_its_policy_saved(method, tmp_path, capsys):
    saved = tmp_path / "policy.json"
    assert main(["solve", str(FOREST), "--horizon", "inf", "--method", method, "--save", str(saved), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["horizon"] is None and answer["first_action"] == {"young": "wait"} and answer["regret"] == 0
    assert answer["lower"] <= 26.244 <= answer["upper"] <= answer["lower"] + 1e-6 and answer["iterations"] > 0
    assert json.loads(saved.read_text())["policy"] == [0, 0, 0] and main(["check", str(saved)]) == 0
    assert main(["solve", str(FOREST), "--horizon", "inf", "--method", method, "--tolerance", "50"]) == 0
    said = capsys.readouterr().out
    assert "which the policy earns; at most" in said and "an action for each state" in said


def test_solve_point_based_agrees_with_the_tree(capsys):
    assert main(["solve", str(TIGER), "--horizon", "4", "--json"]) == 0
    exact = json.loads(capsys.readouterr().out)["value"]
    assert main(["solve", str(TIGER), "--horizon", "4", "--method", "point-based", "--tolerance", "1e-9", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["lower"], answer["upper"]) == pytest.approx((exact, exact), abs=2e-9) and answer["horizon"] == 4


def test_solve_takes_the_search_where_the_horizon_is_too_long_for_a_tree_and_reads_gz(tmp_path, capsys):
    packed = tmp_path / "tiger.pomdp.gz"
    packed.write_bytes(gzip.compress(TIGER.read_bytes()))
    assert main(["solve", str(packed), "--horizon", "1000", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["method"] == "point-based" and answer["lower"] <= 19.371369 and answer["upper"] >= 19.371368
    assert answer["upper"] - answer["lower"] <= 0.001 * answer["upper"]
    packed.write_bytes(packed.read_bytes()[:-9])
    assert main(["solve", str(packed), "--horizon", "3"]) == 3
    assert f"{packed}: cannot unpack" in capsys.readouterr().err


def test_solve_prints_the_value_its_bounds_and_the_first_action_by_name(capsys):
    assert main(["solve", str(TIGER), "--horizon", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"value", "lower", "upper", "method", "seconds", "first_action"}
    assert abs(answer["value"] - 2.3098) < 1e-6 and answer["lower"] == answer["upper"] == answer["value"]
    assert answer["method"] == "tree" and answer["first_action"] == "listen" and answer["seconds"] > 0
    assert main(["solve", str(TIGER), "--horizon", "3", "--method", "hsvi", "--discount", "1"]) == 0
    said = capsys.readouterr().out
    assert "certified to lie in [" in said and "first action  listen" in said and "hsvi" in said


def test_a_file_without_observations_is_solved_and_labeled_as_an_mdp(tmp_path, capsys):
    V = np.zeros(3)  # of the forest: it burns with probability 0.1, or grows; whoever cuts starts over
    for _ in range(5):
        V = np.maximum([0, 0, 4] + 0.9 * (0.1 * V[0] + 0.9 * V[[1, 2, 2]]), [0, 1, 2] + 0.9 * V[0])
    assert main(["solve", str(FOREST), "--horizon", "5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["first_action"] == {"young": "wait"} and answer["method"] == "backward induction"
    assert abs(answer["value"] - V[0]) < 1e-12
    anywhere = tmp_path / "anywhere.pomdp"
    anywhere.write_text(FOREST.read_text().replace("start: young", "start: uniform"))
    assert main(["solve", str(anywhere), "--horizon", "1"]) == 0
    assert "first action  wait in young, cut in middle, wait in old" in capsys.readouterr().out
    made = tmp_path / "data"
    assert main(["data", "make", str(FOREST), "--horizon", "3", "--tasks", "1", "--demos", "2", "--out", str(made)]) == 0
    episode = json.loads((made / "episodes-00000.jsonl").read_text().splitlines()[0])
    assert episode["state"][0] == 0 and episode["label"][0] == 0 and "observation" not in episode


def test_several_files_are_solved_as_a_cloud(tmp_path, capsys):
    deaf = tmp_path / "deaf.pomdp"
    deaf.write_text(TIGER.read_text().replace("0.85", "0.7").replace("0.15", "0.3"))
    values = []
    for alpha in ("0", "1"):
        assert main(["solve", str(TIGER), str(deaf), "--horizon", "3", "--alpha", alpha, "--json"]) == 0
        values.append(json.loads(capsys.readouterr().out)["value"])
    assert values[0] > values[1]  # in the best case nature's help is worth something


@pytest.mark.fault("F13")
def test_a_bad_file_is_exit_3_with_its_line(tmp_path, capsys):
    bad = tmp_path / "bad.pomdp"
    bad.write_text(TIGER.read_text().replace("0.85", "0.95", 1))
    assert main(["solve", str(bad), "--horizon", "3"]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"lindm: error: {bad}:") and error.count("\n") == 1
    assert main(["solve", str(tmp_path / "none.pomdp"), "--horizon", "3"]) == 3
    assert "none.pomdp" in capsys.readouterr().err


def test_rows_that_nearly_sum_to_one_are_warned_of(tmp_path, capsys):
    near = tmp_path / "near.pomdp"
    near.write_text(TIGER.read_text().replace("0.85", "0.850001", 1))
    assert main(["solve", str(near), "--horizon", "1"]) == 0
    assert capsys.readouterr().err.startswith(f"lindm: warning: {near}:")


def test_a_suite_may_be_written_to_a_directory_of_its_own_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kept in ("1 shard made, 0 kept", "0 shards made, 1 kept"):
        assert main(["data", "make", "mdp", "--horizon", "4", "--tasks", "2", "--demos", "1", "--out", "mdp"]) == 0
        assert kept in capsys.readouterr().out


def test_data_is_made_and_exported_from_the_command_line(tmp_path, capsys):
    out, made = tmp_path / "data", ["data", "make", str(TIGER), "--horizon", "3", "--tasks", "2", "--demos", "2"]
    assert main([*made, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"2 tasks in {out}: 1 shard made, 0 kept\n"
    rows = [json.loads(line) for line in (out / "episodes-00000.jsonl").read_text().splitlines()]
    assert [(r["task"], r["role"]) for r in rows] == [(t, role) for t in (0, 1) for role in ("demo", "demo", "query")]
    assert main([*made, "--out", str(out)]) == 0 and "0 shards made" in capsys.readouterr().out
    assert main([*made, "--out", str(out), "--seed", "5"]) == 2
    assert "seed" in capsys.readouterr().err
    assert main(["data", "export", str(out), "--to", "trl", "--names", "--out", str(tmp_path / "trl")]) == 0
    first = json.loads((tmp_path / "trl" / "prompt_completion.jsonl").read_text().splitlines()[0])
    assert first["completion"] == " listen" and "listen" in first["prompt"]
    assert main(["data", "export", str(out), "--to", "nonsense", "--out", str(tmp_path / "x")]) == 2
    assert "to must be one of trl, minari" in capsys.readouterr().err
    assert main(["data", "export", str(tmp_path / "nothing"), "--to", "trl", "--out", str(tmp_path / "x")]) == 3
