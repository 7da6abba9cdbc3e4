"""Intervals by simulation, binomial limits by scipy and by enumeration, Holm by its textbook example."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lindm_experiments.harness.claims import FAIL, INCONCLUSIVE, PASS
from lindm_experiments.harness.statistics import (
    all_of,
    at_most,
    clopper_pearson,
    clustered,
    clustered_ci,
    crossed,
    crossed_ci,
    equivalence,
    holm,
    mean_ci,
    no_violations,
    rate_at_most,
    slopes,
)
from lindm_experiments.harness.verdicts import adjust, to_verdict


@pytest.mark.fault("F24")
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_t_interval_over_per_seed_slopes_covers_95_percent(seeds):
    rng = np.random.default_rng(seeds)
    x = np.array([4.0, 8.0, 16.0, 32.0])
    runs = 2000
    noise = rng.normal(scale=0.1, size=(runs, seeds, x.size)) + rng.normal(scale=0.2, size=(runs, seeds, 1)) * np.log(x)
    covered = 0
    for run in noise:
        _, (lo, hi) = mean_ci(slopes(x, 3 / x * np.exp(run)))
        covered += lo <= -1 <= hi
    assert abs(covered / runs - 0.95) < 5 * np.sqrt(0.95 * 0.05 / runs)


def test_slopes_agree_with_polyfit():
    rng = np.random.default_rng(0)
    x, y = np.array([1.0, 2.0, 5.0, 9.0]), rng.uniform(0.1, 3, size=(6, 4))
    expected = [np.polyfit(np.log(x), np.log(row), 1)[0] for row in y]
    np.testing.assert_allclose(slopes(x, y), expected, rtol=1e-10)


@pytest.mark.parametrize("y", [[1.0, 0.0], [1.0, -1.0], [1.0, np.inf]])
def test_a_slope_of_what_has_no_logarithm_is_refused(y):
    with pytest.raises(ValueError, match="positive and finite"):
        slopes([1, 2], [y])


@pytest.mark.parametrize("mean, verdict", [(0.0, PASS), (3.0, FAIL), (-3.0, FAIL), (1.0, INCONCLUSIVE)])
def test_equivalence_compares_the_interval_with_the_band(mean, verdict):
    values = mean + 0.1 * np.array([-1.0, 1, -1, 1, -1, 1])
    assert equivalence(values, -1, 1).verdict == verdict


@given(st.floats(-2, 2), st.integers(5, 12), st.integers(0, 1000))
def test_equivalence_is_the_90_percent_interval_inside_or_the_95_percent_interval_outside(mean, n, seed):
    values = np.random.default_rng(seed).normal(mean, 0.5, size=n)
    d = equivalence(values, -1, 1)
    (lo90, hi90), (lo95, hi95) = mean_ci(values, 0.10)[1], mean_ci(values, 0.05)[1]
    expected = PASS if lo90 >= -1 and hi90 <= 1 else FAIL if lo95 > 1 or hi95 < -1 else INCONCLUSIVE
    assert d.verdict == expected and d.ci == (lo95, hi95) and d.limits == (lo90, hi90) and d.band == (-1, 1)


@given(st.floats(-2, 2), st.integers(5, 12), st.integers(0, 1000))
def test_a_band_with_one_end_is_decided_by_the_one_sided_limits_alone(mean, n, seed):
    """Not by the two-sided interval, which is wider. The limits are those of scipy."""
    values = np.random.default_rng(seed).normal(mean, 0.5, size=n)
    t = {side: stats.ttest_1samp(values, 0, alternative=side).confidence_interval(0.95) for side in ("greater", "less")}
    lower, upper = float(t["greater"].low), float(t["less"].high)
    below, above = at_most(values, 1.0), equivalence(values, 1.0, np.inf)
    assert below.limits == above.limits == pytest.approx((lower, upper), rel=1e-9)
    assert below.verdict == (PASS if upper <= 1 else FAIL if lower > 1 else INCONCLUSIVE)
    assert above.verdict == (PASS if lower >= 1 else FAIL if upper < 1 else INCONCLUSIVE)
    assert below.ci[0] < lower < upper < below.ci[1]


@given(st.integers(1, 300), st.data())
def test_a_rate_is_decided_by_its_one_sided_limits(n, data):
    count, rate = data.draw(st.integers(0, n)), data.draw(st.floats(0.01, 0.99))
    lower = stats.binomtest(count, n, alternative="greater").proportion_ci(0.95, method="exact").low
    upper = stats.binomtest(count, n, alternative="less").proportion_ci(0.95, method="exact").high
    d = rate_at_most(count, n, rate)
    assert d.limits == pytest.approx((lower, upper), rel=1e-9, abs=1e-12) and d.band == (-np.inf, rate)
    if min(abs(rate - lower), abs(rate - upper)) > 1e-9:
        assert d.verdict == (PASS if upper < rate else FAIL if lower > rate else INCONCLUSIVE)


@pytest.mark.fault("F24")
def test_the_error_rate_at_the_edge_of_the_band_is_5_percent():
    rng = np.random.default_rng(1)
    runs = 4000
    passed = sum(equivalence(1 + 0.1 * rng.normal(size=6), -1, 1).verdict == PASS for _ in range(runs))
    assert abs(passed / runs - 0.05) < 5 * np.sqrt(0.05 * 0.95 / runs)


def test_one_sided_tests_agree_with_scipy():
    values = np.random.default_rng(2).normal(0.3, 1, size=9)
    below = float(np.asarray(stats.ttest_1samp(values, 1.0, alternative="less"))[1])
    above = float(np.asarray(stats.ttest_1samp(values, 1.0, alternative="greater"))[1])
    np.testing.assert_allclose(at_most(values, 1.0).p_pass, below, rtol=1e-12)
    np.testing.assert_allclose(at_most(values, 1.0).p_fail, above, rtol=1e-12)
    np.testing.assert_allclose(equivalence(values, 1.0, np.inf).p_pass, above, rtol=1e-12)


def test_fewer_seeds_than_required_decide_nothing():
    assert equivalence([0.0, 0.1, 0.0, 0.1], -1, 1, min_seeds=5).verdict == INCONCLUSIVE
    assert equivalence([9.0, 9.1, 9.0, 9.1], -1, 1, min_seeds=5).verdict == INCONCLUSIVE
    assert equivalence([0.0], -1, 1, min_seeds=1).verdict == INCONCLUSIVE


def test_equal_values_in_every_seed_are_decided_without_a_variance():
    assert equivalence([0.5] * 5, 0, 1).verdict == PASS and equivalence([0.5] * 5, 0, 1).p == 0
    assert equivalence([1.0] * 5, 0, 1).verdict == PASS
    assert equivalence([2.0] * 5, 0, 1).verdict == FAIL and equivalence([2.0] * 5, 0, 1).p == 0


@pytest.mark.parametrize("values", [[1.0, float("nan")], [], [[1.0]]])
def test_values_that_are_not_one_finite_number_per_seed_are_refused(values):
    with pytest.raises(ValueError, match="one finite number per seed"):
        equivalence(values, 0, 1)


@pytest.mark.parametrize("count, n", [(0, 10), (3, 10), (10, 10), (7, 1000)])
def test_clopper_pearson_agrees_with_scipy(count, n):
    expected = stats.binomtest(count, n).proportion_ci(method="exact")
    np.testing.assert_allclose(clopper_pearson(count, n), (expected.low, expected.high), rtol=1e-9, atol=1e-12)


@pytest.mark.fault("F24")
@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_clopper_pearson_covers_at_least_95_percent_by_enumeration(rate):
    n = 40
    inside = [lo <= rate <= hi for lo, hi in (clopper_pearson(k, n) for k in range(n + 1))]
    assert stats.binom.pmf(np.arange(n + 1), n, rate)[inside].sum() >= 0.95


def test_no_violations_needs_enough_instances_and_one_violation_refutes():
    assert no_violations(0, 10_000, 1e-3).verdict == PASS
    assert no_violations(0, 1000, 1e-3).verdict == INCONCLUSIVE
    assert no_violations(1, 10**9, 1e-3).verdict == FAIL
    for count, band in ((0, (-np.inf, 1e-3)), (1, (-np.inf, 0.0))):  # what a statement without exceptions says of the rate
        d = no_violations(count, 5000, 1e-3)
        assert d.band == band and d.exact and not rate_at_most(count, 5000, 1e-3).exact
        assert (d.limits[1] <= band[1]) == (d.verdict == PASS) and (d.limits[0] > band[1]) == (d.verdict == FAIL)


def test_a_rate_is_judged_by_its_exact_binomial_tails():
    assert rate_at_most(20, 1000, 0.1).verdict == PASS
    assert rate_at_most(100, 1000, 0.1).verdict == INCONCLUSIVE
    assert rate_at_most(200, 1000, 0.1).verdict == FAIL
    expected = stats.binomtest(80, 1000, 0.1, alternative="less").pvalue
    np.testing.assert_allclose(rate_at_most(80, 1000, 0.1).p_pass, expected, rtol=1e-12)


def test_a_claim_of_parts_passes_with_all_and_fails_with_one():
    good, bad, open_ = equivalence([0.0, 0.1] * 3, -1, 1), equivalence([3.0, 3.1] * 3, -1, 1), equivalence([0.9, 1.1] * 3, -1, 1)
    assert all_of([good, good]).verdict == PASS
    assert all_of([good, bad]).verdict == FAIL and all_of([good, bad]).measured == bad.measured
    assert all_of([good, open_]).verdict == INCONCLUSIVE
    np.testing.assert_allclose(all_of([bad, good]).p_fail, 2 * bad.p_fail)


def test_holm_agrees_with_the_worked_example():
    # p = .01, .04, .03, .005 with four hypotheses (Wikipedia, "Holm-Bonferroni method"): only .005 and .01 are rejected at 5 %
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]).shape == (0,)


def test_a_verdict_that_does_not_survive_holm_becomes_inconclusive():
    weak = equivalence([0.0, 0.9, -0.9, 1.3, -1.3, 0.0], -1, 1)
    strong = equivalence([0.0, 0.01] * 3, -1, 1)
    assert weak.verdict == PASS and weak.p > 0.025
    after = adjust([to_verdict("a", weak), to_verdict("b", strong), to_verdict("c", weak)])
    assert [v.verdict for v in after] == [INCONCLUSIVE, PASS, INCONCLUSIVE]
    assert "not after Holm" in after[0].note


@pytest.mark.fault("F24")
@pytest.mark.parametrize("trainings", [1, 3])
def test_intervals_over_trainings_and_tasks_cover_95_percent(trainings):
    """One training: of the models at hand. Three: of what a new training gives, whose effect all tasks of a model share."""
    rng = np.random.default_rng(trainings)
    runs, strata, tasks = 2000, 3, 20
    effects = rng.normal(scale=0.1, size=(runs, strata, trainings, 1))
    values = effects + rng.normal(scale=0.2, size=(runs, strata, trainings, tasks))
    truths = effects.mean((1, 2, 3)) if trainings == 1 else np.zeros(runs)
    intervals = [clustered_ci(run)[1] for run in values]
    covered = np.mean([lo <= truth <= hi for (lo, hi), truth in zip(intervals, truths, strict=True)])
    assert 0.95 - 5 * np.sqrt(0.95 * 0.05 / runs) < covered < 0.98
    if trainings > 1:  # tasks of one model are not independent
        naive = [mean_ci(run.ravel())[1] for run in values]
        assert np.mean([lo <= 0 <= hi for lo, hi in naive]) < 0.75


def test_one_stratum_of_one_cluster_is_the_t_interval_over_its_values():
    values = np.random.default_rng(3).normal(0.3, 1, size=9)
    assert clustered_ci([[values]])[1] == pytest.approx(mean_ci(values)[1], rel=1e-12)
    one, other = clustered([[values]], 0.0, np.inf), equivalence(values, 0.0, np.inf)
    assert (one.n, one.verdict) == (9, other.verdict) and one.p_pass == pytest.approx(other.p_pass, rel=1e-12)


def test_a_contrast_of_two_strata_is_welchs_t_test():
    rng = np.random.default_rng(4)
    one, other = rng.normal(0.5, 1, size=12), rng.normal(0, 3, size=7)
    d = clustered([[one], [other]], 0.0, np.inf, weights=(1, -1))
    welch = stats.ttest_ind(one, other, equal_var=False, alternative="greater")
    assert d.p_pass == pytest.approx(welch.pvalue, rel=1e-12) and d.measured == pytest.approx(one.mean() - other.mean())  # pyright: ignore
    assert d.n == 7 and not clustered([[one], [other]], 0.0, np.inf, weights=(1, -1), min_seeds=8).enough
    assert clustered([[one], [other]], 0.0, np.inf, min_seeds=19).enough


def test_a_stratum_with_several_clusters_counts_their_means():
    rng = np.random.default_rng(5)
    clusters = [rng.normal(m, 0.1, size=n) for m, n in ((0.0, 4), (1.0, 9), (2.0, 5))]
    assert clustered_ci([clusters])[1] == pytest.approx(mean_ci([v.mean() for v in clusters])[1], rel=1e-12)
    assert clustered([[[0.5]]], 0, 1, min_seeds=1).verdict == INCONCLUSIVE
    assert clustered([[[0.5], [0.5]]], 0, 1, min_seeds=2).verdict == PASS


@pytest.mark.parametrize("test", [lambda: clustered([], 0, 1), lambda: clustered_ci([])])
def test_no_strata_are_an_error_that_says_so(test):
    with pytest.raises(ValueError, match="strata must not be empty and must have one weight each; got 0 and 0"):
        test()


def test_strata_without_a_weight_each_are_refused():
    with pytest.raises(ValueError, match="one weight each; got 1 and 2"):
        clustered([[[0.0, 1.0]]], 0, 1, weights=(1, -1))


@pytest.mark.fault("F24")
@pytest.mark.parametrize("spread", [(0.0, 1.0), (1.0, 1.0), (3.0, 1.0)], ids=["tasks", "both", "trainings"])
def test_intervals_over_crossed_trainings_and_tasks_cover_95_percent(spread):
    of_trainings, of_tasks = spread
    rng = np.random.default_rng(0)
    values = (
        of_trainings * rng.normal(size=(2000, 3, 1)) / 5
        + of_tasks * rng.normal(size=(2000, 1, 40))
        + rng.normal(size=(2000, 3, 40))
    )
    covered = [low <= 0 <= high for _, (low, high) in map(crossed_ci, values)]
    assert 0.94 <= np.mean(covered) <= 0.99


def test_a_table_with_one_training_has_the_interval_over_its_tasks():
    values = np.random.default_rng(1).normal(size=(1, 30))
    assert crossed_ci(values) == mean_ci(values[0])
    assert crossed(values, -10, 10, min_seeds=2).verdict == INCONCLUSIVE
    three = np.repeat(values, 3, 0)
    assert crossed(three + np.array([[0.0], [0.01], [-0.01]]), -10, 10, min_seeds=3).verdict == PASS


def test_the_half_width_over_trainings_and_tasks_has_the_parts_of_both():
    v = np.random.default_rng(2).normal(size=(4, 6)) + np.arange(4)[:, None] + np.arange(6)
    parts = []
    for means in ([row.mean() for row in v], [column.mean() for column in v.T]):
        parts.append(stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / np.sqrt(len(means)))
    mean, (low, high) = crossed_ci(v)
    assert mean == pytest.approx(v.mean())
    assert (high - low) / 2 == pytest.approx(np.hypot(*parts))
    assert crossed(v, v.mean() - 1, np.inf, min_seeds=4).p_pass > crossed(v, v.mean() - 2, np.inf, min_seeds=4).p_pass


@pytest.mark.parametrize("values", [[1.0, 2.0], [[1.0, float("nan")]], [[]]])
def test_values_that_are_not_a_table_of_trainings_and_tasks_are_refused(values):
    with pytest.raises(ValueError, match="trainings, tasks"):
        crossed_ci(values)
