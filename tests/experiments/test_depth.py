"""Depth: smoke, predictions by another route, and a verdict that can fail."""

import copy
import dataclasses
from itertools import product
from math import factorial, prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.problems.linear_mdp import onehot_family
from lindm_experiments import depth
from lindm_experiments.harness.claims import claim_ids
from lindm_experiments.harness.experiments import points_of
from lindm_experiments.lib import linear_mdps


@pytest.fixture(scope="module")
def records():
    return [{"point": p} | depth.measure(depth.SMOKE, p) for p in points_of(depth, depth.SMOKE)]


def on_the_lines(record: dict, seeds: int = 8) -> list[dict]:
    """The record as if the measurement were right, with small differences between the seeds."""
    out = []
    for seed in range(seeds):
        r, factor = copy.deepcopy(record), 1 + 1e-3 * (-1) ** seed
        r["bias"]["measured"] = [[v * factor**k for k, v in enumerate(row)] for row in r["bias"]["exact"]]
        layers = len(r["onehot"]["measured"][0])
        r["onehot"]["measured"] = [[factor * v for v in row[:layers]] for row in r["onehot"]["exact"]]
        for f in r["finite"]:
            f["inside"] = [0.5**k * factor**k for k in range(len(f["clean"]))]
            f["stable"], f["limit"] = 1.0, [factor, 1.0]
        for d in r["deep"].values():
            d["trained"][-1] = 0.5 * factor * d["repeated"]
        out.append(r)
    return out


def test_smoke_gives_every_verdict_and_figure(records):
    verdicts = depth.check(on_the_lines(records[0]))
    assert [v.id for v in verdicts] == list(claim_ids("depth"))
    assert [v.verdict for v in verdicts] == ["PASS"] * 5
    assert set(depth.plot(records)) == {v.figure for v in verdicts}


def test_the_bias_is_the_error_of_the_repeated_layer_on_population_moments_in_numpy(records):
    cfg = depth.SMOKE
    family = depth.feature_family(cfg, cfg.base_seed)
    pools = linear_mdps.task_pool(jax.random.split(jax.random.key(cfg.base_seed), 7)[0], family)
    Psi = np.asarray(linear_mdps.pool_moment(pools[:, cfg.contexts :]))
    w = np.asarray(pools[0, : depth.BLOCK])
    x, p = np.asarray(linear_mdps.pairs_table(family)), np.asarray(family.design)
    Lambda = (x * p[:, None]).T @ x
    K = (x * (p * np.einsum("ni,ij,nj->n", x, Psi[0], x))[:, None]).T @ x
    for i, N in enumerate(cfg.N):
        A = Psi[0] @ Lambda @ np.linalg.inv((1 - 1 / N) * Lambda @ Psi[0] @ Lambda + K / N)
        guess = np.zeros_like(w)
        for k in range(cfg.layers):
            guess = guess + (w - guess) @ Lambda @ A.T
            e = guess - w
            np.testing.assert_allclose(records[0]["bias"]["exact"][i][k], np.mean((e @ Lambda) * e) * e.shape[1], rtol=1e-8)


def test_the_tabular_risk_is_the_sum_over_all_counts():
    """Every way of distributing M pairs over the coordinates, with its multinomial weight."""
    a, rho, psi, M, k = np.array([1.5, 3.0, 4.0]), np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.5, 2.0]), 5, 3
    total = 0.0
    for n in product(range(M + 1), repeat=3):
        if sum(n) == M:
            weight = factorial(M) / prod(map(factorial, n)) * np.prod(rho ** np.array(n))
            total += weight * np.sum(rho * psi * (1 - a * np.array(n) / M) ** (2 * k))
    actual = depth.exact_onehot(jnp.asarray(a), jnp.asarray(rho), jnp.asarray(psi), M=M)[k - 1]
    np.testing.assert_allclose(actual, total, rtol=1e-10)


def test_the_tabular_measurement_is_near_it():
    family = onehot_family(3, 2, 1, low=-1.0, high=1.0)
    key = jax.random.key(3)
    w = depth.last_stage_tasks(key, family, tasks=depth.BLOCK)
    a = jnp.full(6, 3.0)
    actual = depth.onehot_risk(key, family, a, w, jnp.asarray([8.0, 32.0]), contexts=16384, longest=32, layers=2)
    expected = [depth.exact_onehot(a, family.design, jnp.square(w).mean(0), M=M)[:2] for M in (8, 32)]
    np.testing.assert_allclose(actual, np.array(expected), rtol=0.03)


@pytest.mark.parametrize("which", range(5))
def test_a_mutated_record_turns_the_verdict_into_fail(records, which):
    wrong = on_the_lines(records[0])
    for r in wrong:
        if which == 0:
            r["bias"]["measured"][-1][1] *= 1.2
        elif which == 1:
            r["onehot"]["measured"][0][-1] *= 1.2
        elif which == 2:
            r["finite"][0]["inside"][-1] = 2 * r["finite"][0]["inside"][0] * (1 + r["finite"][0]["inside"][1])
        elif which == 3:
            r["finite"][-1]["limit"][0] *= 1.1
        else:
            for d in r["deep"].values():
                d["trained"][-1] *= 3
    assert depth.check(wrong)[which].verdict == "FAIL"


@pytest.mark.parametrize("bad", [{"contexts": 100}, {"deep": (1,)}, {"M": (8, 4)}, {"sigma": 0.0}, {"kappa": 0.5}, {"N": ()}])
def test_a_config_out_of_range_names_the_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        dataclasses.replace(depth.QUICK, **bad)
