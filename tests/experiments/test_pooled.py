"""Shared prompts: verdicts that can fail."""

from dataclasses import replace

import numpy as np
import pytest

from lindm_experiments import mutants, pooled
from lindm_experiments.harness.claims import CLAIMS, FAIL, PASS, claim_ids
from tests.experiments.conftest import smoke_records


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


@pytest.mark.parametrize("mutant", [m for m in mutants.MUTANTS if m.claim.startswith("pooled")], ids=lambda m: m.mistake)
def test_a_wrong_bound_does_not_survive(mutant):
    records = ideal()
    mutant.change(records)
    assert verdicts(records)[mutant.claim] == FAIL


@pytest.mark.slow
def test_smoke_gives_every_verdict_and_figure():
    records = smoke_records(pooled)
    shown = pooled.check(records)
    assert [v.id for v in shown] == list(claim_ids("pooled"))
    assert set(pooled.plot(records)) == {v.figure for v in shown}
    # estimation errors of single cells, not only in the mean over seeds
    for r in records:
        ratios = [c["estimation"][0] / c["estimation"][1] for c in r["cells"]]
        np.testing.assert_allclose(np.mean(ratios), 1, atol=0.25)


@pytest.mark.parametrize("bad", [{"contexts": 8}, {"K": (8, 2)}, {"epsilon": 0.0}, {"played": 100}])
def test_a_config_out_of_range_names_the_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(pooled.QUICK, **bad)
