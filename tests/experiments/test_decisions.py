"""Fine-tuning against other policies: records, verdicts, and errors of the configuration."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from lindm.errors import DataError, LindmError
from lindm.evaluation.compare import PolicyResult
from lindm.io import files
from lindm.text import load_template
from lindm_experiments import decisions
from lindm_experiments.decisions import FULL, QUICK, SMOKE, Config
from lindm_experiments.harness.claims import FAIL, INCONCLUSIVE, PASS, claim_ids
from lindm_experiments.lib import language_models
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(decisions)


@pytest.mark.slow
def test_a_record_holds_every_policy_on_the_same_new_tasks(records):
    (record,) = records
    assert record["point"] == {"suite": "pomdp", "horizon": 2, "demos": "oracle", "seed": 0}
    assert record["rows"].keys() == {"id", "ood"}
    for rows in record["rows"].values():
        assert rows.keys() == {*decisions.HIDDEN, "icl", "sft"}
        assert {len(row["gaps"]) for row in rows.values()} == {SMOKE.tasks}
        assert rows["oracle"]["gaps"] == pytest.approx([0] * SMOKE.tasks, abs=1e-6)
        assert rows["random"]["gaps"] == pytest.approx([1] * SMOKE.tasks, abs=1e-6)
        assert all(row["method"] == "exact" for row in rows.values())
        assert {name for name, row in rows.items() if row["invalid"] is not None} == {"icl", "sft"}
    assert record["rows"]["id"]["bc"]["gaps"] != record["rows"]["ood"]["bc"]["gaps"]


@pytest.mark.slow
def test_a_record_is_the_same_again(records):
    (point,) = decisions.points(SMOKE)
    again = {"point": point} | files.to_jsonable(decisions.measure(SMOKE, point))
    assert files.canonical_json(again) == files.canonical_json(records[0])


@pytest.mark.parametrize("suite", decisions.SUITES)
@pytest.mark.parametrize("demos", ["oracle", "worse"])
def test_texts_of_worse_demonstrations_show_rewards_and_no_labels(suite, demos, monkeypatch):
    """Training and evaluation get the same options; a text contains labels only as the actions of its demonstrations."""
    config, faced = [], []

    def named(names, source, dataset, template, rewards):
        faced.append((dataset, names, rewards))
        return names

    def evaluate(source, policies, dataset, **how):
        about = {
            "suite": suite,
            "horizon": 0,
            "split": None,
            "method": "exact",
            "invalid": None,
            "masked": None,
            "decisions_per_s": 1.0,
        }
        return [PolicyResult(policy=policy, gaps=[0.0], **about) for policy in policies]

    monkeypatch.setattr(decisions, "PoliciesByName", named)
    monkeypatch.setattr(decisions, "evaluate", evaluate)
    monkeypatch.setattr(decisions.language_models, "make_data", lambda data, source, data_config: data)
    monkeypatch.setattr(decisions.language_models, "base_model", lambda config, out: out)
    monkeypatch.setattr(decisions.language_models, "fine_tune", lambda options: config.append(options) or options.out)
    result = decisions.measure(SMOKE, {"suite": suite, "horizon": 2, "demos": demos, "seed": 0})
    (options,) = config
    assert {options.rewards, *(rewards for _, _, rewards in faced)} == {"shown" if demos == "worse" else "auto"}
    for data_config, policies, _ in faced:
        assert (data_config.behavior, data_config.seed) == ("epsilon" if demos == "worse" else "oracle", SMOKE.base_seed + 1)
        assert ("behavior" in policies) == (demos == "worse")
    assert result["rows"].keys() == ({"id"} if demos == "worse" else {"id", "ood"})


def made(gaps: dict[str, dict[str, float]], n: int = 60) -> list[dict]:
    """A full run's records: suite -> policy -> mean gap; formats and worse demonstrations like the rest."""
    rng = np.random.default_rng(0)
    cfg = replace(FULL, tasks=n)
    result = []
    for point in decisions.points(cfg):
        parts = ["id"] if point["demos"] == "worse" else ["id", "ood"]
        if point["demos"] == "oracle" and point["horizon"] == getattr(cfg, point["suite"])[0]:
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
                    "method": "exact",
                }
                for policy, mean in gaps[point["suite"]].items()
            }
        result.append({"point": point, "rows": rows})
    return result


GOOD = {
    "mdp": {"sft": 0.02, "icl": 0.2, "bc": 0.1, "behavior": 0.3},
    "pomdp": {"sft": 0.03, "icl": 0.4, "bc": 0.3, "behavior": 0.3},
    "apomdp": {"sft": 0.03, "icl": 0.5, "bc": 0.3, "behavior": 0.3},
}


def verdicts(records: list[dict]) -> dict[str, str]:
    return {v.id: v.verdict for v in decisions.check(records)}


def test_the_verdicts_follow_the_gaps():
    result = verdicts(made(GOOD))
    assert result == dict.fromkeys(claim_ids("decisions"), PASS)


@pytest.mark.parametrize(
    "suite, policy, gap, fails",
    [
        ("pomdp", "sft", 0.15, {"sft-beats-icl"}),
        ("mdp", "bc", 0.0, {"sft-beats-cloning", "behavior-context"}),
        ("mdp", "icl", 0.6, {"partial-observation"}),
        ("apomdp", "icl", 0.3, {"ambiguity"}),
        ("apomdp", "behavior", 0.0, {"behavior-context"}),
        ("mdp", "sft", 0.35, {"sft-beats-icl", "sft-beats-cloning", "ood", "format", "behavior-context"}),
    ],
)
def test_a_number_out_of_its_band_fails_only_its_claims(suite, policy, gap, fails):
    gaps = copy.deepcopy(GOOD)
    gaps[suite][policy] = gap
    assert {id for id, verdict in verdicts(made(gaps)).items() if verdict == FAIL} == fails


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
    for id in ("horizon", "partial-observation", "ambiguity", "format", "behavior-context"):
        assert (result[id].verdict, result[id].measured, result[id].n) == (INCONCLUSIVE, None, 0)
        assert "measured" in result[id].note
    assert result["sft-beats-icl"].n == SMOKE.tasks


def test_few_tasks_decide_nothing():
    assert set(verdicts(made(GOOD, n=10)).values()) == {INCONCLUSIVE}  # 30 tasks of a suite over three horizons


def test_gaps_of_a_suite_are_in_one_order_whatever_the_order_of_the_records():
    records = made(GOOD)
    for part in ("id", "ood"):
        forward, backward = (decisions.gaps(r, "sft", "mdp", part=part) for r in (records, records[::-1]))
        assert len(forward) == 3 * 60
        np.testing.assert_array_equal(forward, backward)
    assert len(decisions.gaps(records, "sft", "mdp", horizon=8, demos="worse")) == 60
    assert len(decisions.gaps(records, "qmdp", "mdp")) == 0


def test_the_table_has_a_row_for_every_policy_of_every_cell():
    rows = decisions.table(made(GOOD))
    cells = 9 * 2 + 3 * 2 + 3  # both splits, two formats, worse demonstrations
    assert len(rows) == 4 * cells
    row = next(r for r in rows if (r["suite"], r["horizon"], r["part"], r["policy"]) == ("pomdp", 6, "ood", "sft"))
    assert row["low"] < row["gap"] < row["high"] and row["gap"] == pytest.approx(0.03, abs=0.01)


@pytest.mark.slow
def test_figures_are_drawn_of_one_cell_and_of_all(records):
    assert decisions.plot(records).keys() == {"gaps"}
    assert decisions.plot(made(GOOD)).keys() == {"gaps", "formats"}


def test_points_name_every_cell_once_and_the_middle_horizons_first():
    result = decisions.points(FULL)
    assert [(p["suite"], p["horizon"]) for p in result[:3]] == [("mdp", 8), ("pomdp", 6), ("apomdp", 3)]
    assert len(result) == 9 + 3
    assert sum(p["demos"] == "worse" for p in result) == 3
    assert len(decisions.points(replace(FULL, seeds=2))) == 24
    assert [p["demos"] for p in decisions.points(QUICK)] == ["oracle"]


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
        ({"mdp": (8, 4)}, "mdp must hold rising numbers, from 1 on"),
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
        import jax

        mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
        there = weights.load(language_models.base_model(config, tmp_path / "before"), mesh=mesh)
        here = setup.build_model(setup.setup_training(config))
        from flax import nnx

        for a, b in zip(jax.tree.leaves(nnx.state(there)), jax.tree.leaves(nnx.state(here)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
