"""Scores of probabilities against optimal actions: by loops over histories, minimization and grids in the test."""
# what may be None is there in these tests
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from lindm.evaluation.calibration import ScoredHistories, calibrate, fit_temperature, merge, scale, score


def scored(seed, n=40, A=3, sharp=1.0):
    """Random probabilities; an action is optimal more often where it has more probability, and some histories have ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, A)) * 1.5
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.array([rng.choice(A, p=row) for row in p])
    optimal = np.eye(A, dtype=bool)[best] | (rng.uniform(size=(n, A)) < 0.15)
    weight = rng.dirichlet(np.ones(n))
    log_p = sharp * logits - np.log(np.exp(sharp * logits).sum(-1, keepdims=True))
    return ScoredHistories(weight=weight, log_p=log_p, optimal=optimal)


def by_loops(task, temperature=1.0):
    """Log-loss, and (weight, confidence, whether it is optimal) of each history, with Python's own arithmetic."""
    loss, rows = 0.0, []
    for w, logs, right in zip(task.weight, task.log_p, task.optimal, strict=True):
        powers = [math.exp(x) ** (1 / temperature) for x in logs]
        p = [x / sum(powers) for x in powers]
        loss += w * -math.log(sum(x for x, ok in zip(p, right, strict=True) if ok))
        rows.append((w, max(p), bool(right[p.index(max(p))])))
    return loss, rows


def nearest(p, right):
    """The squared distance from p to the distributions on the optimal actions: the best point of a grid, then refined."""
    places = [a for a, ok in enumerate(right) if ok]

    def distance(y):
        full = np.zeros(len(p))
        full[places] = y
        return float(((full - p) ** 2).sum())

    if len(places) == 1:
        return distance([1.0])
    free = len(places) - 1
    found = minimize(lambda y: distance([*y, 1 - sum(y)]), np.full(free, 1 / (free + 1)), method="SLSQP", options={"ftol": 1e-15})
    return float(found.fun)


def test_log_loss_and_brier_score_are_those_of_a_loop_over_histories():
    tasks = [scored(seed) for seed in range(4)]
    losses, _ = zip(*map(by_loops, tasks), strict=True)
    briers = [sum(w * nearest(np.exp(x), right) for w, x, right in zip(t.weight, t.log_p, t.optimal, strict=True)) for t in tasks]
    found = score(tasks)
    assert found.log_loss == pytest.approx(np.mean(losses), rel=1e-12) and found.brier == pytest.approx(np.mean(briers), rel=1e-6)
    half = 3.182446305284263 * np.std(losses, ddof=1) / 2  # the 0.975 quantile of t with three degrees of freedom, from a table
    np.testing.assert_allclose(found.log_loss_ci, [np.mean(losses) - half, np.mean(losses) + half], rtol=1e-9)


def test_with_one_optimal_action_the_scores_are_those_of_a_classifier():
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    task = ScoredHistories(weight=np.array([0.25, 0.75]), log_p=np.log(p), optimal=np.eye(3, dtype=bool)[[0, 1]])
    found = score([task])
    assert found.log_loss == pytest.approx(-0.25 * math.log(0.7) - 0.75 * math.log(0.3), rel=1e-12)
    assert found.brier == pytest.approx(0.25 * (0.3**2 + 0.2**2 + 0.1**2) + 0.75 * (0.1**2 + 0.7**2 + 0.6**2), rel=1e-12)


def test_where_every_action_is_optimal_nothing_is_lost():
    found = score([ScoredHistories(weight=np.ones(1), log_p=np.log([[0.2, 0.8]]), optimal=np.ones((1, 2), bool))])
    assert found.log_loss == pytest.approx(0, abs=1e-15) and found.brier == pytest.approx(0, abs=1e-15)


def test_bins_hold_every_history_once_and_give_the_calibration_error():
    tasks = [scored(seed) for seed in (5, 6)]
    rows = [(w / 2, c, ok) for task in tasks for w, c, ok in by_loops(task)[1]]
    found, error = score(tasks), 0.0
    for b in range(10):
        inside = [row for row in rows if b / 10 < row[1] <= (b + 1) / 10]
        one = next((x for x in found.bins if x.low == pytest.approx(b / 10)), None)
        assert (one is None) == (not inside)
        if one is not None:
            total = sum(w for w, _, _ in inside)
            sure = sum(w * confidence for w, confidence, _ in inside) / total
            agreed = sum(w * ok for w, _, ok in inside) / total
            np.testing.assert_allclose([one.weight, one.confidence, one.optimal], [total, sure, agreed], rtol=1e-12)
            error += total * abs(agreed - sure)
    assert found.calibration_error == pytest.approx(error, rel=1e-12) and sum(b.weight for b in found.bins) == pytest.approx(1)


@pytest.mark.parametrize("sharp", [0.4, 1.0, 3.0])
def test_the_fitted_temperature_is_the_best_of_a_grid(sharp):
    tasks = [scored(seed, sharp=sharp) for seed in range(3)]
    grid = np.exp(np.linspace(math.log(0.1), math.log(10), 101))
    losses = [np.mean([by_loops(task, t)[0] for task in tasks]) for t in grid]
    found = fit_temperature(tasks)
    assert found is not None and abs(math.log(found / grid[int(np.argmin(losses))])) < 0.0461, "one step of the grid"
    assert np.mean([by_loops(task, found)[0] for task in tasks]) <= min(losses) + 1e-12
    assert abs(math.log(found / sharp)) < 0.5, "the temperature undoes the sharpening"


def test_a_task_is_scaled_by_the_temperature_of_the_other_half():
    tasks = [scored(seed, sharp=3.0) for seed in range(5)]
    found = calibrate(tasks)
    other = {0: fit_temperature(tasks[1::2]), 1: fit_temperature(tasks[0::2])}
    wanted = np.mean([by_loops(task, other[i % 2])[0] for i, task in enumerate(tasks)])
    assert found.scaled is not None and found.scaled.log_loss == pytest.approx(wanted, rel=1e-9)
    assert found.temperature == pytest.approx(fit_temperature(tasks)) and other[0] != other[1]
    assert found.scaled.log_loss < found.scores.log_loss and found.scaled.calibration_error < found.scores.calibration_error
    assert not found.deterministic


def test_a_policy_that_is_calibrated_has_no_error_and_needs_no_temperature():
    """Every likeliest action is optimal as often as it is probable: two histories of each kind, weighted."""
    tasks = []
    for first, second in itertools.product((0.6, 0.9), (0.75, 0.8)):
        p = np.array([[first, 1 - first]] * 2 + [[second, 1 - second]] * 2)
        weight = np.array([first, 1 - first, second, 1 - second]) / 2
        tasks.append(ScoredHistories(weight=weight, log_p=np.log(p), optimal=np.eye(2, dtype=bool)[[0, 1, 0, 1]]))
    found = calibrate(tasks)
    assert found.scores.calibration_error == pytest.approx(0, abs=1e-12)
    assert found.temperature == pytest.approx(1, abs=1e-5) and found.scaled.log_loss == pytest.approx(found.scores.log_loss)


def test_probabilities_of_zero_and_one_are_scored_and_have_no_temperature():
    with np.errstate(divide="ignore"):
        log_p = np.log(np.eye(2)[[0, 1, 1]])
    weight = np.array([0.5, 0.25, 0.25])
    right = ScoredHistories(weight=weight, log_p=log_p, optimal=np.eye(2, dtype=bool)[[0, 1, 1]])
    wrong = ScoredHistories(weight=weight, log_p=log_p, optimal=np.eye(2, dtype=bool)[[0, 1, 0]])
    found = calibrate([right, right])
    assert found.deterministic and found.temperature is None and found.scaled is None
    assert (found.scores.log_loss, found.scores.brier) == (0.0, 0.0)
    found = calibrate([wrong, wrong])
    assert found.scores.log_loss is None and found.scores.log_loss_ci is None and found.scores.brier == pytest.approx(0.25 * 2)
    assert found.scores.calibration_error == pytest.approx(0.25)


def test_uniform_probabilities_and_a_single_task_have_no_scaled_scores():
    uniform = ScoredHistories(weight=np.ones(1), log_p=np.full((1, 2), np.log(0.5)), optimal=np.array([[True, False]]))
    found = calibrate([uniform] * 4)
    assert found.temperature is None and found.scaled is None and not found.deterministic
    assert found.scores.calibration_error == pytest.approx(0, abs=1e-15), "both actions are likeliest, and one of them is optimal"
    assert calibrate([scored(0)]).scaled is None and calibrate([scored(0)]).temperature is not None


def test_merged_rows_have_the_same_scores_and_scaling_keeps_a_sum_of_one():
    task = scored(3)
    n = len(task.weight)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(n), 3))
    weight, log_p, optimal = merge(task.weight[order] / 3, task.log_p[order], task.optimal[order])
    assert len(weight) == n
    again = ScoredHistories(weight=weight, log_p=log_p, optimal=optimal)
    one, other = score([task]), score([again])
    assert (one.log_loss, one.brier) == pytest.approx((other.log_loss, other.brier), rel=1e-12)
    np.testing.assert_allclose(np.exp(scale(task, 2.5).log_p).sum(-1), 1, rtol=1e-12)
