"""Models from logged episodes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lindm.datasets import read_episodes
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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Estimation:
    """A model of the process that made a file of episodes: by counting where the state is seen, by EM where it is hidden.

    Args:
      path: .csv or .jsonl with the columns episode, step and action, and state, observation, reward as far as there are any.
      states: number of hidden states, for a file without the column state.
      discount: of the model, which no log tells.
      models: 1 for the posterior mean, or a number of draws of the posterior: the models of an ambiguous problem.
      prior: weight of the Dirichlet law of each row of the model, in observations.
      restarts: of EM, from random parameters.
      seed: of draws and restarts.
      names: of states, actions and observations, in their order, as far as they are known; another name in the file is an error.
        [default: those of the file, in alphabetical order]
      progress: called with (restarts done, restarts in all).

    Returns:
      The models, with `.problem(horizon)`, `.save(path)`, `.counts` of the names in the log, and `.warnings`: what the log does
      not identify, and names that may be misspelled.

    Raises:
      ValueError: an argument is out of its range or does not fit the file.
      DataError: the file is wrong; the message has file and line.

    >>> found = ld.estimate("log.csv", prior=1.0)
    >>> found.models[0].actions, found.warnings
    (('run', 'stop'), ())
    """
    log = read_episodes(path, names)
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
                progress=progress,
            )
    except DataError as e:
        raise DataError(f"{path}: {e}") from e
    counts = name_counts(log)
    misspelled = similar_names({part: found for part, found in counts.items() if part not in (names or {})})
    found = replace(found, counts=counts, warnings=(*misspelled, *found.warnings))
    about = f"{len(log)} episodes, {int(found.visits.sum().round())} steps"
    return replace(found, source=f"{path}: {about}, SHA-256 {files.sha256(Path(path))}")
