"""Fine-tuning against other policies: records, verdicts, and errors of the configuration."""

import copy
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from lindm.datasets.generate import draw_block
from lindm.errors import DataError, LindmError
from lindm.evaluation.compare import PolicyResult
from lindm.io import files
from lindm.text import load_template
from lindm_experiments import decisions
from lindm_experiments.decisions import FULL, SMOKE, Config
from lindm_experiments.harness.claims import FAIL, INCONCLUSIVE, PASS, claim_ids, get_claim
from lindm_experiments.lib import language_models
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(decisions)


@pytest.mark.slow
def test_a_record_holds_every_policy_on_the_same_new_tasks(records):
    (record,) = records
    assert record["point"] == {"suite": "pomdp", "horizon": 2, "seed": 0}
    assert record["rows"].keys() == {"id", "ood"}
    for rows in record["rows"].values():
        assert rows.keys() == {*decisions.HIDDEN, "icl", "sft"}
        assert {len(row["gaps"]) for row in rows.values()} == {SMOKE.tasks}
        assert rows["oracle"]["gaps"] == pytest.approx([0] * SMOKE.tasks, abs=1e-6)
        assert rows["random"]["gaps"] == pytest.approx([1] * SMOKE.tasks, abs=1e-6)
        assert all(row["method"] == "exact" for row in rows.values())
        assert {name for name, row in rows.items() if row["invalid"] is not None} == {"icl", "sft"}
        assert {name for name, row in rows.items() if row["effective_samples"]} == {"bayes", "bayes-demo"}
    assert record["rows"]["id"]["icl"]["gaps"] != record["rows"]["ood"]["icl"]["gaps"]


@pytest.mark.slow
def test_a_record_is_the_same_again(records):
    (point,) = decisions.points(SMOKE)
    again = {"point": point} | files.to_jsonable(decisions.measure(SMOKE, point))
    assert files.canonical_json(again) == files.canonical_json(records[0])


def test_every_training_of_every_cell_has_tasks_of_its_own(monkeypatch):
    """The same options in training and in evaluations, seeds that no other cell, split or training has, and both yardsticks."""
    trained, tested = [], []

    def named(names, source, dataset, template):
        tested.append((source.name, source.horizon, source.split, template, dataset, names))
        return names

    def evaluate(source, policies, dataset, **how):
        about = {
            "suite": "",
            "horizon": 0,
            "split": None,
            "method": "exact",
            "invalid": None,
            "masked": 0.0,
            "decisions_per_s": 1.0,
        }
        return [PolicyResult(policy=policy, gaps=[0.0], **about) for policy in policies]

    def make_data(data, source, data_config):
        trained.append((source.name, source.horizon, data_config))
        return data

    monkeypatch.setattr(decisions, "PoliciesByName", named)
    monkeypatch.setattr(decisions, "evaluate", evaluate)
    monkeypatch.setattr(decisions.language_models, "make_data", make_data)
    monkeypatch.setattr(decisions.language_models, "check_model", lambda model: None)
    monkeypatch.setattr(decisions.language_models, "base_model", lambda config, out: out)
    monkeypatch.setattr(decisions.language_models, "fine_tune", lambda options: options.out)
    cfg = replace(FULL, seeds=2)
    rows = [decisions.measure(cfg, point)["rows"] for point in decisions.points(cfg)]
    assert {tuple(parts) for parts in rows} == {("id", "ood"), ("id", "ood", "renamed", "readable")}
    used = [(suite, H, "train", config.seed) for suite, H, config in trained]
    used += [(suite, H, split, config.seed) for suite, H, split, template, config, _ in tested if template is None]
    assert len(used) == 2 * 9 * 3 and len({seed for *_, seed in used}) == len(used)
    for suite, horizon, _, template, config, names in tested:
        assert (config.demos, config.exploration[0]) == (decisions.DEMOS[suite], 0.0)
        planned = {"bayes", "bayes-demo"} if (suite, horizon) != ("pomdp", 8) else set()  # there they take hours
        assert template is not None or {name for name in names if name.startswith("bayes")} == planned
        if template is not None:  # on the tasks of the training's format
            assert (suite, horizon, "id", config.seed) in used


def test_tasks_of_different_cells_have_different_kernels():
    """With one seed they would have the same ones at every horizon."""
    cfg = replace(FULL, mdp=(2, 3), pomdp=(), apomdp=(), seeds=2)

    def kernels(horizon: int, seed: int) -> set[bytes]:
        key = jax.random.key(seed, impl="threefry2x32")
        P = np.asarray(draw_block(key, 0, 8, language_models.suite_at_horizon("mdp", horizon)).P)[:8, 0]  # pyright: ignore
        return {kernel.tobytes() for kernel in P}

    cells = [(point["horizon"], seed) for point in decisions.points(cfg) for seed in decisions.seeds_of(cfg, point).values()]
    drawn = [kernels(*cell) for cell in cells]
    assert len(drawn) == 12 and len(set.union(*drawn)) == 12 * 8
    seed = cells[0][1]
    assert len(kernels(2, seed) & kernels(3, seed)) >= 4


def made(gaps: dict[str, dict[str, float]], n: int = 60, seeds: int = 3) -> list[dict]:
    """A full run's records: suite -> policy -> mean gap; other formats like the rest."""
    rng = np.random.default_rng(0)
    cfg = replace(FULL, tasks=n, seeds=seeds)
    result = []
    for point in decisions.points(cfg):
        parts = ["id", "ood"]
        if point["horizon"] == getattr(cfg, point["suite"])[0]:
            parts += decisions.FORMATS
        rank = getattr(cfg, point["suite"]).index(point["horizon"])
        more = {"icl": 0.03 * rank}  # what it gains grows
        rows = {}
        for part in parts:
            rows[part] = {
                policy: {
                    "gaps": list(mean + more.get(policy, 0.0) + rng.normal(0, 0.01, n)),
                    "gap_of_value": mean / 4,
                    "action_agreement": 0.9,
                    "invalid": None,
                    "effective_samples": [1.5, 20.0 + point["seed"]] if policy == "bayes-demo" else None,
                    "method": "exact",
                }
                for policy, mean in gaps[point["suite"]].items()
                if not (policy.startswith("bayes") and point["horizon"] > decisions.PLANNED.get(point["suite"], 99))
            }
        result.append({"point": point, "rows": rows})
    return result


GOOD = {
    "mdp": {"sft": 0.02, "icl": 0.2, "bc": 0.1, "bayes": 0.1, "bayes-demo": 0.01},
    "pomdp": {"sft": 0.03, "icl": 0.4, "bc": 0.3, "bayes": 1.0, "bayes-demo": 0.01},
    "apomdp": {"sft": 0.03, "icl": 0.5, "bc": 0.3, "bayes": 1.0, "bayes-demo": 0.01},
}


def verdicts(records: list[dict]) -> dict[str, str]:
    return {v.id: v.verdict for v in decisions.check(records)}


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_verdicts_follow_the_gaps_after_the_first_training_as_after_the_last(seeds):
    records = made(GOOD, seeds=seeds)
    assert verdicts(records) == dict.fromkeys(claim_ids("decisions"), PASS)
    assert ["one training" in v.note for v in decisions.check(records)] == [seeds == 1] * len(claim_ids("decisions"))


@pytest.mark.parametrize(
    "suite, policy, gap, fails",
    [
        ("pomdp", "sft", 0.15, {"sft-beats-icl", "sft-near-bayes"}),
        ("mdp", "bc", 0.0, {"sft-beats-cloning"}),
        ("mdp", "bayes", 0.0, {"sft-beats-cloning"}),
        ("apomdp", "bayes-demo", -0.04, {"sft-near-bayes"}),
        ("mdp", "icl", 0.6, {"partial-observation"}),
        ("apomdp", "icl", 0.3, {"ambiguity"}),
        ("mdp", "sft", 0.35, {"sft-beats-icl", "sft-beats-cloning", "sft-near-bayes", "ood", "format"}),
    ],
)
def test_a_number_out_of_its_band_fails_only_its_claims(suite, policy, gap, fails):
    gaps = copy.deepcopy(GOOD)
    gaps[suite][policy] = gap
    assert {id for id, verdict in verdicts(made(gaps)).items() if verdict == FAIL} == fails


def test_a_yardstick_of_few_effective_samples_decides_nothing():
    records = made(GOOD)
    records[4]["rows"]["id"]["bayes-demo"]["effective_samples"] = [1.0, 9.9]
    (verdict,) = [v for v in decisions.check(records) if v.id == "sft-near-bayes"]
    assert (verdict.verdict, verdict.measured) == (INCONCLUSIVE, None) and "9.9" in verdict.note
    assert [v.id for v in decisions.check(records) if v.verdict != PASS] == ["sft-near-bayes"]


def test_a_note_has_the_means_of_the_cells_that_its_verdict_is_about():
    """The Bayes policies do not plan in POMDPs of horizon 8: what a model loses there is no part of a comparison with them."""
    records = made(GOOD)
    for r in records:
        if (r["point"]["suite"], r["point"]["horizon"]) == ("pomdp", 8):
            r["rows"]["id"]["sft"]["gaps"] = [gap + 0.9 for gap in r["rows"]["id"]["sft"]["gaps"]]
    found = {v.id: v for v in decisions.check(records)}
    near, cloning = found["sft-near-bayes"], found["sft-beats-cloning"]
    assert near.verdict == PASS and "SFT / bayes-demo: " in near.note and "pomdp 0.03" in near.note
    assert cloning.verdict == FAIL and "SFT / bc or bayes: " in cloning.note  # `bc` acts at horizon 8, too
    assert "pomdp bc 0.33" in cloning.note and "pomdp bayes 0.03" in cloning.note
    for id in ("sft-near-bayes", "sft-beats-cloning"):
        assert f"POMDP up to horizon {decisions.PLANNED['pomdp']}" in get_claim(id).criterion


def test_a_run_without_a_horizon_at_which_the_yardstick_plans_leaves_its_claims_open():
    records = [r for r in made(GOOD) if (r["point"]["suite"], r["point"]["horizon"]) == ("pomdp", 8)]
    found = {v.id: v for v in decisions.check(records)}
    for id, policy in (("sft-near-bayes", "bayes-demo"), ("sft-beats-cloning", "bayes")):
        assert (found[id].verdict, found[id].measured) == (INCONCLUSIVE, None)
        assert found[id].note == f"{policy} was not measured at horizon 8 of pomdp"
    assert found["sft-beats-icl"].verdict == PASS
    assert {row["context"] for row in decisions.table(records)} == {None}


def test_the_horizon_claim_compares_the_ends():
    records = made(GOOD)
    for r in records:
        if r["point"]["horizon"] == 16:  # of one suite alone
            r["rows"]["id"]["icl"]["gaps"] = [gap - 0.1 for gap in r["rows"]["id"]["icl"]["gaps"]]
    assert verdicts(records)["horizon"] == FAIL


def test_out_of_distribution_and_formats_have_claims_of_their_own():
    records = made(GOOD)
    for r in records:
        if "ood" in r["rows"]:
            r["rows"]["ood"]["sft"]["gaps"] = r["rows"]["ood"]["icl"]["gaps"]
    assert {id for id, v in verdicts(records).items() if v == FAIL} == {"ood"}
    records = made(GOOD)
    for r in records:
        if "readable" in r["rows"]:
            r["rows"]["readable"]["sft"]["gaps"] = r["rows"]["readable"]["icl"]["gaps"]
    assert {id for id, v in verdicts(records).items() if v == FAIL} == {"format"}


@pytest.mark.slow
def test_a_run_of_one_cell_leaves_open_what_it_did_not_measure(records):
    result = {v.id: v for v in decisions.check(records)}
    for id in ("horizon", "partial-observation", "ambiguity", "format"):
        assert (result[id].verdict, result[id].measured, result[id].n) == (INCONCLUSIVE, None, 0)
        assert "measured" in result[id].note
    assert result["sft-beats-icl"].n == SMOKE.tasks


def test_few_tasks_decide_nothing():
    assert set(verdicts(made(GOOD, n=5)).values()) == {INCONCLUSIVE}  # 45 tasks of a suite over horizons and trainings


def test_trainings_that_differ_decide_nothing_that_many_tasks_of_one_would():
    records = made(GOOD)
    for r in records:
        shift = (-0.1, 0.0, 0.2)[r["point"]["seed"]]
        r["rows"]["id"]["sft"]["gaps"] = [gap + shift for gap in r["rows"]["id"]["sft"]["gaps"]]
    assert verdicts(records)["sft-near-bayes"] == INCONCLUSIVE
    alone = [r for r in records if r["point"]["seed"] == 2]  # of this model, 0.2 above the yardstick
    assert verdicts(alone)["sft-near-bayes"] == FAIL


def test_gaps_of_a_suite_are_in_one_order_whatever_the_order_of_the_records():
    records = made(GOOD)
    for factors, clusters in (({"sft": 1.0, "bc": -1.0}, 3), ({"bc": 1.0}, 1)):
        forward, backward = (decisions.gaps(r, "mdp", factors) for r in (records, records[::-1]))
        assert [len(stratum) for stratum in forward] == [clusters] * 3
        np.testing.assert_array_equal(np.ravel(forward), np.ravel(backward))
        assert np.size(forward) == 3 * 3 * 60
    (first,) = decisions.gaps(records, "mdp", {"sft": 1.0, "bc": -0.5}, horizon=8, part="ood")
    rows = [r["rows"]["ood"] for r in records if (r["point"]["suite"], r["point"]["horizon"]) == ("mdp", 8)]
    np.testing.assert_allclose(first[1], np.array(rows[1]["sft"]["gaps"]) - 0.5 * np.array(rows[1]["bc"]["gaps"]), rtol=1e-12)
    assert decisions.gaps(records, "mdp", {"qmdp": 1.0}) == []


def test_the_table_has_a_row_for_every_policy_of_every_cell():
    records = made(GOOD)
    rows = {(r["suite"], r["horizon"], r["part"], r["policy"]): r for r in decisions.table(records)}
    assert (
        len(rows) == len(decisions.table(records)) == 5 * (9 * 2 + 3 * 2) - 2 * 2
    )  # both splits, two formats; no Bayes policy plans at horizon 8
    row = rows["pomdp", 6, "ood", "sft"]
    found = [r["rows"]["ood"] for r in records if (r["point"]["suite"], r["point"]["horizon"]) == ("pomdp", 6)]
    own, other = (np.array([rows[policy]["gaps"] for rows in found]) for policy in ("sft", "bayes-demo"))
    assert (row["n"], row["trainings"], row["invalid"]) == (180, 3, None)
    assert row["gap"] == pytest.approx(own.mean()) and row["low"] < row["gap"] < row["high"]
    assert row["context"] == pytest.approx(other.mean()) and row["reader"] == pytest.approx((own - other).mean())
    (difference,) = [(own - other).mean(1)]
    half = 4.302652729911275 * difference.std(ddof=1) / np.sqrt(3)  # t with two degrees of freedom
    assert row["reader_high"] - row["reader"] == pytest.approx(half, rel=1e-9)
    row = rows["pomdp", 6, "ood", "bayes-demo"]
    assert (row["reader"], row["effective_least"], row["effective"]) == (None, 1.5, 21.0)
    assert rows["pomdp", 6, "ood", "bc"]["effective"] is None


@pytest.mark.slow
def test_figures_are_drawn_of_one_cell_and_of_all(records):
    assert decisions.plot(records).keys() == {"gaps", "reader"}
    assert decisions.plot(made(GOOD)).keys() == {"gaps", "reader", "formats"}


def test_points_name_every_cell_once_for_each_training_and_the_middle_horizons_first():
    result = decisions.points(FULL)
    cells = [(p["suite"], p["horizon"]) for p in result]
    assert cells[:3] == [("mdp", 8), ("pomdp", 6), ("apomdp", 3)]
    assert len(result) == 3 * 9 and cells[:9] == cells[9:18] == cells[18:] and len(set(cells)) == 9
    assert [p["seed"] for p in result] == [0] * 9 + [1] * 9 + [2] * 9


def test_the_other_symbols_are_a_template_that_differs_everywhere(tmp_path):
    path = tmp_path / "renamed.json"
    path.write_text(json.dumps(decisions.RENAMED))
    template = load_template(str(path))
    assert template.grammar.fields == {"state", "action", "model", "observation", "reward"}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seeds": 0}, "seeds must be a whole number of at least 1; got 0"),
        ({"tasks": 0}, "tasks must be a whole number"),
        ({"mdp": (8, 4)}, "mdp must contain rising numbers of at least 1"),
        ({"mdp": (), "pomdp": (), "apomdp": ()}, "must not all be empty"),
        ({"apomdp": (5,)}, "apomdp must be horizons with at most 256 histories"),
        ({"model": "tiny"}, "more must be False for a tiny model"),
    ],
)
def test_invalid_configurations_raise_errors_that_name_the_field(change, said):
    with pytest.raises(ValueError, match=said):
        Config(**change)


def test_a_model_that_is_not_there_is_named_with_its_remedy():
    with pytest.raises(LindmError, match=r"model must be tiny or the directory of a model; got nowhere .*make smollm2") as stop:
        decisions.measure(replace(FULL, model="nowhere"), decisions.points(FULL)[0])
    assert isinstance(stop.value, DataError)


@pytest.mark.slow
def test_the_model_before_training_is_the_one_that_training_starts_from(tmp_path):
    from lindm.llm.io import weights
    from lindm.llm.parallel.sharding import make_mesh
    from lindm.llm.sft import setup

    with language_models.quiet_single_precision():
        data_config = decisions.DatasetConfig(tasks=8, demos=1, seed=3)
        data = language_models.make_data(tmp_path / "data", language_models.suite_at_horizon("pomdp", 2), data_config)
        config = language_models.sft_config(language_models.TINY, data, tmp_path / "run", steps=1, batch=8, seed=5)
        mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
        there = weights.load(language_models.base_model(config, tmp_path / "before"), mesh=mesh)
        here = setup.build_model(setup.setup_training(config))
        from flax import nnx

        for a, b in zip(jax.tree.leaves(nnx.state(there)), jax.tree.leaves(nnx.state(here)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
