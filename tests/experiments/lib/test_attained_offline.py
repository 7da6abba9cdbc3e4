"""The instances that attain the bounds without an oracle: their truths by another route."""

import numpy as np

from lindm_experiments.lib import attained_offline


def test_bootstrapped_losses_are_those_of_their_recursions():
    instances = attained_offline.instances(17)
    for name in ("ties", "penalized"):
        i = instances[name]
        H, S = i.r.shape[:2]
        gap = (i.r[..., 0] - i.r[..., 1])[:, 0]
        np.testing.assert_allclose(i.truth, gap.sum())  # the action does not move the state
        assert (i.Qhat.argmax(-1) == 1).all() and (H, S) == (4, 3)
    roads = instances["two roads"]
    assert roads.Qhat[0, 0].argmax() == 1
    np.testing.assert_allclose(roads.truth, roads.r[1, 1, 0])
