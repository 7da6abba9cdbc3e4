"""A model from logged episodes: by counting where the state is seen, by EM where it is hidden.

Where the state is seen, each row of the kernels has a Dirichlet law with `prior` / K in each of its K entries. After counts n the
posterior mean is (n + prior / K) / (sum n + prior), and draws of the posterior are the models of an ambiguous problem. Where the
state is hidden, `lindm.estimation.hidden_states` finds the parameters that are likeliest.

The mean reward r(s, a) is the average of the logged rewards at the state and action, where the state is seen; of a pair that was
never tried it is the mean reward of the log. Where the state is hidden, it is the ridge regression of the logged rewards on the
law of the state, with `prior` further observations of the mean reward at each state and action.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lindm import validate
from lindm.datasets.episodes import LoggedEpisodes
from lindm.errors import DataError
from lindm.estimation.hidden_states import Fit, Log, initial_parameters, maximize, smooth
from lindm.estimation.model_file import write_models
from lindm.families.registry import NamedProblem, problem_of_models
from lindm.problems.cassandra import Model

MAX_MODELS = 1000
MAX_NAMED = 5  # states or pairs that a warning names
TINY = 1e-9  # weight of the mean reward of the log where the state is seen: it decides for pairs that were never tried alone
SAME = 0.1  # restarts whose objectives differ by less ended at the same maximum


class Steps(NamedTuple):
    """All steps of a log, one after the other; -1 where a step has no such value."""

    episode: np.ndarray  # [n] number of the episode
    time: np.ndarray  # [n] number within the episode
    action: np.ndarray  # [n]
    state: np.ndarray  # [n] before the action
    following: np.ndarray  # [n] the state after it
    observation: np.ndarray  # [n]
    reward: np.ndarray  # [n] nan where there are none


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimation:
    """Estimated models and what is known about them."""

    models: tuple[Model, ...]  # the estimate, or draws of the posterior
    visits: np.ndarray  # [S, A] how often each action was taken in each state, in expectation where the state is hidden
    warnings: tuple[str, ...]  # what the log does not identify, and names that may be misspelled
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # states, ... -> name -> how often it occurs in the log
    log_likelihood: float | None = None  # of the estimate, where the state is hidden
    bic: float | None = None  # Bayesian information criterion, lower is better: compares numbers of hidden states
    objectives: tuple[float, ...] = ()  # of EM in each restart, the best one first
    source: str = ""  # the log: file, episodes and steps

    def problem(self, horizon: int, alpha: float | None = None) -> NamedProblem:
        """The estimated problem over a finite horizon; several models are those of an ambiguous one.

        Raises:
          ValueError: alpha is missing for several models, or given for one; a number is out of its range.
        """
        if (alpha is None) == (len(self.models) > 1):
            raise ValueError(f"alpha must be given for several models, and left out for one; got {alpha}")
        names = [f"model-{i + 1}" for i in range(len(self.models))]
        with jax.enable_x64(True):
            return problem_of_models(self.models, names, horizon, None, alpha, names)

    def save(self, path: str | Path) -> list[Path]:
        """Write the model to PATH.pomdp, or several to PATH-1.pomdp, PATH-2.pomdp, ...; the paths.

        Raises:
          ValueError: the path does not end in .pomdp. DataError: a name of the log cannot be a name in such a file.
          StorageError: a file cannot be written.
        """
        return write_models(self.models, Path(path), [self.source, *(f"warning: {text}" for text in self.warnings)])


def steps_of(log: LoggedEpisodes) -> Steps:
    """The steps with an action, as arrays."""
    rows = []
    for number, episode in enumerate(log.episodes):
        for t, step in enumerate(episode):
            if step.action is None:
                continue
            after = episode[t + 1].state if t + 1 < len(episode) else None
            values = (-1 if x is None else x for x in (step.state, after, step.observation))
            rows.append((number, t, step.action, *values, np.nan if step.reward is None else step.reward))
    return Steps(*(column.astype(float if i == 6 else int) for i, column in enumerate(np.array(rows, float).T)))


def estimate(
    log: LoggedEpisodes,
    *,
    states: int | None = None,
    discount: float = 0.95,
    models: int = 1,
    prior: float = 1.0,
    restarts: int = 10,
    seed: int = 0,
    legal: np.ndarray | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Estimation:
    """A model of the process that made the log.

    Args:
      log: with a state at each step, or with observations and without states.
      states: number of hidden states; None where the log has states.
      discount: of the model, which no log tells.
      models: 1 for the posterior mean, or a number of draws of the posterior (only where the state is seen).
      prior: weight of the Dirichlet law of a row, in observations.
      restarts: of EM, from random parameters.
      seed: of the draws and of the restarts.
      legal: [S, A] bool, the actions that states allow, where the state is seen; no other is in the log.
      progress: called with (restarts done, restarts in all).

    Raises:
      ValueError: an argument is out of its range or does not fit the log. DataError: the log has a column too many or too few.
    """
    validate.count(models, "models")
    validate.count(restarts, "restarts")
    if models > MAX_MODELS:
        raise ValueError(f"models must be at most {MAX_MODELS}; got {models}")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must be a number from 0 to 1; got {discount}")
    if not (np.isfinite(prior) and prior > 0):
        raise ValueError(f"prior must be above 0; got {prior}")
    if "model" in log.fields:
        raise DataError("a log from which a model is estimated must not have the column model")
    rng = np.random.default_rng(validate.count(seed, "seed", 0))
    steps = steps_of(log)
    if "state" in log.fields:
        if states is not None:
            raise ValueError(f"states must be left out where the log has the column state; got {states}")
        return _seen(log, steps, discount, models, prior, rng, legal)
    if states is None:
        raise ValueError("states must be given for a log without the column state: the number of hidden states")
    validate.count(states, "states")
    if "observation" not in log.fields:
        raise DataError("a log without the column state must have the column observation")
    if models > 1:
        raise ValueError(f"models must be 1 where the state is hidden: there is no sampler of that posterior; got {models}")
    return _hidden(log, steps, states, discount, prior, restarts, rng, progress)


# --- the state is seen -------------------------------------------------------------------------------------------------------


def _seen(
    log: LoggedEpisodes,
    steps: Steps,
    discount: float,
    models: int,
    prior: float,
    rng: np.random.Generator,
    legal: np.ndarray | None,
) -> Estimation:
    names = {part: tuple(log.names.get(part, ())) for part in ("states", "actions", "observations")}
    S, A, O = map(len, names.values())
    first, transitions, emitted = counts = np.zeros(S), np.zeros((S, A, S)), np.zeros((A, S, O))
    known = steps.following >= 0
    np.add.at(first, steps.state[steps.time == 0], 1)
    np.add.at(transitions, (steps.state[known], steps.action[known], steps.following[known]), 1)
    if O:
        np.add.at(emitted, (steps.action[known], steps.following[known], steps.observation[known]), 1)
    visits = np.zeros((S, A))
    np.add.at(visits, (steps.state, steps.action), 1)
    r = mean_rewards(steps, np.eye(S)[steps.state], A, TINY)
    laws = [_posterior(count, prior, rng, models > 1) for _ in range(models) for count in counts]
    made = []
    if legal is not None:  # as in a file: an action that is not legal keeps the state and pays nothing
        r = np.where(legal, r, 0.0)
        laws[1::3] = [np.where(legal[..., None], P, np.eye(S)[:, None]) for P in laws[1::3]]
    for rho, P, emissions in zip(laws[::3], laws[1::3], laws[2::3], strict=True):
        fields = {**names, "O": emissions}
        if models > 1 and not O:  # the models of an ambiguous problem are POMDPs
            fields |= {"observations": names["states"], "O": np.broadcast_to(np.eye(S), (A, S, S)).copy()}
        made.append(Model(**fields, discount=discount, P=P, r=r, start=rho, legal=legal))
    tried = visits if legal is None else np.where(legal, visits, 1)  # nobody could try what is not legal
    warnings = _unvisited(tried, visits.sum(1) + np.bincount(steps.following[known], minlength=S), names)
    if np.isnan(steps.reward).any():
        warnings.append("the log has no column reward: every reward of the model is 0")
    if models > 1 and not O:
        warnings.append("the log has no column observation: in the models the observation after an action is the next state")
    return Estimation(models=tuple(made), visits=visits, warnings=tuple(warnings))


def _posterior(counts: np.ndarray, prior: float, rng: np.random.Generator, draw: bool) -> np.ndarray:
    """The posterior mean of the rows of counts [..., K], or a draw."""
    if not counts.size:
        return counts
    weights = counts + prior / counts.shape[-1]
    if draw:
        rows = [rng.dirichlet(row) for row in weights.reshape(-1, weights.shape[-1])]
        weights = np.array(rows).reshape(weights.shape)
    return weights / weights.sum(-1, keepdims=True)


def mean_rewards(steps: Steps, states: np.ndarray, actions: int, prior: float) -> np.ndarray:
    """r [S, A], from the law of the state [n, S] at each step; 0 without rewards."""
    S = states.shape[1]
    r = np.zeros((S, actions))
    if np.isnan(steps.reward).any():
        return r
    mean = steps.reward.mean()
    for a in range(actions):
        rows = steps.action == a
        X = states[rows]
        r[:, a] = mean + np.linalg.solve(X.T @ X + prior * np.eye(S), X.T @ (steps.reward[rows] - mean))
    return r


def _unvisited(visits: np.ndarray, seen: np.ndarray, names: dict[str, tuple[str, ...]]) -> list[str]:
    """Warnings about states that never occurred, actions that were never tried, and pairs of both."""
    states, actions = names["states"], names["actions"]
    warnings = []
    if missing := [states[s] for s in np.flatnonzero(seen < 1)]:
        warnings.append(f"never visited: {_some('state', missing)}; all their rows are the prior's")
    tried = visits.sum(0) > 0
    if not tried.all():
        missing = [actions[a] for a in np.flatnonzero(~tried)]
        warnings.append(f"never tried: {_some('action', missing)}; all their rows are the prior's")
    pairs = [(s, a) for s, a in np.argwhere(visits < 1) if seen[s] >= 1 and tried[a]]
    if pairs:
        of = int((seen >= 1).sum() * tried.sum())
        named = [f"{actions[a]} in {states[s]}" for s, a in pairs]
        guess = "their rows are the prior's, their rewards are guesses from the mean of the log"
        warnings.append(f"tried less than once: {len(pairs)} of {of} pairs of action and state ({_some('', named)}); {guess}")
    return warnings


def _some(word: str, names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{word} {', '.join(names[:MAX_NAMED])}{more}".strip()


# --- the state is hidden -----------------------------------------------------------------------------------------------------


def padded(steps: Steps, episodes: int) -> tuple[Log, tuple[np.ndarray, np.ndarray]]:
    """The log with a column for each episode, and where each step is in it."""
    where = (steps.time, steps.episode)
    shape = (int(steps.time.max()) + 1, episodes)
    columns: list[Any] = []
    for values in (steps.action, steps.observation, np.ones(len(steps.action), bool)):
        column = np.zeros(shape, values.dtype if values.dtype == bool else np.int32)
        column[where] = values
        columns.append(jnp.asarray(column))
    return Log(*columns), where


def _hidden(
    log: LoggedEpisodes,
    steps: Steps,
    states: int,
    discount: float,
    prior: float,
    restarts: int,
    rng: np.random.Generator,
    progress: Callable[[int, int], None],
) -> Estimation:
    actions, observations = tuple(log.names["actions"]), tuple(log.names["observations"])
    names = {"states": tuple(map(str, range(states))), "actions": actions, "observations": observations}
    A, O = len(actions), len(observations)
    data, where = padded(steps, len(log))
    seen = np.zeros((A, O))
    np.add.at(seen, (steps.action, steps.observation), 1)
    fits: list[Fit] = []
    for number in range(restarts):
        fits.append(maximize(initial_parameters(rng, states, seen), data, jnp.asarray(prior)))
        progress(number + 1, restarts)
    fits.sort(key=lambda fit: -float(fit.objective))
    parameters = fits[0].parameters
    likelihood, counts, laws = smooth(parameters, data)
    # the states have no order of their own: the most visited one is the first
    order = np.argsort(-np.asarray(laws).sum((0, 1)), kind="stable")
    rho, P, emissions = np.asarray(parameters.rho)[order], np.asarray(parameters.P)[order][:, :, order], np.asarray(parameters.O)
    occupied = np.asarray(laws)[where][:, order]
    visits = np.stack([occupied[steps.action == a].sum(0) for a in range(A)], 1)
    r = mean_rewards(steps, occupied, A, prior)
    reached = np.asarray(counts.O).sum(-1)[:, order]  # [A, S]
    model = Model(
        states=names["states"],
        actions=actions,
        observations=observations,
        discount=discount,
        P=P,
        O=emissions[:, order],
        r=r,
        start=rho,
    )
    warnings = [
        "the states are hidden: their order is arbitrary, and their numbers say nothing of what they are",
        *_ranks(model.O, reached, names["actions"]),
        *_unvisited(visits, visits.sum(1) + reached.sum(0), names),
        *_restarts([float(fit.objective) for fit in fits]),
    ]
    if np.isnan(steps.reward).any():
        warnings.append("the log has no column reward: every reward of the model is 0")
    tried = int((seen.sum(1) > 0).sum())
    free = states - 1 + tried * states * (states - 1 + O - 1)
    likelihood = float(likelihood)
    return Estimation(
        models=(model,),
        visits=visits,
        warnings=tuple(warnings),
        log_likelihood=likelihood,
        bic=float(free * np.log(len(steps.action)) - 2 * likelihood),
        objectives=tuple(float(fit.objective) for fit in fits),
    )


def _ranks(O: np.ndarray, reached: np.ndarray, actions: Sequence[str]) -> list[str]:
    """Warnings where an action's observations do not tell the states apart.

    A singular value of O[a] counts if it is above the size of the estimation error, whose Frobenius norm is about
    sqrt(sum_s 1 / n_s) for rows that are estimated from n_s observations. With full rank (and kernels of full rank) the
    parameters are identified up to the order of the states (Hsu, Kakade, Zhang, 2012); below it they may not be.
    """
    S, warnings = O.shape[1], []
    for a, name in enumerate(actions):
        noise = np.sqrt((1 / np.maximum(reached[a], 1)).sum())
        rank = int((np.linalg.svd(O[a], compute_uv=False) > min(noise, 1.0)).sum())
        if rank < S and reached[a].sum() >= 1:
            reason = f"there are {O.shape[2]} observations" if O.shape[2] < S else "up to the error of estimation"
            warnings.append(
                f"the observation matrix of {name} has rank {rank} for {S} states ({reason}): it may not be identified"
            )
    return warnings


def _restarts(objectives: Sequence[float]) -> list[str]:
    """A warning where the best restart stands alone."""
    best, *others = objectives
    if others and best - others[0] <= SAME:
        return []
    found = (
        f"only one of {len(objectives)} restarts reached the best objective, {best:.6g}" if others else "there was one restart"
    )
    return [f"{found}: EM finds local maxima; use more restarts"]
