"""Rows of probabilities of other experts beside one file: the models, and errors with their lines."""

import numpy as np
import pytest

import lindm as ld
from lindm.cli.main import main
from lindm.errors import DataError
from lindm.families.registry import load_problem
from lindm.problems.cassandra import parse
from lindm.problems.experts import read_experts
from lindm.types import APOMDP

MACHINE = """discount: 0.9
values: reward
states: good worn
actions: run replace
observations: fine alarm
start: 1 0
T: run
0.8 0.2
0 1
T: replace
1 0
1 0
O: *
0.9 0.1
0.3 0.7
R: run : good : * : * 1
R: run : * : worn : alarm -2
R: replace : * : * : * -1
"""
HEADER = "model,table,action,state,probabilities\n"
ROWS = HEADER + "fragile,T,run,good,0.5 0.5\ndeaf,O,run,*,0.5 0.5\n\nfragile, O ,1,worn,0.333333 0.666666\n"
BASE = parse(MACHINE)


@pytest.fixture
def files(tmp_path):
    machine, rows = tmp_path / "machine.pomdp", tmp_path / "rows.csv"
    machine.write_text(MACHINE)
    rows.write_text(ROWS)
    return str(machine), str(rows)


def test_a_model_has_its_own_rows_and_those_of_the_file(files):
    experts = read_experts(files[1], BASE)
    assert list(experts) == ["fragile", "deaf"]
    fragile, deaf = experts.values()
    np.testing.assert_array_equal(fragile.P, [[[0.5, 0.5], [1, 0]], [[0, 1], [1, 0]]])
    np.testing.assert_allclose(fragile.O, [[[0.9, 0.1], [0.3, 0.7]], [[0.9, 0.1], [1 / 3, 2 / 3]]], atol=1e-6)
    np.testing.assert_allclose(fragile.O.sum(-1), 1, rtol=1e-15)
    np.testing.assert_array_equal(deaf.P, BASE.P)
    np.testing.assert_array_equal(deaf.O, [[[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.3, 0.7]]])
    np.testing.assert_array_equal(BASE.P[0, 0], [0.8, 0.2])  # the file's model is not changed


def test_a_model_expects_the_rewards_of_the_file_under_its_own_probabilities(files):
    fragile, deaf = read_experts(files[1], BASE).values()
    # run in good: 1, but -2 where it leads to worn with an alarm
    np.testing.assert_allclose(BASE.r[:, 0], [0.2 * 0.7 * -2 + (1 - 0.14), 0.7 * -2])
    np.testing.assert_allclose(fragile.r[:, 0], [0.5 * 0.7 * -2 + (1 - 0.35), 0.7 * -2])
    np.testing.assert_allclose(deaf.r[:, 0], [0.2 * 0.5 * -2 + (1 - 0.1), 0.5 * -2])


def test_the_file_and_its_experts_are_the_models_of_an_ambiguous_problem(files):
    machine, rows = files
    source = ld.read_pomdp(machine, horizon=3, alpha=0.6, perturb=rows)
    assert isinstance(source.problem, APOMDP) and source.models == ("machine", "fragile", "deaf")
    wholes = [BASE, *read_experts(rows, BASE).values()]
    np.testing.assert_array_equal(source.problem.models.P[:, 0], [whole.P for whole in wholes])
    np.testing.assert_array_equal(source.problem.models.O[:, 0], [whole.O for whole in wholes])
    np.testing.assert_allclose(source.problem.models.r[:, 1], [0.9 * whole.r for whole in wholes])


def test_commands_take_the_rows(files, capsys, tmp_path):
    machine, rows = files
    problem = [machine, "--horizon", "3", "--alpha", "1", "--perturb", rows]
    assert main(["solve", *problem, "--json"]) == 0
    assert '"method": "tree"' in capsys.readouterr().out
    assert main(["data", "make", *problem, "--tasks", "2", "--demos", "1", "--out", str(tmp_path / "data")]) == 0
    assert main(["eval", machine, "--horizon", "3", "--perturb", rows]) == 2
    assert "alpha must be given for perturb" in capsys.readouterr().err
    assert main(["solve", "maintenance", "--horizon", "3", "--perturb", rows]) == 2
    assert "perturb must be left out for a family" in capsys.readouterr().err
    assert main(["solve", machine, "--horizon", "inf", "--perturb", rows]) == 2
    assert "--horizon inf takes one model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, said",
    [
        ("", ":1: expected the header model,table,action,state,probabilities"),
        ("model;table\n", ":1: expected the header"),
        (HEADER, ":2: expected rows with model, table"),
        (HEADER + "a,T,run,good\n", ":2: expected 5 cells, as the header has; got 4"),
        (HEADER + "a,T,run,good,1 0\nb,R,run,good,1 0\n", ":3: table must be one of T, O; got 'R'"),
        (HEADER + "a,T,runn,good,1 0\n", r":2: action must be one of run, replace, \*; got 'runn'; did you mean run"),
        (HEADER + "a,T,run,2,1 0\n", ":2: state must be one of good, worn"),
        (HEADER + "a,T,run,good,1 0 0\n", ":2: expected 2 probabilities with spaces between them; got 3"),
        (HEADER + "a,T,run,good,1 nan\n", ":2: probabilities must be numbers from 0 to 1; got 'nan'"),
        (HEADER + "a,T,run,good,0.5 0.4\n", r":2: probabilities sum to 0.9; expected one"),
        (HEADER + "a,T,run,*,1 0\na,T,*,worn,1 0\n", ":3: model 'a' has this row of T twice, first on line 2"),
        (HEADER + ",T,run,good,1 0\n", ":2: model must be a name; it is empty"),
        (HEADER + 'a,T,run,good,"1 0\n', ":2: not CSV"),
        (
            HEADER + "".join(f"m{i},T,run,good,1 0\n" for i in range(65)),
            ":66: the file must have at most 64 models; 'm64' is one too many",
        ),
        (HEADER + "machine,T,run,good,1 0\n", ": 'machine' is the name of the file's own model"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(files, text, said, tmp_path):
    path = tmp_path / "wrong.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"wrong\.csv{said}"):
        load_problem([files[0]], 2, alpha=1.0, perturb=path)
