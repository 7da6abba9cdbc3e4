"""The difference of two policies: by numpy over tasks, and its coverage."""

import numpy as np
import pytest

from lindm.evaluation.optimality_gap import PolicyLoss
from lindm.evaluation.paired import paired_difference


def loss(suboptimality, optimal=4.0, uniform=2.0, width=0.0):
    values = {"agreement": 0.5, "exact": True, "decisions": 1, "width": width}
    return PolicyLoss(suboptimality=suboptimality, optimal_value=optimal, uniform_value=uniform, **values)


def test_the_difference_is_that_of_each_task_and_its_interval_is_narrower_than_that_of_independent_tasks():
    rng = np.random.default_rng(0)
    shared, n = rng.uniform(0, 3, 20), 20
    mine, theirs = shared + 0.1 + rng.normal(0, 0.05, n), shared
    spreads = rng.uniform(1, 3, n)
    losses, others = ([loss(x, 4.0, 4.0 - w) for x, w in zip(values, spreads, strict=True)] for values in (mine, theirs))
    found = paired_difference(losses, others, "theirs")
    assert found is not None and found.gap_ci is not None
    value, gap = theirs - mine, (mine - theirs) / spreads
    t = 2.093024054408263  # the 0.975 quantile for 19 degrees of freedom, from a table
    for got, ci, rows in ((found.value, found.value_ci, value), (found.gap, found.gap_ci, gap)):
        half = t * rows.std(ddof=1) / np.sqrt(n)
        assert got == pytest.approx(rows.mean(), rel=1e-12) and ci == pytest.approx([rows.mean() - half, rows.mean() + half])
    assert (found.baseline, found.n) == ("theirs", 20) and found.gap_ci[0] > 0
    alone = t * (mine / spreads).std(ddof=1) / np.sqrt(n)
    assert found.gap_ci[1] - found.gap_ci[0] < alone, "the tasks differ more than the policies"


def test_the_interval_contains_the_mean_difference_as_often_as_it_says():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        shared, extra = rng.exponential(2, 8), rng.normal(0.3, 0.2, 8)
        found = paired_difference([loss(x) for x in shared + extra], [loss(x) for x in shared], "b")
        assert found is not None and found.gap_ci is not None
        inside += found.gap_ci[0] <= 0.15 <= found.gap_ci[1]
    assert 0.92 * 400 <= inside <= 0.98 * 400


def test_bounds_of_the_optimum_cancel_out_of_values_and_widen_the_gap():
    mine, theirs = [loss(x, width=1.0) for x in (1.0, 1.2, 1.1)], [loss(x, width=1.0) for x in (0.5, 0.6, 0.7)]
    found, exact = paired_difference(mine, theirs, "b"), []
    assert found is not None and found.gap_ci is not None
    for optimal in (4.0, 4.5, 5.0):
        gap = np.array([0.5, 0.6, 0.4]) / (optimal - 2.0)
        half = 4.302652729911275 * gap.std(ddof=1) / np.sqrt(3)
        exact.append((gap.mean(), gap.mean() - half, gap.mean() + half))
    assert found.value == pytest.approx(-0.5) and found.gap == pytest.approx((exact[0][0] + exact[2][0]) / 2)
    for mean, low, high in exact:
        assert found.gap_ci[0] <= low + 1e-9 <= mean <= high <= found.gap_ci[1] + 1e-9


def test_where_nothing_varies_there_is_no_interval_and_tasks_without_a_value_or_a_gap_are_left_out():
    found = paired_difference([loss(1.0), loss(1.5), None], [loss(0.5), loss(1.0), loss(3.0)], "b")
    assert (found.value, found.value_ci, found.gap, found.gap_ci, found.n) == (-0.5, None, 0.25, None, 2)
    assert paired_difference([None], [loss(1.0)], "b") is None
    every_policy_is_optimal = [loss(0.0, 2.0, 2.0)] * 2
    found = paired_difference(every_policy_is_optimal, every_policy_is_optimal, "b")
    assert (found.value, found.gap, found.gap_ci) == (0.0, None, None)
