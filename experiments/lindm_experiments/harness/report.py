"""The summary on the screen and the report page, both from verdicts.json and the run directories alone."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lindm.errors import DataError, LindmError, UsageError
from lindm.figures.style import alternative_text
from lindm.io import directories, files, verification
from lindm.io.manifest import FORMAT as MANIFEST_FORMAT
from lindm.io.manifest import read_output, read_records, update_outputs, verify_output
from lindm.io.provenance import provenance
from lindm_experiments.harness.claims import FAIL, INCONCLUSIVE, OPEN, PASS
from lindm_experiments.harness.experiments import experiment_names, find_experiment, load
from lindm_experiments.harness.formats import (
    SMOKE_ONLY,
    count_expected,
    format_measured,
    format_number,
    format_slack,
    verdict_label,
)
from lindm_experiments.harness.page import embed_figure, render_template
from lindm_experiments.harness.tasks import RUN_FORMAT, draw
from lindm_experiments.harness.verdicts import as_expected, is_listed

VERDICTS_FORMAT = "lindm-verdicts-2"  # of verdicts.json
REPORTS = ("verdicts.json", "report.html")


GROUPS = {PASS: "Predictions", FAIL: "Statements that must fail", OPEN: "Open questions (any verdict is a result)"}


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """One line for each claim: id, verdict, measured against predicted; grouped by what is expected, with counts."""
    rows = summary["claims"]
    cells = [
        (
            ("   " if as_expected(r) else ">> ") + r["id"],
            verdict_label(r),
            f"{format_measured(r)}  n={r['n']}",
            f"predicted: {format_number(r['predicted'])}",
        )
        for r in rows
    ]
    widths = [max(map(len, column)) for column in list(zip(*cells, strict=True))[:3]]
    for expected, heading in GROUPS.items():
        group = [(row, cell) for row, cell in zip(rows, cells, strict=True) if row["expected"] == expected]
        if not group:
            continue
        good = sum(as_expected(row) for row, _ in group)
        count = f"{len(group)}" if expected == OPEN else f"{good} of {len(group)} as expected"
        console.print(f"{heading}: {count}", style="bold", highlight=False)
        for row, (id, verdict, value, predicted) in group:
            slack = f"{format_slack(row)}; " if format_slack(row) else ""
            style = "cyan" if expected == OPEN else "green" if as_expected(row) else "bold red"
            line = Text(f"{id:<{widths[0]}}  ").append(f"{verdict:<{widths[1]}}", style=style)
            line.append(f"  {value:<{widths[2]}}  {slack}{predicted}")
            if console.is_terminal:
                line.truncate(console.width, overflow="ellipsis")
            console.print(line, soft_wrap=True, highlight=False)


def print_next(summary: dict[str, Any], directory: Path, errors: Sequence[str], console: Console) -> None:
    """The counts, the errors, and for each claim that is not as expected (`verdicts.is_listed`) what to look at."""
    console.print(f"{count_expected(summary['claims'])}, {summary['wall_s']:.0f} s", style="bold", highlight=False)
    for error in errors:
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
    for row in summary["claims"]:
        undecided = row["verdict"] == INCONCLUSIVE
        if is_listed(row, summary["preset"]) and row["n"]:  # without n, an error above says why
            drawn = run_directory(directory, row["experiment"]) / Path(row["figure"] or "").name
            figure = f"; figure: {drawn}" if row["figure"] else ""
            more = "; more seeds may decide it (--seeds)" if undecided else ""
            text = f"not as expected: {row['id']}: {verdict_label(row)}; {row['criterion']}{more}{figure}"
            console.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)
    if summary["preset"] == "smoke":
        console.print(f"preset smoke: {SMOKE_ONLY}", style="bold", highlight=False, soft_wrap=True)
    about = "In brackets: two-sided 95 % intervals. The report has the test of each verdict and its one-sided limits."
    console.print(about, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {directory / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def docstring_blocks(doc: str) -> list[tuple[str, str]]:
    """A docstring as ("p" | "pre", text) blocks; indented lines are kept as they are."""
    blocks: list[tuple[str, str]] = []
    for part in re.split(r"\n\s*\n", doc.strip("\n")):
        indented = [line.startswith("    ") for line in part.splitlines()]
        if any(indented):
            lead = [line for line, inside in zip(part.splitlines(), indented, strict=True) if not inside]
            if lead and not indented[0]:
                blocks.append(("p", " ".join(lead)))
            blocks.append(
                ("pre", "\n".join(line[4:] for line, inside in zip(part.splitlines(), indented, strict=True) if inside))
            )
        else:
            blocks.append(("p", " ".join(part.split())))
    return [(kind, text) for kind, text in blocks if text]


def read_manifest_if_exists(directory: Path) -> dict:
    """The manifest of a directory; an empty one where it has none."""
    return verification.read_manifest(directory, MANIFEST_FORMAT) if (directory / "manifest.json").exists() else {}


def read_verdicts(directory: Path) -> dict[str, Any]:
    """The content of verdicts.json; DataError where there is none, one of another version, or one that is damaged."""
    path = directory / "verdicts.json"
    verdicts = files.read_json(path, format=VERDICTS_FORMAT)
    rows = verdicts.get("claims")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: claims must be a list of objects")
    for row in rows:
        if not isinstance(name := row.get("experiment"), str) or not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
            raise DataError(f"{path}: experiment must be a name, which is part of names of files; got {name!r}")
    return verdicts


def run_directory(directory: Path, experiment: str) -> Path:
    """The run directory of an experiment, in a directory of `lindm verify` or of `lindm run`."""
    return run if (run := directory / experiment).is_dir() else directory


def experiment_sections(directory: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The values that a report shows of every experiment of a verdicts.json."""
    names = dict.fromkeys(row["experiment"] for row in summary["claims"])
    return [
        experiment_section(
            directory, name, [row for row in summary["claims"] if row["experiment"] == name], name in summary["errors"]
        )
        for name in names
    ]


def experiment_section(directory: Path, experiment: str, claims: list[dict[str, Any]], failed: bool) -> dict[str, Any]:
    """The values that a report shows of one experiment; the files of one that could not finish are not read."""
    if failed:
        section = {"name": experiment, "question": "", "prose": [], "claims": claims, "figures": [], "config": {}, "code": ""}
        return section | {"criteria": "", "records": 0, "seconds": 0.0, "manifest": {}}
    run = run_directory(directory, experiment)
    manifest = read_manifest_if_exists(run)
    for name in ("config.json", "records.jsonl", "metrics.jsonl"):  # a run that is not finished may be without them
        verify_output(run, name)
    pictures = {path.name for path in run.glob("*.png")} | {n for n in manifest.get("outputs", {}) if n.endswith(".png")}
    contents = {name: read_output(run, name) or b"" for name in sorted(pictures)}
    figures = [
        {
            "name": name.removesuffix(".png"),
            "uri": embed_figure(content, str(run / name)),
            "alt": alternative_text(content),
            "claims": [c["id"] for c in claims if c["figure"] == f"{experiment}/{name}"],
        }
        for name, content in contents.items()
    ]
    seconds = [line.get("seconds", 0.0) for line in files.read_json_lines(run / "metrics.jsonl")]
    config = files.read_json(run / "config.json", format=RUN_FORMAT) if (run / "config.json").exists() else {}
    own = experiment in experiment_names()
    doc = docstring_blocks(find_experiment(experiment).docstring if own else manifest.get("docstring", ""))
    return {
        "name": experiment,
        "question": doc[0][1] if doc else "",
        "prose": doc[1:],
        "claims": claims,
        "figures": figures,
        "config": config.get("config", {}),
        "code": config.get("code", ""),
        "criteria": config.get("criteria", ""),
        "records": len(read_records(run)) if (run / "records.jsonl").exists() else 0,
        "seconds": sum(seconds),
        "manifest": manifest,
    }


def render_report(summary: dict[str, Any], sections: list[dict[str, Any]], provenance: dict[str, Any]) -> str:
    """The HTML of the report of a verification."""
    rows = summary["claims"]
    return render_template(
        "report.html.jinja",
        summary=summary,
        rows=rows,
        sections=sections,
        provenance=provenance,
        listed=[row for row in rows if is_listed(row, summary["preset"])],
    )


def write_report(directory: Path) -> Path:
    """report.html of a directory of `lindm verify` or `lindm run`; DataError without a verdicts.json."""
    summary = read_verdicts(directory)
    sections = experiment_sections(directory, summary)
    manifest = next((s["manifest"] for s in sections if s["manifest"]), provenance())
    path = directory / "report.html"
    files.write_atomic(path, render_report(summary, sections, manifest))
    return path


@contextlib.contextmanager
def damage_errors(message: str) -> Iterator[None]:
    """Raise a DataError that begins with `message` where a file lacks a value, or has one of a wrong type or size."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
        if isinstance(e, LindmError):
            raise
        raise DataError(f"{message}: {type(e).__name__}: {e}") from e


def _references(runs: Sequence[Path], given: Sequence[str]) -> list[str]:
    """The experiment of each run directory as `load` takes it: one of the package, or a file that the user gave.

    config.json names an experiment. It names no file: a directory of others must not choose the code that runs.
    """
    known = {name: name for name in experiment_names()} | {find_experiment(path).name: path for path in given}
    names = [str(files.read_json(run / "config.json", format=RUN_FORMAT).get("experiment")) for run in runs]
    for run, name in zip(runs, names, strict=True):
        if name not in known:
            raise UsageError(f"{run} is of an experiment outside the package, {name!r}: give its Python file, --experiments PATH")
    if unused := [path for path in given if find_experiment(path).name not in names]:
        raise UsageError(f"--experiments must be experiments of DIR ({', '.join(dict.fromkeys(names))}); got {unused[0]}")
    return [known[name] for name in names]


def redraw(directory: Path, experiments: Sequence[str] = ()) -> list[Path]:
    """Draw the figures of a directory of `lindm run` or `lindm verify` again, from its records; the files written.

    Args:
      experiments: the Python files of experiments outside the package. Their code runs, and no other of the directory's choice.

    Raises:
      DataError: no records; no config.json, or one of another version; a damaged file.
      UsageError: an experiment of the directory is not in the package and not given; one that is given is not of the directory.
    """
    runs = [directory] if (directory / "records.jsonl").exists() else sorted(p.parent for p in directory.glob("*/records.jsonl"))
    if not runs:
        missing = "" if directory.exists() else ", which does not exist"
        raise DataError(f"DIR must contain records.jsonl, or directories that do; got {directory}{missing}")
    written: list[Path] = []
    for run, reference in zip(runs, _references(runs, experiments), strict=True):
        with directories.sole_writer(run), damage_errors(f"{run} cannot be drawn"):
            decided = (run / "verdicts.json").exists() and read_verdicts(run)
            drawn = draw(load(reference), read_records(run))
            for name, content in drawn.items():
                files.write_atomic(run / name, content)
            update_outputs(run, drawn)  # the report reads the figures, and compares them with the manifest
            reports = [write_report(run).name] if decided else []
            update_outputs(run, reports)
            written += [run / name for name in (*drawn, *reports)]
    if directory not in runs and (directory / "verdicts.json").exists():
        with directories.sole_writer(directory), damage_errors(f"the report of {directory} cannot be written"):
            written.append(write_report(directory))
            update_outputs(directory, ["report.html"])
    return written
