"""Experts who disagree with a model in some rows of probabilities: a CSV file beside one `.pomdp` file.

    model,table,action,state,probabilities
    fragile,T,run,good,0.6 0.4 0
    fragile,T,run,worn,0 0.5 0.5
    deaf,O,run,*,0.5 0.5

A row replaces the probabilities of the next states (table T, `state` is the one before) or of the observations (table O,
`state` is the one that the action led to) in the model of that name; `*` stands for all actions or states, a name may be its
index. What a model does not replace is as in the file. Rewards are the file's, with their expectation under the model's
probabilities.
"""

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np

from lindm.errors import DataError, unknown
from lindm.io import inputs, limits
from lindm.problems.cassandra import SUM_TOLERANCE, Model
from lindm.problems.cassandra_rewards import expected
from lindm.problems.cassandra_sections import INDEX, NUMBER, ROUNDING

COLUMNS = ["model", "table", "action", "state", "probabilities"]
MAX_EXPERTS = 64  # each has tables of its own


def read_experts(path: str | Path, base: Model) -> dict[str, Model]:
    """The models of a CSV file by name, in the order of their first rows.

    Args:
      base: the model of the `.pomdp` file, a POMDP.

    Raises:
      DataError: "path:line: what is wrong": not CSV, another header, an unknown table, action or state, a row that is no
        distribution (within `SUM_TOLERANCE`) or that the model has replaced already; no rows or too many models.
    """
    tables: dict[str, dict[str, np.ndarray]] = {}
    lines: dict[str, dict[str, np.ndarray]] = {}  # of the row that replaced the probabilities
    path = Path(path)
    for line, (name, table, action, state, words) in _rows(path):
        source = f"{path}:{line}"
        if not name:
            raise DataError(f"{source}: model must be a name; it is empty")
        if table not in ("T", "O"):
            raise DataError(f"{source}: {unknown('table', table, ('T', 'O'))}")
        if name not in tables:
            if len(tables) == MAX_EXPERTS:
                raise DataError(f"{source}: the file must have at most {MAX_EXPERTS} models; {name!r} is one too many")
            tables[name] = {"T": base.P.swapaxes(0, 1).copy(), "O": base.O.copy()}
            lines[name] = {"T": np.zeros(base.O.shape[:2], int), "O": np.zeros(base.O.shape[:2], int)}
        where = _index(action, base.actions, "action", source), _index(state, base.states, "state", source)
        if (before := lines[name][table][where].max()) > 0:
            raise DataError(f"{source}: model {name!r} has this row of {table} twice, first on line {before}")
        lines[name][table][where] = line
        tables[name][table][where] = _distribution(words, tables[name][table].shape[-1], source)
    if not tables:
        raise DataError(f"{path}:2: expected rows with {', '.join(COLUMNS)}; the file has none")
    return {name: _model(base, **each) for name, each in tables.items()}


def _model(base: Model, T: np.ndarray, O: np.ndarray) -> Model:
    P, r = T.swapaxes(0, 1).copy(), base.r
    if base.rewards is not None:
        R = base.rewards.R()
        r = np.array([[expected(R[s, a], P[s, a], O[a]) for a in range(r.shape[1])] for s in range(len(r))])
    return replace(base, P=P, O=O, r=r)


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """The cells of each row, with its line."""
    reader = csv.reader(io.StringIO(inputs.read_text(path, limits.POMDP_FILE), newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    header = ",".join(COLUMNS)
    try:
        for cells in reader:
            words = [cell.strip() for cell in cells]
            if any(words):
                rows.append((reader.line_num, words))
    except csv.Error as e:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {e}") from e
    if not rows or rows[0][1] != COLUMNS:
        raise DataError(f"{path}:{rows[0][0] if rows else 1}: expected the header {header}")
    for line, words in rows[1:]:
        if len(words) != len(COLUMNS):
            raise DataError(f"{path}:{line}: expected {len(COLUMNS)} cells, as the header has; got {len(words)}")
    return rows[1:]


def _index(word: str, names: tuple[str, ...], part: str, source: str) -> slice:
    """The part of an axis that a name, an index or `*` means."""
    if word == "*":
        return slice(None)
    if word in names:
        i = names.index(word)
    elif INDEX.fullmatch(word) and int(word) < len(names):
        i = int(word)
    else:
        raise DataError(f"{source}: {unknown(part, word, (*names, '*'))}")
    return slice(i, i + 1)


def _distribution(words: str, size: int, source: str) -> np.ndarray:
    """The numbers of a row, scaled to one where they nearly sum to it."""
    given = words.split()
    if wrong := [word for word in given if not NUMBER.fullmatch(word) or not 0 <= float(word) <= 1]:
        raise DataError(f"{source}: probabilities must be numbers from 0 to 1; got {wrong[0]!r}")
    if len(given) != size:
        raise DataError(f"{source}: expected {size} probabilities with spaces between them; got {len(given)}")
    row = np.array([float(word) for word in given])
    if abs(row.sum() - 1) > SUM_TOLERANCE + ROUNDING:
        raise DataError(f"{source}: probabilities sum to {row.sum():.9g}; expected one (within {SUM_TOLERANCE:g})")
    return row if abs(row.sum() - 1) <= ROUNDING else row / row.sum()
