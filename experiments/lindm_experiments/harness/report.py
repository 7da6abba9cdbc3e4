"""One table on the screen and one page to send on, both from verdicts.json and the run directories alone."""

import ast
import base64
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lindm.errors import DataError
from lindm.io import directories, files
from lindm.io import manifest as provenance
from lindm_experiments.harness import runner
from lindm_experiments.harness.claims import OPEN
from lindm_experiments.harness.verdicts import as_expected

TEMPLATES = Path(__file__).parent / "templates"


def number(value: float | str | None) -> str:
    """Four significant digits; a dash for what was not measured."""
    if isinstance(value, str):
        return value
    return "-" if value is None else f"{value:.4g}"


def interval(ci: list[float | None]) -> str:
    low, high = (("-inf", "inf")[i] if end is None else number(end) for i, end in enumerate(ci))
    return f"[{low}, {high}]"


def measured(row: dict[str, Any]) -> str:
    return "-" if row["measured"] is None else f"{number(row['measured'])} {interval(row['ci'])}"


def label(row: dict[str, Any]) -> str:
    """The verdict, with a word when it is not simply a PASS that was expected."""
    if row["expected"] == OPEN:
        return f"{row['verdict']}, open"
    if as_expected(row):
        return "FAIL, as expected" if row["expected"] == "FAIL" else row["verdict"]
    return f"{row['verdict']} (expected {row['expected']})"


def score(rows: Sequence[dict[str, Any]]) -> str:
    """How many claims are as expected, and how many expect nothing."""
    decided = [row for row in rows if row["expected"] != OPEN]
    parts = [f"{sum(map(as_expected, decided))} of {len(decided)} claims as expected"] if decided else []
    if asked := len(rows) - len(decided):
        parts.append("1 open question" if asked == 1 else f"{asked} open questions")
    return ", ".join(parts)


def table(summary: dict[str, Any]) -> Table:
    """One row per claim; what is not as expected stands out."""
    t = Table(title=f"preset {summary['preset']}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, ratio in (
        ("claim", 4),
        ("statement", 8),
        ("predicted", 5),
        ("measured [95 %]", 5),
        ("criterion", 6),
        ("verdict", 4),
    ):
        t.add_column(heading, ratio=None if heading == "claim" else ratio, no_wrap=heading == "claim", overflow="fold")
    for row in summary["claims"]:
        good = as_expected(row)
        style = "cyan" if row["expected"] == OPEN else "green" if good else "bold red"
        cells = [row["id"], row["statement"], number(row["predicted"]), f"{measured(row)}  n={row['n']}", row["criterion"]]
        mark = "" if good else ">> "
        t.add_row(*map(escape, cells), f"[{style}]{escape(mark + label(row))}[/]", style=None if good else "bold")
    return t


def prose(doc: str) -> list[tuple[str, str]]:
    """A docstring as ("p" | "pre", text) blocks: what is indented is kept as it stands."""
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


def _docstring(experiment: str) -> str:
    source = runner.modules().get(experiment)
    tree = ast.parse(source.read_text(encoding="utf-8")) if source else None
    return inspect.cleandoc(ast.get_docstring(tree) or "") if tree else ""


def read_json(path: Path) -> Any:
    """What a file holds; an empty object where there is none. DataError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise DataError(f"{path}: not JSON: {e}") from e


def run_of(directory: Path, experiment: str) -> Path:
    """Where the records of an experiment are, in a directory of `lindm verify` or of `lindm run`."""
    return run if (run := directory / experiment).is_dir() else directory


def section(directory: Path, experiment: str, claims: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows of one experiment."""
    run = run_of(directory, experiment)
    figures = [
        {
            "name": path.stem,
            "data": base64.b64encode(path.read_bytes()).decode(),
            "claims": [c["id"] for c in claims if c["figure"] == f"{experiment}/{path.name}"],
        }
        for path in sorted(run.glob("*.png"))
    ]
    seconds = [line.get("seconds", 0.0) for line in files.read_json_lines(run / "metrics.jsonl")]
    doc = prose(_docstring(experiment))
    config = read_json(run / "config.json")
    return {
        "name": experiment,
        "question": doc[0][1] if doc else "",
        "prose": doc[1:],
        "claims": claims,
        "figures": figures,
        "config": config.get("config", {}),
        "code": config.get("code", ""),
        "criteria": config.get("criteria", ""),
        "records": len(files.read_json_lines(run / "records.jsonl")),
        "seconds": sum(seconds),
        "manifest": read_json(run / "manifest.json"),
    }


def page(template: str, **values: Any) -> str:
    """A page of this directory. Everything that is shown goes through autoescape."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    how = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, **how)
    environment.filters |= {"number": number, "score": score}
    environment.tests |= {"as_expected": as_expected}
    return environment.get_template(template).render(**values)


def render(summary: dict[str, Any], sections: list[dict[str, Any]], provenance: dict[str, Any]) -> str:
    """The page of one verification."""
    rows = summary["claims"]
    return page(
        "report.html.jinja",
        summary=summary,
        rows=rows,
        sections=sections,
        provenance=provenance,
        unexpected=[r for r in rows if not as_expected(r)],
        controls=[r for r in rows if r["expected"] == "FAIL"],
        opened=any(r["expected"] == OPEN for r in rows),
        measured=measured,
        label=label,
    )


def write_report(directory: Path) -> Path:
    """report.html of a directory of `lindm verify` or `lindm run`; DataError without a verdicts.json."""
    summary = read_json(directory / "verdicts.json")
    if not summary:
        raise DataError(f"no verdicts in {directory / 'verdicts.json'}")
    names = list(dict.fromkeys(row["experiment"] for row in summary["claims"]))
    sections = [section(directory, name, [r for r in summary["claims"] if r["experiment"] == name]) for name in names]
    manifest = next((s["manifest"] for s in sections if s["manifest"]), provenance.provenance())
    path = directory / "report.html"
    files.write_atomic(path, render(summary, sections, manifest))
    return path


def redraw(directory: Path) -> list[Path]:
    """Draw figures and report of a run directory again, from its records; the files written. DataError without records."""
    runs = [directory] if (directory / "records.jsonl").exists() else sorted(p.parent for p in directory.glob("*/records.jsonl"))
    if not runs:
        raise DataError(f"DIR must hold records.jsonl, or directories that do; got {directory}")
    written: list[Path] = []
    for run in runs:
        experiment = read_json(run / "config.json").get("experiment")
        if experiment is None:
            raise DataError(f"{run / 'config.json'} must name the experiment")
        records = files.read_records(run)
        module = runner.load(experiment)
        with directories.sole_writer(run):
            written += [run / f"{name}.{ending}" for name in runner.draw(module, records, run) for ending in ("png", "pdf")]
            provenance.write_manifest(
                run, **{k: v for k, v in read_json(run / "manifest.json").items() if k in ("experiment", "preset", "config")}
            )
    if (directory / "verdicts.json").exists():
        written.append(write_report(directory))
    return written
