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

from lindm.errors import DataError, LindmError, did_you_mean
from lindm.io import inputs, limits
from lindm.io.limits import POMDP_NAMES, POMDP_TABLE
from lindm.problems.cassandra_rewards import ALL, RewardEntries, count_writes, read_rewards

SUM_TOLERANCE = 1e-5  # a row further from one is an error; 0.333333 three times is not
ROUNDING = 1e-12  # a row this close to one is not changed

HEADERS = ("discount", "values", "states", "actions", "observations", "start", "T", "O", "R", "E", "illegal")
NAMES_TOO = ("E", "illegal")  # E: of East
RESERVED = frozenset((*HEADERS[:-2], "uniform", "identity", "reset", "include", "exclude", "reward", "cost"))
PLACES = {
    "T": ("actions", "states", "states"),
    "O": ("actions", "states", "observations"),
    "R": ("actions", "states", "states", "observations"),
}
TOKEN = re.compile(r":|[^\s:]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
INDEX = re.compile("[0-9]{1,9}")


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
    preamble, _, _ = _sections(text[: first.start()] if first else text, str(path))
    S, A, O = (len(_labels(preamble[word])) if word in preamble else 0 for word in ("states", "actions", "observations"))
    return S, A, O


def parse(text: str, name: str = "<text>") -> Model:
    """The model in a text; `name` is its name in error messages.

    Rows that miss one by at most `SUM_TOLERANCE` are scaled to one, with a single `UserWarning`. Without `start` it is uniform.

    Raises:
      DataError: "name:line: what is wrong, the token, and what was expected". Tables above `POMDP_TABLE` numbers are
        refused (where rewards depend on the observation, S*S*O counts as a table).
    """
    preamble, entries, last = _sections(text, name)
    off: list[tuple[int, str]] = []  # the rows that were scaled, with their lines
    names, index, discount, costs, start = _head(preamble, entries, last, off, lambda S, A, O: S * A * (S + O))
    S, A, O = (len(names[word]) for word in ("states", "actions", "observations"))
    tables = {"T": np.zeros((A, S, S)), "O": np.zeros((A, S, O))}
    lines = {word: np.zeros((A, S), int) for word in tables}  # where the row was written last
    rewards, ends, illegal, writes = [], np.zeros(S, bool), np.zeros((A, S), bool), 0
    for entry in entries:
        if entry.word == "E":
            ends[_states(entry, index["states"])] = True
            lines["T"][:, ends] = entry.line
            continue
        if entry.word == "illegal":
            where = _illegal(entry, index)
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


def _head(
    preamble: dict[str, "_Section"],
    entries: list["_Section"],
    last: "_Section",
    off: list[tuple[int, str]],
    numbers: Callable[[int, int, int], int],
) -> _Head:
    """Read the preamble; `off` gets the start if it was scaled. DataError where the sizes make too many `numbers`."""
    labels = {word: _labels(preamble[word]) for word in ("states", "actions", "observations") if word in preamble}
    for word in ("discount", "states", "actions", "observations"):
        if word not in preamble and (word != "observations" or any(entry.word == "O" for entry in entries)):
            raise last.stop(f"{word!r} is missing: expected a line `{word}: ...` before the first T, O or R")
    rule = "a number from 0 to 1"
    discount = float(_only(preamble["discount"], rule, lambda w: bool(NUMBER.fullmatch(w)) and 0 <= float(w) <= 1))
    rule = "`reward` or `cost`, in the singular"
    costs = "values" in preamble and _only(preamble["values"], rule, {"reward", "cost"}.__contains__) == "cost"
    S, A, O = (len(labels.get(word, ())) for word in ("states", "actions", "observations"))
    if (total := numbers(S, A, O)) > POMDP_TABLE:
        raise preamble["states"].stop(f"{S} states, {A} actions and {O} observations make {total} numbers; at most {POMDP_TABLE}")
    names = {"observations": ()} | {word: tuple(map(str, each)) for word, each in labels.items()}
    index = {word: {n: i for i, n in enumerate(names[word])} for word in names}
    at = preamble.get("start", last)
    start = _start(at, index["states"]) if "start" in preamble else np.full(S, 1 / S)
    _normalize(start[None, None], np.array([[at.line]]), lambda a, s: "the start", last, off)
    return _Head(names, index, discount, costs, start)


class _Section(NamedTuple):
    """A header and the tokens up to the next one."""

    source: str
    word: str
    line: int
    words: list[str]
    lines: list[int]

    def stop(self, message: str, at: int | None = None) -> LindmError:
        """The error at the header, or at the section's token `at` where there is one."""
        line = self.line if at is None or at >= len(self.lines) else self.lines[at]
        return DataError(f"{self.source}:{line}: {message}")

    def row_lines(self, rows: int, columns: int) -> list[int]:
        """The line of each row of the numbers that end an entry; one for all rows where a word (`uniform`) stands for them."""
        if not NUMBER.fullmatch(self.words[-1]):
            return self.lines[-1:]
        lines = [line for word, line in zip(self.words, self.lines, strict=True) if word not in ("+", "-")]
        return lines[-rows * columns :: columns]


def _quote(word: str) -> str:
    return repr(word if len(word) <= 60 else word[:57] + "...")


def _sections(text: str, name: str) -> tuple[dict[str, _Section], list[_Section], _Section]:
    """The preamble by word, the entries in order, and an empty section at the last token."""
    words: list[str] = []
    lines: list[int] = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        tokens = TOKEN.findall(line.partition("#")[0])
        words += tokens
        lines += [number] * len(tokens)
    last = _Section(name, "", lines[-1] if lines else 1, [], [])
    if not words:
        raise last.stop("the file is empty: expected `discount: ...`, `states: ...` and so on")
    heads = []  # position and length of each header
    for i, word in enumerate(words):
        length = 3 if word == "start" and words[i + 1 : i + 2] in (["include"], ["exclude"]) else 2
        is_name = word in NAMES_TOO and words[i - 1 : i] == [":"]  # as in T: E: far
        if word in HEADERS and words[i + length - 1 : i + length] == [":"] and not is_name:
            heads.append((i, length))
    if not heads or heads[0][0]:
        raise DataError(f"{name}:{lines[0]}: expected one of {', '.join(HEADERS)}, and a colon; got {_quote(words[0])}")
    preamble: dict[str, _Section] = {}
    entries: list[_Section] = []
    for (i, length), (end, _) in zip(heads, [*heads[1:], (len(words), 0)], strict=True):
        key, body = words[i], slice(i + length, end)
        section = _Section(name, " ".join(words[i : i + length - 1]), lines[i], words[body], lines[body])
        if key in PLACES or key in NAMES_TOO:
            entries.append(section)
        elif entries:
            raise section.stop(f"{key!r} must come before the first T, O, R or E, which is on line {entries[0].line}")
        elif key in preamble:
            raise section.stop(f"{key!r} is given twice, first on line {preamble[key].line}")
        else:
            preamble[key] = section
    return preamble, entries, last


def _only(section: _Section, rule: str, fits: Callable[[str], bool]) -> str:
    """The one token of a section."""
    if len(section.words) != 1 or not fits(section.words[0]):
        got, at = " ".join(section.words[:4]), len(section.words) > 1
        raise section.stop(f"{section.word!r} must be {rule}; got {_quote(got)}", int(at))
    return section.words[0]


def _labels(section: _Section) -> Sequence[int | str]:
    """The names, or the indices of a count: a range, so that a large count allocates nothing before it is checked."""
    words = section.words or [""]
    if len(words) == 1 and (words[0] == "" or NUMBER.fullmatch(words[0])):
        if not INDEX.fullmatch(words[0]) or not 1 <= int(words[0]) <= POMDP_NAMES:
            rule = f"a count from 1 to {POMDP_NAMES} or a list of names"
            raise section.stop(f"{section.word!r} must be {rule}; got {_quote(words[0])}", 0)
        return range(int(words[0]))
    seen: set[str] = set()
    for i, word in enumerate(words):
        if word == ":" and i and (near := did_you_mean(words[i - 1], HEADERS)):
            raise section.stop(f"expected one of {', '.join(HEADERS)} before a colon; got {_quote(words[i - 1])}{near}", i)
        if why := "it is given twice" if word in seen else unfit(word):
            raise section.stop(f"{_quote(word)} cannot be a name in {section.word!r}: {why}", i)
        seen.add(word)
    return words


def unfit(name: str) -> str:
    """Why this cannot be a name; empty where it can."""
    if not TOKEN.fullmatch(name) or name == ":" or "#" in name:
        return "a name has no space, colon or #"
    if name == "*" or NUMBER.fullmatch(name):
        return "a number is an index, and * stands for all"
    return "it is a word of the format (is a colon missing?)" if name in RESERVED else ""


def _find(section: _Section, at: int, kind: str, index: dict[str, int]) -> int:
    """The state, action or observation that token `at` means."""
    word = section.words[at]
    if word in index:
        return index[word]
    if INDEX.fullmatch(word) and int(word) < len(index):
        return int(word)
    if not index:
        raise section.stop(f"{_quote(word)} is no observation of this MDP, which has none: expected *", at)
    some = ", ".join(_quote(n) for n in list(index)[:6]) + (", ..." if len(index) > 6 else "")
    raise section.stop(f"{_quote(word)} is none of the {kind}: expected {some}, or an index from 0 to {len(index) - 1}", at)


def _numbers(section: _Section, first: int, shape: tuple[int, ...]) -> np.ndarray:
    """The tokens from `first` on: exactly as many numbers as the shape holds, probabilities unless they are rewards."""
    want, size = int(np.prod(shape)), " x ".join(str(n) for n in shape if n > 1)
    wanted = "one number" if want == 1 else f"{want} numbers" + (f" ({size})" if " " in size else "")
    values, sign = list[float](), ""
    for word, line in zip(section.words[first:], section.lines[first:], strict=True):
        if not sign and word in ("+", "-"):  # in the grammar a sign is a token of its own
            sign = word
            continue
        word, sign = sign + word, ""
        value, wrong = (float(word), "") if NUMBER.fullmatch(word) else (0.0, "which is not a number")
        if wrong or len(values) == want:
            wrong = f"expected {wanted}; got {len(values)} and then {_quote(word)}, {wrong or 'one too many'}"
        elif not np.isfinite(value):
            wrong = f"expected a finite number; got {_quote(word)}"
        elif section.word != "R" and not 0 <= value <= 1 + ROUNDING:
            wrong = f"expected a probability, from 0 to 1; got {_quote(word)}"
        if wrong:
            raise DataError(f"{section.source}:{line}: {wrong}")
        values.append(value)
    if sign or len(values) < want:
        raise section.stop(f"{section.word!r} needs {wanted}; got {len(values)} up to the next entry or the end")
    return np.array(values).reshape(shape) + 0.0  # + 0.0: no -0.0


def _start(section: _Section, index: dict[str, int]) -> np.ndarray:
    S, words = len(index), section.words
    if section.word != "start":
        listed = np.zeros(S, bool)
        listed[_states(section, index)] = True
        kept = listed if section.word == "start include" else ~listed
        if not kept.any():
            raise section.stop("'start exclude' leaves no state; expected at least one that is not listed")
        return kept / kept.sum()
    if words == ["uniform"]:
        return np.full(S, 1 / S)
    # a whole number alone is a state; only where there is a single state it may be its probability
    if len(words) == 1 and (not NUMBER.fullmatch(words[0]) or (INDEX.fullmatch(words[0]) and (S > 1 or int(words[0]) == 0))):
        return np.eye(S)[_find(section, 0, "states", index)]
    if words and words[0] in index and not NUMBER.fullmatch(words[0]):  # a list of names, as in files of zmdp: each is as likely
        listed = np.zeros(S)
        listed[_states(section, index)] = 1.0
        return listed / listed.sum()
    return _numbers(section, 0, (S,))


def _states(section: _Section, index: dict[str, int]) -> list[int]:
    """The states of a list."""
    if not section.words:
        raise section.stop(f"{section.word!r} takes a list of states; got nothing")
    return [_find(section, i, "states", index) for i in range(len(section.words))]


def _illegal(section: _Section, index: dict[str, dict[str, int]]) -> tuple[int | slice, ...]:
    """The part of a table [A, S] that an entry `illegal: action : state` means."""
    words = section.words
    if len(words) != 3 or words[1] != ":":
        raise section.stop(f"'illegal' takes action : state; got {_quote(' '.join(words[:5]))}")
    return tuple(slice(None) if words[i] == "*" else _find(section, i, k, index[k]) for i, k in ((0, "actions"), (2, "states")))


def check_legal(illegal: np.ndarray, ends: np.ndarray, states: Sequence[str], last: _Section) -> None:
    """Allow every action [A, S] where the episode has ended. DataError for a state without a legal action."""
    illegal[:, ends] = False
    if illegal.all(0).any():
        raise last.stop(f"state {states[int(illegal.all(0).argmax())]!r} has no legal action: expected at least one")


def _entry(section: _Section, index: dict[str, dict[str, int]], start: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray]:
    """The part of its table that an entry writes, and an array that broadcasts against that part."""
    kinds, words = PLACES[section.word], section.words
    given = 1
    while words[2 * given - 1 : 2 * given] == [":"]:
        given += 1
    observed = not index["observations"]
    least, at = (2 if section.word == "R" and not observed else 1), 2 * given - 1  # at: the first of the numbers
    if not least <= given <= len(kinds) or len(words) < at:
        form, got = " : ".join(kind[:-1] for kind in kinds), " ".join(words[:at]) or "nothing"
        raise section.stop(f"{section.word!r} takes {least} to {len(kinds)} of {form}; got {_quote(got)}", at - 1)
    indices = [None if words[2 * i] == "*" else _find(section, 2 * i, kinds[i], index[kinds[i]]) for i in range(given)]
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
    return where, _numbers(section, at, shape)


def _normalize(rows: np.ndarray, lines: np.ndarray, title: Callable, last: _Section, off: list[tuple[int, str]]) -> None:
    """Rows [A, S, ...] that are nearly distributions become so, in place; others are refused, with the line that wrote them."""
    error = np.abs((sums := rows.sum(-1)) - 1)
    for i in map(tuple, np.argwhere(error > ROUNDING)):
        line, row = int(lines[i]), title(*i)
        if not line:
            raise last.stop(f"{row} is missing: expected {rows.shape[-1]} probabilities that sum to one")
        if error[i] > SUM_TOLERANCE + ROUNDING:
            raise DataError(f"{last.source}:{line}: {row} sums to {sums[i]:.9g}; expected one (within {SUM_TOLERANCE:g})")
        off.append((line, f"{row} sums to {sums[i]:.9g}"))
        rows[i] /= sums[i]
