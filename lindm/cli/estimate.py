"""`lindm estimate`: a model from logged episodes."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lindm.cli.option_parser import Command, Positional
from lindm.errors import UsageError
from lindm.io.files import strict_json
from lindm.io.progress import progress_bar

PARTS = ("states", "actions", "observations")
SHOWN_NAMES = 20


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimate a model from logged episodes: by counting if the state is recorded, by EM if it is hidden."""

    episodes: Annotated[Path, Positional("EPISODES")]
    """A .csv or .jsonl file with a row for each step. The columns are episode, step and action, and optionally state (before
    the action), observation (after the action) and reward. The last row of an episode may have only a state."""
    out: Path
    """File of the model (.pomdp)."""
    states: str | None = None
    """Names of all states, such as good,worn,broken; any other name in the file is an error. If the file has no column state:
    the number of hidden states."""
    actions: str | None = None
    """Names of all actions, with commas between them."""
    observations: str | None = None
    """Names of all observations, with commas between them."""
    models: int = 1
    """Number of models to draw from the posterior, for an ambiguous problem. They are written to OUT-1.pomdp, OUT-2.pomdp, ...
    With 1, the model is the posterior mean."""
    like: Path | None = None
    """A .pomdp file from which the model takes the names of states, actions and observations, their order, and the illegal
    actions. [default: the names in the episodes, in alphabetical order]"""
    discount: float | None = None
    """Discount factor of the model; a log does not contain it. [default: that of --like, or 0.95]"""
    prior: float = 1.0
    """Weight of the uniform prior of each row of the model, as a number of observations."""
    restarts: int = 10
    """Number of runs of EM, from random parameters."""
    seed: int = 0
    """Seed of draws and restarts."""
    json: bool = False
    """Print one JSON object."""


def run(options: Estimate) -> int:
    if options.out.suffix != ".pomdp":
        raise UsageError(f"--out must end in .pomdp; got {options.out}")
    from lindm.api.estimation import estimate
    from lindm.cli.problems import warnings_as_lines
    from lindm.problems import cassandra

    states = int(options.states) if options.states is not None and options.states.isdecimal() else None
    declared = {
        part: name_list(part, given) for part in PARTS if (given := getattr(options, part)) and not (part == "states" and states)
    }
    names, legal, discount = declared, None, 0.95
    if options.like is not None:
        if declared:
            raise UsageError(f"--{next(iter(declared))} must be left out with --like, whose file has the names")
        with warnings_as_lines():
            like = cassandra.read(options.like)
        names, discount = {part: given for part in PARTS if (given := getattr(like, part))}, like.discount
        if states is not None:
            names.pop("states", None)  # the hidden states have no names
        legal = like.legal if "states" in names else None
    with progress_bar("restarts") as progress:
        found = estimate(
            options.episodes,
            states=states,
            discount=discount if options.discount is None else options.discount,
            models=options.models,
            prior=options.prior,
            restarts=options.restarts,
            seed=options.seed,
            names=names,
            legal=legal,
            progress=progress,
        )
    paths = found.save(options.out)
    model = found.models[0]
    sizes = {part: len(getattr(model, part)) for part in ("states", "actions", "observations")}
    if options.json:
        answer = {"files": list(map(str, paths)), **sizes, "visits": found.visits.tolist(), "warnings": found.warnings}
        answer |= {"counts": found.counts}
        answer |= {"log_likelihood": found.log_likelihood, "bic": found.bic, "objectives": found.objectives}
        print(strict_json(answer))
        return 0
    for warning in found.warnings:
        print(f"lindm: warning: {warning}", file=sys.stderr)
    print(f"episodes        {found.source.partition(', SHA-256')[0]}")
    for part, counts in found.counts.items():
        if part not in names:  # declared names cannot be misspelled
            print(f"{part:<16}{listed(counts)}")
    print(f"model           {', '.join(f'{size} {part}' for part, size in sizes.items() if size)}")
    if found.log_likelihood is not None:
        print(f"log-likelihood  {found.log_likelihood:.6g}, the best of {len(found.objectives)} restarts; BIC {found.bic:.6g}")
    print(f"files           {paths[0]}" + (f" to {paths[-1].name}, draws of the posterior" if len(paths) > 1 else ""))
    return 0


def name_list(part: str, given: str) -> tuple[str, ...]:
    """The names in an option. UsageError where one is empty or given twice."""
    names = tuple(word.strip() for word in given.split(","))
    if not all(names) or len(set(names)) < len(names):
        number = ", or the number of hidden states" if part == "states" else ""
        raise UsageError(f"--{part} must be different names with commas between them{number}; got {given!r}")
    return names


def listed(counts: Mapping[str, int]) -> str:
    """Names and how often each occurs; of many, the first ones."""
    some = [f"{name} {n}" for name, n in list(counts.items())[:SHOWN_NAMES]]
    return ", ".join(some) + (f", ... ({len(counts)} in all; --json has them)" if len(counts) > SHOWN_NAMES else "")


COMMAND = Command(
    name="estimate",
    options=Estimate,
    run=run,
    examples=(
        "lindm estimate log.csv --out model.pomdp",
        "lindm estimate log.csv --models 20 --out cloud.pomdp",
        "lindm estimate log.csv --states good,worn,broken --actions run,inspect,replace --out model.pomdp",
        "lindm estimate log.csv --states 3 --restarts 30 --out hidden.pomdp",
    ),
)
