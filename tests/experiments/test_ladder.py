"""The ladder's records: exact losses, bounds above them, and verdicts that a broken bound turns."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.problems.linear_mdp import draw_task, second_moment
from lindm.solvers.dp import plan_linear
from lindm_experiments import ladder
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(ladder)


@pytest.fixture
def many(records) -> list[dict]:
    """As many seeds and policies as a verdict needs, by repetition: only `check` is under test with these."""
    big = copy.deepcopy(records * 3)
    for r in big:
        for c in r["cells"]:
            c["n"] = 2000
            c["norm"] = 0.4  # its claim is about longer contexts
    return big


def test_every_rung_is_above_the_truth_on_average_and_never_broken(records):
    for cell in (c for r in records for c in r["cells"]):
        mean = cell["mean"]
        assert all(
            mean[rung] >= mean["suboptimality"]
            for rung in (*ladder.PER_POLICY, "expected", "expected_tight", "high_probability", "mean_policy")
        )
        assert mean["span_per_state"] <= mean["span_per_stage"] <= mean["sup_norm"] <= mean["error_parts"] * (1 + 1e-9)
        assert mean["margin"] <= mean["span_per_stage"]
        assert sum(cell["violations"].values()) == cell["identity_off"] == 0


def test_all_claims_pass_on_enough_seeds(many):
    assert {v.id: v.verdict for v in ladder.check(many)} == dict.fromkeys(claim_ids("ladder"), PASS)


@pytest.mark.parametrize(
    ("claim", "spoil"),
    [
        ("identity", lambda c: c.update(identity_off=1)),
        ("ladder", lambda c: c["violations"].update({"margin": 1})),
        ("expected-bound", lambda c: c["mean"].update({"expected": c["mean"]["suboptimality"] / 2})),
        ("expected-bound/mean-policy", lambda c: c["mean"].update({"mean_policy": c["mean"]["suboptimality"] / 2})),
        ("expected-bound/mean-policy", lambda c: c["mean"].update({"mean_policy": c["mean"]["expected"] * 2})),
        ("high-probability-bound", lambda c: c["violations"].update({"high_probability": c["n"] // 5})),
        ("high-probability-bound", lambda c: c.update(beyond=c["n"] // 5)),
        ("high-probability-bound/radius", lambda c: c.update(norm=0.1)),
    ],
)
def test_a_broken_bound_turns_its_verdict(many, claim, spoil):
    for r in many:
        spoil(r["cells"][0])
        for c in r["cells"][1:] if claim.startswith("high-probability-bound") else ():
            spoil(c)
    assert next(v for v in ladder.check(many) if v.id == claim).verdict == FAIL


@pytest.mark.parametrize(
    ("claim", "pair"),
    [
        ("ladder", "error_parts"),
        ("expected-bound", "expected, noise"),
        ("expected-bound/mean-policy", "mean_policy"),
        ("high-probability-bound", "high_probability, noise"),
        ("high-probability-bound", "radius, rare"),
    ],
)
def test_a_bound_below_the_truth_of_its_instance_turns_its_verdict(many, claim, pair):
    many[0]["attained"][pair] = [1.0, 0.999]
    assert next(v for v in ladder.check(many) if v.id == claim).verdict == FAIL


def test_a_rung_far_above_the_truth_of_its_instance_is_not_attained(many):
    for r in many:
        r["attained"]["mean_policy"] = [1.0, 1.6]
    assert next(v for v in ladder.check(many) if v.id == "ladder/attained").verdict == FAIL


def test_rung_4_is_the_formula_of_numpy_and_the_same_for_every_task():
    cfg = ladder.SMOKE
    family = ladder.families(jax.random.key(5))["simplex"]
    Psi = jnp.stack([jnp.eye(5) * (h + 1) for h in range(4)])
    Ahat = jnp.stack([jnp.eye(5) * 2.0 for _ in range(4)])
    at = jnp.asarray(8.0), jnp.asarray(cfg.half_width), jnp.asarray(cfg.delta)
    got = ladder.rungs_of_tasks(jax.random.key(1), family, Ahat, Ahat, Psi, *at, tasks=3, longest=8)["expected"]
    x = np.asarray(family.phi).reshape(-1, 5)
    L = x.T @ x / len(x)
    total = 0.0
    for h in range(4):
        P = np.asarray(Psi[h])
        K = (x * np.einsum("ni,ij,nj->n", x, P, x)[:, None]).T @ x / len(x)
        R = K - L @ P @ L + cfg.half_width**2 / 3 * L
        off = 2 * L - np.eye(5)
        total += np.sqrt(4 * np.trace(L @ R) / 8) + np.sqrt(np.trace(L @ off @ P @ off.T))
    norm = max(np.sqrt(v @ np.linalg.solve(L, v)) for v in x)
    np.testing.assert_allclose(got, [2 * norm * total] * 3, rtol=1e-10)


def test_the_loss_of_one_policy_is_that_of_a_loop_over_the_stages():
    family = ladder.families(jax.random.key(2))["simplex"]
    zero = jnp.zeros((4, 5, 5))  # a layer of zeros: every action ties, greedy takes the first
    out = ladder.rungs_of_tasks(
        jax.random.key(3), family, zero, zero, zero, jnp.asarray(4.0), jnp.asarray(0.0), jnp.asarray(0.1), tasks=32, longest=4
    )
    k_task = jax.random.split(jax.random.split(jax.random.key(3), 32)[7])[0]
    task = draw_task(k_task, family)
    P = np.einsum("sad,hdt->hsat", task.phi, task.mu)
    r = np.einsum("sad,hd->hsa", task.phi, task.theta)
    best, first = np.zeros(12), np.zeros(12)
    for h in reversed(range(4)):
        best, first = (r[h] + P[h] @ best).max(1), (r[h] + P[h] @ first)[:, 0]
    np.testing.assert_allclose(out["suboptimality"][7], (best - first).mean(), rtol=1e-10)
    np.testing.assert_allclose(plan_linear(task)[0].V[0], best, rtol=1e-10)


def test_the_figures_show_every_family(records):
    figures = ladder.plot(records)
    assert set(figures) == {"waterfall", "growth", "attained"}
    *panels, legend = figures["waterfall"].axes
    assert len(panels) == len(ladder.families(jax.random.key(0))) and not legend.axison


def test_a_config_out_of_range_names_its_field():
    for field, value in (("tasks", 0), ("M", (0,)), ("half_width", float("nan")), ("delta", 0.2)):
        with pytest.raises(ValueError, match=field):
            replace(ladder.SMOKE, **{field: value})


def test_the_families_are_distributions_over_pairs():
    for family in ladder.families(jax.random.key(0)).values():
        assert np.isclose(family.design.sum(), 1)
        assert np.linalg.eigvalsh(second_moment(family))[0] > 0
