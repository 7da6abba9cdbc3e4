"""The table and the page: complete, self-contained, escaped, and honest about what is not as expected."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from lindm.cli.verify import exit_code_of
from lindm.errors import DataError, LindmError, StorageError
from lindm.io import files
from lindm_experiments.harness import verify
from lindm_experiments.harness.claims import CLAIMS, FAIL, OPEN, PASS, claims_hash, get_claim
from lindm_experiments.harness.experiments import ambiguous_ids, select_claims
from lindm_experiments.harness.formats import SMOKE_ONLY, count_expected, format_number, verdict_label
from lindm_experiments.harness.report import (
    VERDICTS_FORMAT,
    docstring_blocks,
    print_next,
    print_summary,
    redraw,
    write_report,
)
from lindm_experiments.harness.runner import Outcome
from lindm_experiments.harness.verdicts import as_expected, count_verdict, mean_verdict, undecided
from lindm_experiments.harness.verify import Verification, summarize

GOOD = mean_verdict("q-risk", [1.0, 1.001, 0.999, 1.0, 1.0], figure="toy")
CONTROL = mean_verdict("controls/swap", [2.0, 2.001, 1.999, 2.0, 2.0])


def summary(*verdicts, message=""):
    error = LindmError(message) if message else None
    outcome = Outcome(experiment="toy", verdicts=list(verdicts), error=error)
    return summarize([outcome], {"toy": ["q-risk", "controls/swap"]}, "quick", 1.5)


def printed(content, width=160) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(content, console)
    print_next(content, Path("v"), [], console)
    console.file.close()
    return console.export_text()


@pytest.fixture
def directory(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "toy")
    files.write_json(tmp_path / "verdicts.json", summary(GOOD, CONTROL), format=VERDICTS_FORMAT)
    return tmp_path


class Page(HTMLParser):
    """Collects what a page would fetch, where it links to, and whether its tags close."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str | None] = []
        self.links: list[str | None] = []
        self.ids: list[str | None] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.fetched += [v for k, v in attrs if k in ("src", "srcset", "data") and v]
        self.fetched += [values["href"]] if tag == "link" else []
        self.links += [values["href"]] if tag == "a" else []
        self.ids += [values["id"]] if "id" in values else []
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_table_shows_every_claim_with_prediction_interval_criterion_and_verdict():
    text = printed(summary(GOOD, CONTROL))
    for word in ("q-risk", "controls/swap", "measured / predicted", "[0.99", "n=5", "PASS", "FAIL, as", "expected"):
        assert word in text
    assert ">>" not in text and max(map(len, text.splitlines())) <= 160


def test_the_slack_of_an_inequality_stands_beside_its_verdict(directory):
    bound = mean_verdict("q-risk", [1.0, 1.001, 0.999, 1.0, 1.0], slack=[3.0, 1.02, 140.0])
    content = summary(bound, CONTROL)
    assert [c["slack"] for c in content["claims"]] == [[1.02, 3.0], None]
    assert "n=5" in printed(content) and printed(content).count("slack 1.02, median 3; predicted") == 1
    files.write_json(directory / "verdicts.json", content, format=VERDICTS_FORMAT)
    assert write_report(directory).read_text().count("slack 1.02, median 3") == 1


def test_no_p_value_is_shown_as_zero(directory):
    for p, shown in ((0.0, "p &lt; 1e-300"), (1e-299, "p = 1e-299"), (0.0123, "p = 0.012")):
        content = summary(GOOD, CONTROL)
        content["claims"][0]["p"] = p
        files.write_json(directory / "verdicts.json", content, format=VERDICTS_FORMAT)
        page = write_report(directory).read_text()
        assert page.count(f"n = 5, {shown}<") == 1 and "p = 0<" not in page


def test_an_unexpected_verdict_stands_out_without_colours():
    text = printed(summary(mean_verdict("q-risk", [1.5, 1.5, 1.5, 1.5, 1.6]), CONTROL))
    assert ">> q-risk" in text and "FAIL (expected PASS)" in text


def test_the_smoke_preset_asks_for_no_more_seeds_and_says_that_it_decides_nothing():
    few = mean_verdict("q-risk", [1.0, 1.2])
    assert "not as expected: q-risk: INCONCLUSIVE (expected PASS)" in (quick := printed(summary(few, CONTROL)))
    assert "more seeds may decide it (--seeds)" in quick and "smoke" not in quick
    smoke = printed(summary(few, CONTROL) | {"preset": "smoke"})
    assert "not as expected" not in smoke and "--seeds" not in smoke and f"preset smoke: {SMOKE_ONLY}" in smoke
    wrong = printed(summary(mean_verdict("q-risk", [1.5, 1.5, 1.5, 1.5, 1.6]), CONTROL) | {"preset": "smoke"})
    assert "not as expected: q-risk: FAIL (expected PASS)" in wrong


def test_the_table_says_what_its_brackets_are():
    assert "In brackets: two-sided 95 % intervals." in printed(summary(GOOD, CONTROL))


def test_a_claim_that_was_not_decided_is_said_to_be_so():
    content = summary(message="toy: worker died (signal 9)")
    assert [c["verdict"] for c in content["claims"]] == ["INCONCLUSIVE"] * 2
    assert content["claims"][0]["note"] == "toy: worker died (signal 9)"
    assert "INCONCLUSIVE" in printed(content)


def test_open_questions_take_no_power_from_predictions_nor_the_other_way():
    """A prediction at p = 0.04 is alone in its family, for any number of open questions beside it."""
    weak = dataclasses.replace(GOOD, p=0.04)
    open_ids = ["sft-beats-icl", "ood", "horizon"]
    questions = [dataclasses.replace(GOOD, id=id, p=p) for id, p in zip(open_ids, (0.02, 0.04, 1.0), strict=True)]
    questions[2] = undecided("horizon", "not measured")
    outcome = Outcome(experiment="toy", verdicts=[weak, *questions])
    rows = summarize([outcome], {"toy": ["q-risk", *open_ids]}, "quick", 1.0)["claims"]
    assert [row["verdict"] for row in rows] == [PASS, PASS, PASS, "INCONCLUSIVE"]
    assert [row["p"] for row in rows] == [0.04, 0.04, 0.04, 1.0]  # 2 x 0.02, and not 3 x: one was not measured
    assert exit_code([outcome], {"claims": rows}) == 0


def exit_code(outcomes, content) -> int:
    return exit_code_of(Verification(summary=content, directory=Path("v"), outcomes=outcomes))


def test_the_exit_code_is_0_only_if_every_verdict_is_the_expected_one():
    good = Outcome(experiment="toy", verdicts=[GOOD, CONTROL])
    assert exit_code([good], summary(GOOD, CONTROL)) == 0
    surprising = mean_verdict("controls/swap", [1.0, 1.001, 0.999, 1.0, 1.0])
    assert exit_code([good], summary(GOOD, surprising)) == 1
    assert exit_code([good, Outcome(experiment="b", error=StorageError("full"))], summary(GOOD, CONTROL)) == 7


def test_a_main_claim_stands_for_its_sub_claims():
    known = {"a": ("weights", "weights/sub"), "b": ("weights-other", "q-risk")}
    assert select_claims(known, ["weights"]) == {"a": ["weights", "weights/sub"]}
    assert select_claims(known, ["weights/sub", "q-risk"]) == {"a": ["weights/sub"], "b": ["q-risk"]}
    assert select_claims(known, []) == {"a": ["weights", "weights/sub"], "b": ["weights-other", "q-risk"]}
    with pytest.raises(LindmError, match="weights/sub"):
        select_claims(known, ["weight"])


def test_an_id_of_several_experiments_selects_all_and_is_qualified_by_the_experiment():
    known = {"ambiguity": ("ambiguity/monotone", "ambiguity/convex"), "decisions": ("ambiguity", "ood")}
    assert select_claims(known, ["ambiguity"]) == {
        "ambiguity": ["ambiguity/monotone", "ambiguity/convex"],
        "decisions": ["ambiguity"],
    }
    assert ambiguous_ids(known, ["ambiguity", "ood"]) == {"ambiguity": ["ambiguity", "decisions"]}
    assert select_claims(known, ["decisions/ambiguity"]) == {"decisions": ["ambiguity"]}
    assert select_claims(known, ["ambiguity/ambiguity"]) == {"ambiguity": ["ambiguity/monotone", "ambiguity/convex"]}
    assert select_claims(known, ["ambiguity/convex"]) == {"ambiguity": ["ambiguity/convex"]}
    assert ambiguous_ids(known, ["decisions/ambiguity", "ambiguity/ambiguity"]) == {}
    for id in ("decisions", "decisions/ood/x"):
        with pytest.raises(LindmError, match="only must be one of"):
            select_claims(known, [id])


def test_an_id_of_several_experiments_is_noted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "run_with_progress", lambda jobs, *_: [Outcome(experiment=job.experiment.name) for job in jobs])
    result = verify.verify("smoke", tmp_path, only=["ambiguity"])
    assert {outcome.experiment for outcome in result.outcomes} == {"ambiguity", "decisions"}
    assert "--only ambiguity selects claims of ambiguity and decisions; --only ambiguity/ambiguity or" in capsys.readouterr().err


@pytest.mark.fault("F20")
def test_the_page_is_well_formed_and_fetches_nothing(directory):
    source = write_report(directory).read_text()
    page = Page(source)
    assert page.open == []
    assert page.fetched and all(str(v).startswith("data:image/webp;base64,") for v in page.fetched)
    assert not re.search(r"https?://|@import|url\(", source)
    assert {link[1:] for link in page.links if link and link.startswith("#")} <= set(page.ids)


def test_the_page_holds_verdicts_figures_configuration_and_provenance(directory):
    source = write_report(directory).read_text()
    for word in ("q-risk", "FAIL, as expected", "Does a toy", "seeds = 6", "Provenance", "jax 0.", "2 of 2 claims as expected"):
        assert word in source


@pytest.mark.fault("F19")
def test_values_on_the_page_are_escaped(directory):
    content = json.loads((directory / "verdicts.json").read_text())
    content["claims"][0]["note"] = "<script>alert(1)</script>{{ 7 * 7 }}"
    content["claims"][0]["predicted"] = 'a < b & "c"'
    files.write_json(directory / "verdicts.json", content, format=VERDICTS_FORMAT)
    source = write_report(directory).read_text()
    assert source.count("<script>") == 1, "that of the page"
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}" in source
    assert "a &lt; b &amp;" in source


def test_a_page_of_an_experiment_that_died_still_opens(tmp_path):
    files.write_json(tmp_path / "verdicts.json", summary(message="toy: worker died (signal 9)"), format=VERDICTS_FORMAT)
    source = write_report(tmp_path).read_text()
    assert "worker died" in source and "0 of 2 claims as expected" in source


def test_redrawing_without_records_is_exit_3(tmp_path):
    with pytest.raises(LindmError) as stop:
        redraw(tmp_path)
    assert isinstance(stop.value, DataError)


def test_a_run_of_another_version_is_not_drawn_again(directory):
    config = directory / "toy" / "config.json"
    files.write_json(config, files.read_json(config), format="lindm-run-0")
    with pytest.raises(DataError, match=r"config.json: must have the format 'lindm-run-2'; got 'lindm-run-0': another version"):
        redraw(directory)


@pytest.mark.fault("F34")
def test_an_interval_that_is_not_finite_is_null_in_json():
    row = summary(mean_verdict("q-risk", [1.0]), CONTROL)["claims"][0]
    assert row["ci"] == [None, None] and row["verdict"] == "INCONCLUSIVE"
    files.canonical_json(row)


def test_prose_keeps_indented_lines_as_they_stand():
    assert docstring_blocks("A question\nin two lines?\n\n    a command\n\nMore:\n    x  = 1") == [
        ("p", "A question in two lines?"),
        ("pre", "a command"),
        ("p", "More:"),
        ("pre", "x  = 1"),
    ]


def test_numbers_and_labels_are_short():
    assert format_number(0.123456) == "0.1235" and format_number(None) == "-" and format_number("-1 in M") == "-1 in M"
    assert verdict_label({"verdict": "FAIL", "expected": "PASS"}) == "FAIL (expected PASS)"
    for verdict in (PASS, FAIL, "INCONCLUSIVE"):  # any verdict is a result
        assert verdict_label({"verdict": verdict, "expected": OPEN}) == f"{verdict}, open"
        assert as_expected({"verdict": verdict, "expected": OPEN})
        assert as_expected({"verdict": verdict, "expected": PASS}) == (verdict == PASS)


def test_the_score_counts_predictions_and_open_questions_apart():
    good, bad, opened = ({"verdict": FAIL, "expected": expected} for expected in (FAIL, PASS, OPEN))
    assert count_expected([good, bad, good]) == "2 of 3 claims as expected"
    assert count_expected([good, opened]) == "1 of 1 claims as expected, 1 open question"
    assert count_expected([opened, opened]) == "2 open questions"


def test_claims_have_unique_ids_bands_and_statements_of_one_sentence():
    assert len({c.id for c in CLAIMS.values()}) == len(CLAIMS)
    for c in CLAIMS.values():
        assert c.lo <= c.hi and c.lo < float("inf") and c.hi > -float("inf"), c.id
        least = 1 if c.experiment in ("offline_data", "offline_circuit") else 5  # there trainings count, each on many tasks
        assert c.min_seeds >= least and c.expected in (PASS, FAIL, OPEN), c.id
        assert c.statement.endswith(".") and c.predicted and c.criterion and c.source, c.id
        assert "{" not in c.criterion, c.id


def test_an_unknown_claim_is_answered_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"^claim 'wieghts' is not known; did you mean weights"):
        get_claim("wieghts")


def test_the_fingerprint_depends_on_the_claims_and_not_on_their_order():
    assert claims_hash(["q-risk", "weights"]) == claims_hash(["weights", "q-risk"]) != claims_hash(["weights"])


def test_counts_are_judged_against_the_largest_admissible_rate():
    assert count_verdict("identity", 0, 20_000, seeds=5).verdict == "PASS"
    assert count_verdict("identity", 0, 20_000, seeds=4).verdict == "INCONCLUSIVE"
    assert count_verdict("identity", 1, 20_000, seeds=5).verdict == "FAIL"
    assert count_verdict("high-probability-bound", 20, 2000, seeds=5, exact=False).verdict == "PASS"
