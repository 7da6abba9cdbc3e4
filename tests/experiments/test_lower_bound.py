"""One layer under kernels that differ: the records, what numpy says of them, and criteria that notice another law."""

import copy

import jax
import numpy as np
import pytest

from lindm.problems.linear_mdp import simplex_family
from lindm_experiments import lower_bound
from lindm_experiments.harness.claims import FAIL, PASS, Mutant, claim_ids
from lindm_experiments.harness.mutants import try_mutants
from lindm_experiments.lib import linear_mdps
from lindm_experiments.mutants import LOWER
from tests.experiments.conftest import smoke_records

REFUTED = ("lower-bound/unminimized", "lower-bound/policy-half")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(lower_bound)


def test_it_runs_and_decides_and_draws_what_it_says(records):
    verdicts = lower_bound.check(records)
    assert tuple(v.id for v in verdicts) == claim_ids("lower_bound")
    assert {v.figure for v in verdicts} <= set(lower_bound.plot(records))


def test_the_law_of_the_pairs_is_what_the_uniform_policy_visits_and_w_belongs_to_the_last_stage():
    family = simplex_family(jax.random.key(1), lower_bound.S, lower_bound.A, lower_bound.D, lower_bound.H, power=4.0, low=-1.0)
    tasks, w, law, Q = (jax.tree.map(np.asarray, v) for v in lower_bound.draw_tasks(jax.random.key(2), family, 3))
    for t in range(3):
        start = np.full(lower_bound.S, 1 / lower_bound.S)
        visits = np.einsum("s,sad,dx->x", start / lower_bound.A, tasks.phi[t], tasks.mu[t, 0])
        np.testing.assert_allclose(law[t], np.repeat(visits / lower_bound.A, lower_bound.A), rtol=1e-10)
        np.testing.assert_allclose(Q[t, -1], tasks.phi[t] @ w[t], rtol=1e-10)
    assert np.abs(law[0] - law[1]).max() > 0.02


def test_contexts_have_the_moments_of_their_law():
    family = simplex_family(jax.random.key(1), lower_bound.S, lower_bound.A, lower_bound.D, lower_bound.H, power=4.0)
    table, rng = np.asarray(linear_mdps.pairs_table(family)), np.random.default_rng(0)
    law = rng.dirichlet(np.ones(len(table)))
    G = lower_bound.draw_grams(rng, table, np.broadcast_to(law, (4000, len(law))), 5)
    np.testing.assert_allclose(G.mean(0), (table * law[:, None]).T @ table, atol=0.01)
    np.testing.assert_allclose(lower_bound.draw_grams(rng, table[:1], np.ones((1, 1)), 7)[0], np.outer(table[0], table[0]))


def test_the_iteration_is_that_of_a_loop():
    rng = np.random.default_rng(1)
    A, F, w = 0.1 * np.eye(2), rng.normal(size=(3, 2, 2)), rng.normal(size=(3, 2))
    G = F @ np.swapaxes(F, 1, 2)
    got = lower_bound.iterate(A, G, w, (1, 3))
    for t in range(3):
        guess = np.zeros(2)
        for k in range(1, 4):
            guess = guess + A @ (G[t] @ w[t] - G[t] @ guess)
            if k in (1, 3):
                np.testing.assert_allclose(got[k // 2][t], guess, rtol=1e-10)


def _ideal(records: list[dict]) -> list[dict]:
    out = [copy.deepcopy(records[i % len(records)]) for i in range(5)]
    for i, r in enumerate(out):
        near, k, t = 1 + 1e-3 * (i + 1), r["kernels"], r["twins"]
        k["exact"] = np.linspace(2.0, 1.01, len(r["M"])).tolist()
        k["floor"], k["unminimized"], k["power"], k["scale_share"] = 1.0, 1.3, 5.0, 0.1
        k["measured"] = (np.array(k["exact"]) * near).tolist()
        k["best"] = (np.array(k["exact"]) * near).tolist()
        k["depth_exact"] = np.geomspace(3.0, 0.01, len(r["depths"])).tolist()
        k["depth"] = (np.array(k["depth_exact"]) * near).tolist()
        k["loss"] = [0.1, 0.01 * near]
        # Var(c)/E[c^2] = 1/4
        k["scales"] = {"floor": 1.0, "one": near, "normalized": 0.01 * near, "power": 4.0, "mean": 0.75**0.5, "square": 1.0}
        n = len(r["M_twins"])
        t["test"], t["reduced"], t["full"] = [0.5] * n, [[0.5, 0.5]] * n, [0.25 * near] * n
        t["hand"], t["deep"], t["below"], t["layers"] = [0.25 * near] * n, [0.001 * near] * n, [0] * n, 1000
    return out


def _verdicts(records: list[dict]) -> dict[str, str]:
    return {v.id: v.verdict for v in lower_bound.check(records)}


def test_ideal_records_pass_but_for_the_two_mutants(records):
    assert _verdicts(_ideal(records)) == {id: FAIL if id in REFUTED else PASS for id in claim_ids("lower_bound")}


@pytest.mark.parametrize("claim", [id for id in claim_ids("lower_bound") if id not in REFUTED])
def test_another_law_fails(records, claim):
    mutants = _ideal(records)
    for i, r in enumerate(mutants):
        near, k, t = 1 + 1e-3 * i, r["kernels"], r["twins"]
        if claim == "lower-bound":
            k["measured"][0] *= 1.1
        if claim == "lower-bound/floor":  # the floor is 20 % too high
            k["floor"] = 1.25 * near
        if claim == "lower-bound/attained":
            k["measured"][-1] = 1.2 * near
        if claim in ("lower-bound/depth", "lower-bound/depth-exact"):
            k["depth"] = [3.0 * near] * len(k["depth"])
        if claim == "lower-bound/scale":
            k["scales"]["one"] = 1.3 * near
        if claim == "lower-bound/normalized":
            k["scales"]["normalized"] = near
        if claim == "lower-bound/policy-kernels":
            k["loss"][1] = 0.09 * near
        if claim == "lower-bound/policy":  # one A that sees more than S
            t["reduced"][0] = [0.4 * near, 0.5]
        if claim == "lower-bound/policy-full":  # one layer below a quarter
            t["below"][0] = 1
        if claim == "lower-bound/policy-attained":
            t["hand"][-1] = 0.3 * near
        if claim == "lower-bound/policy-depth":
            t["deep"][-1] = 0.25 * near
    assert _verdicts(mutants)[claim] == FAIL


@pytest.mark.parametrize("mutant", LOWER, ids=lambda m: f"{m.claim}: {m.mistake}")
def test_every_mutant_is_killed_on_ideal_records(records, mutant: Mutant):
    assert try_mutants([mutant], {"lower_bound": _ideal(records)})[0].killed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"M": (64, 16)}, "M must contain"),
        ({"depth": (2, 4)}, "depth must start at 1"),
        ({"least_scale": 1.5}, "least_scale be below 1"),
        ({"power": 0.0}, "power"),
        ({"layers": 0}, "layers"),
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        lower_bound.Config(**change)
