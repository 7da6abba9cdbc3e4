"""One page of everything: the inputs, the tables, and a complete page without external resources."""

import csv
import io
import shutil

import pytest

from lindm.cli.main import main
from lindm.errors import DataError, LindmError, UsageError
from lindm.evaluation import EVAL_FORMAT
from lindm.io import files
from lindm.llm.sft.options import RUN_FORMAT
from lindm_experiments.harness import summary as pages
from lindm_experiments.harness.public import report
from lindm_experiments.harness.report import VERDICTS_FORMAT
from lindm_experiments.harness.run_directory import RUN_REPORTS
from tests.experiments.harness.test_report import CONTROL, GOOD, Page, summary

ROW = {"suite": "pomdp", "horizon": 6, "split": "id", "policy": "bc", "gap": 0.25, "ci": [0.2, 0.3], "gap_of_value": 0.1}
ROW |= {"gap_of_value_ci": [0.05, 0.15], "n": 3, "action_agreement": 0.75, "method": "exact", "invalid": None}
ROW |= {"suboptimality": 0.5, "suboptimality_ci": [0.4, 0.75], "optimal_lower": 2.0, "interval_over": "tasks"}
MODEL = ROW | {"policy": "sft:runs/<a_b>&c", "gap": 0.02, "ci": None, "invalid": 0.125, "split": "ood"}
NONE = {"suite": "apomdp", "horizon": 5, "split": None, "policy": "x", "gap": None, "ci": None, "n": 0}
NONE |= {"method": "none", "invalid": None}


@pytest.fixture
def work(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "verified" / "toy")
    for name in RUN_REPORTS:
        (tmp_path / "verified" / "toy" / name).unlink()
    files.write_json(tmp_path / "verified" / "verdicts.json", summary(GOOD, CONTROL), format=VERDICTS_FORMAT)
    (tmp_path / "more" / "run").mkdir(parents=True)
    (tmp_path / "more" / "eval").mkdir()
    files.write_json(tmp_path / "more" / "eval" / "eval.json", {"rows": [ROW, MODEL, NONE]}, format=EVAL_FORMAT)
    options = {"model": None, "preset": "tiny", "method": "full", "data": "data/x", "steps": None}
    files.write_json(tmp_path / "more" / "run" / "config.json", {"options": options}, format=RUN_FORMAT)
    looked = [{"step": s, "kind": "eval", "loss": 2.0 - s, "gap": 0.5 - s / 10, "bc_gap": 0.3} for s in (0, 1)]
    lines = [looked[0], {"step": 1, "kind": "train", "loss": 1.5}, looked[1]]
    (tmp_path / "more" / "run" / "metrics.jsonl").write_text("".join(files.record_line(line) + "\n" for line in lines))
    return tmp_path


def test_inputs_are_found_in_directories_and_their_children(work):
    inputs = pages.find_inputs([work / "verified", work / "more", work / "more" / "eval"])
    assert inputs.verifications == [work / "verified"]
    assert inputs.evaluations == [work / "more" / "eval"] and inputs.training == [work / "more" / "run"]
    with pytest.raises(LindmError, match=r"DIR must contain verdicts.json .* or a run of lindm sft; got .*toy") as e:
        pages.find_inputs([work / "verified", work / "verified" / "toy"])
    assert isinstance(e.value, DataError)
    with pytest.raises(LindmError, match="got nowhere"):
        pages.find_inputs([work / "verified", pages.Path("nowhere")])


@pytest.mark.parametrize("given, got", [([], "none"), ("verified", "'verified'")])
def test_a_report_of_no_list_of_directories_is_refused(given, got, tmp_path):
    with pytest.raises(UsageError, match=rf"^directories must .*; got {got}"):
        report(given, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_tables_hold_the_values_of_the_commands(work):
    pages.write_summary([work / "verified", work / "more"], work / "report")
    read = {p.stem: list(csv.DictReader(io.StringIO(p.read_text()))) for p in (work / "report" / "tables").glob("*.csv")}
    assert [row["id"] for row in read["claims"]] == ["q-risk", "controls/swap"]
    first = read["claims"][0]
    ends = [float(first[name]) for name in ("low", "lower_limit", "measured", "upper_limit", "high")]
    assert ends == sorted(set(ends)) and first["verdict"] == "PASS"
    assert [(r["policy"], r["gap"], r["low"], r["loss"], r["loss_high"], r["invalid"]) for r in read["evaluations"]] == [
        ("bc", "0.25", "0.2", "0.5", "0.75", ""),
        ("sft:runs/<a_b>&c", "0.02", "", "0.5", "0.75", "0.125"),
        ("x", "", "", "", "", ""),
    ]
    (run,) = read["training"]
    assert (run["model"], run["steps"], run["loss before"], run["loss after"]) == ("preset tiny", "1", "2.0", "1.0")
    assert (run["gap before"], run["gap after"], run["bc"]) == ("0.5", "0.4", "0.3")


def test_the_parts_of_a_gap_have_a_table_of_their_own_where_there_is_a_yardstick(work):
    split = {"yardstick": "bayes", "gap": 0.25, "not_in_context": 0.06, "lost_by_reader": 0.19, "n": 3}
    parts = [ROW | {"loss_split": split | {"lost_by_reader_ci": [0.1, 0.28]}}, MODEL | {"loss_split": None}]
    parts += [MODEL | {"loss_split": split | {"lost_by_reader_ci": None}}]
    files.write_json(work / "more" / "eval" / "eval.json", {"rows": parts}, format=EVAL_FORMAT)
    pages.write_summary([work / "more"], work / "report")
    rows = list(csv.DictReader(io.StringIO((work / "report" / "tables" / "yardsticks.csv").read_text())))
    columns = ("policy", "yardstick", "not_in_context", "lost_by_reader", "low", "high", "n")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        ("bc", "bayes", "0.06", "0.19", "0.1", "0.28", "3"),
        ("sft:runs/<a_b>&c", "bayes", "0.06", "0.19", "", "", "3"),
    ]
    assert 'id="yardsticks"' in (work / "report" / "index.html").read_text()


def test_a_run_of_one_experiment_brings_its_verdicts_figures_and_table(work, finished):
    shutil.copytree(finished, work / "runs" / "toy")
    (work / "runs" / "toy" / "table.csv").write_text("policy,gap,n\nbc,0.25,3\nsft,,3\n")
    pages.write_summary([work / "runs"], work / "report")
    rows = list(csv.DictReader(io.StringIO((work / "report" / "tables" / "toy.csv").read_text())))
    assert rows == [{"policy": "bc", "gap": "0.25", "n": "3"}, {"policy": "sft", "gap": "", "n": "3"}]
    assert r"sft & - & 3 \\" in (work / "report" / "tables" / "toy.tex").read_text()
    source = (work / "report" / "index.html").read_text()
    assert (
        'id="table-toy"' in source
        and 'id="experiment-toy"' in source
        and 'href="tables/toy.csv"' in source
        and "toy-control/swap" in source
    )
    assert len([v for v in Page(source).fetched if v]) == 1, "the toy's figure"


def test_tables_of_several_runs_have_a_column_for_the_run(work, finished):
    for name in ("one", "two"):
        shutil.copytree(finished, work / name)
        (work / name / "table.csv").write_text(f"policy,gap\n{name},0.5\n")
    rows = pages.experiment_tables([work / "one", work / "two"])["toy"]
    assert [(row["run"], row["policy"], row["gap"]) for row in rows] == [
        (str(work / "one"), "one", 0.5),
        (str(work / "two"), "two", 0.5),
    ]
    rows = pages.claim_rows([work / "one", work / "two"])
    assert [(row["run"], row["id"]) for row in rows] == [
        (str(work / name), id) for name in ("one", "two") for id in ("toy-ratio", "toy-control/swap")
    ]
    assert {row["run"] for row in pages.evaluation_rows([work / "more" / "eval"] * 2)} == {str(work / "more" / "eval")}


def test_the_verdicts_of_a_verification_are_counted_once(work, finished):
    shutil.copytree(finished, work / "verified" / "again")
    assert pages.find_inputs([work / "verified"]).verifications == [work / "verified"]


@pytest.mark.fault("F19")
def test_latex_is_escaped_and_has_a_cell_for_every_value(work):
    text = pages.as_latex(pages.evaluation_rows([work / "more" / "eval"]))
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 4 and {line.count(" & ") for line in lines} == {20 - 1}
    assert r"sft:runs/<a\_b>\&c" in text and r"gap\_of\_value" in text
    assert text.startswith(r"\begin{tabular}{lrllrrrrrrrrrrrrrllr}") and " - " in lines[1]


@pytest.mark.fault("F20")
def test_the_page_shows_everything_and_fetches_nothing(work, capsys):
    assert main(["report", str(work / "verified"), str(work / "more"), "--out", str(work / "report")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert str(work / "report" / "index.html") in printed and len(printed) == 16
    figures = {path.name for path in (work / "report" / "figures").iterdir()}
    assert figures == {f"{name}.{ending}" for name in ("gaps", "losses", "toy") for ending in ("png", "pdf", "svg")}
    assert main(["check", str(work / "report")]) == 0
    source = (work / "report" / "index.html").read_text()
    page = Page(source)
    assert not page.open and all(value.startswith("data:image/webp") for value in page.fetched if value)
    assert len([v for v in page.fetched if v]) >= 2, "decisions and the toy's figure"
    for link in page.links:
        assert link and (link[1:] in page.ids if link.startswith("#") else (work / "report" / link).is_file()), link
    assert "sft:runs/&lt;a_b&gt;&amp;c" in source and "<a_b>" not in source
    assert "2 of 2 claims as expected" in source and "0.125" in source


def test_a_report_of_evaluations_without_any_value_has_no_figure(work):
    files.write_json(work / "more" / "eval" / "eval.json", {"rows": [NONE]}, format=EVAL_FORMAT)
    pages.write_summary([work / "more" / "eval"], work / "report")
    assert "<img" not in (work / "report" / "index.html").read_text() and not (work / "report" / "figures").exists()


def test_figures_of_several_runs_have_names_of_their_own(work, finished):
    for name in ("one", "two"):
        shutil.copytree(finished, work / name)
    first = next((work / "one").glob("*.png"))
    pages.write_summary([work / "one", work / "two"], work / "report")
    names = sorted(path.name for path in (work / "report" / "figures").iterdir())
    assert names == [f"{first.stem}{number}.{ending}" for number in ("-2", "") for ending in ("pdf", "png", "svg")]
    assert (work / "report" / "figures" / first.name).read_bytes() == first.read_bytes()


def test_parts_that_are_not_there_are_left_out(work):
    pages.write_summary([work / "more" / "run"], work / "report")
    source = (work / "report" / "index.html").read_text()
    assert sorted(p.name for p in (work / "report" / "tables").iterdir()) == ["training.csv", "training.tex"]
    assert 'id="claims"' not in source and 'id="evaluations"' not in source and 'id="training"' in source


def test_without_a_directory_there_is_one_line(capsys):
    assert main(["report"]) == 2
    assert "DIR" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["verified/verdicts.json", "more/eval/eval.json", "more/run/config.json"])
def test_a_file_of_another_version_raises_an_error(work, name):
    content = files.read_json(work / name)
    files.write_json(work / name, content | {"format": content["format"][:-1] + "0"})
    with pytest.raises(DataError, match=rf"{name}: must have the format '{content['format']}'; got .*0': another version"):
        pages.write_summary([work / "verified", work / "more"], work / "report")
