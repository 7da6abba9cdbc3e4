"""Problems by name: the families that ship with lindm, in one table, and `.pomdp` files.

To add a family, write a module with a subclass of `TabularSuite` and add it to `FAMILIES` (docs/families.md).
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax

from lindm import validate
from lindm.choices import Split
from lindm.errors import DataError, unknown
from lindm.families import prostate, random_suites, rocksample
from lindm.families.dosing import Dosing
from lindm.families.gridworld import Gridworld
from lindm.families.inventory import Inventory
from lindm.families.maintenance import Maintenance
from lindm.families.screening import Screening
from lindm.families.suites import Suite, TabularSuite
from lindm.problems import cassandra, cassandra_problems
from lindm.problems.apomdp import apomdp
from lindm.problems.experts import read_experts
from lindm.problems.stationary import StationaryPOMDP, to_pomdp
from lindm.types import Problem


@dataclass(frozen=True, kw_only=True)
class NamedProblem:
    """A problem and the names of its parts in the order of the indices; empty where the problem or the file has no such names."""

    problem: Problem
    states: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    observations: tuple[str, ...] = ()
    models: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """The names that there are, by part."""
        parts = {part: getattr(self, part) for part in ("states", "actions", "observations", "models")}
        return {part: names for part, names in parts.items() if names}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of problems."""

    name: str
    summary: str  # one line
    description: str  # what happens in the problem, and the source of its structure
    options: tuple[str, ...]  # sizes and numbers that can be chosen
    help: type[Suite] | Mapping[str, str]  # a sentence about each option: below the fields of a class, or by name
    build: Callable[..., Suite | NamedProblem | StationaryPOMDP]  # from options: a suite, or a problem that has nothing random
    endless: bool = False  # whether it is built without a horizon where none is given


def _tabular(kind: type[TabularSuite]) -> Family:
    """The family of a subclass of `TabularSuite`; its summary is the first line of the class's docstring."""
    options = tuple(field.name for field in fields(kind) if field.name != "name")
    summary, _, description = (inspect.getdoc(kind) or "").partition("\n\n")
    return Family(name=kind.name, summary=summary.rstrip("."), description=description, options=options, help=kind, build=kind)


def _random(name: str, summary: str) -> Family:
    return Family(
        name=name,
        summary=summary,
        description=(random_suites.__doc__ or "").partition("\n\n")[2],
        options=random_suites.options_of(name),
        help=random_suites.RandomSuite,
        build=partial(random_suites.suite, name),
    )


def _prostate(**options: Any) -> NamedProblem:
    return NamedProblem(
        problem=prostate.prostate(**options),
        states=prostate.STATES,
        actions=prostate.ACTIONS,
        observations=prostate.OBSERVATIONS,
        models=prostate.CENTERS,
    )


def _rocksample(horizon: int | None = None, split: Split | None = None, **options: Any) -> Suite | NamedProblem | StationaryPOMDP:
    if split is not None:
        if "layout" in options:
            raise ValueError(f"layout must be left out with split, where it is drawn for each task; got {options['layout']}")
        given: dict[str, Any] = options if horizon is None else options | {"horizon": horizon}
        return rocksample.RockSample(split=split, **given)
    problem = rocksample.rocksample(**options)
    if horizon is None:
        return problem
    names = {"states": problem.states, "actions": problem.actions, "observations": problem.observations}
    return NamedProblem(problem=to_pomdp(problem, horizon), **names)


_ALL = (
    _random("mdp", "Random MDPs"),
    _random("pomdp", "Random POMDPs"),
    _random("apomdp", "Random ambiguous POMDPs"),
    Family(
        name="prostate",
        summary="Active surveillance of prostate cancer as four medical centers see it",
        description=inspect.getdoc(prostate) or "",
        options=tuple(prostate.OPTIONS),
        help=prostate.OPTIONS,
        build=_prostate,
    ),
    _tabular(Maintenance),
    _tabular(Inventory),
    _tabular(Screening),
    _tabular(Dosing),
    _tabular(Gridworld),
    Family(
        name="rocksample",
        summary="A rover samples rocks of unknown worth, over an infinite horizon; with split, on a small grid with random rocks",
        description=(inspect.getdoc(rocksample) or "").partition("\n\n")[2],
        options=tuple(rocksample.OPTIONS),
        help=rocksample.OPTIONS,
        build=_rocksample,
        endless=True,
    ),
)
FAMILIES = {family.name: family for family in _ALL}


def build(name: str, **options: Any) -> Suite | NamedProblem | StationaryPOMDP:
    """A family with its options set: a suite, whose tasks are random, or one problem with names.

    Raises:
      ValueError: an unknown name or option, or a value out of its range.
    """
    if name not in FAMILIES:
        raise ValueError(unknown("name", name, tuple(FAMILIES)))
    family = FAMILIES[name]
    if wrong := [option for option in options if option not in family.options]:
        raise ValueError(unknown(f"an option of {name}", wrong[0], family.options))
    return family.build(**options)


def make(name: str, *, seed: int = 0, **options: Any) -> NamedProblem | StationaryPOMDP:
    """A problem by name: a task of a suite, or a problem that has nothing random.

    Args:
      name: one of `FAMILIES`.
      seed: of the task of a suite.
      options: those of the family; the horizon inf makes a problem without a horizon (`without_horizon`).

    Raises:
      ValueError: an unknown name or option, or a value out of its range.
    """
    if options.get("horizon") == math.inf:
        made = without_horizon(name, seed=seed, **{word: value for word, value in options.items() if word != "horizon"})
        if made.discount == 1:
            raise ValueError(f"discount must be below 1 where the horizon is infinite; {name} has 1 where none is given")
        return made
    made = build(name, **options)
    return draw(made, seed) if isinstance(made, Suite) else made


def without_horizon(name: str, *, seed: int = 0, **options: Any) -> StationaryPOMDP:
    """A problem by name without its horizon: with it, `make` has the same parameters for the seed.

    Raises:
      ValueError: as `make`, or the problem exists with a horizon alone.
    """
    made = build(name, **options)
    if isinstance(made, StationaryPOMDP):
        return made
    if isinstance(made, TabularSuite):
        return made.stationary(_key(seed))
    kinds = {"mdp": "the random suites are made for a horizon and have no discount"}
    reason = "the criterion of an ambiguous problem belongs to each stage of a finite horizon"
    raise ValueError(f"horizon must be finite for {name}: {kinds.get(name.removeprefix('po'), reason)}")


def draw(suite: Suite, seed: int = 0) -> NamedProblem:
    """The task of a suite for a seed, with its names."""
    return NamedProblem(problem=suite.draw(_key(seed)), **suite.names)


def _key(seed: int) -> jax.Array:
    if validate.count(seed, "seed", 0) >= 2**32:
        raise ValueError(f"seed must be below 2^32; got {seed}")
    return jax.random.key(seed)


def load_problem(
    words: Sequence[str],
    horizon: int | None = None,
    discount: float | None = None,
    alpha: float | None = None,
    *,
    perturb: str | Path | None = None,
    **options: Any,
) -> Suite | NamedProblem:
    """What the words of a command name: one of `FAMILIES`, or files (`read_files`).

    Args:
      horizon: stages; required for files, None is the default of a family.
      discount, alpha: None is the default of a family, or the file's own discount.
      perturb: as of `read_files`.
      options: other options of a family; they must be left out for files.

    Raises:
      ValueError: the words name nothing, or an argument is missing, does not apply or is out of its range.
      DataError: as `read_files`.
    """
    if not words:
        raise ValueError(f"PROBLEM must be a .pomdp file or one of {', '.join(FAMILIES)}; got none")
    if len(words) == 1 and words[0] in FAMILIES and not Path(words[0]).is_file():
        if perturb is not None:
            raise ValueError(f"perturb must be left out for a family: its rows are those of one .pomdp file; got {perturb}")
        given: dict[str, Any] = {"horizon": horizon, "discount": discount, "alpha": alpha}
        made = build(words[0], **{name: value for name, value in given.items() if value is not None}, **options)
        if isinstance(made, StationaryPOMDP):
            raise ValueError(f"horizon must be given for {words[0]}, which has none of its own")
        return made
    for word in words:
        if not Path(word).suffix and not Path(word).is_file():
            if word in FAMILIES:
                values = [other for other in words if other.lower() in ("true", "false", "yes", "no", "on", "off")]
                hint = f"; {values[0]!r} is a word of its own, since an option such as --hidden takes no value" if values else ""
                raise ValueError(f"PROBLEM must be one family, or files; got {' '.join(words)}{hint}")
            raise ValueError(_not_a_problem(word) or unknown("PROBLEM", word, (*FAMILIES, "a .pomdp file")))
    if options:
        name, value = next(iter(options.items()))
        raise ValueError(f"{name} must be left out for .pomdp files: it is an option of families; got {value}")
    if horizon is None:
        raise ValueError("horizon must be given for a .pomdp file")
    return read_files(words, horizon, discount, alpha, perturb=perturb)


def _not_a_problem(word: str) -> str | None:
    """Why a path is no problem, if it is a directory."""
    if not Path(word).is_dir():
        return None
    rule = f"PROBLEM must be a .pomdp file or a family; {word} is a directory"
    if (Path(word) / "manifest.json").exists() or (Path(word) / "config.json").exists():
        return f"{rule} that lindm wrote: a dataset is read by `lindm act` and `lindm sft`, a run is a policy, sft:{word}"
    return f"{rule}, and there is no dataset in it"


def read_files(
    words: Sequence[str],
    horizon: int,
    discount: float | None = None,
    alpha: float | None = None,
    *,
    perturb: str | Path | None = None,
) -> NamedProblem:
    """One `.pomdp` file as a POMDP, or as an MDP if it has no observations; several models as an APOMDP.

    Several models are several files, or one file, whose own model is the first, with the rows of other experts.

    Args:
      horizon: stages, at least one.
      discount: in [0, 1]; None is the file's own.
      alpha: attitude to ambiguity, in [0, 1]; required for several models, an error for one.
      perturb: a CSV file with rows of probabilities of other experts (`lindm.problems.experts`).

    Raises:
      ValueError: an argument is missing or out of its range.
      DataError: a file is missing or wrong, or has rewards so large that values are not finite; the message names the line.
    """
    validate.count(horizon, "horizon")
    if discount is not None and not 0 <= discount <= 1:
        raise ValueError(f"discount must be a number from 0 to 1; got {discount}")
    if alpha is not None:
        validate.fraction(alpha, "alpha")
    if not words:
        raise ValueError("FILE must name at least one .pomdp file; got none")
    if perturb is not None and len(words) > 1:
        raise ValueError(f"perturb must be left out for several files, which are models already; got {perturb}")
    if alpha is not None and len(words) == 1 and perturb is None:
        raise ValueError(f"alpha must be left out for a single model, which is not ambiguous; got {alpha}")
    if alpha is None and (len(words) > 1 or perturb is not None):
        several = "several files" if perturb is None else "perturb"
        what = "which are the models of one ambiguous problem" if perturb is None else "whose experts make the problem ambiguous"
        raise ValueError(f"alpha must be given for {several}, {what}: the attitude, from 0 (best case) to 1 (worst case)")
    models = [cassandra.read(word) for word in words]
    stems = [Path(word).stem for word in words]
    if perturb is not None:
        if not models[0].observations:
            raise DataError(f"{words[0]}: observations must be given for perturb, whose models are POMDPs; this is an MDP")
        experts = read_experts(perturb, models[0])
        if stems[0] in experts:
            raise DataError(f"{perturb}: {stems[0]!r} is the name of the file's own model; choose another name for the expert")
        models, stems = [*models, *experts.values()], [*stems, *experts]
        words = [words[0], *(f"{perturb}: model {name!r}" for name in experts)]
    unique = len(set(stems)) == len(stems)
    return problem_of_models(models, words, horizon, discount, alpha, stems if unique else words)


def problem_of_models(
    models: Sequence[cassandra.Model],
    sources: Sequence[str],
    horizon: int,
    discount: float | None,
    alpha: float | None,
    names_of_models: Sequence[str],
) -> NamedProblem:
    """One model as a POMDP, or as an MDP if it has no observations; several models as an APOMDP, for which alpha is needed.

    Raises:
      ValueError: a number is out of its range.
      DataError: the models do not fit together, or rewards are so large that values are not finite; it names the source.
    """
    single_mdp = len(models) == 1 and not models[0].observations
    problems: list[Any] = [cassandra_problems.to_mdp(models[0], horizon, discount)] if single_mdp else []
    problems = problems or cassandra_problems.to_pomdps(models, sources, horizon, discount)
    for source, problem in zip(sources, problems, strict=True):
        try:
            validate.rewards(problem.r, "the rewards")
        except ValueError as e:
            raise DataError(f"{source}: {e}") from e
    names = {"states": models[0].states, "actions": models[0].actions, "observations": models[0].observations}
    if len(models) == 1:
        return NamedProblem(problem=problems[0], **names)
    assert alpha is not None
    return NamedProblem(problem=apomdp(problems, alpha), models=tuple(names_of_models), **names)
