"""`lindm run`: one experiment, with options of its own."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lindm.cli.arguments import Option, options_of_source, parse_options, parser_of

PRESETS = Literal["quick", "full", "smoke"]
SUMMARY = "Run one experiment"
DESCRIPTION = "Run one experiment, decide its claims and write its report. A run that is killed resumes."


def run(words: Sequence[str]) -> int:
    if not words or words[0].startswith("-"):
        options = [Option(name="experiment", type=str, help="")]
        parse_options(parser_of("lindm run EXPERIMENT", DESCRIPTION, options), options, words)
    return run_experiment(words[0], words[1:])


def run_experiment(experiment: str, words: Sequence[str]) -> int:
    """Parse the options of an experiment, which are the fields of its `Config`, and run it."""
    from lindm_experiments.harness import runner

    path = runner.find(experiment)
    preset = "quick"
    for i, word in enumerate(words):  # the preset gives the defaults of all other options, so it is read first
        if word == "--preset" and i + 1 < len(words):
            preset = words[i + 1]
        elif word.startswith("--preset="):
            preset = word.partition("=")[2]
    source = path.read_text(encoding="utf-8")
    own = options_of_source(source, preset)
    common = [
        Option(name="preset", type=PRESETS, default=preset, help="Defaults of the options below."),
        Option(name="out", type=Path, default=Path("results") / f"{experiment}-{preset}", help="Directory of the run."),
        Option(name="fresh", type=bool, default=False, help="Remove what an earlier run wrote to the same directory."),
    ]
    import ast

    description = ast.get_docstring(ast.parse(source)) or ""
    sections = {own[0].name: "Configuration"} if own else {}
    parser = parser_of(f"lindm run {experiment}", description, [*common, *own], sections=sections)
    given = parse_options(parser, [*common, *own], words)
    out, fresh = given.pop("out", common[1].default), given.pop("fresh", False)
    given.pop("preset", None)

    runner.settle_xla(alone=True)
    from lindm.io import files, signals
    from lindm_experiments.harness.executor import Job, configure, perform

    module = runner.load(experiment)
    config = replace(configure(module, preset, None), **given)
    signals.stop_on_signals()
    from rich.console import Console

    from lindm_experiments.harness.progress import show_progress
    from lindm_experiments.harness.report import table, write_report
    from lindm_experiments.harness.verify import exit_code_of, summarise

    console = Console(file=sys.stdout)  # this one, also while an experiment turns what it calls away from it
    console = console if console.is_terminal else Console(file=sys.stdout, width=160)
    job = Job(experiment=experiment, preset=preset, directory=out, fresh=fresh)
    with show_progress(console, 1) as (start, point, end):
        start(job)
        outcome = perform(job, lambda done, total: point(experiment, done, total), cfg=config)
        end(outcome)
    if outcome.error:
        raise outcome.error
    summary = summarise([outcome], {experiment: list(runner.discover()[experiment])}, preset, outcome.seconds)
    files.write_json(out / "verdicts.json", summary)
    write_report(out)
    console.print(table(summary))
    console.print(f"records, figures and report.html: {out}", markup=False)
    return exit_code_of([outcome], summary["claims"])
