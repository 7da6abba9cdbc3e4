"""Attitudes to ambiguity: policies one by one, `prostate` with all its observations, and verdicts of changed records."""

import copy
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.families.prostate import prostate
from lindm.solvers import tree
from lindm.solvers.policy_values import whole_horizon_value
from lindm.types import APOMDP, POMDP
from lindm_experiments import ambiguity
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from lindm_experiments.lib import apomdps
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(ambiguity)


def test_smoke_records_decide_every_claim_and_draw_every_figure(records):
    verdicts = ambiguity.check(records)
    assert tuple(v.id for v in verdicts) == claim_ids("ambiguity")
    assert {v.figure for v in verdicts} == set(ambiguity.plot(records))


def test_four_observations_a_year_have_the_information_of_nine():
    problem = prostate(3, alpha=0.3)
    fewer = apomdps.merge_observations(problem)
    np.testing.assert_allclose(fewer.models.O.sum(-1), 1, rtol=1e-15)
    np.testing.assert_allclose(tree.value(fewer), tree.value(problem), rtol=1e-13)


def test_a_draw_of_the_rewards_and_its_mirror_image_are_around_the_defaults():
    draws = ambiguity.draw_rewards(np.random.default_rng(0), pairs=3, variation=0.2)
    assert len(draws) == 6
    for one, other in zip(draws[::2], draws[1::2], strict=True):
        assert one != other
        for name, default in {"biopsy_loss": 0.05, "untreated_loss": 0.2, "treated_loss": 0.07}.items():
            assert one[name] + other[name] == pytest.approx(2 * default)
            assert abs(one[name] - default) <= 0.2 * default


def _cloud(seed: int = 3) -> APOMDP:
    """Small enough for all its policies: two actions, one bit of observation, two models, two stages; rewards differ."""
    rng = np.random.default_rng(seed)
    P, O = rng.dirichlet(np.ones(3), (2, 1, 3, 2)), rng.dirichlet(np.ones(2), (2, 1, 2, 3))
    arrays = {"P": P, "O": O, "r": rng.uniform(size=(2, 2, 3, 2)), "rho": rng.dirichlet(np.ones(3), 2)}
    return APOMDP(models=POMDP(**{k: jnp.asarray(x) for k, x in arrays.items()}), alpha=jnp.asarray(0.5))


def test_the_best_whole_horizon_value_is_that_of_all_pure_policies():
    policies, alphas = np.array(list(itertools.product((0, 1), repeat=9))), np.array([0.0, 0.4, 1.0])

    @jax.jit
    def best(problem, alpha):
        here = replace(problem, alpha=alpha)
        return jax.vmap(lambda pi: whole_horizon_value(here, (pi[:1], pi[1:])))(policies).max()

    matters = 0
    for seed in range(12):
        problem = _cloud(seed)
        swept = {k: np.asarray(v) for k, v in ambiguity.sweep(problem, alphas).items()}
        np.testing.assert_allclose(swept["best"], [best(problem, a) for a in alphas], rtol=1e-13)
        assert (swept["whole"] <= swept["best"] + 1e-12).all()
        matters += swept["alone"].min() - swept["best"][-1] > 1e-3
    assert matters  # the first action is taken before the model is known


def test_a_sweep_is_the_recursion_of_numpy():
    problem, alphas = _cloud(), np.array([0.0, 0.4, 1.0])
    swept = {k: np.asarray(v) for k, v in ambiguity.sweep(problem, alphas, jnp.ones(problem.models.r.shape)).items()}
    P, O, r, rho = (np.asarray(getattr(problem.models, k)) for k in ("P", "O", "r", "rho"))
    K = np.einsum("msat,mato->maost", P[:, 0], O[:, 0])
    np.testing.assert_allclose(swept["counts"], 2, rtol=1e-13)  # a one for every stage
    for i, alpha in enumerate(alphas):

        def mixed(G: np.ndarray, alpha=alpha) -> np.ndarray:
            return alpha * G.min(0) + (1 - alpha) * G.max(0)

        def last(u: np.ndarray) -> np.ndarray:
            return mixed(np.stack([u @ r[m, 1] for m in (0, 1)]))

        G, of_model = np.zeros((2, 2)), np.zeros((2, 2))
        for m, a in itertools.product((0, 1), (0, 1)):
            children = [rho[m] @ K[m, a, o] for o in (0, 1)]
            G[m, a] = rho[m] @ r[m, 0, :, a] + sum(last(u).max() for u in children)
            of_model[m, a] = rho[m] @ r[m, 0, :, a] + sum((u @ r[m, 1])[last(u).argmax()] for u in children)
        a = mixed(G).argmax()
        np.testing.assert_allclose(swept["value"][i], mixed(G)[a], rtol=1e-13)
        np.testing.assert_allclose(swept["models"][i], of_model[:, a], rtol=1e-13)
        np.testing.assert_allclose(swept["whole"][i], mixed(of_model)[a], rtol=1e-13)
    assert swept["rises"].sum() == 0 and (swept["histories"] == 9).all()


def test_attitudes_from_worst_to_best_make_values_rise():
    swept = ambiguity.sweep(_cloud(), np.array([1.0, 0.4, 0.0]))
    assert np.asarray(swept["rises"]).tolist() == [0, 9, 9]


def test_a_value_above_its_chord_is_noticed():
    assert (ambiguity.bends(np.array([0.0, 1.0, 0.0])) < 0).all()
    assert (ambiguity.bends(np.array([1.0, 0.0, 1.0])) > 0).all()
    lines = ambiguity.segments_of_beliefs(np.random.default_rng(0), (2, 3), 5, 4)
    assert lines.shape == (2, 3, 5, 4)
    np.testing.assert_allclose(lines.sum(-1), 1, rtol=1e-14)
    np.testing.assert_allclose(np.diff(lines, n=2, axis=2), 0, atol=1e-15)


def test_thresholds_are_read_on_a_straight_line():
    assert ambiguity._crossing(np.array([0.0, 1.0, 2.0]), np.array([-2.0, -1.0, 3.0])) == pytest.approx(1.25)
    assert np.isnan(ambiguity._crossing(np.array([0.0, 1.0]), np.array([-2.0, -1.0])))


def test_pessimists_take_the_biopsy_earlier(records):
    (first_year,) = [r for r in records if "advantage" in r]
    x = np.array(first_year["high_risk"])
    for rows in first_year["advantage"]:
        border = [ambiguity._crossing(x, np.array(row)) for row in rows]
        assert border == sorted(border, reverse=True) and border[0] > border[-1]


def _many(records: list[dict]) -> list[dict]:
    """Five seeds, with as many instances as a rate takes."""
    out = [copy.deepcopy(records[i % 2]) for i in range(5)] + [records[-1]]
    for i, r in enumerate(out[:5]):
        r["point"] = {"seed": i}
        r["histories"] = r["policies"] = r["triples"] = 4000
        r["not_convex"][1][-1] = 1
        r["loss"] = [[0.002 + 1e-4 * i] * len(r["alphas"])]
        for row, number in zip(r["prostate"]["biopsies"], np.linspace(0, 1, len(r["alphas"])), strict=True):
            row[:] = [number * (1 + 0.01 * i)] * 4
    return out


def test_verdicts_follow_the_records_and_every_mutant_turns_one(records):
    good = [v.verdict for v in ambiguity.check(_many(records))]
    assert good == [PASS, PASS, PASS, PASS, FAIL, FAIL, PASS, PASS]

    def verdict(claim: str, change) -> str:
        mutants = _many(records)
        for r in mutants[:5]:
            change(r)
        return ambiguity.check(mutants)[claim_ids("ambiguity").index(f"ambiguity/{claim}")].verdict

    assert verdict("monotone", lambda r: r.update(rises=1)) == FAIL
    assert verdict("stagewise", lambda r: r.update(wrong_way=1)) == FAIL
    assert verdict("convex", lambda r: r.update(concave_triples=1)) == FAIL
    assert verdict("attained", lambda r: r.update(equalities=[1e-8, 0.0])) == FAIL
    assert verdict("not-convex", lambda r: r.update(not_convex=[[0] * 3] * 2, problems=4000)) == PASS
    assert verdict("whole-horizon", lambda r: r.update(loss=[[0.0] * 3] * 4000, problems=4000)) == PASS
    assert verdict("whole-horizon-loss", lambda r: r.update(loss=[[0.02 + 0.001 * r["point"]["seed"]] * 3])) == FAIL
    assert verdict("biopsies", lambda r: r["prostate"]["biopsies"].reverse()) == FAIL


def test_random_policies_with_the_criteria_exchanged_are_noticed():
    """Stage-wise minus whole-horizon is not above zero in the worst case and not below it in the best; strictly so for some."""
    problems = ambiguity.draw_problems(jax.random.key(2), np.float64(0.6), problems=2)
    problem = apomdps.first_stages(jax.tree.map(lambda x: x[0], problems), ambiguity.SHORT)
    worst, best = np.asarray(ambiguity.stagewise_differences(jax.random.key(0), problem, policies=8)).T
    assert (worst <= 1e-12).all() and worst.min() < -1e-3
    assert (best >= -1e-12).all() and best.max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphas": (0.0, 1.0)}, "alphas must rise from 0 to 1 and contain 1/2"),
        ({"alphas": (0.0, 0.5, 0.4, 1.0)}, "alphas must rise"),
        ({"alphas": (0.0, 0.5, 1.0, 1.5)}, "alphas must rise"),
        ({"beliefs": 2}, "beliefs"),
        ({"years": 1}, "years"),
        ({"distance": 1.5}, "distance"),
        ({"policies": 0}, "policies"),
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        ambiguity.Config(**change)
