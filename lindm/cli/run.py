"""`lindm run`: one experiment, with options of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lindm.cli.option_parser import Option, Positional, options_of_source, parse_options, parser_of, two_columns

PRESETS = Literal["quick", "full", "smoke"]
SUMMARY = "Run one experiment"
DESCRIPTION = (
    "Run one experiment, decide its claims and write its report. A run that was killed resumes. "
    "EXPERIMENT is a name from the list below, or a Python file with its claims in a TOML file beside it (mine.py, mine.toml)."
)


def run(words: Sequence[str]) -> int:
    if not words or words[0] == "--list":
        print(list_experiments())
        return 0
    if words[0].startswith("-"):
        options = [
            Option(
                name="experiment",
                type=str,
                default=None,
                help="Experiment to run. [default: list all experiments]",
                mark=Positional("EXPERIMENT"),
            ),
            Option(name="list", type=bool, default=False, help="List the experiments."),
        ]
        parse_options(parser_of("lindm run", f"{DESCRIPTION}\n\n{list_experiments()}", options), options, words)
    return run_experiment(words[0], words[1:])


def list_experiments() -> str:
    """A table of the experiments of the package: name, minutes of the quick preset, question."""
    from lindm_experiments.harness.experiments import experiment_names, find_experiment

    rows = {f"{'experiment':<20}minutes": "question"}
    for experiment in map(find_experiment, experiment_names()):
        rows[f"{experiment.name:<20}{experiment.minutes:>7.1f}"] = " ".join(experiment.docstring.split("\n\n")[0].split())
    return "\n".join([*two_columns(rows), "", "`lindm run EXPERIMENT --help` describes an experiment and its options."])


def run_experiment(reference: str, words: Sequence[str]) -> int:
    """Parse the options of an experiment, which are the fields of its `Config`, and run it."""
    from lindm_experiments.harness.experiments import find_experiment

    experiment = find_experiment(reference)
    preset = "quick"
    for i, word in enumerate(words):  # the preset gives the defaults of all other options, so it is read first
        if word == "--preset" and i + 1 < len(words):
            preset = words[i + 1]
        elif word.startswith("--preset="):
            preset = word.partition("=")[2]
    own = options_of_source(experiment.source, preset)
    common = [
        Option(name="preset", type=PRESETS, default=preset, help="Defaults of the options below."),
        Option(name="out", type=Path, default=Path("results") / f"{experiment.name}-{preset}", help="Directory of the run."),
        Option(name="fresh", type=bool, default=False, help="Remove what an earlier run wrote to the same directory."),
    ]
    sections = {own[0].name: "Configuration"} if own else {}
    parser = parser_of(f"lindm run {reference}", experiment.docstring, [*common, *own], sections=sections)
    given = parse_options(parser, [*common, *own], words)
    out, fresh = given.pop("out", common[1].default), given.pop("fresh", False)
    given.pop("preset", None)

    from lindm.cli.verify import report_result
    from lindm_experiments.harness.verify import run_experiment

    return report_result(run_experiment(reference, preset, out, fresh=fresh, **given))
