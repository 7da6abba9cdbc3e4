"""RockSample against a rover that is moved by hand, and the sizes and bounds of the literature."""

import json
import math

import numpy as np
import pytest

from lindm.cli.main import main
from lindm.evaluation.environments import double_precision
from lindm.families.registry import NamedProblem, make
from lindm.families.rocksample import LITERATURE, rocksample
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.point_based import solve
from lindm.types import POMDP

SMALL = rocksample(3, 2, discount=0.9)


def test_the_size_of_the_literature_has_its_states_and_few_nonzeros():
    problem = rocksample()
    assert problem.num_states == 12_545 and problem.num_actions == 13
    assert sum(P.nnz for P in problem.P) == 13 * 12_545
    assert sum(O.nnz for O in problem.O) <= 13 * 2 * 12_545
    assert np.count_nonzero(problem.rho) == 256 and "x0-y3-gggggggg" in [problem.states[i] for i in np.flatnonzero(problem.rho)]


def cells(problem, size: int, rocks: int) -> list[tuple[int, int]]:
    """Where a good rock can be sampled, rock by rock, read from the rewards."""
    found = {}
    for s, name in enumerate(problem.states[:-1]):
        x, y, worth = name.split("-")
        if worth.count("g") == 1 and problem.r[s, 4] == 10:
            found[worth.index("g")] = (int(x[1:]), int(y[1:]))
    return [found[i] for i in range(rocks)]


@pytest.mark.parametrize(("problem", "size", "rocks"), [(SMALL, 3, 2), (rocksample(4, 3, layout=5), 4, 3)])
def test_every_transition_reward_and_check_is_that_of_a_rover_moved_by_hand(problem, size, rocks):
    rock_cells, index = cells(problem, size, rocks), {name: s for s, name in enumerate(problem.states)}
    assert len(set(rock_cells)) == rocks
    for name, s in index.items():
        if name == "end":
            assert (problem.r[s] == 0).all() and all(P[s, s] == 1 for P in problem.P)
            continue
        x, y, worth = int(name[1]), int(name[4]), name[6:]
        for a, action in enumerate(problem.actions):
            to, reward, accuracy = name, 0.0, None
            if action == "east":
                to, reward = (f"x{x + 1}-y{y}-{worth}", 0.0) if x + 1 < size else ("end", 10.0)
            elif action in ("north", "south", "west"):
                dx, dy = {"north": (0, 1), "south": (0, -1), "west": (-1, 0)}[action]
                if x + dx >= 0 and 0 <= y + dy < size:
                    to = f"x{x + dx}-y{y + dy}-{worth}"
            elif action == "sample" and (x, y) in rock_cells:
                i = rock_cells.index((x, y))
                reward = 10.0 if worth[i] == "g" else -10.0
                to = f"x{x}-y{y}-{worth[:i]}b{worth[i + 1 :]}"
            elif action.startswith("check"):
                i = int(action[6:])
                accuracy = (1 + 2 ** (-math.dist((x, y), rock_cells[i]) / 20)) / 2
            assert problem.P[a][s].toarray()[index[to]] == 1 and problem.P[a][s].nnz == 1 and problem.r[s, a] == reward
            if accuracy is None:
                assert problem.O[a][s].toarray().tolist() == [1, 0, 0]
            else:
                good = accuracy if worth[i] == "g" else 1 - accuracy
                np.testing.assert_allclose(problem.O[a][s].toarray(), [0, good, 1 - good])


def test_the_layout_of_the_literature_is_where_the_rewards_are():
    assert cells(rocksample(), 7, 8) == list(LITERATURE[7, 8])


def test_a_small_rover_is_solved_and_leaving_at_once_is_worth_less():
    solution = solve(SMALL, tolerance=0.05, trials=200)
    assert solution.upper - solution.lower <= 0.05
    assert solution.lower > 10 * 0.9**2 + 1 and solution.regret <= 0.05


def test_with_a_horizon_it_is_a_dense_problem_and_without_one_a_sparse_one(capsys):
    with double_precision():
        dense = make("rocksample", size=3, rocks=2, discount=0.9, horizon=4)
        sparse = make("rocksample", size=3, rocks=2)
    assert isinstance(sparse, StationaryPOMDP) and sparse.num_states == 37
    assert isinstance(dense, NamedProblem) and isinstance(dense.problem, POMDP)
    np.testing.assert_array_equal(dense.problem.P[0, :, 2], SMALL.P[2].toarray())
    np.testing.assert_array_equal(dense.problem.O[0, 5], SMALL.O[5].toarray())
    np.testing.assert_allclose(dense.problem.r[2], 0.81 * SMALL.r)
    assert dense.states == SMALL.states
    with pytest.raises(ValueError, match="solve it by point-based, which keeps it sparse"):
        make("rocksample", horizon=4)
    command = ["solve", "rocksample", "--horizon", "inf", "--size", "2", "--rocks", "1", "--discount", "0.5", "--json"]
    assert main(command) == 0
    # the rock is worth 0 on average, and 10 are earned by two steps to the east
    assert json.loads(capsys.readouterr().out)["lower"] == pytest.approx(5)
    assert main(["eval", "rocksample"]) == 2
    assert "horizon must be given for rocksample, which has none of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [({"size": 2, "rocks": 5}, "size and rocks must leave a cell"), ({"size": 0}, "size must be"), ({"rocks": 30}, "fewer than")],
)
def test_impossible_sizes_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        rocksample(**options)
