"""`lindm verify`: every experiment, one verdict for every claim, one table, one report."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console

from lindm.cli.exit_codes import exit_code
from lindm.errors import Preempted, UsageError
from lindm.io import files, manifest, signals
from lindm_experiments.harness import runner
from lindm_experiments.harness.claims import INCONCLUSIVE, OPEN, claims_hash, get_claim
from lindm_experiments.harness.executor import Job, Outcome, run_all
from lindm_experiments.harness.progress import show_progress
from lindm_experiments.harness.report import score, table, write_report
from lindm_experiments.harness.verdicts import Verdict, adjust, as_expected

# Rough share of the work, only to start the longest first (an experiment not named here counts 1).
COST: dict[str, float] = {"decisions": 10.0, "llm_law": 5.0, "mechanism": 4.0}


def select(only: Sequence[str], known: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Experiment -> the claims asked for. A main id stands for its sub-claims too; no ids at all for everything."""
    claims = [c for owned in known.values() for c in owned]
    for wanted in only:
        if not any(c == wanted or c.startswith(f"{wanted}/") for c in claims):
            raise UsageError(f"--only must name claims out of {', '.join(sorted(claims))}; got {wanted!r}")
    chosen = {
        name: [c for c in owned if not only or any(c == w or c.startswith(f"{w}/") for w in only)]
        for name, owned in known.items()
    }
    return {name: owned for name, owned in chosen.items() if owned}


def entry(claim: str, experiment: str, verdict: Verdict | None, note: str = "") -> dict[str, Any]:
    """One claim as verdicts.json holds it; without a verdict it was not decided, for the reason in `note`."""
    c = get_claim(claim)
    row: dict[str, Any] = {
        "id": claim,
        "statement": c.statement,
        "source": c.source,
        "predicted": c.predicted,
        "measured": None,
        "ci": [None, None],
        "n": 0,
        "criterion": c.criterion,
        "verdict": INCONCLUSIVE,
        "expected": c.expected,
        "figure": None,
        "p": None,
        "note": note,
        "experiment": experiment,
        "min_seeds": c.min_seeds,
    }
    if verdict is not None:
        v = asdict(verdict)
        row |= {k: v[k] for k in ("measured", "n", "verdict", "p", "note")}
        row["predicted"] = c.predicted if verdict.predicted is None else verdict.predicted
        row["ci"] = [end if isfinite(end) else None for end in verdict.ci]
        row["figure"] = f"{experiment}/{verdict.figure}.png" if verdict.figure else None
    return row


def summarise(outcomes: Sequence[Outcome], chosen: dict[str, list[str]], preset: str, wall_s: float) -> dict[str, Any]:
    """The content of verdicts.json, in the order of the criteria. Holm over all predictions decided here, and over all open
    questions, which are another family: to ask more of them must not take power from the predictions."""
    decided = [v for o in outcomes for v in o.verdicts if v.id in chosen[o.experiment]]
    families = [[v for v in decided if (get_claim(v.id).expected == OPEN) == is_open] for is_open in (False, True)]
    by_id = {v.id: v for family in families for v in adjust(family)}
    rows = [entry(claim, o.experiment, by_id.get(claim), note=o.message) for o in outcomes for claim in chosen[o.experiment]]
    return {
        "preset": preset,
        "wall_s": round(wall_s, 2),
        "criteria": claims_hash([r["id"] for r in rows]),
        "seconds": {o.experiment: round(o.seconds, 2) for o in outcomes},
        "claims": rows,
    }


def exit_code_of(outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]]) -> int:
    """The first experiment that could not finish gives the code; otherwise 0 if every verdict is an expected one, 1 if not."""
    stopped = next((exit_code(o.error) for o in outcomes if o.error), 0)
    return stopped or int(not all(map(as_expected, rows)))


def verify(
    preset: str, out: Path, only: Sequence[str] = (), seeds: int | None = None, fresh: bool = False, workers: int | None = None
) -> int:
    """Run what decides the claims, write verdicts.json, manifest.json and report.html, print the table; the exit code."""
    started = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    if preset not in ("quick", "full", "smoke"):
        raise UsageError(f"--preset must be one of quick, full; got {preset!r}")
    if seeds is not None and seeds < 1:
        raise UsageError(f"--seeds must be >= 1; got {seeds}")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be >= 1; got {workers}")
    chosen = select(only, runner.discover())
    with files.storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    signals.stop_on_signals()
    jobs = [Job(experiment=name, preset=preset, directory=out / name, seeds=seeds, fresh=fresh) for name in chosen]
    jobs.sort(key=lambda job: -COST.get(job.experiment, 1.0))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with show_progress(console, len(jobs)) as (on_start, on_point, on_end):
        outcomes = run_all(jobs, workers or cores, on_start, on_point, on_end)
    outcomes.sort(key=lambda o: list(chosen).index(o.experiment))
    summary = summarise(outcomes, chosen, preset, time.perf_counter() - started)
    if any(isinstance(o.error, Preempted) for o in outcomes):
        raise Preempted("stopped; the same command resumes")
    files.write_json(out / "verdicts.json", summary)
    write_report(out)
    manifest.write_manifest(out, preset=preset, seeds=seeds, only=list(only), criteria=summary["criteria"])
    console.print(table(summary))
    rows = summary["claims"]
    unexpected = [r["id"] for r in rows if not as_expected(r)]
    console.print(f"{score(rows)}, {summary['wall_s']:.0f} s; report: {out / 'report.html'}")
    for o in outcomes:
        if o.message:
            console.print(f"error: {o.message}", style="bold red", markup=False)
    if unexpected:
        console.print(f"not as expected: {', '.join(unexpected)}", style="bold red", markup=False)
    return exit_code_of(outcomes, rows)
