"""Tables of Gymnasium's toy-text environments against a recursion over the table itself, which skips what follows an end."""

import math
from typing import Any

import numpy as np
import pytest

import lindm as ld
from lindm.families.registry import NamedProblem
from lindm.problems.stationary import StationaryPOMDP
from lindm.problems.transition_table import read_table

from_gymnasium: Any = ld.from_gymnasium  # an MDP, or one without a horizon

# state 1 is the end of some transitions into it, and a place to pass through for others; state 3 is only an end
TABLE = {
    0: {0: [(0.5, 1, 1.0, False), (0.5, 0, 0.0, False)], 1: [(0.25, 1, 8.0, True), (0.75, 3, -1.0, True)]},
    1: {0: [(1.0, 2, 2.0, False)], 1: [(0.5, 1, 0.0, False), (0.25, 1, 0.0, False), (0.25, 0, 4.0, False)]},
    2: {0: [(1.0, 0, 0.0, False)], 1: [(1.0, 3, 5.0, True)]},
    3: {0: [(1.0, 3, 9.0, True)], 1: [(1.0, 0, 9.0, False)]},
}


def recursion(table, horizon: int, discount: float = 1.0) -> np.ndarray:
    """V [S] of a table over a horizon."""
    V = np.zeros(len(table))
    for _ in range(horizon):
        values = [
            [sum(p * (r + discount * (not end) * V[t]) for p, t, r, end in moves) for moves in actions.values()]
            for actions in table.values()
        ]
        V = np.array([max(Q) for Q in values])
    return V


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_an_end_is_followed_by_nothing(start, discount):
    for horizon in (1, 2, 5, 9):
        solution = ld.solve(from_gymnasium(TABLE, horizon=horizon, discount=discount, start=start))
        assert solution.value == pytest.approx(recursion(TABLE, horizon, discount)[start], rel=1e-12)


def test_a_state_that_is_only_an_end_absorbs_and_another_one_gets_an_end_of_its_own():
    problem = read_table(TABLE, 0, 0.9)
    assert problem.num_states == 5 and problem.P[1].toarray()[0].tolist() == [0, 0, 0, 0, 1]
    only = {s: {a: [(p, t, r, t == 3) for p, t, r, _ in moves] for a, moves in actions.items()} for s, actions in TABLE.items()}
    problem = read_table(only, [0.5, 0.5, 0, 0], 0.9)
    assert problem.num_states == 4 and (problem.r[3] == 0).all() and problem.P[1].toarray()[3].tolist() == [0, 0, 0, 1]
    assert problem.r[0].tolist() == [0.5, 0.25 * 8 - 0.75] and problem.P[1].toarray()[1].tolist() == [0.25, 0.75, 0, 0]


def test_what_is_paid_is_the_reward_of_the_transition():
    """State 4 is the end apart; two entries of one transition pay 2 and 5, their mean by probability is 3."""
    table = TABLE | {2: {0: [(0.5, 0, 2.0, False), (0.25, 0, 5.0, False), (0.25, 1, 7.0, False)], 1: [(1.0, 3, 5.0, True)]}}
    problem = read_table(table, 0, 0.9)
    R = problem.reward_table()[0, ..., 0]
    assert R[0, 0].tolist() == [0, 1, 0, 0, 0] and R[0, 1].tolist() == [0, 0, 0, 0, 1.25]
    assert R[2, 0].tolist() == [3, 7, 0, 0, 0] and R[2, 1].tolist() == [0, 0, 0, 0, 5]
    P = np.stack([kernel.toarray() for kernel in problem.P], axis=1)
    np.testing.assert_allclose((P * R).sum(-1), problem.r, rtol=1e-12)
    finite = from_gymnasium(table, horizon=3, discount=0.9, start=0).problem
    assert finite.discount == 0.9 and np.array_equal(finite.paid.R[0, ..., 0], R)
    assert from_gymnasium({0: {0: [(1.0, 0, 2.0, False)]}}, horizon=3, start=0).problem.paid is None


def test_an_action_that_a_state_does_not_list_is_not_legal():
    some = {s: {a: moves for a, moves in actions.items() if (s, a) not in ((0, 1), (1, 1))} for s, actions in TABLE.items()}
    source = from_gymnasium(some, horizon=5, start=0)
    assert source.problem.legal.tolist()[:2] == [[True, False], [True, False]]
    assert ld.solve(source).value == pytest.approx(recursion(some, 5)[0], rel=1e-12)


@pytest.mark.parametrize(("name", "horizon", "options"), [("FrozenLake", None, {}), ("Taxi", 12, {}), ("CliffWalking", 20, {})])
def test_the_optimum_of_the_environments_is_that_of_a_recursion_over_their_tables(name, horizon, options):
    gymnasium = pytest.importorskip("gymnasium")
    newest = max(identity for identity in gymnasium.registry if identity.startswith(f"{name}-v"))
    env = gymnasium.make(newest)
    source = from_gymnasium(newest, horizon=horizon, **options)
    H = horizon or 100  # FrozenLake ends after 100 steps
    assert isinstance(source, NamedProblem) and source.problem.horizon == H
    V = recursion(env.unwrapped.P, H)
    solution = ld.solve(source)
    assert solution.value == pytest.approx(V @ env.unwrapped.initial_state_distrib, rel=1e-12)
    assert ld.solve(from_gymnasium(env, horizon=H)).value == solution.value
    if name == "FrozenLake":
        assert 0.74 < solution.value < 14 / 17  # the probability of the goal in 100 steps, and without a limit


def test_an_environment_without_an_end_is_solved_as_one():
    lake = pytest.importorskip("gymnasium").make("FrozenLake-v1", map_name="8x8")
    problem = from_gymnasium(lake, horizon=math.inf, discount=0.99)
    assert isinstance(problem, StationaryPOMDP)
    solution = ld.solve(problem)
    V = recursion(lake.unwrapped.P, 4000, 0.99)[0]
    assert solution.lower - 1e-9 <= V <= solution.upper + 1e-9 and solution.upper - solution.lower <= 1e-9


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"environment": {}}, "P must be a table with the states 0 to S - 1, each with actions; got 0 states"),
        ({"environment": TABLE | {4: {}}}, r"P\[4\] must have some of the actions 0 to 1; got \[\]"),
        ({"environment": {0: {0: [(0.5, 0, 0, False)]}}}, r"the probabilities of P\[0\]\[0\] must sum to one; they sum to 0.5"),
        ({"environment": {0: {0: [(1.0, 7, 0, False)]}}}, r"P\[0\]\[0\] must list .*; got \(1.0, 7, 0, False\)"),
        ({"environment": object()}, "environment must be an id of Gymnasium, or have a table P.*; got object"),
        ({"environment": "FrozenPond-v1"}, "environment must be an id of Gymnasium; .*FrozenPond"),
        ({"start": None}, "start must be given: the environment has none"),
        ({"start": 9}, "start must be a state from 0 to 3, or a law of 4 states; got 9"),
        ({"start": [1.0, 0]}, r"start must be a law of the 4 states; got shape \(2,\)"),
        ({"start": [1.0, 1.0, 0, 0]}, "^rho must sum to one"),
        ({"horizon": None}, "horizon must be given: the environment has none"),
        ({"horizon": 2.5}, "horizon must be a whole number"),
        (
            {"horizon": math.inf, "discount": 1.0, "map_name": "8x8"},
            "options must be left out where the environment is no id; got map_n",
        ),
    ],
)
def test_what_is_no_table_raises_an_error(change, rule):
    with pytest.raises(ValueError, match=rule):
        from_gymnasium(**{"environment": TABLE, "horizon": 3, "start": 0} | change)
