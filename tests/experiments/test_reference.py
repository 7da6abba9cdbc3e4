"""The reference records: the results page shows the numbers that follow from them."""

import json
import re

import pytest

from lindm.io import manifest
from lindm_experiments.harness.experiments import PACKAGE, load, points_of
from lindm_experiments.harness.tasks import verdicts_of
from lindm_experiments.harness.verdicts import adjust

HERE = PACKAGE.parent
RUNS = sorted(path.parent for path in HERE.glob("reference/*/records.jsonl"))
PAGE = (HERE.parent / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.fixture(params=RUNS, ids=lambda run: run.name)
def run(request):
    config = json.loads((request.param / "config.json").read_text())
    return load(config["experiment"]), config, manifest.read_records(request.param)


def test_there_are_reference_records():
    assert {run.name for run in RUNS} == {"decisions", "llm_law", "mechanism"}


def test_reference_records_are_complete_and_of_the_full_preset(run):
    module, config, records = run
    assert config["preset"] == "full"
    config_of_records = module.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config["config"].items()})
    assert config_of_records == module.FULL
    assert [r["point"] for r in records] == points_of(module, module.FULL)


def test_the_page_shows_the_verdicts_of_the_records(run):
    module, _, records = run
    shown = dict(re.findall(r"^\| `([a-z/-]+)` \| (PASS|FAIL|INCONCLUSIVE) \|", PAGE, re.MULTILINE))
    verdicts = {v.id: v.verdict for v in adjust(verdicts_of(module, records))}
    assert {id: shown.get(id) for id in verdicts} == verdicts


def test_the_page_shows_the_gaps_of_the_records():
    """Every row of its tables: the fine-tuned model's gap and interval, and the others' beside it."""
    from lindm_experiments import decisions

    records = manifest.read_records(HERE / "reference/decisions")
    rows = {(r["suite"], r["horizon"], r["part"], r["policy"]): r for r in decisions.table(records) if r["demos"] == "oracle"}
    number = r"(-?\d\.\d{3})"
    row = rf"^\| (\w+) \| (\d+) \| \*\*{number}\*\* \[{number}, {number}\] \| {number} \| {number} \|"
    cells_of_rows = re.findall(row, PAGE, re.MULTILINE)
    assert len(cells_of_rows) == 18
    for i, (suite, horizon, *values) in enumerate(cells_of_rows):
        part = "id" if i < 9 else "ood"
        sft, icl, bc = (rows[suite, int(horizon), part, policy] for policy in ("sft", "icl", "bc"))
        wanted = [sft["gap"], sft["low"], sft["high"], icl["gap"], bc["gap"]]
        assert values == [f"{v:.3f}" for v in wanted], (suite, horizon, part)


def test_the_page_shows_the_gaps_with_worse_demonstrations():
    from lindm_experiments import decisions

    records = manifest.read_records(HERE / "reference/decisions")
    rows = {(r["suite"], r["policy"]): r for r in decisions.table(records) if r["demos"] == "worse"}
    for suite, horizon in (("mdp", 8), ("pomdp", 6), ("apomdp", 3)):
        sft, bc, icl = ("{gap:.3f} [{low:.3f}, {high:.3f}]".format(**rows[suite, policy]) for policy in ("sft", "bc", "icl"))
        assert f"| {suite} | {horizon} | {sft} | {rows[suite, 'behavior']['gap']:.3f} | {bc} | {icl} |" in PAGE


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
