"""The problem that the PROBLEM words of `lindm solve`, `data make` and `eval` name."""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lindm.choices import Split
from lindm.errors import unknown

if TYPE_CHECKING:
    from lindm.families.registry import NamedProblem
    from lindm.families.suites import Suite


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
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

    with _warnings_as_lines(), double_precision():
        return registry.load_problem(words, horizon, discount, alpha)


def problem_or_suite(
    words: Sequence[str], horizon: int | None, split: Split, discount: float | None, alpha: float | None
) -> "Suite | NamedProblem":
    """A suite by its name, or one problem: the name of a problem that ships with lindm, or .pomdp files.

    Raises:
      ValueError: the words name neither, or an option does not apply.
      DataError: a file is wrong.
    """
    from lindm.families import registry, suites

    if len(words) == 1 and words[0] in suites.NAMES and not Path(words[0]).is_file():
        if discount is not None or alpha is not None:
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
    return read_problem(words, horizon, discount, alpha)
