"""Histories as a user gives them: in the names of the problem, and checked against the problem.

A history is the steps of an episode in progress, before its next action. As text it is a list of words:

    MDP       state action state action ... state            the last state is the current one
    POMDP     action observation action observation ...
    APOMDP    action model observation ...                   the model that nature took

Each word is a name, or a number from 0. Names with spaces are quoted.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np

from lindm import validate
from lindm.datasets.columns import Kind, sizes_of
from lindm.errors import unknown
from lindm.evaluation.environments import double_precision
from lindm.families.registry import NamedProblem
from lindm.problems.apomdp import as_apomdp
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.belief import normalize
from lindm.text import Step
from lindm.text.grammar import FIELDS, SYMBOL_ARGUMENTS
from lindm.types import APOMDP, MDP, POMDP, Problem, at_stage

WORDS: dict[Kind, tuple[str, ...]] = {
    "mdp": ("state", "action"),
    "pomdp": ("action", "observation"),
    "apomdp": ("action", "model", "observation"),
}
"""The words of a step, in their order."""

GIVEN = tuple(name for name in FIELDS if name != "legal")  # which follows from the problem

History = str | Sequence[Step | Mapping[str, Any]]
"""Text as above; or steps, whose fields are numbers; or mappings with the same fields, which are names or numbers."""


@dataclass(frozen=True, kw_only=True)
class ProblemInfo:
    """What is known of the problem of a decision."""

    kind: Kind
    horizon: float  # number of stages, or inf
    sizes: Mapping[str, int]  # number of states, actions, observations and models, as far as the kind has them
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)  # the same, where they have names
    problem: Problem | StationaryPOMDP | None = None  # None: a task of a suite that is not known

    def words(self, part: str) -> Sequence[str]:
        """The names of the states, actions, ..., or their numbers as text."""
        return self.names.get(part) or tuple(map(str, range(self.sizes[part])))


def problem_info(problem: Any) -> ProblemInfo:
    """What is known of a problem.

    Args:
      problem: a problem with or without names, a `StationaryPOMDP`, a dataset (whose tasks may be different problems), or
        what is known already.
    """
    if isinstance(problem, ProblemInfo):
        return problem
    names: dict[str, Sequence[str]] = {}
    if isinstance(problem, NamedProblem | StationaryPOMDP):
        names = {part: list(words) for part in SYMBOL_ARGUMENTS.values() if (words := getattr(problem, part, ()))}
    if isinstance(problem, StationaryPOMDP):
        sizes = {part: n for part in ("states", "actions", "observations") if (n := getattr(problem, f"num_{part}"))}
        kind: Kind = "pomdp" if problem.O else "mdp"
        return ProblemInfo(kind=kind, horizon=math.inf, sizes=sizes, names=names, problem=problem)
    if isinstance(problem, NamedProblem):
        return replace(problem_info(problem.problem), names=names)
    if hasattr(problem, "suite"):  # a dataset
        sizes = {part: getattr(problem, f"num_{part}") for part in SYMBOL_ARGUMENTS.values()}
        return ProblemInfo(kind=problem.kind, horizon=problem.horizon, sizes=sizes, names=problem.names)
    about = sizes_of(problem)
    sizes = {part: about[f"num_{part}"] for part in SYMBOL_ARGUMENTS.values() if f"num_{part}" in about}
    return ProblemInfo(kind=about["kind"], horizon=about["horizon"], sizes=sizes, problem=problem)


# --- reading -----------------------------------------------------------------------------------------------------------------


def read_history(history: History, info: ProblemInfo) -> tuple[Step, ...]:
    """The steps of a history. The last one is open: it has no action, and of an MDP it has the current state.

    Raises:
      ValueError: a word is no name of the problem, a field is missing or has no place, or no decision is left.
    """
    rows = _rows_of_text(history, info.kind) if isinstance(history, str) else list(history)
    if info.kind != "mdp" and (not rows or _field(rows[-1], "action") is not None):
        rows.append({})
    steps = []
    for t, row in enumerate(rows, start=1):
        try:
            steps.append(_step(row, info, last=t == len(rows)))
        except ValueError as e:
            raise ValueError(f"history: step {t}: {e}") from e
    if not steps:
        raise ValueError("history must have the current state of an MDP; got no step")
    if len(steps) > info.horizon:
        rule = f"at most {info.horizon - 1} steps before the next action, since the horizon is {info.horizon}"
        raise ValueError(f"history must have {rule}; got {len(steps) - 1}")
    return tuple(steps)


def _rows_of_text(text: str, kind: Kind) -> list[Mapping[str, str]]:
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise ValueError(f"history must be words, and a quotation mark must be closed ({e}); got {text[:60]!r}") from e
    fields = WORDS[kind]
    starts = range(0, len(words), len(fields))
    rows: list[Mapping[str, str]] = [dict(zip(fields, words[i : i + len(fields)], strict=False)) for i in starts]
    wanted = 1 if kind == "mdp" else 0
    if len(words) % len(fields) != wanted:
        rule = f"repeat '{' '.join(fields)}'" + (" and end with the current state" if kind == "mdp" else "")
        got = f"{len(words)} word{'s' * (len(words) != 1)}" + (f", the last is {words[-1]!r}" if words else "")
        raise ValueError(f"history must {rule}; got {got}")
    return rows


def _field(row: Step | Mapping[str, Any], name: str) -> Any:
    return row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)


def _step(row: Step | Mapping[str, Any], info: ProblemInfo, last: bool) -> Step:
    if not isinstance(row, Step | Mapping):
        raise ValueError(f"a step must have the fields {', '.join(WORDS[info.kind])}; got {str(row)[:60]!r}")
    if isinstance(row, Mapping) and (wrong := [name for name in row if name not in GIVEN]):
        raise ValueError(unknown("a field of a step", str(wrong[0])[:60], GIVEN))
    given = {name: value for name in GIVEN if (value := _field(row, name)) is not None}
    wanted = WORDS[info.kind]
    if last:
        wanted = wanted[:1] if info.kind == "mdp" else ()
    optional = {"reward"} if info.kind == "mdp" and not last else set()
    if missing := [name for name in wanted if name not in given]:
        raise ValueError(
            f"{missing[0]} must be given{' in the last step, the current one' if last else ''}; got {', '.join(given) or 'none'}"
        )
    if extra := sorted(given.keys() - set(wanted) - optional):
        where = "in the last step, whose action is not taken yet" if last else f"in a history of this {info.kind.upper()}"
        raise ValueError(f"{extra[0]} must be left out {where}; got {given[extra[0]]!r}")
    numbers: dict[str, Any] = {name: _number(given[name], name, info, isinstance(row, Step)) for name in wanted}
    if "reward" in given:
        reward = given["reward"]
        if isinstance(reward, bool) or not isinstance(reward, int | float | np.floating) or not math.isfinite(reward):
            raise ValueError(f"reward must be a finite number; got {str(reward)[:60]!r}")
        numbers["reward"] = float(reward)
    return Step(**{"action": None} | numbers)


def _number(value: Any, name: str, info: ProblemInfo, is_number: bool) -> int:
    """The number of a name; `is_number`: the value is the number itself."""
    words = info.words(SYMBOL_ARGUMENTS[name])
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
        raise ValueError(f"{name} must be a name or a whole number; got {str(value)[:60]!r}")
    if is_number:
        if not 0 <= int(value) < len(words):
            raise ValueError(f"{name} must be a number from 0 to {len(words) - 1}; got {value}")
        return int(value)
    word = str(value)
    try:
        return validate.index(word if len(word) <= 200 else f"{word[:200]}...", words, name)
    except ValueError as e:
        number = f" (or its number, 0 to {len(words) - 1})" if info.names.get(SYMBOL_ARGUMENTS[name]) else ""
        raise ValueError(f"{e}{number}") from None


# --- the problem -------------------------------------------------------------------------------------------------------------


def check_history(steps: Sequence[Step], info: ProblemInfo) -> tuple[tuple[Step, ...], np.ndarray | None]:
    """The steps, of an MDP with the rewards that were not given, and the belief after them where the state is hidden.

    Where the problem does not allow all actions, the steps have those that are legal.

    The belief is [S]; at the start of an ambiguous problem it is [M, S], one for each model. Without a problem nothing is
    checked, and there is no belief.

    Raises:
      ValueError: a state or an observation has the probability 0, or an action is not legal.
    """
    problem: Any = info.problem
    if problem is None:
        return tuple(steps), None
    with double_precision():
        if info.kind == "mdp":
            return _check_states(steps, info, problem), None
        checked, beliefs = [], np.zeros((1, 0))
        for t, (step, beliefs) in enumerate(zip(steps, _beliefs(steps, info, problem), strict=True)):
            checked.append(_with_legal(t, step, legal_actions(problem, belief=beliefs), info))
        return tuple(checked), beliefs[0] if len(steps) > 1 or len(beliefs) == 1 else beliefs


def _beliefs(steps: Sequence[Step], info: ProblemInfo, problem: POMDP | APOMDP | StationaryPOMDP) -> Iterator[np.ndarray]:
    """The belief [M, S] under each model before each step."""
    beliefs = problem.rho[None] if isinstance(problem, StationaryPOMDP) else np.asarray(as_apomdp(problem).models.rho)
    yield beliefs
    for t, step in enumerate(steps[:-1]):
        assert step.action is not None and step.observation is not None
        P, O = _kernel(problem, t, step.model or 0, step.action)
        joint = (beliefs[step.model or 0] @ P)[:, None] * O  # [S, O]
        belief, mass = normalize(joint[:, step.observation])
        if not mass > 0:
            _impossible(t, "observation", step.observation, info, joint.sum(0))
        beliefs = np.broadcast_to(belief, beliefs.shape)
        yield beliefs


def _kernel(problem: Any, t: int, m: int, a: int) -> tuple[Any, np.ndarray]:
    """P [S, S], sparse where the problem is, and O [S, O] of an action at stage t under model m."""
    if isinstance(problem, StationaryPOMDP):
        return problem.P[a], problem.O[a].toarray()
    models = as_apomdp(problem).models
    return np.asarray(at_stage(models.P[m], t))[:, a], np.asarray(at_stage(models.O[m], t))[a]


def _check_states(steps: Sequence[Step], info: ProblemInfo, problem: MDP | StationaryPOMDP) -> tuple[Step, ...]:
    law, checked = np.asarray(problem.rho), []
    for t, step in enumerate(steps):
        assert step.state is not None
        if not law[step.state] > 0:
            _impossible(t, "state", step.state, info, law)
        step = _with_legal(t, step, legal_actions(problem, step.state), info)
        if step.action is not None and isinstance(problem, StationaryPOMDP):
            law = problem.P[step.action][[step.state]].toarray()[0]
        elif step.action is not None and isinstance(problem, MDP):
            law = np.asarray(at_stage(problem.P, t))[step.state, step.action]
            if step.reward is None:
                paid = problem.pay(t, step.state, step.action, steps[t + 1].state)
                step = replace(step, reward=float(paid))
        checked.append(step)
    return tuple(checked)


def legal_actions(problem: Any, state: int | None = None, belief: np.ndarray | None = None) -> np.ndarray | None:
    """Which actions are legal [A] in a state, or in every state that a belief [S] or [M, S] holds possible; None: all."""
    legal = getattr(problem.models if isinstance(problem, APOMDP) else problem, "legal", None)
    if legal is None:
        return None
    legal = np.asarray(legal)
    legal = legal[0] if legal.ndim == 3 else legal
    if belief is None:
        return legal[state]
    return np.all(legal[np.any(np.atleast_2d(belief) > 0, axis=0)], axis=0)


def legal_demonstration(steps: Sequence[Step], info: ProblemInfo) -> tuple[Step, ...]:
    """The steps of a demonstration with the actions that were legal, where the problem does not allow all.

    Where the state is hidden, steps after an observation that is impossible under the problem are not judged.

    Raises:
      IllegalActionError: an action is not legal.
    """
    problem: Any = info.problem
    if problem is None or (problem.models if isinstance(problem, APOMDP) else problem).legal is None:
        return tuple(steps)
    checked: list[Step] = []
    with double_precision():
        if info.kind == "mdp":
            return tuple(_with_legal(t, step, legal_actions(problem, step.state), info) for t, step in enumerate(steps))
        try:
            for t, (step, beliefs) in enumerate(zip(steps, _beliefs(steps, info, problem), strict=True)):
                checked.append(_with_legal(t, step, legal_actions(problem, belief=beliefs), info))
        except IllegalActionError:
            raise
        except ValueError:
            pass
    return (*checked, *steps[len(checked) :])


class IllegalActionError(ValueError):
    """An action of a history that is not legal."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"history: step {step + 1}: {reason}")
        self.step, self.reason = step, reason


def _with_legal(t: int, step: Step, legal: np.ndarray | None, info: ProblemInfo) -> Step:
    """A step with the actions [A] that are legal there. IllegalActionError: its own is not."""
    if legal is None:
        return step
    if step.action is not None and not legal[step.action]:
        words = info.words("actions")
        raise IllegalActionError(t, f"the action {words[step.action]!r} is not legal there; legal: {_some(words, legal)}")
    return replace(step, legal=tuple(np.flatnonzero(legal).tolist()))


def _some(words: Sequence[str], among: np.ndarray) -> str:
    possible = [words[i] for i in np.flatnonzero(among).tolist()]
    return (", ".join(possible[:12]) or "none") + (f", ... ({len(possible)} in all)" if len(possible) > 12 else "")


def _impossible(t: int, name: str, number: int, info: ProblemInfo, law: np.ndarray) -> NoReturn:
    words = info.words(SYMBOL_ARGUMENTS[name])
    some = _some(words, law > 0)
    raise ValueError(f"history: step {t + 1}: the {name} {words[number]!r} has the probability 0 there; possible: {some}")
