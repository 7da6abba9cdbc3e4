"""Offline data: records of a small run, and the verdicts on records whose answer is known."""

import copy
import json

import numpy as np
import pytest

from lindm.errors import DataError
from lindm.io import files
from lindm.llm.sft.loop import TrainLoop
from lindm_experiments import offline_data
from lindm_experiments.harness.claims import FAIL, INCONCLUSIVE, PASS, claim_ids
from lindm_experiments.harness.unfinished import measuring_in
from lindm_experiments.lib.offline_cells import CELLS, PRETRAINED
from lindm_experiments.lib.offline_claims import unexplained
from lindm_experiments.offline_data import FULL, QUICK, SMOKE, Config
from tests.experiments.conftest import smoke_records

TASKS = 60
TASK_EFFECT = np.random.default_rng(0).normal(size=TASKS)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(offline_data)


def row(gap, seed=0, **more):
    noise = np.random.default_rng(seed).normal(size=TASKS)
    return {"gaps": (gap + 0.02 * TASK_EFFECT + 0.01 * noise).tolist(), "agreement": 0.9, "method": "rollout"} | more


def curve(jump, low, last=32_768):
    """A plateau above the .3 of bc until `jump` sequences, then `low`."""
    n = np.arange(25) * last // 24
    loss, gap = (np.where(n < jump, *ends) for ends in ((1.04 + 0.001 * np.cos(n), 0.8 - n / 1e7), (0.4, low)))
    return [{"sequences": int(n[i]), "loss": float(loss[i]), "gap": float(gap[i]), "bc": 0.3} for i in range(25)]


def synthetic(cfg=FULL):
    """Records in which all claims of the full run hold."""
    made = []
    for point in offline_data.points(cfg):
        if "test" in point:
            cell, K = CELLS[point["test"]], point["demos"]
            gaps = {"behavior": 0.5, "bc": 0.3, "certainty-equivalence": 0.2, "lsvi": 0.2, "pevi": 0.5, "bayes": 0.1}
            rows = {name: row(gap) for name, gap in gaps.items()} | {"bayes-demo": row(0.06 + 0.1 / K, error=0.001)}
            made.append({"point": point, "rows": rows})
            continue
        cell, n, seed = CELLS[point["cell"]], point["n"], point["seed"]
        gap = 0.35 if n <= 2048 else 0.04 if cell.steps == 2 else 0.09
        gap += {0.0: -0.04, 1.0: 0.1}.get(cell.epsilon, 0.0) - (0.02 if cell.names else 0.0)
        rows = {str(K): row(gap + 0.1 / K + 0.05 / cell.demos, seed + 1) for K in cell.test_demos}
        jump = {"soft": 6000, "regret": 12_000}.get(cell.loss, 9000) // (4 if cell.model == PRETRAINED else 1) + 500 * seed
        last = int(cell.steps * (4096 if cell.model == PRETRAINED else 32_768))
        made.append({"point": point, "rows": rows, "curve": curve(jump, gap, last)})
    return made


def verdicts(records):
    return {v.id: v for v in offline_data.check(records)}


def test_records_in_which_every_claim_holds_pass():
    found = verdicts(synthetic())
    assert {id: v.verdict for id, v in found.items()} == dict.fromkeys(claim_ids("offline_data"), PASS)
    assert "model 0.07" in found["offline/beats-lsvi"].note and "3 trainings, 60 tasks" in found["offline/beats-lsvi"].note


def refute(change):
    records = synthetic()
    for r in records:
        change(r["point"], r)
    return verdicts(records)


@pytest.mark.parametrize(
    "id, policy",
    [
        ("offline/beats-demonstrator", "behavior"),
        ("offline/beats-majority", "bc"),
        ("offline/beats-lsvi", "lsvi"),
        ("offline/near-bayes", "bayes-demo"),
    ],
)
def test_a_policy_that_is_better_than_the_model_refutes_the_comparison(id, policy):
    def better(point, r):
        if "test" in point:
            r["rows"][policy] = row(0.02)

    assert refute(better)[id].verdict == FAIL


def test_the_yardstick_may_be_missed_by_a_quarter_of_its_gap_and_no_more():
    def of_yardstick(factor):
        def change(point, r):
            if "test" in point:
                r["rows"]["bayes-demo"] = row(0.08)
            elif point["cell"] == "long":
                r["rows"]["5"] = row(0.08 * factor, point["seed"] + 1)

        return refute(change)["offline/near-bayes"].verdict

    assert (of_yardstick(1.1), of_yardstick(1.5)) == (PASS, FAIL)


@pytest.mark.parametrize("scale", [-0.5, -2.0, None], ids=["slow power law", "power law", "exponential"])
def test_a_convex_curve_is_no_jump(scale):
    def smooth(point, r):
        for p in r.get("curve", ()):
            n = p["sequences"] + 1365
            p["loss"] = 0.5 + (np.exp(-n / 20_000) if scale is None else (n / 1365) ** scale) + 0.002 * np.cos(n)

    assert refute(smooth)["offline/jump"].verdict == FAIL


def test_a_slow_fall_after_a_plateau_is_no_jump():
    def slow(point, r):
        for p in r.get("curve", ()):
            p["loss"] = 0.5 + 0.5 / (1 + (p["sequences"] / 9000) ** 1.5)

    assert refute(slow)["offline/jump"].verdict == FAIL


def test_models_that_learn_from_few_tasks_refute_that_the_jump_needs_data():
    def learns(point, r):
        if point.get("cell") == "base":
            r["rows"] |= {"5": row(0.1, point["seed"])}

    assert refute(learns)["offline/data"].verdict == FAIL


def test_quality_loss_and_names_are_refuted_by_the_opposite():
    def opposite(point, r):
        match point.get("cell"):
            case "uniform" | "pretrained-symbols":
                r["rows"] = {"5": row(0.03, point["seed"])}
            case "soft":
                r["curve"] = curve(20_000 + 500 * point["seed"], 0.09)

    found = refute(opposite)
    ids = ("offline/quality", "offline/loss", "offline/names")
    assert {id: found[id].verdict for id in ids} == dict.fromkeys(ids, FAIL)


NEVER = 10**9


@pytest.mark.parametrize(
    "pretrained, last, tiny, verdict",
    [
        (NEVER, 4096, 9000, INCONCLUSIVE),  # more than 4096: fewer or more than 9000
        (NEVER, 30_000, 9000, FAIL),
        (NEVER, 4096, NEVER, INCONCLUSIVE),
        (2000, 4096, NEVER, PASS),  # of a limit
        (20_000, 40_000, 9000, FAIL),
    ],
)
def test_a_model_that_does_not_get_below_bc_gives_a_limit_that_decides_in_one_direction(pretrained, last, tiny, verdict):
    def change(point, r):
        if point.get("cell") == "pretrained":
            r["curve"] = curve(pretrained, 0.09, last)
        elif point.get("cell") == "long":
            r["curve"] = curve(tiny + 3000 * point["seed"], 0.04, 65_536)

    found = refute(change)["offline/pretrained"]
    assert found.verdict == verdict
    assert ("more than" in found.note) == (NEVER in (pretrained, tiny))


def test_a_yardstick_with_a_small_sample_decides_nothing():
    def small(point, r):
        if "test" in point:
            r["rows"]["bayes-demo"]["effective_samples"] = [1.0, 9.0]

    assert refute(small)["offline/near-bayes"].verdict == INCONCLUSIVE


def test_lengths_that_matter_at_some_lengths_of_the_test_alone_are_no_sum_of_parts():
    def interact(point, r):
        if point.get("cell") in ("two", "base", "ten"):
            sign = {"two": 1, "base": 0, "ten": -1}[point["cell"]]
            r["rows"] |= {
                K: row(x + sign * y, point["seed"]) for K, x, y in (("2", 0.5, 0), ("5", 0.2, 0.02), ("10", 0.12, -0.02))
            }

    assert refute(interact)["offline/training-length"].verdict == FAIL


def test_the_unexplained_share_is_that_of_least_squares():
    rows, columns = np.array([1.0, 2.0, 4.0]), np.array([1.0, -1.0, 3.0])
    assert unexplained(rows[:, None] + columns) == pytest.approx(0, abs=1e-12)
    table = np.outer(rows, columns)
    of_columns = np.tile(np.eye(3), (3, 1))
    of_both = np.concatenate([of_columns, np.repeat(np.eye(3), 3, 0)], 1)
    residual = [
        ((table.ravel() - X @ np.linalg.lstsq(X, table.ravel(), rcond=None)[0]) ** 2).sum() for X in (of_columns, of_both)
    ]
    assert unexplained(table) == pytest.approx(residual[1] / residual[0])


def test_cells_that_were_not_measured_leave_their_claims_open():
    records = [r for r in synthetic() if r["point"].get("cell", "base") in ("base", "long")]
    found = verdicts(records)
    decided = {id for id, v in found.items() if v.verdict != INCONCLUSIVE}
    assert decided == {
        "offline/" + id for id in ("beats-demonstrator", "beats-majority", "beats-lsvi", "near-bayes", "jump", "data")
    }
    assert "was not measured" in found["offline/pretrained"].note


def test_every_row_of_the_table_has_what_the_reader_lost():
    rows = offline_data.table(synthetic())
    mine = next(r for r in rows if (r["cell"], r["policy"], r["n"]) == ("long", "sft", 65_536))
    yardstick = next(r for r in rows if (r["policy"], r["demos"]) == ("bayes-demo", 5) and CELLS[r["cell"]].epsilon == 0.5)
    assert mine["lost"] == pytest.approx(mine["gap"] - yardstick["gap"]) and mine["lost_low"] < mine["lost"] < mine["lost_high"]
    assert yardstick["lost"] == 0 and yardstick["error"] == 0.001 and mine["trainings"] == 3


def test_figures_are_drawn_from_all_records_and_from_a_part():
    figures = offline_data.plot(synthetic())
    assert figures.keys() == {"law", "curves", "factors", "lengths"}
    base = [r for r in synthetic() if r["point"].get("cell", "base") == "base" and r["point"].get("test", "base") == "base"]
    assert offline_data.plot(base).keys() == {"law", "curves"}


def test_no_two_trainings_share_tasks_and_tests_are_new():
    points = [p for p in offline_data.points(FULL) if "cell" in p]
    seeds = [offline_data.seed_of(FULL, p) for p in points]
    assert len(set(seeds)) == len(seeds)
    assert not set(seeds) & {offline_data.test_seed(FULL), FULL.base_seed + 1}


def test_the_base_cell_comes_first_then_cell_by_cell_and_larger_models_last():
    trainings = [p for p in offline_data.points(FULL) if "cell" in p]
    base = [p for p in trainings if p["cell"] in ("base", "long")]
    assert trainings[: len(base)] == base and len(base) == 3 * (len(FULL.n) + 1)
    tiny = [p for p in trainings[len(base) :] if CELLS[p["cell"]].model == "tiny"]
    assert trainings[len(base) :][: len(tiny)] == tiny and [p["seed"] for p in tiny] == sorted(p["seed"] for p in tiny)
    assert [CELLS[p["cell"]].model for p in trainings[len(base) + len(tiny) :]] == ["small"] + 5 * [PRETRAINED]
    assert {p["cell"] for p in trainings} == set(FULL.cells)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"cells": ("base", "bse")}, "cells must be among .*; got 'bse'"),
        ({"n": (512, 128)}, "n must contain rising numbers"),
        ({"repeats": 1}, "repeats"),
        ({"rate": 0.0}, "rate must be positive"),
        ({"evaluations": 5}, "evaluations must be .*at least 6.*5"),
        ({"steps": 20}, "steps must be .*at least 24.*20"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, error):
    with pytest.raises(ValueError, match=error):
        Config(**options)


def test_a_model_that_is_not_there_is_refused_at_the_first_point_of_the_run():
    cfg = Config(model="no/such/model")
    with pytest.raises(DataError, match="no/such/model"):
        offline_data.measure(cfg, offline_data.points(cfg)[0])


@pytest.mark.slow
def test_records_of_a_small_run_hold_all_policies_and_the_curve(records):
    tests = [r for r in records if "test" in r["point"]]
    trainings = [r for r in records if "cell" in r["point"]]
    assert tests and trainings
    for r in tests:
        assert {"behavior", "bc", "bayes", "bayes-demo"} <= r["rows"].keys()
        assert all(len(p["gaps"]) == SMOKE.tasks for p in r["rows"].values())
    for r in trainings:
        assert r["curve"][0]["sequences"] == 0 and len(r["curve"]) > 2
        assert r["curve"][-1]["sequences"] == SMOKE.batch * offline_data.steps_of(SMOKE, CELLS[r["point"]["cell"]])
    assert {v.verdict for v in offline_data.check(copy.deepcopy(records))} <= {PASS, FAIL, INCONCLUSIVE}
    assert {p["cell"] for p in offline_data.points(QUICK) if "cell" in p} == {"bandit"}


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_a_training_that_was_interrupted_goes_on_and_gives_the_same_record(tmp_path, monkeypatch, records):
    """Interrupted twice: at a step of the training, and between its end and the tests of the model."""
    record = next(r for r in records if r["point"].get("cell") == "bandit")
    read, half, steps = TrainLoop._read_metrics, SMOKE.steps // 2, []

    def stop_in_the_middle(loop):
        if loop.started is not None:
            steps.append(loop.started.batch.step)
            if len(steps) == half:
                raise KeyboardInterrupt
        return read(loop)

    def stop_before_the_tests(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainLoop, "_read_metrics", stop_in_the_middle)
    with measuring_in(tmp_path / "point"):
        with pytest.raises(KeyboardInterrupt):
            offline_data.measure(SMOKE, record["point"])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(offline_data, "evaluate", stop_before_the_tests)
            offline_data.measure(SMOKE, record["point"])
        again = offline_data.measure(SMOKE, record["point"])
    assert json.loads(json.dumps({"point": record["point"]} | files.to_jsonable(again))) == record
    assert steps == [*range(half), *range(half - 1, SMOKE.steps)]  # the step in which it stopped is the only one trained twice
