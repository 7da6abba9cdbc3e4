"""Episodes from a file of the user's own: demonstrations, or logs from which a model is estimated.

The file is CSV with a header, or JSON lines (an object with the same names in each line). A row is a step:

    episode,step,state,action,observation,reward
    monday,0,good,run,fine,1.0
    monday,1,good,run,alarm,0.7

`episode` is any name; the rows of an episode follow each other. `step` counts from 0, or in the whole file from 1. `action` is
what was done. The other columns are optional, each with a value in every row or in none: `state` before the action; `observation`
and, of an ambiguous problem, `model` after the action; `reward`. The last row of an episode may have a state alone: the one that
the last action led to. States, actions, models and observations are names or numbers from 0. Other columns are ignored, unless
their name is nearly one of these.
"""

import csv
import io
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lindm import validate
from lindm.datasets.columns import STEP_FIELDS
from lindm.errors import DataError, did_you_mean
from lindm.io import inputs, limits
from lindm.text import Step
from lindm.text.grammar import SYMBOL_ARGUMENTS

COLUMNS = ("episode", "step", "action", "observation", "state", "model", "reward")
REQUIRED = COLUMNS[:3]

Row = Mapping[str, str]
"""Column -> the word in it; without columns that are empty in the row."""


@dataclass(frozen=True, kw_only=True)
class LoggedEpisodes:
    """The episodes of a file, in its order.

    Attributes:
      episodes: of each episode its steps, in which states, actions, models and observations are numbers. The last step has no
        action where the file has the state that the last action led to.
      ids: the name of each episode in the file.
      lines: of each episode the line of each row.
      fields: the fields of `lindm.datasets.columns.STEP_FIELDS` that the steps have.
      names: of states, actions, models and observations, as far as the file has them: those that were given to the reader;
        otherwise all that occur, in alphabetical order, or "0", "1", ... where all of them are numbers.
    """

    episodes: tuple[tuple[Step, ...], ...]
    ids: tuple[str, ...]
    lines: tuple[tuple[int, ...], ...]
    fields: frozenset[str]
    names: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.episodes)


def read_episodes(
    path: str | Path, names: Mapping[str, Sequence[str]] | None = None, required: Collection[str] = ()
) -> LoggedEpisodes:
    """Read a file of episodes.

    Args:
      path: ends in .csv or .jsonl.
      names: of states, actions, models and observations, in the order of their numbers, as far as they are known; the file may
        then have no others.
      required: fields of `STEP_FIELDS` that the file must have.

    Raises:
      DataError: the file cannot be read, or a row breaks one of the rules above; the message has the file and the line.
    """
    path, reader = Path(path), _Reader(names or {})
    line = 1
    for line, row in _rows(path):
        try:
            reader.add(line, row)
            if missing := sorted(set(required) - reader.fields):
                raise ValueError(f"{missing[0]} must be given; got the columns {', '.join(row)}")
        except ValueError as e:
            raise DataError(f"{path}:{line}: {e}") from e
    if not reader.ids:
        raise DataError(f"{path}:{line}: expected at least one row with {', '.join(REQUIRED)}")
    return reader.finish()


# --- rows --------------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Every row with its line."""
    kinds = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix not in kinds:
        raise DataError(f"{path} must be a .csv or .jsonl file of episodes")
    text = inputs.read_text(path, limits.EPISODES_FILE)
    return kinds[path.suffix](text, str(path))


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            words, line = [cell.strip() for cell in cells], reader.line_num
            if not any(words):
                continue
            if header is None:
                header = words
                _check_columns(header, f"{name}:{line}")
                continue
            if len(words) != len(header):
                raise DataError(f"{name}:{line}: expected {len(header)} cells, as the header has; got {len(words)}")
            yield line, {column: word for column, word in zip(header, words, strict=True) if word and column in COLUMNS}
    except csv.Error as e:
        raise DataError(f"{name}:{reader.line_num}: not CSV: {e}") from e
    if header is None:
        raise DataError(f"{name}:1: expected a header with {', '.join(REQUIRED)}; the file is empty")


def _json_rows(text: str, name: str) -> Iterator[tuple[int, Row]]:
    checked: set[tuple[str, ...]] = set()
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        source = f"{name}:{number}"
        row = inputs.parse_json(line, source)
        if not isinstance(row, dict):
            raise DataError(f"{source}: expected an object with {', '.join(REQUIRED)}; got {str(row)[:60]!r}")
        if (columns := tuple(row)) not in checked:
            _check_columns(columns, source)
            checked.add(columns)
        yield number, {column: word for column in COLUMNS if (word := _word(column, row.get(column), source))}


def _word(column: str, value: Any, source: str) -> str:
    """A JSON value as the word that CSV has; empty for null."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or (column != "reward" and isinstance(value, float)):
        rule = "a number" if column == "reward" else "a name or a whole number"
        raise DataError(f"{source}: {column} must be {rule}; got {str(value)[:60]!r}")
    return repr(value)


def _check_columns(columns: Sequence[str], source: str) -> None:
    """DataError where columns are missing, given twice or misspelled."""
    for column in columns:
        if column not in COLUMNS and (near := did_you_mean(column.lower(), COLUMNS)):
            raise DataError(f"{source}: the column {column!r} is not known{near}")
    if twice := [column for column in COLUMNS if columns.count(column) > 1]:
        raise DataError(f"{source}: the column {twice[0]!r} is given twice")
    if missing := [column for column in REQUIRED if column not in columns]:
        raise DataError(f"{source}: the column {missing[0]!r} is missing; got {', '.join(columns)[:200]}")


# --- episodes ----------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Column:
    """The names of one column, numbered as they come where they are not known."""

    known: Sequence[str] | None
    codes: dict[str, int] = field(default_factory=dict)

    def code(self, name: str, word: str) -> int:
        if (code := self.codes.get(word)) is None:
            code = len(self.codes) if self.known is None else validate.index(word, self.known, name)
            self.codes[word] = code
            if self.known is None and len(self.codes) > limits.POMDP_NAMES:
                raise ValueError(f"{name} must have at most {limits.POMDP_NAMES} names; got more")
        return code

    def finish(self) -> tuple[tuple[str, ...], Sequence[int]]:
        """The names in their order, and the number of each code."""
        if self.known is not None:
            return tuple(self.known), range(len(self.known))
        if all(re.fullmatch("[0-9]{1,6}", word) for word in self.codes):  # no more than `POMDP_NAMES`
            numbers = [int(word) for word in self.codes]
            return tuple(map(str, range(max(numbers) + 1))), numbers
        names = sorted(self.codes)
        position = {name: i for i, name in enumerate(names)}
        return tuple(names), [position[word] for word in self.codes]


class _Reader:
    """The episodes of the rows so far."""

    def __init__(self, names: Mapping[str, Sequence[str]]):
        self.columns = {name: _Column(known=names.get(part)) for name, part in SYMBOL_ARGUMENTS.items()}
        self.episodes: list[list[Step]] = []
        self.lines: list[list[int]] = []
        self.ids: dict[str, int] = {}  # -> the line of the first row
        self.fields: frozenset[str] = frozenset()
        self.first_step = 0
        self._last = ""  # the episode of the row before

    def add(self, line: int, row: Row) -> None:
        """One more row. ValueError where it breaks a rule."""
        episode = row.get("episode", "")
        if not episode:
            raise ValueError("episode must be given in every row")
        if not self.ids or episode != self._last:
            if episode in self.ids:
                began = f"episode {episode!r} began on line {self.ids[episode]}"
                raise ValueError(f"the rows of an episode must follow each other; {began}, and another one came between")
            self._last, self.ids[episode] = episode, line
            self.episodes.append([])
            self.lines.append([])
        steps, has = self.episodes[-1], frozenset(row) & STEP_FIELDS
        if steps and steps[-1].action is None:
            raise ValueError("action must be given in every row but the last one of an episode; the row before has none")
        self._check_step(row.get("step", ""), len(steps))
        if "action" in row and not steps and len(self.ids) == 1:
            self.fields = has
        wanted = self.fields if "action" in row else {"state"} & self.fields
        if "action" not in row and (not steps or not wanted):
            raise ValueError("action must be given, except in the last row of an episode, which may have a state alone")
        if different := sorted(has ^ wanted):
            rule = "in every row or in none" if "action" in row else "in a row with an action"
            raise ValueError(f"{different[0]} must be given {rule}; this row has {', '.join(row)}")
        codes: dict[str, Any] = {name: column.code(name, row[name]) for name, column in self.columns.items() if name in row}
        reward = _reward(row["reward"]) if "reward" in row else None
        steps.append(Step(**{"action": None} | codes, reward=reward))
        self.lines[-1].append(line)

    def _check_step(self, word: str, before: int) -> None:
        """ValueError unless a step's number follows those of the steps before it in its episode."""
        number = int(word) if re.fullmatch("[0-9]{1,18}", word) else None
        if len(self.ids) == 1 and before == 0:
            if number not in (0, 1):
                raise ValueError(f"step must count from 0, or from 1; the first row has {word!r}")
            self.first_step = number
        elif number != self.first_step + before:
            raise ValueError(f"step must be {self.first_step + before}, since steps follow each other; got {word!r}")

    def finish(self) -> LoggedEpisodes:
        """The episodes, with the numbers of the names in their final order."""
        finished = {name: column.finish() for name, column in self.columns.items() if column.codes}

        def renumbered(step: Step) -> Step:
            codes = {name: order[code] for name, (_, order) in finished.items() if (code := getattr(step, name)) is not None}
            return Step(**{"action": None} | codes, reward=step.reward)

        return LoggedEpisodes(
            episodes=tuple(tuple(map(renumbered, steps)) for steps in self.episodes),
            ids=tuple(self.ids),
            lines=tuple(map(tuple, self.lines)),
            fields=self.fields,
            names={SYMBOL_ARGUMENTS[name]: names for name, (names, _) in finished.items()},
        )


def _reward(word: str) -> float:
    try:
        number = math.nan if "_" in word else float(word)  # Python reads 1_0 as 10
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"reward must be a finite number; got {word!r}")
    return number
