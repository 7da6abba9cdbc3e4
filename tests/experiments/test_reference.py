"""The reference records: the results page shows the numbers that follow from them."""

import json
import re

import numpy as np
import pytest

from lindm.io import manifest
from lindm.io.files import read_json_lines
from lindm_experiments.harness.experiments import PACKAGE, load, points_of
from lindm_experiments.harness.statistics import at_most, mean_ci
from lindm_experiments.harness.tasks import verdicts_of
from lindm_experiments.harness.verdicts import Verdict, adjust, to_verdict

HERE = PACKAGE.parent
EARLIER = HERE / "reference" / "decisions"  # a run of an earlier version of this experiment
PILOT = HERE / "reference" / "offline_data_pilot"  # the first records of a run on other seeds
RUNS = sorted(path.parent for path in HERE.glob("reference/*/records.jsonl") if path.parent not in (EARLIER, PILOT))
PAGE = (HERE.parent / "docs" / "results.md").read_text(encoding="utf-8")
SHOWN = dict(re.findall(r"^\| `([a-z/-]+)` \| (PASS|FAIL|INCONCLUSIVE) \|", PAGE, re.MULTILINE))


@pytest.fixture(params=RUNS, ids=lambda run: run.name)
def run(request):
    config = json.loads((request.param / "config.json").read_text())
    return load(config["experiment"]), config, manifest.read_records(request.param)


def test_there_are_reference_records():
    assert {run.name for run in RUNS} == {"llm_law", "mechanism"} and (EARLIER / "records.jsonl").is_file()


def test_reference_records_are_complete_and_of_the_full_preset(run):
    module, config, records = run
    assert config["preset"] == "full"
    config_of_records = module.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config["config"].items()})
    assert config_of_records == module.FULL
    assert [r["point"] for r in records] == points_of(module, module.FULL)


def test_the_page_shows_the_verdicts_of_the_records(run):
    module, _, records = run
    verdicts = {v.id: v.verdict for v in adjust(verdicts_of(module, records))}
    assert {id: SHOWN.get(id) for id in verdicts} == verdicts


def earlier_gaps(suite: str, policy: str, part: str = "id") -> np.ndarray:
    """Gaps [horizon, task] of the earlier run of `decisions`."""
    records = sorted(manifest.read_records(EARLIER), key=lambda r: r["point"]["horizon"])
    parts = [r["rows"].get(part) for r in records if r["point"]["suite"] == suite]
    return np.array([rows[policy]["gaps"] for rows in parts if rows])


def test_the_page_shows_the_verdicts_of_the_earlier_run_with_tasks_as_clusters():
    """Its tasks of one number have the same kernels at all horizons: they are one unit, the mean over horizons."""
    suites = ("mdp", "pomdp", "apomdp")

    def below(suite: str, policy: str, share: float, part: str = "id") -> np.ndarray:
        return (earlier_gaps(suite, "sft", part) - share * earlier_gaps(suite, policy, part)).mean(0)

    gain = {name: earlier_gaps(name, "icl") - earlier_gaps(name, "sft") for name in suites}
    claims = {
        "sft-beats-icl": [below(name, "icl", 0.25) for name in suites],
        "sft-beats-cloning": [below(name, "bc", 1) for name in suites],
        "horizon": [gain[name][0] - gain[name][-1] for name in suites],
        "partial-observation": [(gain["mdp"] - gain["pomdp"]).mean(0)],
        "ambiguity": [(gain["pomdp"] - gain["apomdp"]).mean(0)],
        "ood": [below(name, "icl", 0.5, "ood") for name in suites],
        "format": [below(name, "icl", 0.5, part) for name in suites for part in ("renamed", "readable")],
    }
    assert all(len(part) == 50 for parts in claims.values() for part in parts)
    verdicts: list[Verdict] = [
        to_verdict(id, *(at_most(part, 0, min_seeds=50) for part in parts)) for id, parts in claims.items()
    ]
    assert {v.id: SHOWN.get(v.id) for v in verdicts} == {v.id: v.verdict for v in adjust(verdicts)}


def test_the_page_shows_the_gaps_of_the_records():
    """Every row of its tables: the fine-tuned model's gap and interval, and the others' beside it."""
    from lindm_experiments import decisions

    records = manifest.read_records(EARLIER)
    rows = {(r["suite"], r["horizon"], r["part"], r["policy"]): r for r in decisions.table(records)}
    number = r"(-?\d\.\d{3})"
    row = rf"^\| (\w+) \| (\d+) \| \*\*{number}\*\* \[{number}, {number}\] \| {number} \| {number} \|"
    cells_of_rows = re.findall(row, PAGE, re.MULTILINE)
    assert len(cells_of_rows) == 18
    for i, (suite, horizon, *values) in enumerate(cells_of_rows):
        part = "id" if i < 9 else "ood"
        sft, icl, bc = (rows[suite, int(horizon), part, policy] for policy in ("sft", "icl", "bc"))
        wanted = [sft["gap"], sft["low"], sft["high"], icl["gap"], bc["gap"]]
        assert values == [f"{v:.3f}" for v in wanted], (suite, horizon, part)


def test_the_page_shows_the_gaps_of_the_earlier_run_with_worse_demonstrations():
    for record in read_json_lines(EARLIER / "worse_demonstrations.jsonl"):
        rows = record["rows"]["id"]
        intervals = {policy: mean_ci(rows[policy]["gaps"]) for policy in ("sft", "behavior", "bc")}
        sft, demonstrator, bc = (f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, (low, high) in intervals.values())
        point = record["point"]
        assert f"| {point['suite']} | {point['horizon']} | {sft} | {demonstrator.split()[0]} | {bc} |" in PAGE


def test_the_page_shows_the_gaps_and_losses_of_the_pilot_of_offline_data():
    found = 0
    for record in read_json_lines(PILOT / "records.jsonl"):
        point, rows = record["point"], record["rows"]
        if "cell" in point:
            losses = [evaluation["loss"] for evaluation in record["curve"]]
            end = f" {min(losses):.3f} | {losses[-1]:.3f} |"
            shown = {f"| {point['n']:,} |": (rows["5"], end)}
        elif point["demos"] == 5:
            shown = {rf"| `{policy}`": (row, "") for policy, row in rows.items() if policy != "layer"}
        else:
            continue
        for start, (row, end) in shown.items():
            mean, (low, high) = mean_ci(row["gaps"])
            (line,) = (
                line for line in PAGE.splitlines() if line.startswith(start) and f"{mean:.3f} [{low:.3f}, {high:.3f}]" in line
            )
            assert line.endswith(f"| {mean:.3f} [{low:.3f}, {high:.3f}] |{end}")
            found += 1
    assert found == 6 + 7


def test_the_page_shows_the_risks_by_length():
    from lindm_experiments import llm_law

    records = manifest.read_records(HERE / "reference/llm_law")
    N, M = llm_law.lengths(records)
    risks = {predictor: llm_law.risks(records, predictor).mean(0) for predictor in ("transformer", "layer", "bayes")}
    for i, n in enumerate(N):
        for predictor in ("transformer", "layer"):
            cells = [f"{ratio:.2f}" for ratio in risks[predictor][i] / risks["bayes"][i]]
            cells = [f"**{cell}**" if m == n else cell for m, cell in zip(M, cells, strict=True)]
            assert f"| {n} | {predictor} | {' | '.join(cells)} |" in PAGE
    for n, gaps in llm_law.language_gaps(records).items():
        cells = [f"{sum(values) / len(values):.3f}" for values in gaps.values()]
        assert f"| {n} demonstrations | {' | '.join(cells)} |" in PAGE
