"""Models from logged episodes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from lindm import validate
from lindm.datasets import read_episodes
from lindm.datasets.episodes import LoggedEpisodes
from lindm.errors import DataError
from lindm.estimation import estimate as counting
from lindm.estimation.estimate import Estimation
from lindm.estimation.log_names import name_counts, similar_names
from lindm.evaluation.environments import double_precision
from lindm.io import files


def estimate(
    path: str | Path,
    *,
    states: int | None = None,
    discount: float = 0.95,
    models: int = 1,
    prior: float = 1.0,
    restarts: int = 10,
    seed: int = 0,
    names: Mapping[str, Sequence[str]] | None = None,
    legal: ArrayLike | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Estimation:
    """Estimate a model from a file of episodes: by counting if the state is recorded, by EM if it is hidden.

    Args:
      path: a .csv or .jsonl file with the columns episode, step and action, and optionally state, observation and reward.
      states: number of hidden states, for a file without the column state.
      discount: discount factor of the model; a log does not contain it.
      models: 1 for the posterior mean, or a number of draws from the posterior, which are the models of an ambiguous problem.
      prior: weight of the Dirichlet law of each row of the model, in observations.
      restarts: number of runs of EM, from random parameters.
      seed: seed of draws and restarts.
      names: names of states, actions and observations in their order, where known; any other name in the file is an error.
        [default: those of the file, in alphabetical order]
      legal: [S, A] bool, the actions that are legal in the states of `names`, if the state is recorded. [default: all]
      progress: called with (restarts done, restarts in all).

    Returns:
      The models, with `.problem(horizon)`, `.save(path)`, `.counts` of the names in the log, and `.warnings`: what the log does
      not identify, and names that may be misspelled.

    Raises:
      ValueError: an argument is out of its range or does not fit the file.
      DataError: the file is wrong, or has an action that is not legal; the message has file and line.

    >>> found = ld.estimate("log.csv", prior=1.0)
    >>> found.models[0].actions, found.warnings
    (('run', 'stop'), ())
    """
    log = read_episodes(path, names)
    if legal is not None:
        if "state" not in log.fields or not {"states", "actions"} <= (names or {}).keys():
            raise ValueError(
                "legal must be left out for hidden states; otherwise the names of states and actions must be given, too"
            )
        legal = np.asarray(validate.legal(np.asarray(legal), len(log.names["states"]), len(log.names["actions"])))
        _check_legal(log, legal, path)
    try:
        with double_precision():
            found = counting.estimate(
                log,
                states=states,
                discount=discount,
                models=models,
                prior=prior,
                restarts=restarts,
                seed=seed,
                legal=legal,
                progress=progress,
            )
    except DataError as e:
        raise DataError(f"{path}: {e}") from e
    counts = name_counts(log)
    misspelled = similar_names({part: found for part, found in counts.items() if part not in (names or {})})
    found = replace(found, counts=counts, warnings=(*misspelled, *found.warnings))
    about = f"{len(log)} episodes, {int(found.visits.sum().round())} steps"
    return replace(found, source=f"{path}: {about}, SHA-256 {files.sha256(Path(path))}")


def _check_legal(log: LoggedEpisodes, legal: np.ndarray, path: str | Path) -> None:
    """DataError for a row whose action the state does not allow."""
    states, actions = log.names["states"], log.names["actions"]
    for steps, lines in zip(log.episodes, log.lines, strict=True):
        for step, line in zip(steps, lines, strict=True):
            if step.state is not None and step.action is not None and not legal[step.state, step.action]:
                allowed = ", ".join(actions[a] for a in np.flatnonzero(legal[step.state]))
                rule = f"the action {actions[step.action]!r} is not legal in the state {states[step.state]!r}"
                raise DataError(f"{path}:{line}: {rule}; legal: {allowed}")
