"""Directories of results may be hostile: they name no code and no place of a file, and their tables compute nothing."""

import csv
import io
import json
import shutil
import sys

import pytest

from lindm.cli.main import main
from lindm.evaluation import EVAL_FORMAT
from lindm.io import files
from lindm_experiments.harness import claims
from lindm_experiments.harness.tasks import as_csv
from tests.experiments.conftest import build_lab

pytestmark = pytest.mark.fault("F19")
EVIL = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\n"


@pytest.fixture
def work(tmp_path, finished, monkeypatch):
    """A directory with `run`, a run of the toy, and the file of the toy; what is imported or claimed here does not stay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "CLAIMS", dict(claims.CLAIMS))
    shutil.copytree(finished, tmp_path / "run")
    build_lab(tmp_path)
    yield tmp_path
    for name in ("toy", "evil"):
        sys.modules.pop(f"lindm_experiments.{name}", None)


def contents(directory):
    """The files below a directory, without the empty file of a lock."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.stat().st_size}


def rewrite(path, **changes):
    """Change fields of a JSON file; its checksum is right again, as a forger would have it."""
    content = files.read_json(path)
    files.write_json(path, content | changes, format=content["format"])


# --- code --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def marker(work):
    """The file that the code of `evil.py`, a complete experiment in the run directory and beside it, writes when it runs."""
    marker = work / "marker"
    for directory in (work, work / "run"):
        for ending, more in (("py", EVIL.format(marker=str(marker))), ("toml", "")):
            source = (work / "lab" / f"toy.{ending}").read_text()
            (directory / f"evil.{ending}").write_text(source.replace('"toy-', '"evil-') + more)
    return marker


@pytest.mark.parametrize("name", ["evil", "evil.py", "./evil.py", "run/evil.py", "run.evil", "../evil", ["evil"], None])
def test_no_file_of_a_directory_names_the_code_that_draws_it(work, marker, name, capsys):
    rewrite(work / "run" / "config.json", experiment=name)
    rewrite(work / "run" / "manifest.json", experiment=name, source=str(work / "run" / "evil.py"))
    before = contents(work / "run")
    assert main(["plot", "run"]) == 2
    assert "is of an experiment outside the package" in (error := capsys.readouterr().err) and "--experiments PATH" in error
    assert error.count("\n") == 1 and not marker.exists() and contents(work / "run") == before


def test_a_given_file_of_another_experiment_does_not_run(work, marker, capsys):
    assert main(["plot", "run", "--experiments", "lab/toy.py", "evil.py"]) == 2
    assert capsys.readouterr().err == "lindm: error: --experiments must be experiments of DIR (toy); got evil.py\n"
    assert not marker.exists()


def test_the_given_file_draws_the_directory(work, marker, capsys):
    before = contents(work / "run")
    rewrite(work / "run" / "manifest.json", source=str(work / "run" / "evil.py"))
    (work / "run" / "toy.png").unlink()
    (work / "run" / "toy.py").write_text(EVIL.format(marker=str(marker)))  # has the name of the experiment
    assert main(["plot", "run", "--experiments", "lab/toy.py"]) == 0
    assert {"run/toy.png", "run/toy.pdf", "run/toy.svg", "run/report.html"} == set(capsys.readouterr().out.split())
    assert (work / "run" / "toy.png").read_bytes() == before["toy.png"] and not marker.exists()


def test_a_figure_that_is_drawn_with_other_bytes_is_that_of_the_manifest(work, capsys):
    """As another version of matplotlib draws it."""
    source = work / "lab" / "toy.py"
    source.write_text(source.read_text().replace('axes.plot(r["curve"])', 'axes.plot(r["curve"], "k")'))
    before = (work / "run" / "toy.png").read_bytes()
    assert main(["plot", "run", "--experiments", "lab/toy.py"]) == 0, capsys.readouterr().err
    assert (work / "run" / "toy.png").read_bytes() != before and main(["check", "run"]) == 0


@pytest.mark.slow
def test_runs_of_the_package_and_of_given_files_are_drawn_together(work, capsys):
    (work / "verified").mkdir()
    shutil.move(work / "run", work / "verified" / "toy")
    assert main(["run", "controls", "--preset", "smoke", "--seeds", "1", "--out", "verified/controls"]) in (0, 1)
    capsys.readouterr()
    assert main(["plot", "verified", "--experiments", "lab/toy.py"]) == 0
    assert {"verified/toy/toy.png", "verified/controls/controls.png"} <= set(capsys.readouterr().out.split())


def test_a_report_reads_no_source_that_a_manifest_names(work):
    (work / "secret.py").write_text('"""The secret docstring."""\n')
    rewrite(work / "run" / "manifest.json", source=str(work / "secret.py"))
    assert main(["report", "run", "--out", "page"]) == 0
    page = (work / "page" / "index.html").read_text()
    assert "secret docstring" not in page and "Does a toy survive?" in page


@pytest.mark.parametrize(
    "name, changes",
    [
        ("records.jsonl", None),
        ("verdicts.json", {"claims": [{"experiment": "toy"}]}),
        ("manifest.json", {"docstring": 7}),
    ],
)
def test_a_file_that_lacks_what_a_figure_or_a_report_needs_is_exit_3(work, name, changes, capsys):
    if changes is None:
        (work / "run" / "manifest.json").unlink()
        (work / "run" / name).write_text(files.record_line({"point": {"seed": 0}, "curve": None}) + "\n")
    else:
        rewrite(work / "run" / name, **changes)
    assert main(["plot", "run", "--experiments", "lab/toy.py"]) == 3
    error = capsys.readouterr().err
    assert error.startswith(("lindm: error: run ", "lindm: error: run/")) and error.count("\n") == 1


# --- names of files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "a/b", "..", ".hidden", "a\x00b", "a\nb", "-x", "", "é", 7, None, ["toy"]]
)
@pytest.mark.parametrize(
    "words", [["report", "run", "--out", "page"], ["plot", "run", "--experiments", "lab/toy.py"]], ids=["report", "plot"]
)
def test_the_name_of_an_experiment_never_becomes_a_path(work, words, name, capsys):
    rows = json.loads((work / "run" / "verdicts.json").read_text())["claims"]
    rewrite(work / "run" / "verdicts.json", claims=[*rows, rows[0] | {"experiment": name}])
    outside = sorted(work.parent.iterdir())
    assert main(words) == 3
    error = capsys.readouterr().err
    assert f"verdicts.json: experiment must be a name, which is part of names of files; got {name!r}" in error
    assert error.count("\n") == 1 and not (work / "page").exists()
    assert sorted(work.parent.iterdir()) == outside


# --- tables --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_a_text_that_a_spreadsheet_would_compute_gets_an_apostrophe(start):
    text = f"{start}HYPERLINK(A1)"
    written = as_csv([{text: text, "n": f"a{text}"}])
    shown = text.replace("\r", "\n")  # the same line break, which csv puts in quotes
    assert list(csv.reader(io.StringIO(written, newline=""))) == [[f"'{shown}", "n"], [f"'{shown}", f"a{shown}"]]
    assert "\r" not in written


def test_numbers_stay_numbers():
    assert as_csv([{"a": -0.5, "b": -3, "c": None, "d": 1e-300, "e": True}]) == "a,b,c,d,e\n-0.5,-3,,1e-300,True\n"


def test_the_tables_of_a_report_compute_nothing(work):
    """From evaluations, verdicts, options and table.csv: every text of the input is still a text."""
    formula = '=HYPERLINK("http://x","y")'
    row = {"suite": formula, "horizon": -6, "split": "@id", "policy": "-1+1", "gap": -0.25, "ci": [-0.5, 0.25], "method": "+a"}
    files.write_json(work / "run" / "eval.json", {"rows": [row]}, format=EVAL_FORMAT)
    rows = json.loads((work / "run" / "verdicts.json").read_text())["claims"]
    rewrite(
        work / "run" / "verdicts.json", claims=[r | {"id": "=1+1", "statement": "\t=1", "predicted": "-1 in M"} for r in rows]
    )
    (work / "run" / "table.csv").write_text(f'=1+1,n\n"{formula.replace(chr(34), chr(34) * 2)}",-2.5\n')
    assert main(["report", "run", "--out", "page"]) == 0
    tables = {p.stem: list(csv.reader(io.StringIO(p.read_text(), newline=""))) for p in (work / "page" / "tables").glob("*.csv")}
    assert tables.keys() == {"claims", "evaluations", "toy"}
    cells = [cell for table in tables.values() for row in table for cell in row]
    computed = [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]
    assert sorted(computed) == ["-0.25", "-0.5", "-2.5", "-6"]
    assert {f"'{formula}", "'@id", "'-1+1", "'+a", "'=1+1", "'\t=1", "'-1 in M"} <= set(cells)
