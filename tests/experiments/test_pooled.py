"""Shared prompts: verdicts that can fail, the two special instances, and the exact risk by numpy from prompts that were drawn."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.icl.attention import ReducedAttention, query_columns
from lindm.icl.trainer import train
from lindm.io import files
from lindm.problems.linear_mdp import second_moment
from lindm.solvers.rollout import rollout
from lindm.types import Prompt
from lindm_experiments import mutants, pooled
from lindm_experiments.harness.claims import CLAIMS, FAIL, PASS, claim_ids
from lindm_experiments.harness.experiments import points_of
from lindm_experiments.lib import linear_mdps


def ideal(seeds: int = 10) -> list[dict]:
    """Records in which everything is as predicted, with small differences between the seeds."""
    out = []
    for seed in range(seeds):
        jitter = 1 + 1e-3 * (-1) ** seed
        cells = [
            {
                "reader": reader,
                "law": law,
                "dependence": dependence,
                "K": K,
                "risk": [jitter * size, size],
                "estimation": [jitter, 1.0],
                "loss": 1.0,
                "mean": jitter,
                "off": 0,
                "above": 0,
                "price": 0.01,
                "price bound": 0.5,
                "normal": jitter,
            }
            for (reader, law), size in zip(pooled.READERS, (1.0, 1.1, 1.2, 0.9, 1.1, 3.0, 3.0, 0.5), strict=True)
            for dependence in pooled.DEPENDENCE
            for K in (2, 8)
        ]
        program = [{"K": K, "loss": [1.0, 1.0], "rung": [[3.0, 1.2], [3.0, 1.3]]} for K in (2, 8)]
        counts = dict.fromkeys(("identity", "rung 1", "rung 2", "rung 3"), 0)
        ratios = {f"{which} {r}": 2.0 for which in ("least", "median") for r in "123"}
        ladder = [{"n": 4096, "mutant, rung 2 without its factor 2": 1} | counts | ratios]
        copied = {
            "p": 0.6,
            "gap": 0.5,
            "truth": 0.108,
            "predicted": 0.108,
            "mean": 0.02333 * jitter,
            "occupancy": 0.108,
            "rung": 0.108,
        }
        out.append(
            {
                "N": 8,
                "K": [2, 8],
                "played": 64,
                "cells": cells,
                "program": program,
                "ladder": ladder,
                "independent_noise": 2 * 0.6 * jitter,
                "floor": [3.0, 2.5],
                "copied": copied,
                "attained": {"shared rung": [0.108, 0.108], "price": [0.12, 0.12]},
                "tabular": [{"K": K, "loss": 1.0, "mean": 1.06 * jitter} for K in (2, 8)],
            }
        )
    return out


def verdicts(records: list[dict]) -> dict[str, str]:
    return {v.id: v.verdict for v in pooled.check(records)}


def test_what_is_predicted_gets_the_expected_verdicts():
    assert verdicts(ideal()) == {id: CLAIMS[id].expected for id in claim_ids("pooled")}


def _cell(record: dict, reader: str, law: str) -> dict:
    return next(c for c in record["cells"] if (c["reader"], c["law"], c["dependence"], c["K"]) == (reader, law, "shared", 8))


MUTANTS = {
    # the i.i.d. formula on a prompt whose pairs depend on one another
    "pooled": lambda r: _cell(r, "blind", "return")["estimation"].__setitem__(1, 0.57),
    # the floor without the distance of the stages from their average
    "pooled/blind-floor": lambda r: r["floor"].__setitem__(0, r["floor"][0] - r["floor"][1]),
    # readers exchanged
    "pooled/augmented": lambda r: _cell(r, "augmented", "oracle").__setitem__(
        "risk", [1.05 * x for x in _cell(r, "stage", "oracle")["risk"]]
    ),
    "pooled/normal": lambda r: [c.__setitem__("normal", 1.2) for c in r["cells"]],
    "pooled/rungs": lambda r: r["ladder"][0].__setitem__("rung 2", r["ladder"][0]["mutant, rung 2 without its factor 2"]),
    "pooled/occupancy-policy": lambda r: r["cells"][0].__setitem__("off", 1),
    "pooled/price": lambda r: _cell(r, "stage", "oracle").__setitem__("mean", 1.1),
    "pooled/tabular": lambda r: r["tabular"][1].__setitem__("mean", 1.0),
    # half the bound; the rung of independent stages in its place
    "pooled/shared-rung": lambda r: [p.__setitem__("rung", [[b / 2 for b in x] for x in p["rung"]]) for p in r["program"]],
    "pooled/price-bound": lambda r: r["cells"][0].__setitem__("above", 1),
    "pooled/attained": lambda r: r["attained"].__setitem__("price", [0.12, 0.24]),
}


@pytest.mark.parametrize("claim", MUTANTS)
def test_a_mutant_turns_pass_into_fail(claim):
    records = ideal()
    for r in records:
        MUTANTS[claim](r)
    got = verdicts(records)
    assert got[claim] == FAIL
    assert [id for id, v in got.items() if v != CLAIMS[id].expected] == [claim]


@pytest.mark.parametrize("claim", [id for id in claim_ids("pooled") if CLAIMS[id].expected == FAIL])
def test_a_negative_control_could_have_passed(claim):
    records = ideal()
    for seed, r in enumerate(records):
        jitter = 1 + 1e-3 * (-1) ** seed
        r["independent_noise"] = 2.0 * jitter
        r["copied"]["mean"] = 0.108 * jitter
    assert verdicts(records)[claim] == PASS


def test_every_claim_has_a_mutant_or_is_a_control():
    assert {id for id in claim_ids("pooled") if CLAIMS[id].expected == PASS} == set(MUTANTS)


def test_shifted_contexts_come_from_different_prompts():
    prompt = np.arange(64.0)
    sums = np.broadcast_to(prompt[:, None, None, None], (64, pooled.H, pooled.H, pooled.D))
    assert np.all(pooled.with_dependence(sums, "shared") == sums)
    markov = pooled.with_dependence(sums, "markov")[0, :, :, 0]
    assert all(len(set(stage)) == 1 for stage in markov) and len(set(markov[:, 0])) == pooled.H
    assert len(set(pooled.with_dependence(sums, "pairs")[0, :, :, 0].ravel())) == pooled.H**2


def test_the_copied_trajectory_has_its_closed_form_and_attains_both_bounds():
    p, gap = 0.7, 0.4
    rng = np.random.default_rng(3)
    out = pooled.copied(rng, (p, p, p), gap, 2)
    np.testing.assert_allclose([out["truth"], out["rung"], out["occupancy"]], gap * p**3, rtol=1e-9)
    np.testing.assert_allclose(out["mean"], gap * p**6, rtol=1e-9)
    out = pooled.copied(rng, (p, 1.0, 1.0), gap, 1)
    np.testing.assert_allclose([out["price"], out["price bound"]], gap * p * (1 - p), rtol=1e-9)


@pytest.mark.parametrize("mutant", [m for m in mutants.MUTANTS if m.claim.startswith("pooled")], ids=lambda m: m.mistake)
def test_a_wrong_bound_does_not_survive(mutant):
    records = ideal()
    mutant.change(records)
    assert verdicts(records)[mutant.claim] == FAIL


@pytest.mark.slow
def test_smoke_gives_every_verdict_and_figure_and_drawn_prompts_have_the_exact_moments():
    cfg = pooled.SMOKE
    records = [{"point": p} | files.to_jsonable(pooled.measure(cfg, p)) for p in points_of(pooled, cfg)]
    shown = pooled.check(records)
    assert [v.id for v in shown] == list(claim_ids("pooled"))
    assert set(pooled.plot(records)) == {v.figure for v in shown}
    # estimation errors of single cells, not only in the mean over seeds
    for r in records:
        ratios = [c["estimation"][0] / c["estimation"][1] for c in r["cells"]]
        np.testing.assert_allclose(np.mean(ratios), 1, atol=0.25)
    # moments of the sums of one task, by simulation alone
    key = jax.random.key(5)
    family = pooled.draw_family(key)
    tasks = pooled.draw_tasks(key, family, 0.5, 2)
    sums = pooled.draw_sums(key, family, tasks, 20000, (1,))[:, :, 0].reshape(2, 4, 20000, pooled.H, -1)
    mean, covariance = np.asarray(tasks.mean), np.asarray(tasks.covariance)
    for task, law, h in np.ndindex(2, 4, pooled.H):
        drawn = sums[task, law, :, h]
        size = np.sqrt(np.trace(covariance[task, law, h]))
        np.testing.assert_allclose(drawn.mean(0), mean[task, law, h], atol=0.04 * size)
        np.testing.assert_allclose(np.cov(drawn.T), covariance[task, law, h], atol=0.06 * size**2)


@pytest.mark.slow
def test_training_on_shared_prompts_finds_the_augmented_reader_with_its_blocks_between_stages():
    H, D, N = pooled.H, pooled.D, 8
    family = pooled.draw_family(jax.random.key(77001))
    pool = pooled.draw_tasks(jax.random.key(77001), family, 0.5, pooled.POOL)
    columns = query_columns(jnp.kron(jnp.eye(H), second_moment(family)))

    def draw(key, mdps, behavior, w, flat, columns):
        which, k = jax.random.split(key)
        task = jax.random.randint(which, (256,), 0, len(w))

        def one(k, i):
            episodes = rollout(k, jax.tree.map(lambda x: x[i], mdps), behavior[i], N)
            x = flat[episodes.s * pooled.A + episodes.a]
            y = jnp.einsum("nhd,hd->nh", x, w[i])
            augmented = jnp.einsum("nhd,hg->nhgd", x, jnp.eye(H, dtype=x.dtype)).reshape(N * H, H * D)
            return Prompt(x=augmented, y=y.reshape(-1), query=columns), columns @ w[i].reshape(-1)

        return jax.vmap(one)(jax.random.split(k, 256), task)

    data = linear_mdps.single_precision((pool.mdp, pool.behavior, pool.w, linear_mdps.pairs_table(family), columns))
    layer, _ = train(ReducedAttention(H * D), draw, jax.random.key(1), steps=2000, data=data, learning_rate=0.3)
    trained = np.asarray(layer.A[...])[0]
    readers = pooled.layers(jax.tree.map(np.asarray, pool), N) * H  # the prompt averages over N H pairs
    best, blocks = (readers[pooled.READERS.index((x, "oracle"))].reshape(H * D, H * D) for x in ("augmented", "stage"))
    assert np.linalg.norm(trained - best) < 0.02 * np.linalg.norm(best)
    assert np.linalg.norm(trained - blocks) > 0.08 * np.linalg.norm(best)


@pytest.mark.parametrize("bad", [{"contexts": 8}, {"K": (8, 2)}, {"epsilon": 0.0}, {"played": 100}])
def test_a_config_out_of_range_names_the_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(pooled.QUICK, **bad)
