"""Experiments, evaluations of policies and training runs on one page, its tables as CSV and LaTeX, its figures as PNG and PDF.

    lindm report DIR [DIR ...] --out report

DIR is a directory of `lindm verify` or `lindm run` (verdicts.json), of `lindm eval --out` (eval.json) or of `lindm sft`
(metrics.jsonl and the options of a training run), or contains such directories. Every number is read from the files of these
commands.
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lindm.errors import DataError
from lindm.evaluation import EVAL_FORMAT
from lindm.figures.style import alternative_text
from lindm.io import files
from lindm.io.directories import require_kind, sole_writer
from lindm.io.manifest import read_output, write_manifest
from lindm.io.provenance import provenance
from lindm.llm.sft import metrics
from lindm.llm.sft.options import run_options
from lindm_experiments.harness.formats import format_number
from lindm_experiments.harness.page import embed_figure, render_template
from lindm_experiments.harness.report import (
    damage_errors,
    experiment_sections,
    read_manifest_if_exists,
    read_verdicts,
    run_directory,
)
from lindm_experiments.harness.tasks import as_csv

Row = dict[str, Any]


class Inputs(NamedTuple):
    """Directories by their content."""

    verifications: list[Path]
    evaluations: list[Path]
    training: list[Path]


def _is_training(directory: Path) -> bool:
    return (directory / "metrics.jsonl").is_file() and run_options(directory) is not None


KINDS: dict[str, Callable[[Path], bool]] = {
    "verifications": lambda d: (d / "verdicts.json").is_file(),
    "evaluations": lambda d: (d / "eval.json").is_file(),
    "training": _is_training,
}


def find_inputs(directories: Sequence[Path]) -> Inputs:
    """The inputs among the directories and their children. DataError for a directory without any."""
    inputs = Inputs([], [], [])
    for directory in directories:
        inside = sorted(p for p in directory.iterdir() if p.is_dir()) if directory.is_dir() else []
        contents = [(kind, d) for d in (directory, *inside) for kind, holds in KINDS.items() if d.is_dir() and holds(d)]
        if ("verifications", directory) in contents:  # its verdicts include those of its children
            contents = [(kind, d) for kind, d in contents if kind != "verifications" or d == directory]
        if not contents:
            known = "verdicts.json (lindm verify, lindm run), eval.json (lindm eval --out) or a run of lindm sft"
            raise DataError(f"DIR must contain {known}; got {directory}{'' if directory.exists() else ', which does not exist'}")
        for kind, one in contents:
            if one not in (listed := getattr(inputs, kind)):
                listed.append(one)
    return inputs


# --- tables ----------------------------------------------------------------------------------------------------------------


def _run_column(directory: Path, directories: Sequence[Path]) -> Row:
    """The column that distinguishes several runs; none for a single run."""
    return {} if len(directories) == 1 else {"run": str(directory)}


def claim_rows(directories: Sequence[Path]) -> list[Row]:
    rows = []
    for directory in directories:
        for row in read_verdicts(directory)["claims"]:
            low, high = row["ci"]
            kept = _run_column(directory, directories) | {k: row[k] for k in ("id", "statement", "predicted", "measured")}
            slack = (row.get("slack") or [None])[0]
            lower, upper = row.get("limits") or (None, None)
            kept |= {"low": low, "high": high, "lower_limit": lower, "upper_limit": upper, "slack": slack}
            rows.append(kept | {k: row[k] for k in ("n", "verdict", "expected")})
    return rows


def experiment_tables(directories: Sequence[Path]) -> dict[str, list[Row]]:
    """Name of an experiment -> the rows of its table.csv in all runs."""
    tables: dict[str, list[Row]] = {}
    for directory in directories:
        for name in dict.fromkeys(row["experiment"] for row in read_verdicts(directory)["claims"]):
            if (content := read_output(run_directory(directory, name), "table.csv")) is not None:
                rows = csv.DictReader(io.StringIO(content.decode()))
                run = _run_column(directory, directories)
                tables.setdefault(name, []).extend(run | {k: _value(v) for k, v in row.items()} for row in rows)
    return tables


def _value(cell: str) -> float | int | str | None:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None


def evaluation_rows(directories: Sequence[Path]) -> list[Row]:
    """Normalized optimality gaps and losses in units of reward, each with its interval, and what else an evaluation tells."""
    rows = []
    for directory in directories:
        for row in files.read_json(directory / "eval.json", format=EVAL_FORMAT)["rows"]:
            kept = _run_column(directory, directories) | {k: row[k] for k in ("suite", "horizon", "split", "policy", "gap")}
            kept |= dict(zip(("low", "high"), row["ci"] or (None, None), strict=True))
            kept |= {"loss": row.get("suboptimality")}
            kept |= dict(zip(("loss_low", "loss_high"), row.get("suboptimality_ci") or (None, None), strict=True))
            rows.append(kept | {name: row.get(name) for name in OTHERS})
    return rows


OTHERS = ("gap_of_value", "optimal_lower", "optimal_upper", "uniform_value", "action_agreement", "invalid", "n", "method")
OTHERS += ("interval_over", "note")


def yardstick_rows(directories: Sequence[Path]) -> list[Row]:
    """The parts of the normalized optimality gaps where an evaluation has a yardstick."""
    rows = []
    for directory in directories:
        for row in files.read_json(directory / "eval.json", format=EVAL_FORMAT)["rows"]:
            if (split := row.get("loss_split")) is None:
                continue
            kept = _run_column(directory, directories) | {k: row[k] for k in ("suite", "horizon", "split", "policy")}
            kept |= {k: split[k] for k in ("yardstick", "gap", "not_in_context", "lost_by_reader")}
            rows.append(
                kept | dict(zip(("low", "high"), split["lost_by_reader_ci"] or (None, None), strict=True)) | {"n": split["n"]}
            )
    return rows


def training_rows(directories: Sequence[Path]) -> list[Row]:
    rows = []
    for directory in directories:
        options = run_options(directory)
        assert options is not None
        records = metrics.read_metrics(directory)
        evaluated = [r for r in records if r["kind"] == "eval"]
        first, last = (evaluated[0], evaluated[-1]) if evaluated else ({}, {})
        rows.append(
            {
                "run": str(directory),
                "model": options["model"] or f"preset {options['preset']}",
                "method": options["method"],
                "data": options["data"],
                "steps": max((r["step"] for r in records), default=0),
                "loss before": first.get("loss"),
                "loss after": last.get("loss"),
                "gap before": first.get("gap"),
                "gap after": last.get("gap"),
                "bc": last.get("bc_gap"),
            }
        )
    return rows


ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {c: f"\\{c}" for c in "&%$#_{}"}


def as_latex(rows: Sequence[Row]) -> str:
    """A tabular for the package booktabs."""

    def cell(value: Any) -> str:
        text = format_number(value if isinstance(value, (str, float, int)) else None)
        return "".join(ESCAPES.get(c, c) for c in " ".join(text.split()))

    names = list(rows[0])
    numeric = [all(isinstance(row[name], (float, int, type(None))) for row in rows) for name in names]
    lines = [rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}", r"\toprule"]
    lines += [" & ".join(map(cell, names)) + r" \\", r"\midrule"]
    lines += [" & ".join(cell(row[name]) for name in names) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


# --- the page --------------------------------------------------------------------------------------------------------------


GAPS = {
    "gaps": ("gap", "low", "high", "normalized optimality gap"),
    "losses": ("loss", "loss_low", "loss_high", r"$V^* - V^\pi$, units of reward"),
}
"""Figure of the evaluations -> its columns and the label of its axis."""


def draw_gaps(rows: Sequence[Row], name: str) -> dict[str, bytes]:
    """NAME.png, NAME.pdf and NAME.svg: the gaps or losses (`GAPS`) of all policies with their intervals.

    There is one panel for each suite, horizon and split.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from lindm_experiments.harness.figures import COLORS, MEASURED, STYLE, WIDTH, figure_files

    value, low, high, label = GAPS[name]
    known = [row for row in rows if row[value] is not None]
    cells = list(dict.fromkeys((r["suite"], r["horizon"], r["split"]) for r in known))
    names = list(dict.fromkeys(r["policy"] for r in known))
    columns = min(2, len(cells))
    height = -(-len(cells) // columns)
    with rc_context(STYLE):  # pyright: ignore
        size = (WIDTH if columns > 1 else 6.0, (0.9 + 0.28 * len(names)) * height)
        figure = Figure(figsize=size)
        axes = figure.subplots(height, columns, sharey=True, squeeze=False)
        for axis, cell in zip(axes.flat, cells, strict=False):
            for row in known:
                if (row["suite"], row["horizon"], row["split"]) == cell:
                    y, x = -names.index(row["policy"]), row[value]
                    ends = None if row[low] is None else [[x - row[low]], [row[high] - x]]
                    axis.errorbar([x], [y], xerr=ends, color=COLORS[0], capsize=2, **MEASURED)
            suite, horizon, split = cell
            axis.set(title=f"{suite}, horizon {horizon}" + (f", {split}" if split else ""), xlabel=label)
            axis.set_yticks([-i for i in range(len(names))], [name if len(name) < 32 else f"...{name[-28:]}" for name in names])
            axis.axvline(0, color="#444444", linewidth=0.8, marker="")
        for axis in axes.flat[len(cells) :]:
            axis.set_visible(False)
        about = "each policy has a point and its interval, in one panel for each suite, horizon and split"
        figure.set_label(f"{label.replace('$', '')}: {about}; 0 is optimal.")
        return figure_files(name, figure)


def write_summary(directories: Sequence[Path], out: Path) -> list[Path]:
    """Write OUT/index.html, OUT/tables/*.csv and *.tex, OUT/figures/*.png, *.pdf and *.svg; their paths.

    Raises:
      DataError: a file of a directory is damaged.
    """
    inputs = find_inputs(directories)
    with damage_errors(f"a file of {', '.join(map(str, directories))} is damaged"):
        written = _render(inputs)
    with sole_writer(out):
        require_kind(out, "index.html", "a report")
        with files.storage_errors(out):
            for part in {path.parent for path in written}:
                (out / part).mkdir(parents=True, exist_ok=True)
        for path, content in written.items():
            files.write_atomic(out / path, content)
        write_manifest(out, [path.as_posix() for path in written])
    return [out / path for path in written]


def _render(inputs: Inputs) -> dict[Path, str | bytes]:
    """The content of every file of a report, by its path in the report's directory."""
    own = experiment_tables(inputs.verifications)
    tables = {"claims": claim_rows(inputs.verifications)} | own
    tables |= {"evaluations": evaluation_rows(inputs.evaluations)}
    tables |= {"yardsticks": yardstick_rows(inputs.evaluations), "training": training_rows(inputs.training)}
    tables = {name: rows for name, rows in tables.items() if rows}
    written: dict[Path, str | bytes] = {}
    for name, rows in tables.items():
        written[Path("tables", f"{name}.csv")] = as_csv(rows)
        written[Path("tables", f"{name}.tex")] = as_latex(rows)
    figures: dict[str, bytes] = {}
    for name, (value, *_) in GAPS.items():
        if any(row[value] is not None for row in tables.get("evaluations", ())):
            figures |= draw_gaps(tables["evaluations"], name)
    verifications = []
    for number, directory in enumerate(inputs.verifications):
        verdicts = read_verdicts(directory)
        sections = experiment_sections(directory, verdicts)
        for section in sections:
            run = run_directory(directory, section["name"])
            for figure in section["figures"]:
                name, own_name = section["name"], figure["name"]
                to = _copied(figures, run, own_name, name if name == own_name else f"{name}-{own_name}", number)
                figure["links"] = _links(figures, to)
        suffix = f"-{number + 1}" if number else ""  # of anchors: an experiment may be in several verifications
        shown = {"directory": str(directory), "preset": verdicts["preset"], "rows": verdicts["claims"]}
        verifications.append(shown | {"sections": sections, "suffix": suffix})
    runs = [
        {
            "name": str(directory),
            "options": run_options(directory),
            "curves": _copied(figures, directory, "curves", "curves", number),
        }
        for number, directory in enumerate(inputs.training)
    ]
    gap_figures = [name for name in GAPS if f"{name}.png" in figures]
    shown = [*gap_figures, *(run["curves"] for run in runs if run["curves"])]  # those of the experiments are in their sections
    manifests = [(str(d), read_manifest_if_exists(d)) for d in (*inputs.verifications, *inputs.evaluations, *inputs.training)]
    written |= {Path("figures", name): content for name, content in figures.items()}
    written[Path("index.html")] = render_template(
        "summary.html.jinja",
        tables=tables,
        experiment_tables=list(own),
        verifications=verifications,
        runs=runs,
        gap_figures=gap_figures,
        figure_links={name: _links(figures, name) for name in shown},
        images={name: embed_figure(figures[f"{name}.png"], f"{name}.png") for name in shown},
        seen={name: alternative_text(figures[f"{name}.png"]) for name in shown},
        manifests=[(name, manifest) for name, manifest in manifests if manifest],
        here=provenance(),
    )
    return written


def _links(figures: dict[str, bytes], name: str | None) -> list[tuple[str, str]]:
    """Format and path of the files of a figure, in the report's directory."""
    files_of = [(ending.upper(), f"{name}.{ending}") for ending in ("png", "pdf", "svg")]
    return [(text, f"figures/{file}") for text, file in files_of if file in figures]


def _copied(figures: dict[str, bytes], directory: Path, name: str, to: str, number: int) -> str | None:
    """Copy NAME.png, NAME.pdf and NAME.svg of a directory to the figures, under a name that begins with `to`; that name, or None.

    Args:
      number: of the directory among those of its kind; from the second on, it is in the name.
    """
    to = f"{to}-{number + 1}" if number else to
    for ending in ("png", "pdf", "svg"):
        if (content := read_output(directory, f"{name}.{ending}")) is not None:
            figures[f"{to}.{ending}"] = content
    return to if f"{to}.png" in figures else None
