r"""POMDPs and MDPs in Cassandra's `.pomdp` format.

A file is a preamble (`discount`, `values`, `states`, `actions`, `observations` and an optional `start`, in any order), then
entries: `T: a : s : s'` for P(s' | s, a), `O: a : s' : o` for P(o | a, s'), `R: a : s : s' : o` for the reward. An entry may
leave its last places out and give a row or a matrix (or a word: `uniform`, `identity`, `reset` for the law of the first state);
`*` stands for all; a later entry replaces an earlier one number by number; the default is zero. Line ends have no meaning
except in a comment (#). A file without `observations` is an MDP: the state is observed, and `R` takes a : s : s'. Rules and
tolerance are those of the parser of pomdp-solve (A. R. Cassandra), which reads the same files.

One entry comes from zmdp (T. Smith): `E: s ...` lists states that end the episode. It ends on arrival, and nothing is earned
afterward. Such a state is read as one that every action keeps and that pays nothing. Where the state is hidden, it makes no
difference whether the end is seen, because an ended episode adds zero to the value of every action.

One entry is our own: `illegal: a : s` says that action a is not allowed in state s (`*` stands for all). Where the state is
hidden, an action is legal if every state of positive probability allows it.

A `Model` holds the arrays of planning, with the expected reward (negated where the file gives costs)

    r(s, a) = sum_{s'} P(s' | s, a) sum_o O(o | a, s') R(a, s, s', o),

and R itself where it depends on the next state or the observation: what an environment pays.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lindm.errors import DataError
from lindm.io import inputs, limits
from lindm.io.limits import POMDP_TABLE
from lindm.problems.cassandra_rewards import ALL, RewardEntries, count_writes, read_rewards
from lindm.problems.cassandra_sections import (
    INDEX,
    NUMBER,
    PLACES,
    ROUNDING,
    Section,
    find,
    only,
    quote,
    read_labels,
    read_numbers,
    read_sections,
    read_states,
)

SUM_TOLERANCE = 1e-5  # a row further from one is an error; 0.333333 three times is not


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """The POMDP or MDP of a file: names, and numpy arrays in double precision for every stage."""

    states: tuple[str, ...]
    actions: tuple[str, ...]
    observations: tuple[str, ...]  # none in an MDP, whose state is observed
    discount: float  # in [0, 1]
    P: np.ndarray  # [S, A, S] probability of the next state
    O: np.ndarray  # [A, S, O] probability of the observation after an action, given the state it led to
    r: np.ndarray  # [S, A] expected reward
    start: np.ndarray  # [S] law of the first state
    rewards: RewardEntries | None = None  # None where R is r(s, a) for every next state and observation
    legal: np.ndarray | None = None  # [S, A] bool, the actions that a state allows; None: all


OTHER_FILES = {
    **dict.fromkeys((".svg", ".png", ".pdf"), "a picture"),
    **dict.fromkeys((".alpha", ".policy", ".json", ".npz"), "a policy or a solution, which `lindm act` takes before its problem"),
    **dict.fromkeys((".csv", ".jsonl", ".parquet"), "data: `lindm estimate` makes a problem from logged episodes"),
}


def read(path: str | Path) -> Model:
    """The model in a file (UTF-8). DataError as in `parse`, or when the file cannot be read."""
    return parse(_text(path), str(path))


def _text(path: str | Path) -> str:
    """The text of a file. DataError where it cannot be read, or where its name is that of another kind of file."""
    if (kind := OTHER_FILES.get(Path(path).suffix.lower())) and Path(path).is_file():
        raise DataError(f"{path}: expected a problem in Cassandra's format (.pomdp); a {Path(path).suffix} file is {kind}")
    return inputs.read_text(Path(path), limits.POMDP_FILE)


def read_sizes(path: str | Path) -> tuple[int, int, int]:
    """The numbers of states, actions and observations that a file declares, 0 where it does not; its entries are not read."""
    text = _text(path)
    first = re.search(r"^[ \t]*([TORE]|illegal)[ \t]*:", text, re.MULTILINE)
    preamble, _, _ = read_sections(text[: first.start()] if first else text, str(path))
    S, A, O = (len(read_labels(preamble[word])) if word in preamble else 0 for word in ("states", "actions", "observations"))
    return S, A, O


def parse(text: str, name: str = "<text>") -> Model:
    """The model in a text; `name` is its name in error messages.

    Rows that miss one by at most `SUM_TOLERANCE` are scaled to one, with a single `UserWarning`. Without `start` it is uniform.

    Raises:
      DataError: "name:line: what is wrong, the token, and what was expected". Tables above `POMDP_TABLE` numbers are
        refused (where rewards depend on the observation, S*S*O counts as a table).
    """
    preamble, entries, last = read_sections(text, name)
    off: list[tuple[int, str]] = []  # the rows that were scaled, with their lines
    names, index, discount, costs, start = read_head(preamble, entries, last, off, lambda S, A, O: S * A * (S + O))
    S, A, O = (len(names[word]) for word in ("states", "actions", "observations"))
    tables = {"T": np.zeros((A, S, S)), "O": np.zeros((A, S, O))}
    lines = {word: np.zeros((A, S), int) for word in tables}  # where the row was written last
    rewards, ends, illegal, writes = [], np.zeros(S, bool), np.zeros((A, S), bool), 0
    for entry in entries:
        if entry.word == "E":
            ends[read_states(entry, index["states"])] = True
            lines["T"][:, ends] = entry.line
            continue
        if entry.word == "illegal":
            where = illegal_part(entry, index)
            illegal[where], lines["T"][where] = True, entry.line
            continue
        where, values = _entry(entry, index, start)
        if entry.word == "R":
            rewards.append((entry, where, values))
        else:
            writes = count_writes(writes, tables[entry.word][where].size, entry)
            tables[entry.word][where], lines[entry.word][where[:2]] = values, entry.row_lines(*values.shape[1:])
    check_legal(illegal, ends, names["states"], last)
    tables["T"][illegal] = np.eye(S)[np.nonzero(illegal)[1]]
    tables["T"][:, ends] = np.eye(S)[ends]
    for word, table in tables.items() if O else [("T", tables["T"])]:
        title = f"{word} of action {{!r}}, state {{!r}}".format
        _normalize(table, lines[word], lambda a, s, t=title: t(names["actions"][a], names["states"][s]), last, off)
    if off:
        line, row = min(off)
        more = f" (and {len(off) - 1} more that miss it)" if len(off) > 1 else ""
        warnings.warn(f"{name}:{line}: {row}, not to one{more}: scaled", UserWarning, stacklevel=2)
    r, entries = read_rewards(rewards, **tables, sign=-1.0 if costs else 1.0, ended=ends)
    for entry, (_, state, *_), values in rewards:
        if state.start is not None and ends[state.start] and values.any():
            lost = f"the reward of actions in {names['states'][state.start]!r} is never paid: E ends the episode on arrival"
            warnings.warn(f"{name}:{entry.line}: {lost}", UserWarning, stacklevel=2)
            break
    legal = ~illegal.T if illegal.any() else None
    r[illegal.T] = 0.0
    P = tables["T"].swapaxes(0, 1).copy()
    return Model(**names, discount=discount, P=P, O=tables["O"], r=r, start=start, rewards=entries, legal=legal)


class _Head(NamedTuple):
    """What the preamble of a file says."""

    names: dict[str, tuple[str, ...]]  # of states, actions and observations
    index: dict[str, dict[str, int]]
    discount: float
    costs: bool
    start: np.ndarray  # [S]


def read_head(
    preamble: dict[str, Section],
    entries: list[Section],
    last: Section,
    off: list[tuple[int, str]],
    numbers: Callable[[int, int, int], int],
) -> _Head:
    """Read the preamble; `off` gets the start if it was scaled. DataError where the sizes make too many `numbers`."""
    labels = {word: read_labels(preamble[word]) for word in ("states", "actions", "observations") if word in preamble}
    for word in ("discount", "states", "actions", "observations"):
        if word not in preamble and (word != "observations" or any(entry.word == "O" for entry in entries)):
            raise last.stop(f"{word!r} is missing: expected a line `{word}: ...` before the first T, O or R")
    rule = "a number from 0 to 1"
    discount = float(only(preamble["discount"], rule, lambda w: bool(NUMBER.fullmatch(w)) and 0 <= float(w) <= 1))
    rule = "`reward` or `cost`, in the singular"
    costs = "values" in preamble and only(preamble["values"], rule, {"reward", "cost"}.__contains__) == "cost"
    S, A, O = (len(labels.get(word, ())) for word in ("states", "actions", "observations"))
    if (total := numbers(S, A, O)) > POMDP_TABLE:
        raise preamble["states"].stop(f"{S} states, {A} actions and {O} observations make {total} numbers; at most {POMDP_TABLE}")
    names = {"observations": ()} | {word: tuple(map(str, each)) for word, each in labels.items()}
    index = {word: {n: i for i, n in enumerate(names[word])} for word in names}
    at = preamble.get("start", last)
    start = _start(at, index["states"]) if "start" in preamble else np.full(S, 1 / S)
    _normalize(start[None, None], np.array([[at.line]]), lambda a, s: "the start", last, off)
    return _Head(names, index, discount, costs, start)


def _start(section: Section, index: dict[str, int]) -> np.ndarray:
    S, words = len(index), section.words
    if section.word != "start":
        listed = np.zeros(S, bool)
        listed[read_states(section, index)] = True
        kept = listed if section.word == "start include" else ~listed
        if not kept.any():
            raise section.stop("'start exclude' leaves no state; expected at least one that is not listed")
        return kept / kept.sum()
    if words == ["uniform"]:
        return np.full(S, 1 / S)
    # a whole number alone is a state; only where there is a single state it may be its probability
    if len(words) == 1 and (not NUMBER.fullmatch(words[0]) or (INDEX.fullmatch(words[0]) and (S > 1 or int(words[0]) == 0))):
        return np.eye(S)[find(section, 0, "states", index)]
    if words and words[0] in index and not NUMBER.fullmatch(words[0]):  # a list of names, as in files of zmdp: each is as likely
        listed = np.zeros(S)
        listed[read_states(section, index)] = 1.0
        return listed / listed.sum()
    return read_numbers(section, 0, (S,))


def illegal_part(section: Section, index: dict[str, dict[str, int]]) -> tuple[int | slice, ...]:
    """The part of a table [A, S] that an entry `illegal: action : state` means."""
    words = section.words
    if len(words) != 3 or words[1] != ":":
        raise section.stop(f"'illegal' takes action : state; got {quote(' '.join(words[:5]))}")
    return tuple(slice(None) if words[i] == "*" else find(section, i, k, index[k]) for i, k in ((0, "actions"), (2, "states")))


def check_legal(illegal: np.ndarray, ends: np.ndarray, states: Sequence[str], last: Section) -> None:
    """Allow every action [A, S] where the episode has ended. DataError for a state without a legal action."""
    illegal[:, ends] = False
    if illegal.all(0).any():
        raise last.stop(f"state {states[int(illegal.all(0).argmax())]!r} has no legal action: expected at least one")


def _entry(section: Section, index: dict[str, dict[str, int]], start: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray]:
    """The part of its table that an entry writes, and an array that broadcasts against that part."""
    kinds, words = PLACES[section.word], section.words
    given = 1
    while words[2 * given - 1 : 2 * given] == [":"]:
        given += 1
    observed = not index["observations"]
    least, at = (2 if section.word == "R" and not observed else 1), 2 * given - 1  # at: the first of the numbers
    if not least <= given <= len(kinds) or len(words) < at:
        form, got = " : ".join(kind[:-1] for kind in kinds), " ".join(words[:at]) or "nothing"
        raise section.stop(f"{section.word!r} takes {least} to {len(kinds)} of {form}; got {quote(got)}", at - 1)
    indices = [None if words[2 * i] == "*" else find(section, 2 * i, kinds[i], index[kinds[i]]) for i in range(given)]
    free = len(kinds) - given
    where = (*(ALL if i is None else slice(i, i + 1) for i in indices), *[ALL] * free)
    shape = (1,) * given + tuple(len(index[kind]) or 1 for kind in kinds[given:])
    word = words[at] if len(words) == at + 1 else ""
    if word == "uniform" and free and section.word != "R":
        return where, np.full(shape, 1 / shape[-1])
    if word == "identity" and free == 2 and section.word == "T":
        return where, np.eye(shape[-1])[None]
    if word == "reset" and free and section.word == "T":
        return where, np.broadcast_to(start, shape)
    return where, read_numbers(section, at, shape)


def _normalize(rows: np.ndarray, lines: np.ndarray, title: Callable, last: Section, off: list[tuple[int, str]]) -> None:
    """Rows [A, S, ...] that are nearly distributions become so, in place; others are refused, with the line that wrote them."""
    sums = rows.sum(-1)
    error = np.abs(sums - 1)
    for i in map(tuple, np.argwhere(error > ROUNDING)):
        line, row = int(lines[i]), title(*i)
        if not line:
            raise last.stop(f"{row} is missing: expected {rows.shape[-1]} probabilities that sum to one")
        if error[i] > SUM_TOLERANCE + ROUNDING:
            raise DataError(f"{last.source}:{line}: {row} sums to {sums[i]:.9g}; expected one (within {SUM_TOLERANCE:g})")
        off.append((line, f"{row} sums to {sums[i]:.9g}"))
        rows[i] /= sums[i]
