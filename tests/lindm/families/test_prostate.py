"""The prostate problem: its law of a year, its names and rewards, and its decisions, against a plain recursion over beliefs."""

import jax
import numpy as np
import pytest

from lindm.families.prostate import ACTIONS, CENTERS, OBSERVATIONS, STATES, prostate
from lindm.problems.apomdp import apomdp
from tests.lindm.problems.test_apomdp import action_values


def year(center: str, s: int, a: str):
    """Law of (next state, observation), step by step; states are numbered."""
    onset, sensitivity = {"JH": (0.0691, 0.7184), "UCSF": (0.1217, 0.7431), "UofT": (0.1016, 0.7949), "PRIAS": (0.0841, 0.7614)}[
        center
    ]
    low, high = {
        "JH": ([0.3552, 0.4311, 0.2137], [0.2868, 0.4706, 0.2426]),
        "UCSF": ([0.0768, 0.5680, 0.3552], [0.0678, 0.5736, 0.3586]),
        "UofT": ([0.4573, 0.3422, 0.2005], [0.3312, 0.2368, 0.4320]),
        "PRIAS": ([0.1361, 0.5357, 0.3282], [0.1094, 0.5501, 0.3405]),
    }[center]
    for ill, p in ((False, 1 - onset), (True, onset)) if s == 0 else ((True, 1.0),):
        for psa, q in enumerate(high if ill else low, 1):
            if s == 2:
                yield 2, f"psa-{psa}-{'null' if a == 'defer' else 'positive'}", p * q
            elif a == "defer":
                yield int(ill), f"psa-{psa}-null", p * q
            elif not ill:
                yield 0, f"psa-{psa}-negative", p * q
            else:
                yield 2, f"psa-{psa}-positive", p * q * sensitivity
                yield 1, f"psa-{psa}-negative", p * q * (1 - sensitivity)


def test_a_year_of_surveillance_is_progression_then_biopsy_then_observation():
    models = prostate(2).models
    for m, center in enumerate(CENTERS):
        for s in range(3):
            for a, action in enumerate(ACTIONS):
                want = np.zeros((3, 9))
                for t, seen, p in year(center, s, action):
                    want[t, OBSERVATIONS.index(seen)] += p
                got = np.asarray(models.P)[m, 0, s, a][:, None] * np.asarray(models.O)[m, 0, a]
                np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


def test_the_four_centers_are_a_valid_apomdp_with_names_and_stand_in_rewards():
    problem = prostate(4, 1.0, discount=0.5, biopsy_loss=0.1, untreated_loss=0.3, treated_loss=0.2)
    apomdp([jax.tree.map(lambda x, m=m: x[m], problem.models) for m in range(4)], problem.alpha)
    assert problem.models.P.shape == (len(CENTERS), 1, len(STATES), len(ACTIONS), len(STATES))
    assert problem.models.O.shape[-1] == len(set(OBSERVATIONS)) == 9
    np.testing.assert_allclose(problem.models.rho, [[1 - x, x, 0] for x in (0.0583, 0.0809, 0.0774, 0.0653)], rtol=1e-12)
    for m in range(4):
        np.testing.assert_allclose(problem.models.r[m, 1], np.array([[1, 0.9], [0.7, 0.6], [0.8, 0.7]]) / 2, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_decision_for_a_biopsy_depends_on_the_observation(alpha):
    models = prostate(4, alpha).models
    rho = np.asarray(models.rho)
    first = action_values(models, alpha, rho)
    assert first[0] > first[1] + 1e-3  # waiting is best at the start
    joint = np.einsum("ms,mst,mto->mot", rho, np.asarray(models.P)[:, 0, :, 0], np.asarray(models.O)[:, 0, 0])
    mass = joint.sum(-1)
    tau = (joint / np.where(mass > 0, mass, 1)[..., None])[mass > 0]
    second = action_values(models, alpha, np.repeat(tau[:, None], 4, axis=1), 1)
    assert len(set(second.argmax(-1))) == 2


def test_numbers_out_of_range_raise_an_error_that_names_them():
    for arguments, rule in (
        ({"horizon": 0}, "horizon must be a whole number"),
        ({"alpha": 2.0}, "alpha must be a number in"),
        ({"discount": -0.1}, "discount must be a number in"),
        ({"biopsy_loss": -0.1}, "biopsy_loss must be finite and not negative"),
        ({"treated_loss": float("nan")}, "treated_loss must be"),
        ({"untreated_loss": float("inf")}, "untreated_loss must be"),
    ):
        with pytest.raises(ValueError, match=rule):
            prostate(**arguments)
