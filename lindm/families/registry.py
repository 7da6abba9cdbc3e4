"""A decision problem with the names of its parts, from what a user types: `.pomdp` files, or a problem that ships with lindm."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lindm import validate
from lindm.errors import did_you_mean
from lindm.problems import cassandra
from lindm.problems.apomdp import CENTRES, PROSTATE_ACTIONS, PROSTATE_OBSERVATIONS, PROSTATE_STATES, apomdp, prostate
from lindm.types import Problem

SHIPPED = ("prostate",)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One problem; names in the order of the indices, empty where the problem has no such part or its parts have no names."""

    problem: Problem
    states: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    observations: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


def named(words: Sequence[str], horizon: int, discount: float | None = None, alpha: float | None = None) -> Source:
    """The problem that `words` name: one file, several files that form a cloud, or the name of a shipped problem.

    Args:
      horizon: stages, at least one.
      discount: in (0, 1]; None takes the file's own, and 0.97 for `prostate`.
      alpha: attitude to the models of a cloud, in [0, 1]; needed by several files, refused for one; None is 0.5 for `prostate`.

    Raises:
      ValueError: an argument is out of its range, or missing.
      lindm.io.LindmError: a file is wrong (exit code 3), with its line.
    """
    validate.count(horizon, "horizon")
    if discount is not None and not 0 < discount <= 1:
        raise ValueError(f"discount must be above 0 and at most 1; got {discount}")
    if alpha is not None:
        validate.fraction(alpha, "alpha")
    if not words:
        raise ValueError("FILE must name at least one .pomdp file, or a problem: " + ", ".join(SHIPPED))
    if len(words) == 1 and words[0] in SHIPPED and not Path(words[0]).is_file():
        cloud = prostate(horizon, 0.5 if alpha is None else alpha, discount=0.97 if discount is None else discount)
        return Source(
            problem=cloud,
            states=PROSTATE_STATES,
            actions=PROSTATE_ACTIONS,
            observations=PROSTATE_OBSERVATIONS,
            models=CENTRES,
        )
    for word in words:
        if not Path(word).suffix and not Path(word).is_file():
            known = f"{word!r} is neither a file nor a problem that ships with lindm ({', '.join(SHIPPED)})"
            raise ValueError(known + did_you_mean(word, SHIPPED))
    if alpha is not None and len(words) == 1:
        raise ValueError(f"alpha must be left out for a single model, which is not ambiguous; got {alpha}")
    if alpha is None and len(words) > 1:
        raise ValueError("alpha must be given for several files, which form a cloud: 1 is the worst case, 0 the best")
    models = [cassandra.read(word) for word in words]
    pomdps = cassandra.to_pomdps(models, words, horizon, discount)
    names = {"states": models[0].states, "actions": models[0].actions, "observations": models[0].observations}
    if len(words) == 1:
        return Source(problem=pomdps[0], **names)
    assert alpha is not None
    stems = tuple(Path(word).stem for word in words)
    return Source(problem=apomdp(pomdps, alpha), models=stems if len(set(stems)) == len(stems) else tuple(words), **names)
