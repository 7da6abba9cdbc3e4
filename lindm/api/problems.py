"""Decision problems from files, arrays and names, in double precision."""

import math
import reprlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lindm import validate
from lindm.errors import UsageError
from lindm.evaluation.environments import double_precision
from lindm.evaluation.simulator import GAME, gymnasium_environment
from lindm.families import registry
from lindm.families.registry import NamedProblem
from lindm.families.suites import Suite
from lindm.problems import apomdp as apomdps
from lindm.problems import linear_mdp as linear_mdps
from lindm.problems import mdp as mdps
from lindm.problems import pomdp as pomdps
from lindm.problems import stationary, transition_table
from lindm.problems.cassandra_sections import unfit
from lindm.problems.stationary import StationaryPOMDP
from lindm.types import APOMDP, MDP, POMDP, LinearMDP, Problem, RewardFunction, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def read_pomdp(
    *paths: str | Path,
    horizon: int,
    discount: float | None = None,
    alpha: float | None = None,
    perturb: str | Path | None = None,
) -> NamedProblem:
    """Read a problem from a file in Cassandra's `.pomdp` format; several files are the models of an ambiguous POMDP.

    A file without observations is an MDP.

    Args:
      horizon: number of stages.
      discount: discount factor in [0, 1]. [default: that of the file]
      alpha: attitude to ambiguity, required for several models: 1 is the worst case over the models, 0 the best case.
      perturb: a CSV file with the rows of one problem file that other experts replace; its columns are model, table (T or O),
        action, state, probabilities. The models are that of the file and those of the experts.

    Returns:
      The problem in `.problem`, with the names of its states, actions, observations and models.

    Raises:
      ValueError: an argument is out of range or missing.
      DataError: a file is wrong; names the file and the line.

    >>> tiger = ld.read_pomdp("tiger.pomdp", horizon=4)
    >>> tiger.actions
    ('listen', 'open-left', 'open-right')
    >>> tiger.problem.horizon, tiger.problem.num_states
    (4, 2)
    """
    with double_precision():
        return registry.read_files([str(path) for path in paths], horizon, discount, alpha, perturb=perturb)


def read_stationary_pomdp(path: str | Path, *, discount: float | None = None) -> StationaryPOMDP:
    """Read a problem from a file in Cassandra's `.pomdp` format, for `solve_stationary`.

    Args:
      discount: discount factor. [default: that of the file]

    Raises:
      ValueError: the discount is out of range.
      DataError: the file is wrong; names the file and the line.

    >>> ld.read_stationary_pomdp("tiger.pomdp").actions
    ('listen', 'open-left', 'open-right')
    """
    return stationary.read(path, discount)


def stationary_mdp(P: Any, r: ArrayLike, rho: ArrayLike, *, discount: float, legal: ArrayLike | None = None) -> StationaryPOMDP:
    """Make an MDP without a horizon from arrays, for `solve_stationary`, and check the arrays.

    Args:
      P: [S, A, S] probabilities of the next state; or for each action a sparse matrix [S, S], of scipy or a JAX BCOO. Memory and
        work grow with the nonzeros.
      r: [S, A] mean rewards, not discounted.
      rho: [S] distribution of the first state.
      discount: in [0, 1]; below 1 for an infinite horizon.
      legal: [S, A] bool, which actions a state allows, at least one. [default: all]

    Raises:
      ValueError: names the argument, the rule and what was got.

    >>> stay_or_swap = [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]
    >>> problem = ld.stationary_mdp(stay_or_swap, [[0, 0], [1, 1]], [1, 0], discount=0.5)
    >>> round(ld.solve(problem).lower, 9)
    1.0
    """
    return stationary.stationary_mdp(P, r, rho, discount, legal)


def from_gymnasium(
    environment: Any, *, horizon: float | None = None, discount: float = 1.0, start: ArrayLike | None = None, **options: Any
) -> NamedProblem | StationaryPOMDP:
    """Make the MDP of a Gymnasium environment that has a table of its transitions: FrozenLake, Taxi, CliffWalking.

    An episode that ends stays in a state that pays nothing.

    Args:
      environment: an id (needs gymnasium: `pip install -e '.[gym]'`), an environment, or a table P[s][a] of
        (probability, next state, reward, terminated).
      horizon: number of stages, or inf (with a discount below 1). [default: the time limit of the environment]
      discount: in [0, 1].
      start: number or distribution [S] of the first state. [default: that of the environment]
      options: options of the environment with that id, such as `map_name="8x8"`.

    Returns:
      An MDP; with an infinite horizon, one for `solve_stationary`.

    Raises:
      ValueError: there is no table, horizon or start, or one that is wrong.
      UsageError: gymnasium is not installed.

    >>> corridor = {0: {0: [(0.5, 0, 0.0, False), (0.5, 1, 1.0, True)]}, 1: {0: [(1.0, 1, 0.0, True)]}}
    >>> ld.solve(ld.from_gymnasium(corridor, horizon=2, start=0)).value
    0.75
    """
    if isinstance(environment, str):
        try:
            import gymnasium
        except ImportError as e:
            raise UsageError(f"environments by id need gymnasium: pip install -e '.[gym]' ({e})") from e
        try:
            environment = gymnasium.make(environment, **options)
        except gymnasium.error.Error as e:
            raise ValueError(f"environment must be an id of Gymnasium; {e}") from e
    elif options:
        raise ValueError(f"options must be left out where the environment is no id; got {', '.join(options)}")
    table, law, limit = transition_table.find_table(environment)
    start, horizon = law if start is None else start, limit if horizon is None else horizon
    if start is None or horizon is None:
        raise ValueError(f"{'start' if start is None else 'horizon'} must be given: the environment has none")
    problem = transition_table.read_table(table, start, discount)
    if horizon == math.inf:
        return problem
    return NamedProblem(problem=_with_horizon(problem, validate.count(horizon, "horizon")))


def _with_horizon(problem: StationaryPOMDP, horizon: int) -> MDP:
    """The first stages of an MDP without a horizon."""
    P = np.stack([kernel.toarray() for kernel in problem.P], axis=1)
    with double_precision():
        made = mdps.mdp(P[None], mdps.over_stages(jnp.asarray(problem.r), horizon, problem.discount), problem.rho, problem.legal)
        if problem.rewards is None and problem.discount == 1:
            return made
        return replace(made, paid=RewardFunction(R=jnp.asarray(problem.reward_table()), discount=jnp.asarray(problem.discount)))


def mdp(P: ArrayLike, r: ArrayLike, rho: ArrayLike, *, legal: ArrayLike | None = None) -> MDP:
    """Make an MDP from arrays, and check the arrays.

    Args:
      P: [H|1, S, A, S] probabilities of the next state.
      r: [H, S, A] mean rewards.
      rho: [S] distribution of the first state.
      legal: [S, A] bool, which actions a state allows, at least one. [default: all]

    Raises:
      ValueError: names the argument, the rule and what was got.

    >>> stay_or_swap = [[[[1, 0], [0, 1]], [[0, 1], [1, 0]]]]
    >>> ld.solve(ld.mdp(stay_or_swap, [[[0, 0], [1, 1]]] * 3, [1, 0])).value
    2.0
    """
    with double_precision():
        return mdps.mdp(P, r, rho, legal)


def pomdp(
    P: ArrayLike,
    O: ArrayLike,
    r: ArrayLike,
    rho: ArrayLike,
    *,
    horizon: int | None = None,
    discount: float = 1.0,
    legal: ArrayLike | None = None,
) -> POMDP:
    """Make a POMDP from arrays, and check the arrays.

    Args:
      P: [S, A, S] or [H|1, S, A, S] probabilities of the next state.
      O: [A, S, O] or [H|1, A, S, O] probabilities of the observation, by the action and the next state.
      r: [S, A] (then `horizon` is required) or [H, S, A] mean rewards, not discounted.
      rho: [S] distribution of the first state.
      discount: in [0, 1].
      legal: [S, A] bool, which actions a state allows, at least one. At a belief an action is legal if every state of positive
        probability allows it. [default: all]

    Raises:
      ValueError: names the argument, the rule and what was got.

    >>> P = [[[1, 0]], [[0, 1]]]
    >>> ld.pomdp(P, [[[0.9, 0.1], [0.1, 0.9]]], [[0], [1]], [0.5, 0.5], horizon=2).num_observations
    2
    """
    with double_precision():
        return pomdps.pomdp(P, O, r, rho, horizon=horizon, discount=discount, legal=legal)


def apomdp(models: "Sequence[POMDP | NamedProblem]", alpha: float) -> APOMDP:
    """Make an ambiguous POMDP from models of the same sizes.

    Args:
      models: POMDPs, such as those of `pomdp`, `read_pomdp` and `make`. The result has no names: `with_names` gives it some.
      alpha: attitude to ambiguity: 1 is the worst case over the models, 0 the best case.

    Raises:
      ValueError: names the model, the argument, the rule and what was got.

    >>> models = [ld.pomdp([[[1]]], [[[1]]], [[reward]], [1], horizon=2) for reward in (1.0, 3.0)]
    >>> ld.solve(ld.apomdp(models, alpha=0.25)).value
    5.0
    """
    plain = [model.problem if isinstance(model, NamedProblem) else model for model in models]
    if wrong := [model for model in plain if not isinstance(model, POMDP)]:
        raise ValueError(f"models must be POMDPs; got {type(wrong[0]).__name__}")
    with double_precision():
        return apomdps.apomdp([model for model in plain if isinstance(model, POMDP)], alpha)


def linear_mdp(phi: ArrayLike, mu: ArrayLike, theta: ArrayLike, rho: ArrayLike | None = None) -> LinearMDP:
    """Make a linear MDP from its features, and check that its kernel is a probability kernel.

    Args:
      phi: [S, A, d] features.
      mu: [H, d, S] measures over next states.
      theta: [H, d] reward weights.
      rho: [S] distribution of the first state. [default: uniform]

    Raises:
      ValueError: a shape is wrong, a value is not finite, or <phi(s, a), mu_h> is not a distribution.

    >>> problem = ld.linear_mdp([[[1.0, 0.0]], [[0.0, 1.0]]], [[[0, 1], [1, 0]]] * 2, [[0.0, 1.0]] * 2)
    >>> ld.solve(problem).value
    1.0
    """
    with double_precision():
        return linear_mdps.linear_mdp(phi, mu, theta, rho)


def with_names(
    problem: NamedProblem | Problem | LinearMDP,
    *,
    states: "Sequence[str]" = (),
    actions: "Sequence[str]" = (),
    observations: "Sequence[str]" = (),
    models: "Sequence[str]" = (),
) -> NamedProblem:
    """Name the parts of a problem, for its first action, its policy, its files and its texts.

    Args:
      states, actions, observations, models: a name for each, in the order of the indices. [default: the names that it has]

    Raises:
      ValueError: a part has another number of names, a name twice, or a name that a `.pomdp` file cannot hold (a number, or one
        with a space, a colon or a #).

    >>> stay_or_swap = [[[[1, 0], [0, 1]], [[0, 1], [1, 0]]]]
    >>> problem = ld.mdp(stay_or_swap, [[[0, 0], [1, 1]]] * 3, [1, 0])
    >>> ld.solve(ld.with_names(problem, actions=["stay", "swap"])).first_actions
    {0: 'swap'}
    """
    source = as_source(problem)
    sizes = {part: getattr(source.problem, f"num_{part}", 0) for part in ("states", "actions", "observations", "models")}
    parts = {"states": states, "actions": actions, "observations": observations, "models": models}
    given = {part: _to_names(part, names) for part, names in parts.items()}
    for part, names in given.items():
        shown = reprlib.repr(list(names))  # of a long list, the first names
        if names and not sizes[part]:
            raise ValueError(f"{part} must be left out for a {type(source.problem).__name__}, which has none; got {shown}")
        if len(names) not in (0, sizes[part]):
            raise ValueError(f"{part} must have {sizes[part]} names, one for each; got {len(names)}: {shown}")
        for i, name in enumerate(names):
            if why := unfit(name) or ("it is given twice" if name in names[:i] else ""):
                raise ValueError(f"{part} must have different names that a file can hold; got {name!r}: {why}")
    return replace(source, **{part: names for part, names in given.items() if names})


def _to_names(part: str, given: "Iterable[str]") -> tuple[str, ...]:
    """The names of a part; ValueError where they are no list of strings."""
    try:
        names = None if isinstance(given, str) else tuple(given)
    except TypeError:  # it cannot be iterated over
        names = None
    if names is None or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{part} must be a list of names; got {given!r}")
    return tuple(map(str, names))  # the strings of an array are of a type of NumPy


def suite(name: str, *, horizon: int | None = None, split: Literal["id", "ood"] = "id", **options: Any) -> Suite:
    """A family of random problems with its sizes and options set, for `make_dataset` and `evaluate`.

    Args:
      name: a family with random parameters, such as mdp, pomdp, apomdp or maintenance; `lindm families` lists them.
      horizon: number of stages. [default: that of the family]
      split: distribution of the parameters: id (in distribution) or ood (out of distribution).
      options: other options of the family, such as states and actions.

    Raises:
      ValueError: an unknown name or option, or a value out of its range.

    >>> ld.suite("pomdp", horizon=4, split="ood").quality
    0.8
    """
    made = registry.build(name, split=split, **{} if horizon is None else {"horizon": horizon}, **options)
    assert isinstance(made, Suite)  # one problem has no split
    return made


def make(name: str, *, seed: int = 0, **options: Any) -> NamedProblem | StationaryPOMDP:
    """Make a problem by name, with parameters that are drawn from the seed.

    Args:
      name: a family; `lindm families` lists them with their options.
      seed: seed of the parameters.
      options: options of the family, such as states and horizon; horizon=math.inf, with a discount below 1, makes a problem
        without a horizon.

    Raises:
      ValueError: an unknown name or option, a value out of its range, or a family that has only a finite horizon.

    >>> ld.make("pomdp", horizon=4, seed=3).problem.num_states
    4
    >>> ld.make("prostate", horizon=3).actions[:2]
    ('defer', 'biopsy')
    """
    with double_precision():
        return registry.make(name, seed=seed, **options)


def as_source(problem: NamedProblem | Problem | LinearMDP) -> NamedProblem:
    """A problem with names, in double precision. ValueError for anything else than a problem."""
    if not isinstance(problem, NamedProblem | MDP | POMDP | APOMDP | LinearMDP):
        made = "`read_pomdp` reads files, `make` and `suite` make problems by name"
        raise ValueError(f"problem must be an MDP, a POMDP, an APOMDP or a LinearMDP ({made}); got {problem!r}")
    with double_precision():
        problem = linear_mdps.tabulate(problem) if isinstance(problem, LinearMDP) else problem
        source = problem if isinstance(problem, NamedProblem) else NamedProblem(problem=problem)
        return replace(source, problem=cast(source.problem, jnp.float64))


def to_gymnasium(problem: NamedProblem | Problem | LinearMDP | StationaryPOMDP, *, nature: int | str | None = None) -> Any:
    """Make a Gymnasium environment of a problem. Its rewards are those that the problem pays, not discounted.

    Args:
      nature: required for an ambiguous POMDP: the model that makes every step, by number or name; or "game": at every step
        nature chooses the worst model with probability alpha and the best one otherwise, as in the problem's value.

    Returns:
      A `gymnasium.Env` with `discount`: discounted by it, the mean return of a policy is its value. Observations, rewards, ends
      and `info` are described in `lindm.evaluation.simulator`. `horizon` (or None), `nature` and `names` are those of the
      problem; an MDP that is the same at every stage has `P` and `initial_state_distrib` as Gymnasium's toy-text environments
      have them: for each state and action a list of (probability, next state, reward, whether the next state has ended).

    Raises:
      ValueError: `nature` is missing, unknown, or given for a problem that is not ambiguous.
      UsageError: gymnasium is missing.

    >>> env = ld.to_gymnasium(ld.read_pomdp("tiger.pomdp", horizon=4))
    >>> observation, info = env.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = env.step(0)
    >>> reward, terminated, info["stage"]
    (-1.0, False, 1)
    """
    if isinstance(problem, StationaryPOMDP):
        parts = {part: getattr(problem, part) for part in ("states", "actions", "observations")}
        one, names = problem, {part: given for part, given in parts.items() if given}
    else:
        source = as_source(problem)
        one, names = source.problem, source.names
    if not isinstance(one, APOMDP):
        if nature is not None:
            raise ValueError(f"nature must be left out for a problem with one model; got {nature!r}")
        return gymnasium_environment(one, None, names)
    models = names.get("models", ())
    if isinstance(nature, str) and nature in models:
        nature = models.index(nature)
    if nature != GAME and not (isinstance(nature, int) and not isinstance(nature, bool) and 0 <= nature < one.num_models):
        known = ", ".join(models) or f"0 to {one.num_models - 1}"
        raise ValueError(f"nature must be {GAME!r} or a model of this ambiguous problem ({known}); got {nature!r}")
    return gymnasium_environment(one, nature, names)
