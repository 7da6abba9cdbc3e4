"""The tiger by three routes: its published values, the grid of beliefs, and the tree."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from lindm.problems.apomdp import single
from lindm.solvers import tree
from lindm_experiments.lib import tiger


def test_the_tiger_has_the_published_values():
    Q = tiger.tiger_answers(10)
    published = {1: -1, 2: -1.95, 3: 2.3098, 5: 2.7630961931, 10: 6.6933684318}
    for horizon, value in published.items():
        assert Q[horizon - 1, len(Q[0]) // 2].max() == pytest.approx(value, abs=1e-4 if horizon == 3 else 1e-9)


def test_the_tigers_grid_is_the_tree_at_every_belief():
    problem, left = single(tiger.tiger(4, 3, 5)), tiger.tiger_beliefs()
    Q = tiger.tiger_answers(5)[-1]
    for i in (0, 37, 211, len(left) - 3):
        start = jnp.array([[left[i], 1 - left[i], 0, 0]])
        moved = replace(problem, models=replace(problem.models, rho=start))
        np.testing.assert_allclose(tree.tree(moved).Q[0], Q[i], rtol=1e-12)
