"""What alpha vectors of any origin earn: against simulated episodes, linear equations by hand, and a recursion."""

import json
import math

import numpy as np
import pytest

from lindm.cli.main import main
from lindm.solvers.alpha_values import policy_value_bounds
from lindm.solvers.point_based import solve
from tests.lindm.solvers.test_alpha_file import SARSOP
from tests.lindm.solvers.test_point_based import FILES, earned, model, read


def test_the_optimal_vectors_of_the_tiger_earn_its_value_exactly():
    tiger = read("tiger")
    solution = solve(tiger, tolerance=1e-6)
    lower, upper = policy_value_bounds(tiger, solution.actions, solution.vectors)
    assert lower == pytest.approx(19.371368, abs=1e-6) and upper - lower < 1e-6
    assert lower >= solution.lower - 1e-6  # the best vector at every belief earns at least what each vector promises


def test_vectors_that_promise_what_they_do_not_earn_are_found_out():
    tiger = read("tiger")
    # always listen, whatever is promised: -1 at every stage
    lower, upper = policy_value_bounds(tiger, np.array([0]), np.array([[1e6, 1e6]]), tolerance=1e-9)
    assert (lower, upper) == pytest.approx((-20, -20), abs=1e-6)
    # open the left door where it is likelier that the tiger is right, by 10 and -100; afterwards the sides are even again
    lower, upper = policy_value_bounds(tiger, np.array([1]), np.array([[0.0, 0.0]]))
    assert (lower, upper) == pytest.approx((-45 / 0.05,) * 2, abs=1e-6)


@pytest.mark.parametrize("kind", ["dense", "sparse", "deterministic"])
def test_the_bounds_contain_what_a_recursion_over_all_observations_earns(kind):
    for seed in range(3):
        problem = model(seed, 0.6, kind=kind)
        solution = solve(problem, trials=8)
        begun, rest = earned(solution, 8, problem.rho, math.inf), 0.6**8 / 0.4
        for beliefs in (3, 60, 5000):
            lower, upper = policy_value_bounds(problem, solution.actions, solution.vectors, tolerance=1e-3, max_beliefs=beliefs)
            assert lower - 1e-9 <= begun + rest * problem.r.max() and begun + rest * problem.r.min() <= upper + 1e-9
        assert upper - lower < 0.05


def test_eval_takes_alpha_vectors_of_every_origin(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiger = str(FILES / "tiger.pomdp")
    (tmp_path / "sarsop.policy").write_text(SARSOP)
    assert main(["solve", tiger, "--horizon", "inf", "--save", "best.alpha"]) == 0
    capsys.readouterr()
    command = ["eval", tiger, "--horizon", "3", "--tasks", "2", "--demos", "1", "--json"]
    assert main([*command, "--policy", "alpha:best.alpha", "--policy", "alpha:sarsop.policy", "--policy", "random"]) == 0
    best, other, random = json.loads(capsys.readouterr().out)
    assert best["method"] == other["method"] == "exact" and random["gap"] == 1
    # opening after two equal growls is optimal with three stages to go; with the other vectors a door is never opened early
    assert best["gap"] == pytest.approx(0, abs=1e-9) and other["gap"] > 0.01
    assert main([*command, "--policy", "alpha:none.alpha"]) == 3
    assert main(["eval", "pomdp", "--tasks", "2", "--demos", "1", "--policy", "alpha:best.alpha"]) == 2
    assert "PROBLEM must be one POMDP, as of a .pomdp file, for the policy 'alpha:best.alpha'" in capsys.readouterr().err
