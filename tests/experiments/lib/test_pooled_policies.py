"""The two instances of shared prompts with known losses."""

import numpy as np

from lindm_experiments.lib import pooled_policies


def test_the_copied_trajectory_has_its_closed_form_and_attains_both_bounds():
    p, gap = 0.7, 0.4
    rng = np.random.default_rng(3)
    out = pooled_policies.copied(rng, (p, p, p), gap, 2)
    np.testing.assert_allclose([out["truth"], out["rung"], out["occupancy"]], gap * p**3, rtol=1e-9)
    np.testing.assert_allclose(out["mean"], gap * p**6, rtol=1e-9)
    out = pooled_policies.copied(rng, (p, 1.0, 1.0), gap, 1)
    np.testing.assert_allclose([out["price"], out["price bound"]], gap * p * (1 - p), rtol=1e-9)
