"""Models as text in Cassandra's `.pomdp` format, which `lindm.problems.cassandra` reads."""

from collections.abc import Iterator, Sequence

import numpy as np

from lindm.problems.cassandra import Model
from lindm.problems.cassandra_sections import ROUNDING, unfit


def write(model: Model) -> str:
    """The model as a text: `parse(write(model))` has the same names and, to the last bit, the same numbers.

    Raises:
      ValueError: a name that the format cannot hold, a shape that does not fit the names, a row that is not a distribution.
    """
    S, A, O = len(model.states), len(model.actions), len(model.observations)
    if not 0 <= model.discount <= 1:
        raise ValueError(f"discount must be a number from 0 to 1; got {model.discount}")
    for field, shape in {"P": (S, A, S), "O": (A, S, O), "r": (S, A), "start": (S,)}.items():
        array = getattr(model, field)
        if array.shape != shape or 0 in (S, A) or not np.isfinite(array).all():
            raise ValueError(f"{field} must be finite, of the shape {shape} that the names ask for; got shape {array.shape}")
        if field != "r" and array.size and ((array < 0).any() or (np.abs(array.sum(-1) - 1) > ROUNDING).any()):
            raise ValueError(f"each row of {field} must be a distribution (its sum within {ROUNDING:g} of one)")
    lines = [f"discount: {float(model.discount)!r}", "values: reward"]
    for word in ("states", "actions", *["observations"] * (O > 0)):
        names = getattr(model, word)
        counted = names == tuple(map(str, range(len(names))))
        if not counted and (bad := [n for n in names if unfit(n)] or [n for n in names if names.count(n) > 1]):
            raise ValueError(f"{word} must be different names that a file can hold; got {bad[0]!r}: {unfit(bad[0]) or 'twice'}")
        lines.append(f"{word}: {len(names) if counted else ' '.join(names)}")
    lines.append(f"start: {_row(model.start)}")
    lines += _rows("T", model.P.swapaxes(0, 1), model.actions, model.states, model.states)
    lines += _rows("O", model.O, model.actions, model.states, model.observations) if O else []
    lines += _reward_rows(model)
    if model.legal is not None:
        if model.legal.shape != (S, A) or not model.legal.any(1).all():
            raise ValueError(f"legal must have the shape {(S, A)} and allow an action in every state")
        lines += [f"illegal: {model.actions[a]} : {model.states[s]}" for s, a in zip(*np.nonzero(~model.legal), strict=True)]
    return "\n".join(lines) + "\n"


def _reward_rows(model: Model) -> Iterator[str]:
    """The entries of R that are not zero; one block where r alone is given and the action changes nothing."""
    if model.rewards is None:
        everywhere = (model.r == model.r[:, :1]).all()
        for a, action in enumerate("*" if everywhere else model.actions):
            for s in np.flatnonzero(model.r[:, a]):
                yield f"R: {action} : {model.states[s]} : * : * {float(model.r[s, a])!r}"
        return
    _, _, next_states, observations = model.rewards.shape
    following = model.states if next_states > 1 else "*"
    observed = model.observations if observations > 1 else "*"
    for action, table in zip(model.actions, model.rewards.tables(), strict=True):
        for s, u, o in zip(*np.nonzero(table), strict=True):
            yield f"R: {action} : {model.states[s]} : {following[u]} : {observed[o]} {float(table[s, u, o])!r}"


def _row(row: np.ndarray) -> str:
    return "uniform" if (row == 1 / len(row)).all() else " ".join(map(repr, row.tolist()))


def _rows(word: str, table: np.ndarray, actions: Sequence[str], froms: Sequence[str], tos: Sequence[str]) -> Iterator[str]:
    """The entries of a table [A, S, ...], each row in the shorter of its forms; one block where the action changes nothing."""
    for action, rows in [("*", table[0])] if (table == table[0]).all() else zip(actions, table, strict=True):
        if word == "T" and (rows == np.eye(len(froms))).all():
            yield f"T: {action} identity"
            continue
        for name, row in zip(froms, rows, strict=True):
            head = f"{word}: {action} : {name}"
            single = "\n".join(f"{head} : {to} {v!r}" for to, v in zip(tos, row.tolist(), strict=True) if v)
            yield min(single, f"{head} {_row(row)}", key=len)
