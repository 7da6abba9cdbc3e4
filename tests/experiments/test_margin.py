"""The margin's records and verdicts."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lindm.problems.linear_mdp import second_moment, simplex_family
from lindm_experiments import margin
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(margin)


M, FAR = [12, 16, 24, 32, 48, 64, 96, 128], [512, 1024, 2048]


def _ideal(decay, free=-1.0, constant=1.0, floor=1.0) -> list[dict]:
    """Records with the loss decay(M) where there is a gap, constant M^free without one, and this share of the floor."""
    rng = np.random.default_rng(0)
    records = []
    for _ in range(10):
        gap = decay(np.array(M, float)) * np.exp(rng.normal(0, 0.03, len(M)))
        no_gap = constant * 512.0 ** (-1 - free) * np.array(FAR, float) ** free * np.exp(rng.normal(0, 0.01))
        records.append(
            {
                "M": M,
                "M_free": FAR,
                "seen": [1000] * len(M),
                "curves": {
                    "gap": gap.tolist(),
                    "no gap": no_gap.tolist(),
                    "floor": [floor + rng.normal(0, 1e-3)] * 3,
                    "mean policy": (8 * gap).tolist(),
                },
                "floor_predicted": 1.0,
                "no_gap_constant": 1.0,
                "smallest_gap": 0.5,
                "attained": {"bernstein": [60.0, 64.0], "cramer": [60.0, 60.1]},
            }
        )
    return copy.deepcopy(records)


def test_an_exponential_passes_and_no_power_does():
    for rate in (0.02, 0.04, 0.08):
        assert margin.check(_ideal(lambda M, rate=rate: 0.1 * np.exp(-rate * M) / np.sqrt(M)))[0].verdict == PASS
    for power in (0.5, 1.0, 2.5, 5.0):
        assert margin.check(_ideal(lambda M, power=power: 3.0 * M**-power))[0].verdict == FAIL
    # nor does a power that sets in late
    assert margin.check(_ideal(lambda M: 3.0 * (15.0**4 + M**4) ** -0.625))[0].verdict == FAIL


def test_the_verdicts_follow_the_slopes_the_constant_and_the_floor():
    def verdicts(**changes):
        return {v.id: v.verdict for v in margin.check(_ideal(lambda M: np.exp(-0.05 * M), **changes))}

    good = verdicts()
    assert good == dict.fromkeys(claim_ids("margin"), PASS)
    assert verdicts(free=-0.5)["margin/no-gap"] == FAIL
    for constant in (0.5, 2.0):
        assert verdicts(constant=constant) == good | {"margin/no-gap-constant": FAIL}
    assert verdicts(floor=0.5) == good | {"margin/floor": FAIL}


def test_lengths_at_which_hardly_a_loss_was_seen_are_not_fitted():
    records = _ideal(lambda M: np.exp(-0.07 * M))
    for r in records:
        r["seen"][-1] = margin.ENOUGH - 1
        r["curves"]["gap"][-1] = 1e-300
    measured = margin.check(records)[0].measured
    assert measured is not None and 1.4 < measured < 4
    for r in records:
        r["seen"] = [0] * len(M)
    assert margin.check(records)[0].verdict != PASS


def test_every_seed_has_its_own_feature_map_with_two_actions_apart_in_every_state():
    maps = np.stack([margin.draw_family(jax.random.key(seed)).phi for seed in range(20)])
    assert np.linalg.norm(maps[:, :, 0] - maps[:, :, 1], axis=-1).min() >= margin.APART
    assert len(np.unique(maps.reshape(20, -1), axis=0)) == 20


def test_the_losses_are_those_of_drawn_contexts():
    family = margin.draw_family(jax.random.key(1))
    mdps, plans, w = tasks = margin.draw_tasks(jax.random.key(2), family, 3)
    A = jnp.stack([jnp.diag(jnp.array([1.0, 2.0, 3.0])), jnp.eye(3)])
    got = margin.losses(np.random.default_rng(3), family, A, tasks, contexts=4, lengths=(5, 9))
    counts = np.random.default_rng(3).multinomial(np.array([[5], [4]]), family.design, size=(3, 4, 2, 2)).cumsum(2)
    pairs = np.asarray(family.phi).reshape(6, 3)
    for t, c, i in np.ndindex(3, 4, 2):
        assert counts[t, c, i].sum(-1).tolist() == [(5, 9)[i]] * 2
        x = [np.repeat(pairs, counts[t, c, i, h], axis=0) for h in range(2)]
        S = [x[h].T @ (x[h] @ w[t, h]) / len(x[h]) for h in range(2)]
        chosen = np.stack([(family.phi @ A[h] @ S[h]).argmax(-1) for h in range(2)])
        V = np.zeros(3)
        for h in (1, 0):
            V = np.array([mdps.r[t, h, s, chosen[h, s]] + mdps.P[t, h, s, chosen[h, s]] @ V for s in range(3)])
        np.testing.assert_allclose(got[t, c, i], (plans.V[t, 0] - V).mean(), atol=1e-12)


def test_the_constant_without_a_gap_is_that_of_the_sum_over_states():
    family = margin.draw_family(jax.random.key(1))
    mdps, plans, w = tasks = margin.draw_tasks(jax.random.key(2), family, 40)
    A, width = np.stack([np.diag([1.0, 2.0, 3.0])] * 2), 0.3
    pairs, expected = np.asarray(family.phi).reshape(6, 3), 0.0
    for t in range(40):
        best = np.asarray(plans.Q[t]).argmax(-1)
        visits = np.stack([np.full(3, 1 / 3), np.full(3, 1 / 3) @ np.asarray(mdps.P[t, 0])[np.arange(3), best[0]]])
        for h, s in np.ndindex(2, 3):
            side = A[h].T @ np.asarray(family.phi[s, 1] - family.phi[s, 0])
            part = pairs @ side * (pairs @ w[t, h])
            if abs(plans.Q[t, h, s, 0] - plans.Q[t, h, s, 1]) < width:
                expected += visits[h, s] * np.var(part) / 4 / width / 40
    np.testing.assert_allclose(margin.no_gap_constant(family, jnp.asarray(A), tasks, jnp.asarray(width)), expected, rtol=1e-9)


def test_the_exponent_is_that_of_the_state_in_which_a_wrong_action_is_likeliest():
    family = margin.draw_family(jax.random.key(1))
    _, plans, w = tasks = margin.draw_tasks(jax.random.key(2), family, 6)
    A = np.stack([np.linalg.inv(second_moment(family))] * 2)
    pairs, t = np.asarray(family.phi).reshape(6, 3), np.linspace(0, 400, 40001)
    for i, got in enumerate(np.asarray(margin.exponents(family, jnp.asarray(A), tasks))):
        rates = []
        for h, s in np.ndindex(2, 3):
            best = int(np.asarray(plans.Q[i, h, s]).argmax())
            part = pairs @ A[h].T @ np.asarray(family.phi[s, best] - family.phi[s, 1 - best]) * (pairs @ w[i, h])
            rates.append(np.max(np.log(6) - scipy.special.logsumexp(-np.outer(t, part), axis=1)))
        assert abs(got - min(rates)) < 5e-3 * min(rates) + 1e-5


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
    for bound in ("mean policy", "theorem 5", "rung 4"):
        assert all(b >= t - 1e-12 for r in records for b, t in zip(r["curves"][bound], r["curves"]["gap"], strict=True))
    assert set(margin.plot(records)) == {"margin"}


def test_a_config_out_of_range_names_its_field():
    for field, value in (("pool", 1000), ("gap_tasks", 2000), ("free_tasks", 0), ("M", (8,)), ("M_free", (16, 8)), ("N", 0)):
        with pytest.raises(ValueError, match=field):
            replace(margin.SMOKE, **{field: value})
