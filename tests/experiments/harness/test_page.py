"""The pages without a browser: every claim once, unique ids, links that resolve, one script, plots in the right places."""

import base64
import hashlib
import io
import re
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread, imsave

from lindm.errors import DataError
from lindm.io import files, limits
from lindm_experiments.harness.claims import CLAIMS, OPEN
from lindm_experiments.harness.formats import SMOKE_ONLY, format_test
from lindm_experiments.harness.page import HEIGHT, WIDTH, band_words, claim_kind, embed_figure, interval_plot
from lindm_experiments.harness.report import VERDICTS_FORMAT, write_report
from lindm_experiments.harness.statistics import equivalence, no_violations
from lindm_experiments.harness.summary import write_summary
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.harness.verify import verdict_row
from tests.experiments.harness.test_report import Page

UNEXPECTED = "q-risk"


def png(height=60, width=90) -> bytes:
    """A picture with every kind of color: two gradients and a white part."""
    picture = np.ones((height, width, 3))
    picture[:, : width // 2, 0] = np.linspace(0, 1, height)[:, None]
    picture[:, : width // 2, 1] = np.linspace(1, 0, width // 2)
    buffer = io.BytesIO()
    imsave(buffer, picture, format="png")
    return buffer.getvalue()


def write_verification(directory, experiments=None) -> list[dict]:
    """verdicts.json of a verification that decides every claim of the experiments, and a figure of experiment risk; the rows."""
    rows = []
    for claim in CLAIMS.values():
        if experiments is not None and claim.experiment not in experiments:
            continue
        verdict = {OPEN: "INCONCLUSIVE"}.get(claim.expected, claim.expected)
        if claim.id == UNEXPECTED:
            verdict = "FAIL"
        middle = float(np.mean([end for end in (claim.lo, claim.hi) if np.isfinite(end)]))
        ci = (middle - 0.01, middle + 0.01)
        figure = "error" if claim.experiment == "risk" else None
        decided = Verdict(id=claim.id, measured=middle, ci=ci, n=5, verdict=verdict, p=0.01, figure=figure)
        rows.append(verdict_row(claim.id, claim.experiment, decided))
    content = {"preset": "quick", "wall_s": 1.0, "criteria": "c" * 64, "seconds": {}, "errors": {}, "claims": rows}
    (directory / "risk").mkdir(parents=True)
    (directory / "risk" / "error.png").write_bytes(png())
    files.write_json(directory / "verdicts.json", content, format=VERDICTS_FORMAT)
    return rows


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The rows of a verification of all claims, and the source of its report."""
    directory = tmp_path_factory.mktemp("verified")
    return write_verification(directory), write_report(directory).read_text(encoding="utf-8")


def test_every_claim_is_there_once_and_every_link_resolves(written):
    rows, source = written
    page = Page(source)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert {row["id"] for row in rows} == set(CLAIMS) <= set(page.ids)
    assert {f"experiment-{claim.experiment}" for claim in CLAIMS.values()} <= set(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids) and "figure-risk-error" in page.ids  # pyright: ignore
    assert len(source) < 1_000_000, "the figures of a quick verification take 2 MB, and the page shall stay below 3 MB"


def test_every_verdict_is_a_word_and_a_symbol_and_not_a_color_alone(written):
    rows, source = written
    found = re.findall(
        r'<article class="claim (\w+)" id="([^"]*)".*?<use href="#icon-(\w+)"/></svg> <span>(\w+)', source, re.DOTALL
    )
    assert found == [(claim_kind(row), row["id"], claim_kind(row), row["verdict"]) for row in rows]
    assert {kind for kind, *_ in found} == {"hold", "control", "open", "unexpected"}
    assert [id for kind, id, *_ in found if kind == "unexpected"] == [UNEXPECTED]
    assert set(re.findall(r'<symbol id="icon-(\w+)"', source)) == {"hold", "control", "open", "unexpected"}


def test_the_filters_offer_every_experiment_and_count_the_claims(written):
    rows, source = written
    for experiment in {row["experiment"] for row in rows}:
        number = sum(row["experiment"] == experiment for row in rows)
        assert f'<option value="experiment-{experiment}">{experiment} ({number})</option>' in source
    assert f'<option value="kind:open">Open questions ({sum(row["expected"] == OPEN for row in rows)})</option>' in source
    assert f"{len(rows)} of {len(rows)} claims</output>" in source


@pytest.mark.fault("F19", "F20")
def test_a_browser_runs_the_script_of_the_page_and_no_other_and_fetches_nothing(written):
    _, source = written
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', source)
    assert {"default-src 'none'", "img-src data:", f"script-src 'sha256-{digest}'"} <= set(policy.split("; "))
    assert not re.search(r"\son\w+=", source), "handlers in attributes would not run"


def test_every_claim_says_which_test_decides_it_and_what_its_name_means(written):
    rows, source = written
    two = sum(None not in row["band"] for row in rows)
    assert source.count("<dd>PASS: two one-sided tests for equivalence (TOST), each at 5 %; FAIL: a two-sided test") == two > 0
    assert source.count("<dd>PASS: a one-sided test at 5 %; FAIL: a one-sided test at 5 %</dd>") == len(rows) - two > 0
    assert "two one-sided tests for equivalence (TOST)" in source.partition('id="method"')[2]


def decided(*verdicts: Verdict) -> list[dict]:
    return [verdict_row(v.id, CLAIMS[v.id].experiment, v) for v in verdicts]


def test_the_page_shows_the_interval_and_the_limits_which_decide(tmp_path):
    """The rate of no violation among 3,400: its two-sided interval leaves the band, its one-sided limit is inside."""
    verdicts = count_verdict("pooled/rungs", 0, 3400, seeds=10), mean_verdict("paper-bound", np.linspace(0.97, 1.0, 10))
    count, mean = decided(*verdicts)
    assert count["verdict"] == "PASS" and count["limits"][1] < 0.001 < count["ci"][1]
    content = {"preset": "quick", "wall_s": 1.0, "criteria": "c", "seconds": {}, "errors": {}, "claims": [count, mean]}
    files.write_json(tmp_path / "verdicts.json", content, format=VERDICTS_FORMAT)
    source = write_report(tmp_path).read_text(encoding="utf-8")
    assert source.count('class="limits"') == source.count('class="ci"') == 2
    assert "<dd>PASS: a one-sided test at 5 %; FAIL: one violation refutes the statement</dd>" in source
    for row in (count, mean):
        ends = [f"{end:.4g}" for end in row["limits"]]
        assert f"one-sided: {ends[0]} and {ends[1]}</p>" in source


def test_a_violation_of_one_part_is_shown_over_the_band_of_this_part():
    """The mean is far inside the band of the claim; the other part has two violations among 40 and admits none."""
    (row,) = decided(mean_verdict("paper-bound", [0.5, 0.51] * 5, also=[no_violations(2, 40, 1.0)]))
    assert (row["verdict"], row["measured"], row["band"], row["exact"]) == ("FAIL", 0.05, [None, 0.0], True)
    p = interval_plot(row)
    assert p is not None and p.limits is not None and p.edges[0] < p.limits[0] < p.measured and p.words.endswith("band at most 0")


def test_the_test_of_a_criterion_with_several_parts_says_their_number_and_the_level_of_a_fail():
    """A mean of two parts that is outside the band by a test at 5 %, and not at 5 % / 2, has no verdict."""
    values = np.array([-0.6, -0.3, 0.0, 0.3, 0.6])
    one, two, counted = decided(
        mean_verdict("q-risk", values + 1.65),
        mean_verdict("q-risk", values + 1.65, [1.0, 1.001, 0.999, 1.0, 1.0]),
        count_verdict("pooled/rungs", 0, 3400, seeds=10, also=[equivalence(values, -np.inf, 0.0)]),
    )
    assert (one["verdict"], two["verdict"], one["measured"]) == ("FAIL", "INCONCLUSIVE", two["measured"])
    assert [row["parts"] for row in (one, two, counted)] == [1, 2, 2]
    assert format_test(one).endswith("FAIL: a two-sided test at 5 %")
    parts = "PASS needs all of the 2 parts, FAIL one of them"
    assert format_test(two).endswith(f"FAIL: a two-sided test at 5 % / 2; {parts}")
    assert format_test(counted) == f"PASS: a one-sided test at 5 %; FAIL: a one-sided test at 5 % / 2; {parts}"


@pytest.mark.parametrize("preset", ["smoke", "quick"])
def test_a_page_of_the_smoke_preset_says_that_its_verdicts_mean_nothing(tmp_path, preset):
    write_verification(tmp_path / "v", ["risk"])
    content = files.read_json(tmp_path / "v" / "verdicts.json") | {"preset": preset}
    files.write_json(tmp_path / "v" / "verdicts.json", content, format=VERDICTS_FORMAT)
    write_summary([tmp_path / "v"], tmp_path / "r")
    pages = {"This": write_report(tmp_path / "v"), str(tmp_path / "v"): tmp_path / "r" / "index.html"}
    for subject, path in pages.items():
        source, said = path.read_text(encoding="utf-8"), f"{subject} is a run of the preset smoke: {SMOKE_ONLY}"
        assert (said in source) == (preset == "smoke")


@pytest.mark.parametrize(
    "preset, verdict, listed", [("smoke", "FAIL", True), ("smoke", "INCONCLUSIVE", False), ("quick", "INCONCLUSIVE", True)]
)
def test_a_page_of_the_smoke_preset_lists_unexpected_verdicts_but_not_undecided_claims(tmp_path, preset, verdict, listed):
    rows = write_verification(tmp_path, ["risk"])
    rows = [row | ({"verdict": verdict} if row["id"] == UNEXPECTED else {}) for row in rows]
    content = files.read_json(tmp_path / "verdicts.json") | {"preset": preset, "claims": rows}
    files.write_json(tmp_path / "verdicts.json", content, format=VERDICTS_FORMAT)
    source = write_report(tmp_path).read_text(encoding="utf-8")
    assert (f'Not as expected: <a href="#{UNEXPECTED}">' in source) == listed == ("Not as expected: <a" in source)


def test_a_page_without_bands_shows_numbers_without_plots(tmp_path):
    """verdicts.json of an earlier version has no bands."""
    rows = write_verification(tmp_path, ["risk"])
    content = files.read_json(tmp_path / "verdicts.json")
    content["claims"] = [{k: v for k, v in row.items() if k not in ("band", "limits", "exact")} for row in rows]
    files.write_json(tmp_path / "verdicts.json", content, format=VERDICTS_FORMAT)
    source = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'class="interval"' not in source and source.count("<article") == len(rows)


# --- interval plots --------------------------------------------------------------------------------------------------------


def plot(lo, hi, measured, ci, **more) -> Any:
    return interval_plot({"band": [lo, hi], "measured": measured, "ci": list(ci)} | more)


def test_an_interval_plot_has_one_scale_for_band_interval_and_measured_value():
    p = plot(0.9, 1.1, 1.02, (0.95, 1.09), limits=[0.97, 1.07])
    values, positions = [0.9, 1.1, 0.95, 1.09, 0.97, 1.07, 1.02], [*p.band, *p.ci, *p.limits, p.measured]
    slope, start = np.polyfit(values, positions, 1)
    assert np.allclose(np.polyval([slope, start], values), positions, atol=0.06) and slope > 0
    assert p.edges == list(p.band) and p.band[0] > 0 and p.band[1] < WIDTH and HEIGHT < WIDTH
    assert [(text, side) for _, text, side in p.labels] == [("0.9", "middle"), ("1.1", "middle")]
    said = "measured 1.02, two-sided 95 % interval [0.95, 1.09]"
    assert p.words == f"{said}, one-sided 95 % limits 0.97 and 1.07, band 0.9 to 1.1"
    old = plot(0.9, 1.1, 1.02, (0.95, 1.09))  # a row of an earlier version
    unknown = plot(0.9, 1.1, 1.02, (0.95, 1.09), limits=[None, None])  # a verdict that was made without limits
    assert unknown == old and old.limits is None and old.words == f"{said}, band 0.9 to 1.1"


def test_infinite_ends_lie_at_the_edges_of_the_plot():
    above, below = plot(None, 1.0, 0.5, (None, 0.7), limits=[None, 0.6]), plot(1.0, None, 0.5, (0.2, None), limits=[0.3, None])
    assert above.limits[0] == 0 < above.limits[1] < above.ci[1] and below.ci[0] < below.limits[0] < below.limits[1] == WIDTH
    assert "one-sided 95 % limits -inf and 0.6" in above.words
    assert above.band[0] == 0 and above.ci[0] == 0 and above.edges == [above.band[1]] and above.labels[0][1] == "≤ 1"
    assert below.band[1] == WIDTH and below.ci[1] == WIDTH and below.edges == [below.band[0]] and below.labels[0][1] == "≥ 1"
    assert below.measured < below.band[0] and above.measured < above.band[1]
    assert (band_words((None, 1.0)), band_words((1.0, None))) == ("at most 1", "at least 1")


def test_a_narrow_band_is_visible_and_its_labels_are_one_inside_the_plot():
    p = plot(0.9, 1.1, 70.7, (67.7, 73.7))
    assert p.band[1] - p.band[0] == pytest.approx(2) and p.measured > 0.8 * WIDTH
    assert p.labels == [(0, "0.9 to 1.1", "start")]


def test_values_that_are_all_the_same_have_a_plot():
    for value in (0.0, 1.0, -3e-9):
        p = plot(None, value, value, (value, value))
        assert 0 < p.measured < WIDTH and p.measured == p.ci[0] == p.ci[1] == p.band[1]


def test_a_claim_that_was_not_measured_has_no_plot():
    assert plot(0.0, 1.0, None, (None, None)) is None


# --- figures ---------------------------------------------------------------------------------------------------------------


def test_an_embedded_figure_has_the_colors_of_its_file_up_to_half_a_level():
    uri = embed_figure(png(), "x.png")
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    shown = imread(io.BytesIO(base64.b64decode(data)), format="webp")[..., :3] / 255
    exact = imread(io.BytesIO(png()))[..., :3]
    assert shown.shape == exact.shape and np.abs(shown - exact).max() <= 0.5 / 15 + 1e-6
    assert (shown[exact.min(-1) == 1] == 1).all(), "paper stays white"


@pytest.mark.fault("F19")
def test_what_is_no_picture_or_a_huge_one_is_exit_3():
    huge = bytearray(png())
    huge[16:24] = (2**14).to_bytes(4, "big") * 2
    assert limits.OUTPUT_PIXELS < 2**28
    for content in (b"", b"<svg/>", png()[:200], bytes(huge)):
        with pytest.raises(DataError, match=r"^x.png: must be a PNG image"):
            embed_figure(content, "x.png")
