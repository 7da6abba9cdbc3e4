"""Problems by name."""

from typing import Any

import jax
import numpy as np
import pytest

from lindm.families.prostate import ACTIONS, CENTERS, OPTIONS, prostate
from lindm.families.random_suites import draw_task, suite
from lindm.families.registry import make
from lindm.types import POMDP


def test_a_suite_makes_the_task_that_it_draws():
    task: Any = make("mdp", horizon=4, split="ood", seed=7)
    assert task.actions == ()
    jax.tree.map(np.testing.assert_array_equal, task.problem, draw_task(jax.random.key(7), suite("mdp", 4, "ood")))


def test_fields_of_a_suite_can_be_changed():
    named: Any = make("pomdp", states=3, actions=2, observations=2, horizon=4, gap=0.0)
    task = named.problem
    assert isinstance(task, POMDP)
    assert (task.num_states, task.num_actions, task.num_observations, task.horizon) == (3, 2, 2, 4)


def test_prostate_takes_its_own_options_and_has_names():
    named: Any = make("prostate", horizon=3, alpha=0.2, biopsy_loss=0.1)
    jax.tree.map(np.testing.assert_array_equal, named.problem, prostate(3, 0.2, biopsy_loss=0.1))
    assert named.actions == ACTIONS and named.models == CENTERS
    prostate(**dict(zip(OPTIONS, (2, 0.5, 0.9, 0.1, 0.1, 0.1), strict=True)))  # every option exists


def test_unknown_names_and_options_are_named_in_the_error():
    with pytest.raises(ValueError, match=r"^name must be one of mdp, pomdp, apomdp, .*; got 'tiger'"):
        make("tiger")
    with pytest.raises(ValueError, match=r"^an option of apomdp 'distanse' is not known; did you mean distance\?"):
        make("apomdp", distanse=0.3)
    with pytest.raises(ValueError, match=r"^an option of prostate must be one of horizon, alpha, .*; got 'discuont'"):
        make("prostate", discuont=0.9)
    with pytest.raises(ValueError, match=r"^suite must be one of mdp, pomdp, apomdp; got 'mpd'"):
        suite("mpd")
