"""Fine-tuning: verdicts that notice other laws."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from lindm_experiments import fine_tuning
from lindm_experiments.harness import claims
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from tests.experiments.conftest import smoke_records

CFG = fine_tuning.SMOKE


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(fine_tuning)


def _ideal(records: list[dict]) -> list[dict]:
    """Records that follow the theory, with small differences between the seeds."""
    out = [copy.deepcopy(records[i % len(records)]) for i in range(8)]
    for i, r in enumerate(out):
        noise = 1 + 1e-3 * (-1) ** i
        r["all"]["measured"] = (noise * np.array(r["all"]["flow"])).tolist()
        few = np.array(r["few"]["flow"])
        few[1, 0::2], few[1, 1::2] = 0.5 * noise, 0.8
        r["few"]["flow"] = r["few"]["measured"] = few.tolist()
        r["replay"]["measured"] = (noise * np.array(r["replay"]["optimum"])).tolist()
        n, shares = len(r["times"]), len(fine_tuning.SHARES)
        trained = np.array(r["trained"])
        trained[:, n : n + shares] = noise**2 * np.array(r["replay"]["optimum"]) * 1.005
        r["trained"] = trained.tolist()
        value = r["value"]
        value["risk"]["measured"] = (noise * np.array(value["risk"]["exact"])).tolist()
        value["zero_shot"] |= {"gain": 1.0, "lost": noise}
        value["row"]["measured"] = noise * value["row"]["exact"]
        for law, ratio in (("new", 0.5), ("old", 1.5)):
            r["policy"][law] |= {"loss": {"before": 1.0, "all": noise * ratio, "row": noise}, "weight_changes": 0}
            r["policy"][law] |= {"all_changes": 5, "row_changes": 1}
        r["policy"]["decisions"] = 10_000
    return out


def _verdicts(records: list[dict]) -> dict[str, str]:
    return {v.id: v.verdict for v in fine_tuning.check(records)}


def test_the_verdicts_follow_the_theory_and_its_mutants_fail(records, monkeypatch):
    ideal = _ideal(records)
    monkeypatch.setitem(claims.CLAIMS, "fine-tuning/frontier", replace(claims.CLAIMS["fine-tuning/frontier"], hi=0.01))
    assert _verdicts(ideal) == dict.fromkeys(claim_ids("fine_tuning"), PASS)
    mutants = copy.deepcopy(ideal)
    for r in mutants:
        for part in ("all", "few", "replay"):
            r[part]["measured"] = (1.2 * np.array(r[part]["measured"])).tolist()
        r["few"]["measured"][1] = (np.array(r["few"]["measured"][1]) ** -1).tolist()
        r["frontier"] = (1.05 * np.array(r["frontier"])).tolist()  # a frontier that is 5 % too high
        best = np.array(r["replay"]["optimum"]) * 0.9
        r["replay"]["optimum"] = best.tolist()
        value = r["value"]
        value["risk"]["measured"] = (1.2 * np.array(value["risk"]["measured"])).tolist()
        value["zero_shot"]["lost"] *= 0.5  # the claim that the value matrix forgets less
        value["row"]["measured"] *= 1.2
        for law in ("new", "old"):
            policy = r["policy"][law]
            policy["weight_changes"] = policy["all_changes"]  # all weights in place of the value weight
            policy["loss"] = {"before": 1.0, "all": policy["loss"]["row"], "row": policy["loss"]["all"]}
    assert _verdicts(mutants) == dict.fromkeys(claim_ids("fine_tuning"), FAIL)


def test_the_frontier_with_the_shares_exchanged_is_violated(records):
    good = fine_tuning.above_frontier(records[0])
    assert good.min() > 1 - 1e-9
    swapped = copy.deepcopy(records[0])
    swapped["frontier"] = [row[::-1] for row in swapped["frontier"]]
    assert fine_tuning.above_frontier(swapped).min() < 0.99


def test_smoke_gives_every_verdict_and_the_figure(records):
    verdicts = fine_tuning.check(records)
    assert tuple(v.id for v in verdicts) == claim_ids("fine_tuning")
    assert {v.figure for v in verdicts} == set(fine_tuning.plot(records))
    for r in records:
        assert all(r["policy"][law]["weight_changes"] == 0 for law in ("old", "new"))


def test_a_config_out_of_range_names_its_field():
    for field, value in (("times", (1.0,)), ("times", (1.0, 100.0)), ("few", 0), ("steps", 0), ("sigma", -1.0)):
        with pytest.raises(ValueError, match=field):
            replace(CFG, **{field: value})
