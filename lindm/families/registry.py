"""Problems by name: `make` for a suite or a problem that ships with lindm, `load_problem` for `.pomdp` files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lindm import validate
from lindm.errors import DataError, did_you_mean, unknown
from lindm.families import prostate, suites
from lindm.problems import cassandra
from lindm.problems.apomdp import apomdp
from lindm.types import Problem

NAMED_PROBLEMS = ("prostate",)


@dataclass(frozen=True, kw_only=True)
class NamedProblem:
    """A problem and the names of its parts in the order of the indices; empty where the problem or the file has no such names."""

    problem: Problem
    states: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    observations: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


def make(name: str, *, seed: int = 0, **sizes: Any) -> NamedProblem:
    """A problem by name: a task of a suite, or a problem that ships with lindm.

    Args:
      name: mdp, pomdp or apomdp (`lindm.families.suites`), or prostate (`lindm.families.prostate`).
      seed: of the task of a suite.
      sizes: the arguments of `suites.suite`, or those of `prostate`.

    Raises:
      ValueError: an unknown name or size, or a size out of its range.
    """
    if name in suites.NAMES:
        return NamedProblem(problem=suites.draw_task(jax.random.key(seed), suites.suite(name, **sizes)))
    if name not in NAMED_PROBLEMS:
        raise ValueError(unknown("name", name, (*suites.NAMES, *NAMED_PROBLEMS)))
    if wrong := [size for size in sizes if size not in prostate.OPTIONS]:
        raise ValueError(unknown("an option of prostate", wrong[0], prostate.OPTIONS))
    return NamedProblem(
        problem=prostate.prostate(**sizes),
        states=prostate.STATES,
        actions=prostate.ACTIONS,
        observations=prostate.OBSERVATIONS,
        models=prostate.CENTERS,
    )


def load_problem(words: Sequence[str], horizon: int, discount: float | None = None, alpha: float | None = None) -> NamedProblem:
    """A problem of `NAMED_PROBLEMS`, one `.pomdp` file (an MDP if it has no observations), or several as the models of an APOMDP.

    Args:
      horizon: stages, at least one.
      discount: in [0, 1]; None is the file's own, and 0.97 for `prostate`.
      alpha: attitude to ambiguity, in [0, 1]; required for several files, an error for one file; None is 0.5 for `prostate`.

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
        raise ValueError("FILE must name at least one .pomdp file, or a problem: " + ", ".join(NAMED_PROBLEMS))
    if len(words) == 1 and words[0] in NAMED_PROBLEMS and not Path(words[0]).is_file():
        given: dict[str, Any] = {"discount": discount, "alpha": alpha}
        return make(words[0], horizon=horizon, **{name: value for name, value in given.items() if value is not None})
    for word in words:
        if not Path(word).suffix and not Path(word).is_file():
            known = f"{word!r} is neither a file nor a problem that ships with lindm ({', '.join(NAMED_PROBLEMS)})"
            raise ValueError(known + did_you_mean(word, NAMED_PROBLEMS))
    if alpha is not None and len(words) == 1:
        raise ValueError(f"alpha must be left out for a single model, which is not ambiguous; got {alpha}")
    if alpha is None and len(words) > 1:
        raise ValueError("alpha must be given for several files, which are models of one APOMDP: 1 is the worst case, 0 the best")
    models = [cassandra.read(word) for word in words]
    single_mdp = len(models) == 1 and not models[0].observations
    problems: list[Any] = [cassandra.to_mdp(models[0], horizon, discount)] if single_mdp else []
    problems = problems or cassandra.to_pomdps(models, words, horizon, discount)
    for word, problem in zip(words, problems, strict=True):
        try:
            validate.rewards(problem.r, "the rewards")
        except ValueError as e:
            raise DataError(f"{word}: {e}") from e
    names = {"states": models[0].states, "actions": models[0].actions, "observations": models[0].observations}
    if len(words) == 1:
        return NamedProblem(problem=problems[0], **names)
    assert alpha is not None
    stems = tuple(Path(word).stem for word in words)
    unique = len(set(stems)) == len(stems)
    return NamedProblem(problem=apomdp(problems, alpha), models=stems if unique else tuple(words), **names)
