"""A curve with a jump is distinguished from convex curves, and the place where it reaches a level is found."""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from lindm_experiments.lib.jumps import (
    change_point,
    doublings_of_fall,
    evidence_of_jump,
    power_law,
    sequences_to_reach,
    stretched_exponential,
)

N = 1000.0 * np.arange(1, 21)
NOISE = np.random.default_rng(0).normal(size=20)


def test_a_power_law_is_found_and_no_jump_is_seen_in_it():
    y = 0.3 + 2.0 * (N / N[0]) ** -0.7
    fit = power_law(N, y)
    np.testing.assert_allclose(fit.values, y, atol=1e-4)
    assert evidence_of_jump(N, y + 0.01 * NOISE) < 0


def test_the_fit_of_a_power_law_is_that_of_scipy():
    y = 0.3 + 2.0 * (N / N[0]) ** -0.7 + 0.02 * NOISE
    found, _ = curve_fit(lambda n, c, a, b: c + a * n**-b, N / N[0], y, p0=(0.5, 1.0, 1.0), bounds=(0, np.inf))
    residual = ((y - found[0] - found[1] * (N / N[0]) ** -found[2]) ** 2).sum()
    assert power_law(N, y).residual == pytest.approx(residual, rel=1e-4)


CONVEX = {
    "power law": 0.3 + 2.0 * (N / N[0]) ** -0.7,
    "exponential": 0.3 + 2.0 * np.exp(-N / 3000),
    "stretched exponential": 0.3 + 2.0 * np.exp(-((N / 3000) ** 0.5)),
}


@pytest.mark.parametrize("curve", CONVEX.values(), ids=CONVEX)
def test_no_jump_is_seen_in_a_convex_curve(curve):
    assert evidence_of_jump(N, curve + 0.01 * NOISE) < 0.1
    assert doublings_of_fall(N, curve) > 1


def test_a_stretched_exponential_is_found():
    assert stretched_exponential(N, CONVEX["stretched exponential"]).residual < 1e-3


def test_the_fall_of_a_line_from_three_quarters_to_one_quarter():
    n = np.array([1.0, 2, 3, 4, 5])
    assert doublings_of_fall(n, [1.0, 0.75, 0.5, 0.25, 0.0]) == pytest.approx(1.0)  # from 2 to 4


@pytest.mark.parametrize("k", [3, 8, 16])
def test_a_jump_is_found_where_it_is_and_no_power_law_describes_it(k):
    y = np.where(np.arange(20) < k, 1.04, 0.75 - 0.02 * np.log(N / N[0])) + 0.005 * NOISE
    assert change_point(N, y)[1] == k
    assert evidence_of_jump(N, y) > 1


def test_a_change_point_by_least_squares_over_all_points_is_that_of_a_design_matrix():
    y = np.cos(np.arange(20) / 3)
    x = np.log(N)
    residuals = {}
    for k in range(3, 18):
        before = np.arange(20) < k
        design = np.stack([before, before * x, ~before, ~before * x], 1).astype(float)
        residuals[k] = float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())
    fit, k = change_point(N, y)
    assert k == min(residuals, key=residuals.__getitem__)
    assert fit.residual == pytest.approx(residuals[k], rel=1e-6)


def test_too_short_a_curve_has_no_change_point():
    with pytest.raises(ValueError, match="n must contain at least 6 numbers; got 5"):
        change_point(N[:5], N[:5])


def test_the_number_of_sequences_at_a_level_is_between_the_points_around_it():
    y = [1.0, 0.8, 0.4, 0.6, 0.2, 0.1]
    n = 10.0 ** np.arange(6)
    assert sequences_to_reach(n, y, 0.5) == pytest.approx(10 ** (3 + 0.25))  # it rises above once more
    assert sequences_to_reach(n, y, 2.0) == 1
    assert sequences_to_reach(n, y, 0.05) is None
