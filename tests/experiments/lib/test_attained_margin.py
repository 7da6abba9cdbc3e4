"""The instance that attains the exponents of the margin: its truth by another route."""

import numpy as np

from lindm_experiments.lib import attained_margin


def test_the_decay_is_that_of_a_sum_of_signs():
    i = attained_margin.decaying(np.random.default_rng(3))
    share = i.phi[-1, 0, 1] * i.g[0] / i.noise_bound
    rate = ((1 + share) * np.log1p(share) + (1 - share) * np.log1p(-share)) / 2  # relative entropy to a fair coin
    np.testing.assert_allclose(1 / i.truth, rate, rtol=6e-3)
    assert 1 / i.truth >= rate
