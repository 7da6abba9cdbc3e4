"""The price of having no oracle: records against loops, and verdicts that a broken bound turns."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.problems.linear_mdp import simplex_family
from lindm_experiments import bellman_horizon as exp
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(exp)


def _many(records: list[dict], power: float) -> list[dict]:
    big = copy.deepcopy(records * 3)
    for i, r in enumerate(big):
        r["n"] = 2000
        r["mean"]["injected"] = [h ** (power + 0.001 * i) for h in r["horizons"]]
    return big


def test_the_verdicts_follow_the_growth(records):
    def verdicts(records: list[dict]) -> dict[str, str]:
        return {v.id: v.verdict for v in exp.check(records)}

    as_claimed = dict.fromkeys(claim_ids("bellman_horizon"), PASS) | {"bellman-horizon/quadratic-price": FAIL}
    assert verdicts(_many(records, 1.0)) == as_claimed
    assert verdicts(_many(records, 2.0)) == as_claimed | {"bellman-horizon/linear": FAIL}
    price = _many(records, 1.0)
    for r in price:
        r["mean"] |= {"oracle": [1.0] * len(r["horizons"]), "bellman": r["horizons"]}
    assert verdicts(price) == as_claimed | {"bellman-horizon/quadratic-price": PASS}
    for spoil, claim in (
        (lambda r: r["violations"].update(linear=1), "bellman-horizon"),
        (lambda r: r["attained"].update(linear=[1.0, 0.99]), "bellman-horizon"),
        (lambda r: r["attained"].update(span=[1.0, 1.6]), "bellman-horizon/attained"),
        (lambda r: r["pessimism"].update(violations=1), "bellman-horizon/pessimism"),
    ):
        broken = _many(records, 1.0)
        for r in broken:
            spoil(r)
        assert verdicts(broken)[claim] == FAIL


def test_pessimism_costs_nothing_where_nothing_is_uncertain_and_its_bound_is_the_sum_along_the_optimal_policy():
    family = simplex_family(jax.random.key(1), 4, 2, 3, 3)
    mdps, plans, _, _ = exp.backward_pass(jax.random.key(2), family, tasks=8, M=16)
    loss, bound = exp.pessimistic_losses(jax.random.key(0), mdps, plans, jnp.asarray(0.0))
    np.testing.assert_allclose([loss, bound], 0, atol=1e-12)
    loss, bound = exp.pessimistic_losses(jax.random.key(0), mdps, plans, jnp.asarray(0.3))
    assert (loss <= bound).all() and (bound <= 2 * 3 * 0.3).all() and bound.min() > 0


def test_losses_and_bounds_by_horizon_are_those_of_loops():
    family = simplex_family(jax.random.key(1), 4, 2, 3, 3, low=-1.0, high=1.0)
    mdps, plans, Q, by_oracle = exp.backward_pass(jax.random.key(2), family, tasks=8, M=16)
    out = exp.losses_and_bounds(mdps, plans, Q, by_oracle)
    for n in range(4):
        P, r, q = (np.asarray(x[n]) for x in (mdps.P, mdps.r, Q))
        V = np.zeros((4, 4))
        best = np.zeros((4, 4))
        e = np.zeros(3)
        for h in (2, 1, 0):
            chosen = q[h].argmax(-1)
            V[h] = [r[h, s, chosen[s]] + P[h, s, chosen[s]] @ V[h + 1] for s in range(4)]
            best[h] = (r[h] + P[h] @ best[h + 1]).max(-1)
            later = q[h + 1].max(-1) if h < 2 else np.zeros(4)
            e[h] = np.abs(r[h] + P[h] @ later - q[h]).max()
        for H in (1, 2, 3):
            h0 = 3 - H
            np.testing.assert_allclose(out["bellman"][n, H - 1], (best[h0] - V[h0]).mean(), atol=1e-12)
            np.testing.assert_allclose(out["linear"][n, H - 1], 2 * e[h0:].sum(), rtol=1e-12)
            quadratic = 2 * sum(e[i:].sum() for i in range(h0, 3))
            np.testing.assert_allclose(out["quadratic"][n, H - 1], quadratic, rtol=1e-12)


def test_exact_backups_lose_nothing():
    family = simplex_family(jax.random.key(1), 4, 2, 3, 3)
    mdps, plans, _, _ = exp.backward_pass(jax.random.key(2), family, tasks=8, M=16)
    np.testing.assert_allclose(exp.injected_losses(jax.random.key(0), mdps, plans, jnp.asarray(0.0)), 0, atol=1e-12)


def test_smoke_records_and_figure(records):
    for r in records:
        mean = r["mean"]
        assert all(t <= s <= 2 * q for t, s, q in zip(mean["bellman"], mean["span"], mean["quadratic"], strict=True))
        assert sum(r["violations"].values()) == 0
    assert set(exp.plot(records)) == {"horizon"}


def test_a_config_out_of_range_names_its_field():
    for field, value in (("tasks", 7), ("horizon", 2), ("M", 0), ("epsilon", 0.0)):
        with pytest.raises(ValueError, match=field):
            replace(exp.SMOKE, **{field: value})
