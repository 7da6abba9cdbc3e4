"""The problem that the PROBLEM words of `lindm solve`, `data make` and `eval` name."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lindm.choices import Behavior, Split
from lindm.cli.option_parser import Positional
from lindm.errors import UsageError

if TYPE_CHECKING:
    from lindm.families.registry import NamedProblem
    from lindm.families.suites import Suite


@dataclass(frozen=True, kw_only=True)
class FamilyOptions:
    """The options of families: sizes, and what changes a problem. A family that does not have one refuses it."""

    split: Split | None = None
    """Distribution of the parameters: id (in distribution) or ood (out of distribution). [default: id]"""
    states: int | None = None
    """Number of states."""
    actions: int | None = None
    """Number of actions."""
    observations: int | None = None
    """Number of observations."""
    models: int | None = None
    """Number of models."""
    gap: float | None = None
    """Smallest difference between the values of the best and the second best action; 0 allows any (mdp, pomdp, apomdp)."""
    capacity: int | None = None
    """Largest stock (inventory)."""
    lead_time: int | None = None
    """Periods from an order to its arrival (inventory)."""
    hidden: bool | None = None
    """Hide the condition of the machine (maintenance)."""
    size: int | None = None
    """Number of cells on each side of the grid (gridworld, rocksample)."""
    dark: bool | None = None
    """Hide the goal (gridworld)."""
    slip: float | None = None
    """Probability that a move goes sideways (gridworld)."""
    rocks: int | None = None
    """Number of rocks (rocksample)."""
    layout: int | None = None
    """Seed of the positions of the rocks (rocksample)."""
    perturb: Path | None = None
    """CSV file with the rows of one .pomdp file that other experts replace; the problem is then ambiguous."""


FAMILY_OPTIONS = tuple(field.name for field in fields(FamilyOptions))


@dataclass(frozen=True, kw_only=True)
class ProblemOptions(FamilyOptions):
    """The options of `data make` and `eval` that say which problems there are, and who demonstrates."""

    problem: Annotated[tuple[str, ...], Positional("PROBLEM")]
    """A family, such as mdp, pomdp or prostate, or a .pomdp file. Several files are the models of an ambiguous POMDP."""
    horizon: int | Literal["inf"] | None = None
    """Number of stages, not inf; required for a file. [default: that of the family]"""
    discount: float | None = None
    """Discount factor. [default: that of the file or family]"""
    alpha: float | None = None
    """Attitude to ambiguity: 1 is the worst case over the models, 0 the best case."""
    behavior: Behavior = "oracle"
    """Policy that makes the demonstrations; epsilon is the oracle with some random actions."""
    epsilon: float = 0.2
    """Probability of a random action in the policy epsilon."""


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Prints the warnings of the parser of problem files on stderr, one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"lindm: warning: {warning.message}", file=sys.stderr)


def problem_or_suite(options: Any) -> "Suite | NamedProblem":
    """What the words of a command name: a suite, or one problem in double precision.

    Args:
      options: `FamilyOptions` with problem, horizon, discount and alpha.

    Raises:
      ValueError: the words name nothing, or an option does not apply.
      DataError: a file is wrong.
    """
    from lindm.evaluation.environments import double_precision
    from lindm.families import registry

    if options.horizon == "inf":
        rule = "a whole number here, since datasets and evaluations have episodes that end"
        raise UsageError(f"--horizon must be {rule}; lindm solve takes inf, and its policy is one of lindm act; got inf")
    given = {name: value for name in FAMILY_OPTIONS if (value := getattr(options, name)) is not None}
    with warnings_as_lines(), double_precision():
        return registry.load_problem(options.problem, options.horizon, options.discount, options.alpha, **given)


def one_problem(options: Any) -> "NamedProblem":
    """One problem in double precision: as `problem_or_suite`, and of a suite the task of `options.seed`."""
    from lindm.evaluation.environments import double_precision
    from lindm.families import registry
    from lindm.families.suites import Suite

    named = problem_or_suite(options)
    if not isinstance(named, Suite):
        if options.seed is not None:
            raise ValueError(f"seed must be left out for a problem that has nothing random; got {options.seed}")
        return named
    with double_precision():
        return registry.draw(named, options.seed or 0)
