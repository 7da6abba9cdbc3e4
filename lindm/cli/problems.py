"""The problem that the PROBLEM words of `lindm solve`, `data make` and `eval` name."""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lindm.choices import Behavior, Split
from lindm.cli.option_parser import Positional
from lindm.errors import unknown

if TYPE_CHECKING:
    from lindm.families.registry import NamedProblem
    from lindm.families.suites import Suite


@dataclass(frozen=True, kw_only=True)
class ProblemOptions:
    """The options of `data make` and `eval` that say which problems there are, and who demonstrates."""

    problem: Annotated[tuple[str, ...], Positional("PROBLEM")]
    """A suite (mdp, pomdp or apomdp), prostate, or a .pomdp file. Several files are the models of an ambiguous POMDP."""
    horizon: int | None = None
    """Number of stages; required for a file. [default: the middle one of a suite's three]"""
    split: Split = "id"
    """Split of a suite: in distribution or out of distribution."""
    discount: float | None = None
    """Discount factor, in place of the file's."""
    alpha: float | None = None
    """Attitude to ambiguity: 1 is the worst case over the models, 0 the best."""
    behavior: Behavior = "oracle"
    """Behavior policy of the demonstrations; epsilon is the oracle with random actions."""
    epsilon: float = 0.2
    """Probability of a random action of the behavior policy epsilon."""


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Prints the warnings of the parser of problem files on stderr, one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"lindm: warning: {warning.message}", file=sys.stderr)


def read_problem(words: Sequence[str], horizon: int, discount: float | None, alpha: float | None) -> "NamedProblem":
    """One problem, in double precision: .pomdp files, or the name of a problem that ships with lindm.

    Raises:
      ValueError: the words name no problem, or an option does not apply.
      DataError: a file is wrong.
    """
    from lindm.evaluation.environments import double_precision
    from lindm.families import registry

    with warnings_as_lines(), double_precision():
        return registry.load_problem(words, horizon, discount, alpha)


def problem_or_suite(options: ProblemOptions) -> "Suite | NamedProblem":
    """A suite by its name, or one problem: the name of a problem that ships with lindm, or .pomdp files.

    Raises:
      ValueError: the words name neither, or an option does not apply.
      DataError: a file is wrong.
    """
    from lindm.families import registry, suites

    words, horizon, split = options.problem, options.horizon, options.split
    if len(words) == 1 and words[0] in suites.NAMES and not Path(words[0]).is_file():
        if options.discount is not None or options.alpha is not None:
            raise ValueError("discount and alpha must be left out for a suite, which has its own")
        return suites.suite(words[0], horizon, split)
    known = (*suites.NAMES, *registry.NAMED_PROBLEMS)
    for word in words:
        if not Path(word).suffix and not Path(word).is_file() and (word not in registry.NAMED_PROBLEMS or len(words) > 1):
            raise ValueError(unknown("PROBLEM", word, (*known, "a .pomdp file")))
    if split != "id":
        raise ValueError(f"split must be left out for a single problem, which has one distribution; got {split!r}")
    if horizon is None:
        raise ValueError("horizon must be given for a problem that is not a suite")
    return read_problem(words, horizon, options.discount, options.alpha)
