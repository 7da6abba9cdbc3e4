"""`lindm verify`: every experiment, one verdict for every claim."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lindm.cli.exit_codes import exit_code
from lindm.cli.option_parser import Command

if TYPE_CHECKING:
    from lindm_experiments.harness.verify import Verification


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Run the experiments and give every claim a verdict. The command writes verdicts.json and report.html. A run that was
    killed resumes."""

    preset: Literal["quick", "full", "smoke"] = "quick"
    """quick takes minutes, full covers the ranges that a paper would show, smoke takes seconds and decides nothing."""
    out: Path | None = None
    """Directory of the results. [default: results/PRESET]"""
    mutants: bool = False
    """Put one mistake at a time into the bounds; each must turn the PASS of its claim into a FAIL. Uses the records that
    `lindm verify` wrote to --out. Experiments without records there run first, and interrupted ones are completed first. Writes
    no verdicts."""
    experiments: tuple[str, ...] = ()
    """Experiments to run: names, or Python files with their claims beside them. [default: all of lindm's]"""
    only: tuple[str, ...] = ()
    """Ids of the claims to decide. A main id includes its sub-claims; EXPERIMENT/ID is an id of one experiment. [default: all]"""
    seeds: int | None = None
    """Number of seeds. [default: that of the preset]"""
    seed_offset: int = 0
    """Number added to the base seed of every experiment, to decide on other seeds than those of the preset."""
    fresh: bool = False
    """Remove what earlier runs of these experiments wrote to the same directory."""
    executor: Literal["local", "ray"] = "local"
    """Where the workers run: on this machine, or in the Ray cluster at RAY_ADDRESS (a local cluster if it is not set)."""
    workers: int | None = None
    """Number of worker processes. [default: one per core]"""


def run(options: Verify) -> int:
    if options.mutants:
        return run_mutants(options)
    from lindm_experiments.harness.verify import verify

    return report_result(verify(options.preset, options.out, experiments=options.experiments, **shared_options(options)))


def shared_options(options: Verify) -> dict[str, Any]:
    """The options that apply with and without --mutants."""
    return {name: getattr(options, name) for name in ("only", "seeds", "seed_offset", "fresh", "executor", "workers")}


def run_mutants(options: Verify) -> int:
    """Print one line for each mutant; 1 if one survives."""
    from rich.console import Console

    from lindm.errors import UsageError
    from lindm_experiments.harness.mutants import print_mutants, verify_mutants

    if options.experiments:
        raise UsageError("--experiments does not apply to --mutants: choose claims by --only")
    trials = verify_mutants(options.preset, options.out, **shared_options(options))
    print_mutants(trials, Console())
    return int(not all(t.killed for t in trials))


def report_result(result: "Verification") -> int:
    """Print the summary of a verification; its exit code."""
    from rich.console import Console

    from lindm_experiments.harness.report import print_next, print_summary

    console = Console()
    print_summary(result.summary, console)
    print_next(result.summary, result.directory, [o.message for o in result.outcomes if o.error], console)
    return exit_code_of(result)


def exit_code_of(result: "Verification") -> int:
    """The first experiment that could not finish gives the code; otherwise 0 if every verdict is an expected one, 1 if not."""
    from lindm_experiments.harness.verdicts import as_expected

    errors = [exit_code(o.error) for o in result.outcomes if o.error]
    return errors[0] if errors else int(not all(map(as_expected, result.summary["claims"])))


COMMAND = Command(
    name="verify",
    options=Verify,
    run=run,
    examples=(
        "lindm verify",
        "lindm verify --only estimation-slope ladder",
        "lindm verify --preset full --workers 8",
        "lindm verify --mutants",
    ),
)
