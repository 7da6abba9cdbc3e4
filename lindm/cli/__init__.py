"""The door. Everything heavy is imported after the arguments are understood, so that `lindm --help` answers at once.

Exit codes: 0 ok, 1 a verdict is not the expected one, 2 usage, 3 data, 4 no usable checkpoint, 5 not finite, 6 out of memory,
7 storage, 8 a process of the run was lost, 75 preempted (everything finished is on disk; the same command resumes).
LINDM_DEBUG=1 shows the traceback of an error.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lindm.cli import models
from lindm.cli.eval import Eval, run_eval
from lindm.cli.launch import Launch, run_launch
from lindm.cli.plan import Plan, run_plan
from lindm.cli.problems import Data, Export, Make, Solve, run_export, run_make, run_solve
from lindm.errors import LindmError
from lindm.exit_codes import exit_code
from lindm.llm.sft.options import Sft


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Run the experiments, print a verdict for every claim, write verdicts.json and report.html. A killed run resumes."""

    preset: str = "quick"
    """quick (minutes) or full (the ranges a paper would show)"""
    out: Path | None = None
    """where results go [default: results/PRESET]"""
    only: tuple[str, ...] = ()
    """claims to decide, by id; a main id stands for its sub-claims too [default: all]"""
    seeds: int | None = None
    """number of seeds, in place of the preset's"""
    fresh: bool = False
    """start over: remove what earlier runs of these experiments wrote to the same place"""
    workers: int | None = None
    """processes [default: one per core]"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run one experiment; `lindm run EXPERIMENT --help` lists its own options."""

    experiment: tyro.conf.Positional[str]
    """name of a module in experiments/"""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Redraw the figures (and the report) of a run directory from its records alone."""

    directory: tyro.conf.Positional[Path]
    """a directory written by `lindm run` or `lindm verify`"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """One page of verifications, evaluations and training runs, with its tables as CSV and LaTeX."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """directories of `lindm verify`, `lindm eval --out` or `lindm sft`, or directories of such"""
    out: Path = Path("report")
    """where the page goes"""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check versions, devices, precision, disk, fonts and the lock."""

    out: Path = Path("results")
    """where results would go"""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed and memory beside other implementations."""

    what: tyro.conf.Positional[str]
    """attention, solvers, sft or decisions"""
    json: bool = False
    """print one JSON list"""


Command = (
    Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Solve, tyro.conf.subcommand("solve")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[models.Model, tyro.conf.subcommand("model")]
    | Annotated[Sft, tyro.conf.subcommand("sft")]
    | Annotated[models.Export, tyro.conf.subcommand("export")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Launch, tyro.conf.subcommand("launch")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)
DESCRIPTION = (
    "lindm: in-context learning for sequential decisions, measured beside what theory predicts, and language models that decide."
)


def _parse(kind, arguments: Sequence[str], prog: str, description: str | None):
    """tyro at the door; what it cannot parse becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                args=list(arguments),
                prog=prog,
                description=description,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as e:
        if e.code in (0, None):
            raise
        raise ValueError(re.sub(r"^Error parsing \w+: ", "", _one_line(complaint.getvalue()))) from None


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws, in unicode or in ASCII."""
    found: list[str] = []
    inside = False
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        bare = line.strip(" │|")
        if bare.startswith(("╭", "╰", "─", "---", "+--")):  # an edge, or a rule inside
            if found:
                break
            inside = True
        elif bare.startswith("Got errors") or (found and not bare):
            break
        elif inside and bare:
            found.append(bare)
    return " ".join(found) or box.strip()


def _verify(command: Verify) -> int:
    from lindm_experiments.harness.verify import verify

    out = Path("results") / command.preset if command.out is None else command.out
    return verify(command.preset, out, command.only, command.seeds, command.fresh, command.workers)


def _run(experiment: str, rest: Sequence[str]) -> int:
    from lindm.io import files, signals
    from lindm_experiments.harness import runner
    from lindm_experiments.harness.executor import Job, configure, perform

    runner.settle_xla(alone=True)
    module = runner.load(experiment)
    preset = "quick"
    for i, word in enumerate(rest):  # the preset gives the defaults of all other options, so it is read first
        if word == "--preset" and i + 1 < len(rest):
            preset = rest[i + 1]
        elif word.startswith("--preset="):
            preset = word.partition("=")[2]
    default = configure(module, preset, None)
    config_type = tyro.conf.OmitArgPrefixes[type(default)]  # pyright: ignore
    options = make_dataclass(
        "Options",
        [
            ("preset", str, field(default=preset)),
            ("out", Path, field(default=Path("results") / f"{experiment}-{preset}")),
            ("fresh", bool, field(default=False)),
            ("config", config_type, field(default=default)),
        ],
        frozen=True,
        kw_only=True,
    )
    asked = _parse(options, rest, f"lindm run {experiment}", module.__doc__)
    signals.stop_on_signals()
    from rich.console import Console

    from lindm_experiments.harness.progress import show_progress
    from lindm_experiments.harness.report import table, write_report
    from lindm_experiments.harness.verify import exit_code_of, summarise

    console = Console(file=sys.stdout)  # this one, also while an experiment turns what it calls away from it
    console = console if console.is_terminal else Console(file=sys.stdout, width=160)
    job = Job(experiment=experiment, preset=preset, directory=asked.out, fresh=asked.fresh)
    with show_progress(console, 1) as (start, point, end):
        start(job)
        outcome = perform(job, lambda done, total: point(experiment, done, total), cfg=asked.config)
        end(outcome)
    if outcome.error:
        raise outcome.error
    summary = summarise([outcome], {experiment: list(module.CLAIMS)}, preset, outcome.seconds)
    files.write_json(asked.out / "verdicts.json", summary)
    write_report(asked.out)
    console.print(table(summary))
    console.print(f"records, figures and report.html: {asked.out}", markup=False)
    return exit_code_of([outcome], summary["claims"])


def _plot(directory: Path) -> int:
    from lindm.io import signals
    from lindm_experiments.harness.report import redraw

    signals.stop_on_signals()
    for path in redraw(directory):
        print(path)
    return 0


def _report(command: Report) -> int:
    from lindm.io import signals
    from lindm_experiments.harness.summary import write

    if not command.directories:
        raise ValueError("DIR must name at least one directory")
    signals.stop_on_signals()
    for path in write(command.directories, command.out):
        print(path)
    return 0


def _bench(command: Bench) -> int:
    if command.what == "attention":
        from lindm.bench import attention as bench
    elif command.what == "solvers":
        from lindm.bench import solvers as bench
    elif command.what == "sft":
        from lindm.bench import sft as bench
    elif command.what == "decisions":
        from lindm.bench import decisions as bench
    else:
        raise ValueError(f"WHAT must be attention, solvers, sft or decisions; got {command.what!r}")
    return int(bench.main(command.json) or 0)


def _sft(command: Sft) -> int:
    from lindm.llm.parallel import supervisor

    if (command.processes or 1) > 1 or (command.coordinator is None and supervisor.launcher(dict(os.environ))):
        supervisor.guard()  # before the first thread: from here on the child goes on
    from lindm.llm.sft import trainer

    return trainer.run(command)


def _dispatch(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from lindm import __version__

        print(__version__)
        return 0
    if len(arguments) > 1 and arguments[0] == "run" and not arguments[1].startswith("-"):
        return _run(arguments[1], arguments[2:])
    if len(arguments) > 1 and arguments[0] == "launch" and not arguments[1].startswith("-"):
        return run_launch(arguments[1], arguments[2:])
    command = _parse(Command, arguments or ["--help"], "lindm", DESCRIPTION)
    match command:
        case Verify():
            return _verify(command)
        case Run():
            return _run(command.experiment, [])
        case Plot():
            return _plot(command.directory)
        case Report():
            return _report(command)
        case Doctor():
            from lindm.cli import doctor

            return doctor.main(command.out)
        case Solve():
            return run_solve(command)
        case Data(command=Make() as make):
            return run_make(make)
        case Data(command=Export() as export):
            return run_export(export)
        case models.Model():
            return models.run_model(command)
        case Sft():
            return _sft(command)
        case models.Export():
            return models.run_export(command)
        case Eval():
            return run_eval(command)
        case Plan():
            return run_plan(command)
        case Launch():
            return run_launch(command.launcher, [])
        case Bench():
            return _bench(command)
    raise AssertionError(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. SystemExit only from --help and from what cannot be parsed."""
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except Exception as e:
        if os.environ.get("LINDM_DEBUG") == "1":
            raise
        hint = "" if isinstance(e, LindmError | ValueError) else f"{type(e).__name__}: "
        print(f"lindm: error: {hint}{e}", file=sys.stderr)
        return exit_code(e)
