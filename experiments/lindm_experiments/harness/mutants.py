"""Mutants: a bound with one mistake in it must turn the verdict of its claim from PASS to FAIL.

A mutant changes the records of an experiment, as if a wrong formula had made them; the experiment's own `check` decides. The
mutants of the package are in `experiments/lindm_experiments/mutants.py`.
"""

import contextlib
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lindm.io import directories
from lindm.io.executor import Executor
from lindm.io.manifest import read_records
from lindm_experiments.harness.claims import FAIL, PASS, Mutant, get_claim
from lindm_experiments.harness.experiments import find_experiment, load, select_claims
from lindm_experiments.harness.report import REPORTS
from lindm_experiments.harness.verify import check_options, make_jobs, run_with_progress
from lindm_experiments.harness.xla import settings_kept


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The verdict on a claim without and with a mistake, each alone (before any correction for the number of claims)."""

    claim: str
    mistake: str
    correct: str
    mutated: str

    @property
    def killed(self) -> bool:
        """Whether the mistake turned PASS to FAIL."""
        return self.correct == PASS and self.mutated == FAIL


def try_mutants(mutants: Sequence[Mutant], records: dict[str, list[dict]]) -> list[Trial]:
    """The verdicts of the mutants, from the records of each experiment, in the order of the mutants."""
    correct = {name: _verdicts(name, kept) for name, kept in records.items()}
    trials = []
    for mutant in mutants:
        name = get_claim(mutant.claim).experiment
        mutated = copy.deepcopy(records[name])
        mutant.change(mutated)
        verdict = _verdicts(name, mutated)[mutant.claim]
        trials.append(Trial(claim=mutant.claim, mistake=mutant.mistake, correct=correct[name][mutant.claim], mutated=verdict))
    return trials


def _verdicts(experiment: str, records: list[dict]) -> dict[str, str]:
    return {v.id: v.verdict for v in load(experiment).check(records)}


def select_mutants(mutants: Sequence[Mutant], only: Sequence[str]) -> list[Mutant]:
    """Those of the claims that the ids of `only` select, as in `verify`. UsageError for an id that selects none."""
    known: dict[str, list[str]] = {}
    for claim in dict.fromkeys(m.claim for m in mutants):
        known.setdefault(get_claim(claim).experiment, []).append(claim)
    chosen = select_claims(known, only)
    return [m for m in mutants if m.claim in chosen.get(get_claim(m.claim).experiment, ())]


@settings_kept()
def verify_mutants(
    preset: str = "quick",
    out: str | Path | None = None,
    *,
    only: Sequence[str] = (),
    seeds: int | None = None,
    seed_offset: int = 0,
    fresh: bool = False,
    workers: int | None = None,
    executor: Executor = "local",
) -> list[Trial]:
    """Put one mistake after the other into the bounds and decide their claims again: each must turn a PASS to a FAIL.

    The records of `verify` in the same directory are used. Experiments without records there run first, and those that were
    interrupted are completed first; a note names them.

    Args:
      preset, out, seeds, seed_offset, fresh, workers, executor: as in `verify`.
      only: ids of claims. [default: all that have a mutant]

    Returns:
      For each mutant its claim, the mistake, the verdict without and with it, and whether it was `killed`.

    Raises:
      UsageError: an unknown preset, or a claim without a mutant.
      LindmError: an experiment could not finish.

    >>> trials = ld.verify_mutants("smoke", "mutants", only=["bellman-horizon"], workers=1)
    >>> trials[0].claim
    'bellman-horizon'
    """
    from lindm_experiments.mutants import MUTANTS

    directory = Path("results") / preset if out is None else Path(out)
    check_options(preset, seeds, seed_offset, workers)
    mutants = select_mutants(MUTANTS, only)
    names = list(dict.fromkeys(get_claim(m.claim).experiment for m in mutants))
    there = directory.exists()
    with contextlib.ExitStack() as locks:
        locks.enter_context(directories.sole_writer(directory))
        directories.require_kind(directory, REPORTS[0], "a verification")
        for note in _what_runs_first(directory, names, fresh, there):
            print(f"lindm: note: {note}", file=sys.stderr)
        jobs = make_jobs([find_experiment(n) for n in names], preset, directory, seeds, seed_offset, fresh)
        for outcome in run_with_progress(jobs, locks, executor, workers):
            if outcome.error:
                raise outcome.error
        return try_mutants(mutants, {name: read_records(directory / name) for name in names})


def _what_runs_first(directory: Path, experiments: Sequence[str], fresh: bool, there: bool) -> list[str]:
    """Which experiments are measured before a mutant is tried, why, and how the user avoids it.

    Args:
      there: the directory existed before this call.
    """
    absent = [name for name in experiments if fresh or not (directory / name / "records.jsonl").exists()]
    begun = [name for name in experiments if name not in absent and not (directory / name / "manifest.json").exists()]
    notes = []
    if absent:
        if fresh:
            why = f"--fresh removes the records in {directory}"
        else:
            lacks = f"has no records of {'it' if len(absent) == 1 else 'them'}" if there else "does not exist"
            why = f"{directory} {lacks}; to use the records of an earlier `lindm verify`, give its directory as --out"
        notes.append(f"{', '.join(absent)} {'runs' if len(absent) == 1 else 'run'} first: {why}")
    if begun:
        words = ("is", "its run", "is") if len(begun) == 1 else ("are", "their runs", "are")
        notes.append(f"{', '.join(begun)} {words[0]} completed first: {words[1]} in {directory} {words[2]} not finished")
    return notes


def print_mutants(trials: Sequence[Trial], console: Console) -> None:
    """One line for each mutant: claim, mistake, what became of the verdict; and how many were killed."""
    widths = [max(len(text) for text in column) for column in zip(*((t.claim, t.mistake) for t in trials), strict=True)]
    for t in trials:
        change = f"{t.correct} -> {t.mutated}"
        line = Text(f"{t.claim:<{widths[0]}}  {t.mistake:<{widths[1]}}  ")
        line.append(f"killed ({change})" if t.killed else f"SURVIVED ({change})", style="green" if t.killed else "bold red")
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"{sum(t.killed for t in trials)} of {len(trials)} mutants killed", style="bold", highlight=False)
