"""Problems from files and names."""

from pathlib import Path

import numpy as np
import pytest

from lindm.errors import DataError, LindmError
from lindm.families.prostate import ACTIONS, CENTERS, prostate
from lindm.families.registry import NamedProblem, load_problem, read_files
from lindm.types import APOMDP, POMDP

COIN = """discount: 0.5
values: reward
states: heads tails
actions: look call
observations: shiny dull
T: * identity
O: look
{p} {q}
{q} {p}
O: call uniform
R: call : heads : * : * 1
"""


@pytest.fixture
def coins(tmp_path):
    paths = []
    for name, p in (("fair", 0.75), ("foggy", 0.5)):
        path = tmp_path / f"{name}.pomdp"
        path.write_text(COIN.format(p=p, q=1 - p))
        paths.append(str(path))
    return paths


def test_one_file_is_a_pomdp_with_its_names_and_its_discount(coins):
    source = read_files(coins[:1], horizon=3)
    assert isinstance(source.problem, POMDP) and source.problem.r.shape == (3, 2, 2)
    assert (source.states, source.actions, source.observations) == (("heads", "tails"), ("look", "call"), ("shiny", "dull"))
    assert source.models == ()
    np.testing.assert_array_equal(source.problem.r[:, 0, 1], [1, 0.5, 0.25])
    undiscounted = read_files(coins[:1], 3, discount=1.0).problem
    assert isinstance(undiscounted, POMDP)
    np.testing.assert_array_equal(undiscounted.r[:, 0, 1], [1, 1, 1])


def test_several_files_are_an_apomdp_with_models_named_after_them(coins):
    source = read_files(coins, horizon=2, alpha=0.25)
    assert isinstance(source.problem, APOMDP) and float(source.problem.alpha) == 0.25
    assert source.models == ("fair", "foggy")
    np.testing.assert_array_equal(source.problem.models.O[:, 0, 0, 0], [[0.75, 0.25], [0.5, 0.5]])


def test_a_problem_that_ships_with_lindm_has_a_name():
    source = load_problem(["prostate"], horizon=4, alpha=0.3)
    wanted = prostate(4, 0.3)
    assert isinstance(source, NamedProblem) and isinstance(source.problem, APOMDP)
    np.testing.assert_array_equal(source.problem.models.r, wanted.models.r)
    assert source.models == CENTERS and source.actions == ACTIONS


def test_a_file_of_that_name_comes_first(coins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prostate").write_text(Path(coins[0]).read_text())
    source = load_problem(["prostate"], horizon=1)
    assert isinstance(source, NamedProblem) and isinstance(source.problem, POMDP)


@pytest.mark.parametrize(
    "words, options, rule",
    [
        (["maze"], {}, r"PROBLEM must be one of mdp, .*, a .pomdp file; got 'maze'"),
        ([], {}, "PROBLEM must be a .pomdp file or one of mdp"),
        (["mdp", "pomdp"], {}, "PROBLEM must be one family, or files; got mdp pomdp"),
        (["mdp", "true"], {}, "'true' is a word of its own, since an option such as --hidden takes no value"),
        (["tests"], {}, "PROBLEM must be a .pomdp file or a family; tests is a directory, and there is no dataset in it"),
        (["a.pomdp"], {"states": 3}, "states must be left out for .pomdp files: it is an option of families; got 3"),
        (["a.pomdp"], {"horizon": None}, "horizon must be given for a .pomdp file"),
        (["prostate"], {"states": 3}, "an option of prostate must be one of horizon, .*; got 'states'"),
        (["a.pomdp"], {"horizon": 0}, "horizon must be a whole number of at least 1; got 0"),
        (["a.pomdp"], {"discount": 1.5}, "discount must be a number from 0 to 1; got 1.5"),
        (["a.pomdp", "b.pomdp"], {}, "alpha must be given for several files"),
        (["a.pomdp"], {"alpha": 0.5}, "alpha must be left out for a single model"),
        (["a.pomdp", "b.pomdp"], {"alpha": 2.0}, "alpha"),
    ],
)
def test_arguments_are_checked_before_a_file_is_read(words, options, rule):
    with pytest.raises(ValueError, match=rule):
        load_problem(words, **{"horizon": 2, **options})


def test_files_of_one_stem_keep_their_paths_apart(coins, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "fair.pomdp"
    twin.write_text(Path(coins[1]).read_text())
    assert read_files([coins[0], str(twin)], horizon=1, alpha=1.0).models == (coins[0], str(twin))


def test_models_of_different_problems_raise_an_error(coins, tmp_path):
    other = tmp_path / "other.pomdp"
    other.write_text(COIN.format(p=0.5, q=0.5).replace("call", "bet"))
    with pytest.raises(LindmError, match=r"other.pomdp: actions must be as in") as stop:
        read_files([coins[0], str(other)], horizon=1, alpha=1.0)
    assert isinstance(stop.value, DataError)
