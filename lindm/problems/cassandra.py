r"""POMDPs in Cassandra's `.pomdp` format, in and out.

A file is a preamble (`discount`, `values`, `states`, `actions`, `observations` and the optional `start`, in any order), then
entries: `T: a : s : s'` for P(s' | s, a), `O: a : s' : o` for P(o | a, s'), `R: a : s : s' : o` for the reward. An entry may leave
its last places out and give a row or a matrix instead (or `uniform`, `identity`, `reset`: start again); `*` stands for all, a later
entry replaces an earlier one number by number, what is never written is zero. Line ends mean nothing except to a comment (#).
The rules are those of the grammar and parser of pomdp-solve 5 (A. R. Cassandra), with its tolerance for rows that do not quite sum
to one. A `Model` keeps what planning needs, the expected reward

    r(s, a) = sum_{s'} P(s' | s, a) sum_o O(o | a, s') R(a, s, s', o),      negated where the file counts costs.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lindm.files import DATA, Stop
from lindm.problems import checks
from lindm.types import POMDP

ENTRIES = 50_000_000  # of all tables together, 400 MB
SUM_TOLERANCE = 1e-5  # rows further from one are refused (0.333333 three times is written and read everywhere)
ROUNDING = 1e-12  # rows this close to one are left exactly as they are

HEADERS = ("discount", "values", "states", "actions", "observations", "start", "T", "O", "R")
RESERVED = frozenset((*HEADERS, "uniform", "identity", "reset", "include", "exclude", "reward", "cost"))
TOKEN = re.compile(r":|[^\s:]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
INDEX = re.compile(r"[0-9]{1,9}")
# what the places of an entry name, in their order; the numbers it gives stand for the places it leaves out
PLACES = {
    "T": ("actions", "states", "states"),
    "O": ("actions", "states", "observations"),
    "R": ("actions", "states", "states", "observations"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A POMDP as a file has it: names and numpy arrays in double precision, the same at every stage."""

    states: tuple[str, ...]
    actions: tuple[str, ...]
    observations: tuple[str, ...]
    discount: float  # in (0, 1]
    P: np.ndarray  # [S, A, S] probability of the next state
    O: np.ndarray  # [A, S, O] probability of the observation after an action, given the state it led to
    r: np.ndarray  # [S, A] expected reward
    start: np.ndarray  # [S] law of the first state


def read(path: str | Path) -> Model:
    """The model in a file. Raises `Stop` (exit code 3) with file and line where it is not one."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as e:
        raise Stop(DATA, f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise Stop(DATA, f"{path}:{line}: expected text in UTF-8; got the byte 0x{data[e.start]:02x}") from e
    return parse(text, str(path))


def parse(text: str, name: str = "<text>") -> Model:
    """The model in a text; `name` is what errors call it.

    Rows within `SUM_TOLERANCE` of one are scaled to one, with one `UserWarning` for the whole text.

    Raises:
      Stop: (exit code 3) "name:line: what is wrong", the token in question and what was expected.
    """
    preamble, entries, last = _sections(text, name)
    for word in ("discount", "states", "actions", "observations"):
        if word not in preamble:
            raise last.stop(f"{word!r} is missing: expected a line `{word}: ...`")
    discount, sign = _discount(preamble["discount"]), _sign(preamble.get("values"))
    sizes = {word: _size(preamble[word]) for word in PLACES["R"]}
    S, A, O = sizes["states"], sizes["actions"], sizes["observations"]
    if (total := S * A * (S + O)) > ENTRIES:
        raise preamble["states"].stop(f"{S} states, {A} actions, {O} observations need {total} table entries; at most {ENTRIES}")
    names = {word: _names(preamble[word]) for word in sizes}
    index = {word: {n: i for i, n in enumerate(names[word])} for word in names}

    off: list[tuple[int, str]] = []
    start, at = (_start(preamble["start"], index["states"]) if "start" in preamble else np.full(S, 1 / S)), preamble.get("start", last)
    _normalise(start[None], np.array([at.line]), lambda i: "the start", at, off)
    P, P_line = np.zeros((S, A, S)), np.zeros((S, A), int)
    Z, Z_line = np.zeros((A, S, O)), np.zeros((A, S), int)
    rewards = []
    for entry in entries:
        places, values = _entry(entry, names, index, start)
        if entry.word == "T":
            a, s, s2 = places
            P[s, a, s2], P_line[s, a] = values.swapaxes(0, 1), entry.line
        elif entry.word == "O":
            Z[places], Z_line[places[:2]] = values, entry.line
        else:
            rewards.append((entry, places, values))
    for word, line in (("T", P_line), ("O", Z_line)):
        if not line.any():
            raise last.stop(f"the {word} entries are missing: expected lines `{word}: {' : '.join(w[:-1] for w in PLACES[word])} p`")
    _normalise(P, P_line, lambda i: f"T of state {names['states'][i[0]]!r}, action {names['actions'][i[1]]!r}", last, off)
    _normalise(Z, Z_line, lambda i: f"O of action {names['actions'][i[0]]!r}, state {names['states'][i[1]]!r}", last, off)
    if off:
        line, row = min(off)
        more = f" (and {len(off) - 1} more rows)" if len(off) > 1 else ""
        warnings.warn(f"{name}:{line}: {row}{more}; scaled to one", UserWarning, stacklevel=2)
    r = sign * _expected_reward(rewards, P, Z) + 0.0  # + 0.0: a cost of nothing is not -0.0
    return Model(**names, discount=discount, P=P, O=Z, r=r, start=start)


class _Section(NamedTuple):
    """A header and the tokens that belong to it."""

    source: str
    word: str
    line: int
    words: list[str]
    lines: list[int]

    def stop(self, message: str, at: int | None = None) -> Stop:
        """The error at this header, or at token `at` of the section."""
        line = self.line if at is None or at >= len(self.lines) else self.lines[at]
        return Stop(DATA, f"{self.source}:{line}: {message}")


def _quote(word: str) -> str:
    return repr(word if len(word) <= 40 else word[:37] + "...")


def _sections(text: str, name: str) -> tuple[dict[str, _Section], list[_Section], _Section]:
    """The preamble by its words, the entries in their order, and an empty section at the last line."""
    words: list[str] = []
    lines: list[int] = []
    number = 1
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        found = TOKEN.findall(line.partition("#")[0])
        words += found
        lines += [number] * len(found)
    last = _Section(name, "", number, [], [])
    if not words:
        raise last.stop("the file is empty: expected `discount: ...`, `states: ...` and so on")
    heads = []  # (position of the header, its length)
    for i, word in enumerate(words):
        if word in HEADERS and words[i + 1 : i + 2] == [":"]:
            heads.append((i, 2))
        elif word == "start" and words[i + 1 : i + 3] in (["include", ":"], ["exclude", ":"]):
            heads.append((i, 3))
    if not heads or heads[0][0]:
        raise Stop(DATA, f"{name}:{lines[0]}: expected one of {', '.join(HEADERS)}, and a colon; got {_quote(words[0])}")
    preamble: dict[str, _Section] = {}
    entries: list[_Section] = []
    for (i, length), (end, _) in zip(heads, [*heads[1:], (len(words), 0)], strict=True):
        word = words[i]
        if length == 3:
            word += " " + words[i + 1]
        section = _Section(name, word, lines[i], words[i + length : end], lines[i + length : end])
        key = words[i]
        if key in PLACES:
            entries.append(section)
        elif entries:
            raise section.stop(f"{key!r} must come before the first T, O or R (line {entries[0].line})")
        elif key in preamble:
            raise section.stop(f"{key!r} is given twice, first on line {preamble[key].line}")
        else:
            preamble[key] = section
    return preamble, entries, last


def _only(section: _Section, expected: str) -> str:
    """The single token of a section."""
    if len(section.words) != 1:
        got = f"{_quote(section.words[1])} after it" if section.words else "nothing"
        raise section.stop(f"{section.word!r} takes {expected}; got {got}", 1)
    return section.words[0]


def _discount(section: _Section) -> float:
    word = _only(section, "one number")
    if not NUMBER.fullmatch(word) or not 0 < float(word) <= 1:
        raise section.stop(f"the discount must be a number above 0 and at most 1; got {_quote(word)}", 0)
    return float(word)


def _sign(section: _Section | None) -> float:
    word = _only(section, "`reward` or `cost`") if section else "reward"
    if section and word not in ("reward", "cost"):
        raise section.stop(f"'values' must be `reward` or `cost`; got {_quote(word)}", 0)
    return 1.0 if word == "reward" else -1.0


def _size(section: _Section) -> int:
    """How many states, actions or observations there are, before anything is made for them."""
    if len(section.words) != 1 or not NUMBER.fullmatch(section.words[0]):
        if not section.words:
            raise section.stop(f"{section.word!r} must be a count or a list of names; got nothing")
        return len(section.words)
    word = section.words[0]
    if not re.fullmatch("[0-9]+", word) or not word.strip("0"):
        raise section.stop(f"{section.word!r} must be a count of at least 1 or a list of names; got {_quote(word)}", 0)
    if not INDEX.fullmatch(word):
        raise section.stop(f"{section.word!r} is {_quote(word)}; the tables have at most {ENTRIES} entries", 0)
    return int(word)


def _names(section: _Section) -> tuple[str, ...]:
    if len(section.words) == 1 and INDEX.fullmatch(section.words[0]):
        return tuple(map(str, range(int(section.words[0]))))
    seen = set()
    for i, word in enumerate(section.words):
        if why := _unfit(word):
            raise section.stop(f"{_quote(word)} cannot be a name among the {section.word}: {why}", i)
        if word in seen:
            raise section.stop(f"the name {_quote(word)} is given twice among the {section.word}", i)
        seen.add(word)
    return tuple(section.words)


def _unfit(name: str) -> str:
    """Why this cannot be a name; empty where it can."""
    if TOKEN.fullmatch(name) is None or name == ":" or "#" in name:
        return "a name has no space, no colon and no #"
    if name == "*" or NUMBER.fullmatch(name):
        return "a number is an index, and * stands for all"
    return "it is a word of the format (is a colon missing?)" if name in RESERVED else ""


def _find(section: _Section, at: int, kind: str, index: dict[str, int]) -> int:
    """The state, action or observation that token `at` names."""
    word = section.words[at]
    if word in index:
        return index[word]
    if INDEX.fullmatch(word) and int(word) < len(index):
        return int(word)
    some = ", ".join(list(index)[:6]) + (", ..." if len(index) > 6 else "")
    raise section.stop(f"{_quote(word)} is none of the {kind}: expected one of {some}, or an index from 0 to {len(index) - 1}", at)


def _numbers(section: _Section, first: int, shape: tuple[int, ...]) -> np.ndarray:
    """The tokens from `first` on, exactly as many numbers as the shape asks for."""
    words, want = section.words[first:], int(np.prod(shape))
    lines = section.lines[first:]
    if "+" in words or "-" in words:  # the grammar has the sign as a token of its own
        joined: list[str] = []
        kept: list[int] = []
        for word, line in zip(words, lines, strict=True):
            if joined and joined[-1] in ("+", "-"):
                joined[-1] += word
            else:
                joined, kept = [*joined, word], [*kept, line]
        words, lines = joined, kept
    size = " x ".join(str(n) for n in shape if n > 1)
    wanted = "one number" if want == 1 else f"{want} numbers" + (f" ({size})" if " x " in size else "")
    for i, (word, line) in enumerate(zip(words, lines, strict=True)):
        if i == want or not NUMBER.fullmatch(word):
            found = f"expected {wanted}; found {i} and then {_quote(word)}"
            raise Stop(DATA, f"{section.source}:{line}: {found}, which is {'one too many' if NUMBER.fullmatch(word) else 'not a number'}")
        if not np.isfinite(float(word)):
            raise Stop(DATA, f"{section.source}:{line}: expected a finite number; got {_quote(word)}")
        if section.word != "R" and not 0 <= float(word) <= 1 + ROUNDING:
            raise Stop(DATA, f"{section.source}:{line}: expected a probability, from 0 to 1; got {_quote(word)}")
    if len(words) < want:
        raise section.stop(f"{section.word!r} needs {wanted}; found {len(words)} before the next entry or the end of the file")
    return np.array([float(word) for word in words]).reshape(shape)


def _start(section: _Section, index: dict[str, int]) -> np.ndarray:
    S, words = len(index), section.words
    if section.word != "start":
        if not words:
            raise section.stop(f"{section.word!r} takes a list of states; got nothing")
        listed = np.zeros(S, bool)
        listed[[_find(section, i, "states", index) for i in range(len(words))]] = True
        kept = listed if section.word == "start include" else ~listed
        if not kept.any():
            raise section.stop("'start exclude' leaves no state to start from")
        return kept / kept.sum()
    if words == ["uniform"]:
        return np.full(S, 1 / S)
    # one whole number is a state, unless it is the whole law of a single state
    if len(words) == 1 and not (NUMBER.fullmatch(words[0]) and (S == 1 or not INDEX.fullmatch(words[0]))):
        return np.eye(S)[_find(section, 0, "states", index)]
    if len(words) > 1 and words[1] in index:
        raise section.stop(f"'start' takes one state, {S} numbers or `uniform`; several states are `start include: ...`", 1)
    return _numbers(section, 0, (S,))


def _entry(section: _Section, names: dict, index: dict, start: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray]:
    """Which part of the table an entry writes, and what: an array that broadcasts against that part."""
    kinds, words = PLACES[section.word], section.words
    places: list[slice] = []
    at = 0
    while True:
        kind = kinds[len(places)]
        if at >= len(words) or words[at] == ":":
            raise section.stop(f"{section.word!r} has no {kind[:-1]} here: expected a name, an index or *", at)
        i = None if words[at] == "*" else _find(section, at, kind, index[kind])
        places.append(slice(None) if i is None else slice(i, i + 1))
        at += 1
        if words[at : at + 1] != [":"]:
            break
        if len(places) == len(kinds):
            raise section.stop(f"{section.word!r} has {len(kinds)} places; got a colon after the last", at)
        at += 1
    least = 2 if section.word == "R" else 1
    if len(places) < least:
        raise section.stop("'R' needs an action and a state at least: R: action : state", at)
    shape = tuple(1 if i < len(places) else len(names[kind]) for i, kind in enumerate(kinds))
    free = len(kinds) - len(places)
    places += [slice(None)] * free
    if section.word != "R" and free and len(words) == at + 1:
        if words[at] == "uniform":
            return tuple(places), np.full(shape, 1 / shape[-1])
        if words[at] == "identity" and section.word == "T" and free == 2:
            return tuple(places), np.eye(shape[-1])[None]
        if words[at] == "reset" and section.word == "T":
            return tuple(places), np.broadcast_to(start, shape)
    return tuple(places), _numbers(section, at, shape)


def _normalise(rows: np.ndarray, line: np.ndarray, label: Callable, last: _Section, off: list[tuple[int, str]]) -> None:
    """Rows that are nearly distributions become distributions, in place; the others are refused where they were last written."""
    sums = rows.sum(-1)
    error = np.abs(sums - 1)
    for i in map(tuple, np.argwhere(error > ROUNDING)):
        where, row = int(line[i]), label(i)
        if not where:
            raise last.stop(f"{row} is never given: expected a row of {rows.shape[-1]} probabilities")
        if error[i] > SUM_TOLERANCE + ROUNDING:
            raise Stop(DATA, f"{last.source}:{where}: {row} sums to {sums[i]:.9g}; expected one (within {SUM_TOLERANCE:g})")
        off.append((where, f"{row} sums to {sums[i]:.9g}"))
        rows[i] /= sums[i]


def _expected_reward(rewards: list[tuple[_Section, tuple, np.ndarray]], P: np.ndarray, Z: np.ndarray) -> np.ndarray:
    """r [S, A]. One action at a time, on axes s, s', o; an axis that no entry tells apart is left out."""
    (S, A, _), everything = P.shape, slice(None)
    by_observation = [e for e, places, values in rewards if places[3] != everything or values.shape[3] > 1]
    by_next = by_observation or [e for e, places, values in rewards if places[2] != everything or values.shape[2] > 1]
    table = np.empty((S, S if by_next else 1, Z.shape[-1] if by_observation else 1))
    r = np.zeros((S, A))
    for a in range(A):
        table[:] = 0.0
        for _, (actions, s, s2, o), values in rewards:
            if actions == everything or actions.start == a:
                table[s, s2, o] = values[0]
        for s in range(S):
            weight = P[s, a, :, None] * (Z[a] if by_observation else 1.0) if by_next else np.ones((1, 1))
            possible = table[s][weight > 0]
            # a reward that does not depend on what happens is that reward, to the last bit
            r[s, a] = possible[0] if (possible == possible[0]).all() else (weight * table[s]).sum()
    return r


