"""`lindm verify` and `lindm run`: one verdict for every claim, verdicts.json and a report."""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console

from lindm.errors import UsageError, unknown
from lindm.io import directories, files, manifest
from lindm.io.executor import Executor
from lindm.io.progress import Progress, ProgressTask, format_seconds
from lindm_experiments.harness.claims import INCONCLUSIVE, OPEN, claims_hash, get_claim
from lindm_experiments.harness.experiments import Experiment, ambiguous_ids, experiment_names, find_experiment, select_claims
from lindm_experiments.harness.report import REPORTS, VERDICTS_FORMAT, write_report
from lindm_experiments.harness.runner import Outcome, run_experiments
from lindm_experiments.harness.tasks import Job
from lindm_experiments.harness.verdicts import Verdict, adjust
from lindm_experiments.harness.xla import configure_xla, settings_kept


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` and `run_experiment` return: the content of verdicts.json, where it is, and how each experiment ended."""

    summary: dict[str, Any]
    directory: Path
    outcomes: list[Outcome]


@settings_kept()
def verify(
    preset: str = "quick",
    out: str | Path | None = None,
    *,
    experiments: Sequence[str] = (),
    only: Sequence[str] = (),
    seeds: int | None = None,
    seed_offset: int = 0,
    fresh: bool = False,
    workers: int | None = None,
    executor: Executor = "local",
) -> Verification:
    """Run experiments and give every claim a verdict; write verdicts.json and report.html. A call that is interrupted resumes.

    Args:
      preset: quick (minutes), full (the ranges that a paper would show) or smoke (seconds; decides nothing).
      out: directory of the results. [default: results/PRESET]
      experiments: names, or Python files with their claims beside them. [default: all of lindm's]
      only: ids of claims; a main id includes its sub-claims, EXPERIMENT/ID is an id of one experiment. [default: all]
      seeds: number of seeds, in place of the preset's.
      seed_offset: what is added to the base seed of every experiment, for verdicts on other seeds than the preset's.
      fresh: remove what earlier runs of these experiments wrote to the same directory.
      workers: number of worker processes. [default: one per core]
      executor: local or ray.

    Returns:
      The content of verdicts.json in `.summary`, its directory, and how each experiment ended.

    Raises:
      UsageError: an unknown preset, claim or experiment, or a directory of another run.

    >>> result = ld.verify("smoke", "verified", only=["controls/swap"], workers=1)
    >>> [(claim["id"], claim["verdict"]) for claim in result.summary["claims"]]
    [('controls/swap', 'INCONCLUSIVE')]
    """
    out = Path("results") / preset if out is None else Path(out)
    started = time.perf_counter()
    for name, given in (("experiments", experiments), ("only", only)):
        if isinstance(given, str):
            raise UsageError(f"{name} must be a list; got {given!r}")
    check_options(preset, seeds, seed_offset, workers)
    known = {e.name: e for e in map(find_experiment, experiments or experiment_names())}
    claims = {name: e.claims for name, e in known.items()}
    chosen = select_claims(claims, only)
    for id, names in ambiguous_ids(claims, only).items():
        choices = " or ".join(f"--only {name}/{id}" for name in names)
        print(f"lindm: note: --only {id} selects claims of {' and '.join(names)}; {choices} selects one", file=sys.stderr)
    with contextlib.ExitStack() as locks:
        locks.enter_context(directories.sole_writer(out))
        directories.require_kind(out, REPORTS[0], "a verification")
        jobs = make_jobs([known[e] for e in chosen], preset, out, seeds, seed_offset, fresh)
        outcomes = run_with_progress(jobs, locks, executor, workers)
        outcomes.sort(key=lambda o: list(chosen).index(o.experiment))
        summary = summarize(outcomes, chosen, preset, time.perf_counter() - started)
        write_verdicts(out, summary)
        measured = [f"{o.experiment}/{name}" for o in outcomes if o.verdicts for name in ("config.json", "records.jsonl")]
        options = {"preset": preset, "seeds": seeds, "seed_offset": seed_offset, "only": list(only)}
        manifest.write_manifest(out, [*REPORTS, *measured], **options, criteria=summary["criteria"])
    return Verification(summary=summary, directory=out, outcomes=outcomes)


def make_jobs(
    experiments: Sequence[Experiment], preset: str, out: Path, seeds: int | None, seed_offset: int, fresh: bool
) -> list[Job]:
    """A job for each experiment, in a directory of its own in `out`; the longest first."""
    config = {} if seeds is None else {"seeds": seeds}
    jobs = [
        Job(experiment=e, preset=preset, directory=out / e.name, config=config, seed_offset=seed_offset, fresh=fresh)
        for e in experiments
    ]
    return sorted(jobs, key=lambda job: -job.experiment.minutes)


def check_options(preset: str, seeds: int | None, seed_offset: int, workers: int | None) -> None:
    """UsageError for an unknown preset or a number out of range."""
    if preset not in ("quick", "full", "smoke"):
        raise UsageError(unknown("preset", preset, ("quick", "full", "smoke")))
    for name, number in (("seeds", seeds), ("workers", workers)):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be >= 1; got {number}")
    if seed_offset < 0:
        raise UsageError(f"seed_offset must be >= 0; got {seed_offset}")


@settings_kept()
def run_experiment(
    experiment: str, preset: str = "quick", out: str | Path | None = None, *, fresh: bool = False, **config: Any
) -> Verification:
    """Run one experiment in this process and decide its claims. A call that is interrupted resumes.

    Args:
      experiment: a name, or a Python file with its claims in a TOML file beside it.
      preset: quick, full or smoke.
      out: directory of the run. [default: results/EXPERIMENT-PRESET]
      fresh: remove what an earlier run wrote to the same directory.
      config: fields of the experiment's `Config` that differ from the preset's.

    Raises:
      UsageError: an unknown experiment, preset or field, or a directory of another run.
      LindmError: the error that ended the run.

    >>> result = ld.run_experiment("controls", "smoke", "controls", seeds=1)
    >>> result.summary["claims"][0]["experiment"]
    'controls'
    """
    selected = find_experiment(experiment)
    directory = Path("results") / f"{selected.name}-{preset}" if out is None else Path(out)
    configure_xla(single_process=True)
    job = Job(experiment=selected, preset=preset, directory=directory, config=config, fresh=fresh)
    with contextlib.ExitStack() as locks:
        (outcome,) = run_with_progress([job], locks, "serial", None)
        if outcome.error:
            raise outcome.error
        summary = summarize([outcome], {selected.name: list(selected.claims)}, preset, outcome.seconds)
        write_verdicts(directory, summary)
        manifest.update_outputs(directory, REPORTS)
    return Verification(summary=summary, directory=directory, outcomes=[outcome])


def run_with_progress(jobs: Sequence[Job], locks: contextlib.ExitStack, executor: Executor, workers: int | None) -> list[Outcome]:
    """Run the jobs (`locks` as of `run_experiments`) with a bar for each experiment, and one line for each that ends."""
    # also while an experiment redirects what it calls; in a notebook, lines of the error stream and no outputs of their own
    console = Console(file=sys.stderr, force_jupyter=False)
    with Progress(console) as progress:
        total = progress.add("experiments", total=len(jobs)) if len(jobs) > 1 else None
        tasks: dict[str, ProgressTask] = {}

        def on_point(name: str, done: int, points: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add(name, total=points, done=done)
            tasks[name].update(done)

        def on_end(outcome: Outcome) -> None:
            if (task := tasks.pop(outcome.experiment, None)) is not None:
                task.remove()
            if total is not None:
                total.update(total.done + 1)
            if outcome.error and executor == "serial":
                return  # of `run_experiment`, which raises the error
            message = outcome.message or f"{outcome.experiment}: done"  # an error names its experiment
            progress.print(f"{message}, {format_seconds(outcome.seconds)} of computing")  # the sum over all workers

        return run_experiments(jobs, locks, executor=executor, workers=workers, on_point=on_point, on_end=on_end)


def finite(ends: Sequence[float]) -> list[float | None]:
    """The ends of an interval as verdicts.json holds them: null for an infinite one."""
    return [end if isfinite(end) else None for end in ends]


def verdict_row(claim: str, experiment: str, verdict: Verdict | None, note: str = "") -> dict[str, Any]:
    """One claim as verdicts.json holds it; without a verdict it was not decided, for the reason in `note`."""
    c = get_claim(claim)
    row: dict[str, Any] = {
        "id": claim,
        "statement": c.statement,
        "source": c.source,
        "predicted": c.predicted,
        "measured": None,
        "ci": [None, None],
        "limits": [None, None],
        "n": 0,
        "criterion": c.criterion,
        "band": finite((c.lo, c.hi)),
        "exact": False,
        "parts": 1,
        "verdict": INCONCLUSIVE,
        "expected": c.expected,
        "figure": None,
        "p": None,
        "slack": None,
        "note": note,
        "experiment": experiment,
        "min_seeds": c.min_seeds,
    }
    if verdict is not None:
        v = asdict(verdict)
        row |= {k: v[k] for k in ("measured", "n", "verdict", "p", "note", "exact", "parts")}
        row["predicted"] = c.predicted if verdict.predicted is None else verdict.predicted
        row |= {k: finite(v[k]) for k in ("ci", "limits", "band") if v[k] is not None}
        row["figure"] = f"{experiment}/{verdict.figure}.png" if verdict.figure else None
        row["slack"] = None if verdict.slack is None else list(verdict.slack)
    return row


def summarize(outcomes: Sequence[Outcome], chosen: dict[str, list[str]], preset: str, wall_s: float) -> dict[str, Any]:
    """The content of verdicts.json, in the order of the outcomes; `chosen`: experiment -> claims.

    Holm's correction runs over all predictions decided here, and separately over all open questions: more open questions do not
    take power from the predictions.
    """
    decided = [v for o in outcomes for v in o.verdicts if v.id in chosen[o.experiment]]
    families = [[v for v in decided if (get_claim(v.id).expected == OPEN) == is_open] for is_open in (False, True)]
    by_id = {v.id: v for family in families for v in adjust(family)}
    rows = [verdict_row(c, o.experiment, by_id.get(c), note=o.message) for o in outcomes for c in chosen[o.experiment]]
    return {
        "format": VERDICTS_FORMAT,
        "preset": preset,
        "wall_s": round(wall_s, 2),
        "criteria": claims_hash([r["id"] for r in rows]),
        "seconds": {o.experiment: round(o.seconds, 2) for o in outcomes},
        "errors": {o.experiment: o.message for o in outcomes if o.error},
        "claims": rows,
    }


def write_verdicts(directory: Path, summary: dict[str, Any]) -> None:
    """Write verdicts.json and report.html."""
    files.write_json(directory / "verdicts.json", summary, format=VERDICTS_FORMAT)
    write_report(directory)
