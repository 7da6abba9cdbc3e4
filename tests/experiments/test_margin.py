"""The margin's records and verdicts."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.io import files
from lindm.problems.linear_mdp import second_moment, simplex_family
from lindm_experiments import margin
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from lindm_experiments.harness.experiments import points_of


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return [{"point": p} | files.to_jsonable(margin.measure(margin.SMOKE, p)) for p in points_of(margin, margin.SMOKE)]


def _ideal(steep: float, free: float, floor: float) -> list[dict]:
    """Records of power laws with these slopes and this share of the floor."""
    M, far = [8, 16, 32, 64], [512, 1024, 2048]
    record = {
        "M": M,
        "M_free": far,
        "seen": [1000, 500, 100, 30],
        "curves": {
            "gap": [m**steep for m in M],
            "no gap": [m**free for m in far],
            "floor": [floor] * 3,
        },
        "floor_predicted": 1.0,
        "smallest_gap": 0.5,
    }
    jitter = np.random.default_rng(0).normal(0, 1e-3, 6)
    out = [copy.deepcopy(record) for _ in jitter]
    for r, e in zip(out, jitter, strict=True):
        r["curves"]["gap"] = [y * m**e for y, m in zip(r["curves"]["gap"], M, strict=True)]
        r["curves"]["no gap"] = [y * m**e for y, m in zip(r["curves"]["no gap"], far, strict=True)]
        r["curves"]["floor"][-1] += e
    return out


def test_the_verdicts_follow_the_slopes():
    good = {v.id: v.verdict for v in margin.check(_ideal(-3.0, -1.0, 1.0))}
    assert good == dict.fromkeys(claim_ids("margin"), PASS)
    bad = {v.id: v.verdict for v in margin.check(_ideal(-0.5, -0.5, 0.5))}
    assert bad == dict.fromkeys(claim_ids("margin"), FAIL)


def test_lengths_at_which_hardly_a_loss_was_seen_are_not_fitted():
    records = _ideal(-3.0, -1.0, 1.0)
    for r in records:
        r["seen"][-1] = margin.ENOUGH - 1
        r["curves"]["gap"][-1] = 1e-300
    assert margin.check(records)[0].measured == pytest.approx(-3, abs=0.01)
    for r in records:
        r["seen"] = [0, 0, 0, 0]
    assert margin.check(records)[0].verdict != PASS


def test_the_floor_is_the_loss_of_the_policy_of_infinite_contexts():
    family = simplex_family(jax.random.key(4), 3, 2, 3, 2, low=-1.0, high=1.0)
    mdps, plans, w = tasks = margin.draw_tasks(jax.random.key(5), family, 8)
    A = jnp.stack([jnp.diag(jnp.array([1.0, 9.0, 3.0]))] * 2)
    loss, margins_ = margin.floor_and_margins(family, A, tasks)
    Lambda = np.asarray(second_moment(family))
    for i in range(8):
        values = np.einsum("sad,hd->hsa", family.phi, np.einsum("hij,jk,hk->hi", A, Lambda, w[i]))
        chosen = values.argmax(-1)
        V = np.zeros(3)
        for h in (1, 0):
            V = np.array([mdps.r[i, h, s, chosen[h, s]] + mdps.P[i, h, s, chosen[h, s]] @ V for s in range(3)])
        np.testing.assert_allclose(loss[i], (plans.V[i, 0] - V).mean(), atol=1e-12)
        right = np.asarray(plans.Q[i]).argmax(-1) == chosen
        assert bool((np.asarray(margins_[i]) > 0).all()) == bool(right.all())


@pytest.mark.slow
def test_smoke_records_and_figure(records):
    assert all(len(r["curves"]["gap"]) == len(r["M"]) and r["smallest_gap"] > 0 for r in records)
    assert all(b >= t - 1e-12 for r in records for b, t in zip(r["curves"]["rung 4"], r["curves"]["gap"], strict=True))
    assert set(margin.plot(records)) == {"margin"}


def test_a_config_out_of_range_names_its_field():
    for field, value in (("candidates", 1000), ("free_tasks", 0), ("M", (8,)), ("M_free", (16, 8)), ("N", 0)):
        with pytest.raises(ValueError, match=field):
            replace(margin.SMOKE, **{field: value})
