"""Problems by name."""

import math
from typing import Any

import jax
import numpy as np
import pytest

import lindm as ld
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


@pytest.mark.parametrize(
    ("name", "options"), [("maintenance", {}), ("maintenance", {"hidden": True}), ("inventory", {}), ("screening", {})]
)
def test_a_family_without_a_horizon_has_the_same_parameters_and_its_value_is_the_limit(name, options):
    endless: Any = make(name, horizon=math.inf, discount=0.5, seed=3, **options)
    ended: Any = make(name, horizon=5, discount=0.5, seed=3, **options)
    assert endless.actions == ended.actions and endless.states == ended.states and endless.discount == 0.5
    assert endless.observations == ended.observations
    np.testing.assert_array_equal(np.stack([P.toarray() for P in endless.P], 1), ended.problem.P[0])
    np.testing.assert_array_equal(endless.r, ended.problem.r[0])
    if endless.O:
        np.testing.assert_array_equal(np.stack([O.toarray() for O in endless.O]), ended.problem.O[0])
    solution, finite = ld.solve_stationary(endless, tolerance=1e-6), ld.solve(ended).value
    tail = np.array([endless.r.min(), endless.r.max()]) * 0.5**5 / (1 - 0.5)
    assert finite + tail[0] - 1e-6 <= solution.lower <= solution.upper <= finite + tail[1] + 1e-6


def test_what_has_no_infinite_horizon_says_why():
    for name, reason in (("apomdp", "ambiguous"), ("dosing", "ambiguous"), ("prostate", "ambiguous"), ("mdp", "random suites")):
        with pytest.raises(ValueError, match=f"horizon must be finite for {name}: .*{reason}"):
            make(name, horizon=math.inf)
    with pytest.raises(ValueError, match="discount must be below 1 where the horizon is infinite; gridworld has 1"):
        make("gridworld", horizon=math.inf)


def test_a_problem_with_a_horizon_of_its_own_is_no_stationary_one():
    with pytest.raises(ValueError, match=r"^problem must be a StationaryPOMDP .*; got NamedProblem$"):
        ld.solve_stationary(make("pomdp", states=2, actions=2, observations=2, horizon=2, gap=0.0))
