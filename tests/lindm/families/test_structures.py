"""Families against what is known of them: control limits, base stocks, (s, S) policies, shortest paths, searches."""

from typing import Any

import jax
import numpy as np
import pytest

import lindm as ld
from lindm.families.dosing import NOISE, Dosing
from lindm.families.gridworld import Gridworld
from lindm.families.inventory import Inventory
from lindm.families.maintenance import Maintenance
from lindm.families.screening import Screening

SPLITS = ("id", "ood")
DRAWS = [(split, seed) for split in SPLITS for seed in range(12)]


def arrays(suite, seed=0) -> Any:
    """P, r of the first stage, rho and O of one model, in numpy."""
    problem = suite.draw(jax.random.key(seed))
    model = problem.models if hasattr(problem, "models") else problem
    fields = (model.P, model.r, model.rho, getattr(model, "O", None))
    return [None if x is None else np.asarray(x, float) for x in fields]


def backward(P, r, horizon):
    """Action values [H, S, A], by backward induction in numpy, and the least best actions [H, S]."""
    V, Q = np.zeros(len(r)), np.zeros((horizon, *r.shape))
    for t in reversed(range(horizon)):
        Q[t] = r + P @ V
        V = Q[t].max(-1)
    return Q, (Q.max(-1, keepdims=True) - 1e-9 < Q).argmax(-1)


# --- maintenance --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split, seed", DRAWS)
def test_a_control_limit_is_optimal_for_maintenance(split, seed):
    P, r, _, _ = arrays(Maintenance(states=6, horizon=12, split=split), seed)
    P, r = P[0], r[0]
    tails = np.cumsum(P[:, 0, ::-1], axis=-1)[:, ::-1]  # probability of a condition at least as bad
    assert (np.diff(tails, axis=0) >= -1e-12).all() and (np.diff(r[:, 0]) <= 0).all()  # what Derman's theorem assumes
    stays = np.diagonal(P[:, 0])
    assert (np.diff(stays[:-1]) <= 0).all() and stays[-1] == 1  # wear never slows down, and nothing repairs itself
    np.testing.assert_array_equal(P[:, 1], np.broadcast_to(np.eye(6)[0], (6, 6)))
    assert len(set(r[:, 1])) == 1
    _, best = backward(P, r, 12)
    assert (np.diff(best, axis=1) >= 0).all()  # once replaced, replaced in every worse condition
    assert (best[-1] == 0).all() or r[-1, 0] < r[-1, 1]  # nobody buys a machine for no period


def test_limits_differ_between_tasks_and_both_decisions_are_taken():
    limits = {tuple(backward(P[0], r[0], 8)[1][0]) for P, r, _, _ in (arrays(Maintenance(), seed) for seed in range(20))}
    assert len(limits) >= 3


def test_a_worn_machine_gives_signals_and_an_inspection_shows_the_level():
    P, r, _, O = arrays(Maintenance(hidden=True, states=4, observations=2))
    np.testing.assert_array_equal(P[0, :, 0], P[0, :, 1])
    np.testing.assert_array_equal(O[0, 1], [[1, 0], [1, 0], [0, 1], [0, 1]])
    np.testing.assert_array_equal(O[0, 0], O[0, 2])
    assert 0.5 < O[0, 0, 0, 0] < 1 and np.allclose(O[0, 0, 3], O[0, 0, 0, ::-1])
    fees = r[0, :, 0] - r[0, :, 1]
    assert np.allclose(fees, fees[0]) and fees[0] > 0


# --- inventory ----------------------------------------------------------------------------------------------------------------


def one_period(capacity, lead_time, stock, coming, order, demand):
    """What is left, the orders on their way, the sales, the lost sales."""
    on_shelf = min(stock + order, capacity) if lead_time == 0 else stock
    sold = min(on_shelf, demand)
    if lead_time == 0:
        return on_shelf - sold, (), sold, demand - sold
    queue = (*coming, order)
    return min(on_shelf - sold + queue[0], capacity), queue[1:], sold, demand - sold


@pytest.mark.parametrize("lead_time", [0, 1, 2, 3])
def test_an_inventory_moves_as_its_orders_and_demands(lead_time):
    suite = Inventory(capacity=3, actions=3, lead_time=lead_time, split="ood")
    P, r, rho, _ = arrays(suite)
    states = [tuple(map(int, name.split("+"))) for name in suite.names["states"]]
    start = states.index((3, *(0,) * max(lead_time - 1, 0)))
    # the law of the demand: what is left of a full shelf, without orders
    demand = [P[0, start, 0, states.index((3 - d, *states[start][1:]))] for d in range(4)]
    np.testing.assert_allclose(np.sum(demand), 1)
    unit = (r[0, start, 1] - r[0, start, 2]) if lead_time else None
    for s, (stock, *coming) in enumerate(states):
        for a in range(3):
            law, sales = np.zeros(len(states)), 0.0
            for d, p in enumerate(demand):
                left, later, sold, _ = one_period(3, lead_time, stock, coming, a, d)
                law[states.index((left, *later))] += p
                sales += p * sold
            np.testing.assert_allclose(P[0, s, a], law, atol=1e-12)
            if unit is not None and a:
                np.testing.assert_allclose(r[0, s, a] - r[0, s, 1], -unit * (a - 1), atol=1e-9)
    assert rho[[i for i, (_, *coming) in enumerate(states) if any(coming)]].sum() == 0


@pytest.mark.parametrize("seed", range(12))
def test_base_stocks_are_optimal_without_fixed_costs_and_lead_time(seed):
    P, r, _, _ = arrays(Inventory(capacity=6, actions=4, lead_time=0), seed)
    _, best = backward(P[0], r[0], 8)
    for orders in best:
        level = (np.arange(7) + orders)[orders > 0].max(initial=0)
        np.testing.assert_array_equal(orders, np.clip(level - np.arange(7), 0, 3))


@pytest.mark.parametrize("seed", range(12))
def test_with_fixed_costs_one_orders_up_to_one_level_or_not_at_all(seed):
    P, r, _, _ = arrays(Inventory(capacity=5, actions=6, lead_time=0, split="ood"), seed)
    _, best = backward(P[0], r[0], 8)
    for orders in best:
        up_to = (np.arange(6) + orders)[orders > 0]
        assert len(set(up_to)) <= 1
        assert (np.diff((orders > 0).astype(int)) <= 0).all()  # those who order have less than those who do not


# --- screening ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split, seed", DRAWS[::3])
def test_a_disease_takes_its_course_and_a_treatment_cures_or_leaves_it(split, seed):
    P, r, rho, O = arrays(Screening(states=5, split=split), seed)
    P, r, O = P[0], r[0], O[0]
    np.testing.assert_array_equal(P[:, 0], P[:, 1])
    np.testing.assert_allclose(P[:, 0], np.triu(np.tril(P[:, 0], 1)))  # one stage at a time, never back
    np.testing.assert_array_equal(P[4, :, 4], 1)
    cure = 1 - P[1:4, 2, 1:].sum(-1) / P[1:4, 0, 1:].sum(-1)
    assert (np.diff(cure) <= 1e-12).all() and (cure > 0).all()
    np.testing.assert_allclose(P[1:4, 2, 1:], (1 - cure)[:, None] * P[1:4, 0, 1:])
    np.testing.assert_array_equal(O[:, 4], [[0, 0, 1]] * 3)
    assert (np.diff(O[:, :4, 1], axis=1)[:, 1:] >= 0).all() and (O[1, 1:4, 1] > O[1, 0, 1]).all()
    assert O[1, 0, 1] < O[0, 0, 1] == O[2, 0, 1]  # a test raises fewer false alarms than symptoms do
    assert (r[4] == 0).all() and (np.diff(r[:, 0]) <= 0).all() and (r[:4, 0] > r[:4, 1]).all() and rho[4] == 0


def test_in_the_last_period_one_waits():
    suite = Screening(horizon=1)
    assert all(ld.solve(ld.make("screening", horizon=1, seed=seed)).first_action == "wait" for seed in range(3))
    assert suite.names["actions"][0] == "wait"


# --- dosing -------------------------------------------------------------------------------------------------------------------


def test_a_dose_moves_the_level_by_the_drift_of_each_expert():
    P, r, rho, O = arrays(Dosing(states=4, actions=3, models=3, observations=2))
    for m in range(3):
        up, down = P[m, 0, 1, :, 2], P[m, 0, 1, :, 0]
        drift = (up - down) / (1 - 2 * NOISE)
        np.testing.assert_allclose(drift[1], (drift[0] + drift[2]) / 2)  # linear in the dose
        np.testing.assert_allclose(np.minimum(up, down), NOISE)
        np.testing.assert_allclose(P[m, 0, 2, :, 3], up)
        np.testing.assert_allclose(P[m, 0, 0, :, 0], 1 - up)  # no level below the lowest
        assert drift[0] < 0 < drift[2]
    np.testing.assert_array_equal(r[0], r[1])
    np.testing.assert_array_equal(rho[0], rho[2])
    assert (P[0] != P[1]).any() and (O[0] != O[1]).any()
    assert r[0, 0, 1].max() == 1 and (r[0, 0].argmax(0) == 1).all()


def test_the_more_one_fears_the_worst_expert_the_less_dosing_is_worth():
    problems: list[Any] = [ld.make("dosing", horizon=3, alpha=alpha) for alpha in (0.0, 0.5, 1.0)]
    solved: list[Any] = [ld.solve(problem) for problem in problems]
    assert solved[0].value > solved[1].value > solved[2].value


# --- gridworld ----------------------------------------------------------------------------------------------------------------


def cells_of(suite):
    names = suite.names["observations"][:-1] if suite.dark else suite.names["states"]
    return {tuple(map(int, name[1:].split("c"))): i for i, name in enumerate(names)}


def distances(cells, free, goal):
    """Steps to the goal by breadth-first search over neighbors that are not walls."""
    steps, edge = {goal: 0}, [goal]
    while edge:
        row, column = edge.pop(0)
        for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if near in cells and free[cells[near]] and near not in steps:
                steps[near] = steps[row, column] + 1
                edge.append(near)
    return steps


@pytest.mark.parametrize("split, seed", DRAWS[::2])
def test_without_slips_the_value_is_the_time_after_the_shortest_path(split, seed):
    suite = Gridworld(size=4, slip=0.0, split=split)
    P, r, rho, _ = arrays(suite, seed)
    cells, goal = cells_of(suite), int(r[0, :, 0].argmax())
    free = (rho > 0) | (np.arange(16) == goal)
    assert (~free).sum() == int({"id": 0.15, "ood": 0.25}[split] * 16)
    steps = distances(cells, free, next(cell for cell, i in cells.items() if i == goal))
    assert len(steps) == free.sum()  # every free cell can be reached
    Q, _ = backward(P[0], r[0], 8)
    for cell, n in steps.items():
        assert Q[0, cells[cell]].max() == pytest.approx(max(8 - n, 0), abs=1e-12)


def test_a_slip_goes_to_either_side_with_half_of_its_probability():
    suite = Gridworld(size=3, slip=0.3, split="ood")
    P, _, rho, _ = arrays(suite, 1)
    straight, _, _, _ = arrays(Gridworld(size=3, slip=0.0, split="ood"), 1)
    up, right, down, left = range(4)
    for s in np.flatnonzero(rho):
        wanted = 0.7 * straight[0, s, up] + 0.15 * (straight[0, s, left] + straight[0, s, right])
        np.testing.assert_allclose(P[0, s, up], wanted, atol=1e-12)
        wanted = 0.7 * straight[0, s, left] + 0.15 * (straight[0, s, down] + straight[0, s, up])
        np.testing.assert_allclose(P[0, s, left], wanted, atol=1e-12)


def search(cells, free, weights, position, horizon):
    """The best expected time at a hidden goal: a plain search over walks, which end where the goal is."""
    if horizon <= 1:
        return 0.0
    row, column = position
    best = 0.0
    for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
        if near in cells and free[cells[near]]:
            found = weights.get(near, 0.0)
            rest = {cell: w for cell, w in weights.items() if cell != near}
            best = max(best, found * (horizon - 1) + search(cells, free, rest, near, horizon - 1))
    return best


@pytest.mark.parametrize("size, horizon, seed", [(2, 4, 0), (2, 4, 1), pytest.param(3, 6, 2, marks=pytest.mark.slow)])
def test_in_the_dark_the_value_is_that_of_the_best_search(size, horizon, seed):
    suite = Gridworld(size=size, dark=True, horizon=horizon, slip=0.0, split="ood")
    named: Any = ld.make("gridworld", size=size, dark=True, horizon=horizon, slip=0.0, split="ood", seed=seed)
    cells, rho = cells_of(suite), np.asarray(named.problem.rho)
    weights, position = {}, None
    for i in np.flatnonzero(rho):
        cell, goal = named.states[i].split("-goal-")
        weights[tuple(map(int, goal[1:].split("c")))], position = rho[i], tuple(map(int, cell[1:].split("c")))
    free = [cell in weights or cell == position for cell in cells]
    solution = ld.solve(named)
    assert solution.lower - 1e-9 <= search(cells, free, weights, position, horizon) <= solution.upper + 1e-9
    assert solution.upper - solution.lower < 1e-6
