"""The text of a file in Cassandra's format (`lindm.problems.cassandra`) as sections, and what the tokens of a section mean."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lindm.errors import DataError, LindmError, did_you_mean
from lindm.io.limits import POMDP_NAMES

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


class Section(NamedTuple):
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


def quote(word: str) -> str:
    return repr(word if len(word) <= 60 else word[:57] + "...")


def read_sections(text: str, name: str) -> tuple[dict[str, Section], list[Section], Section]:
    """The preamble by word, the entries in order, and an empty section at the last token."""
    words: list[str] = []
    lines: list[int] = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        tokens = TOKEN.findall(line.partition("#")[0])
        words += tokens
        lines += [number] * len(tokens)
    last = Section(name, "", lines[-1] if lines else 1, [], [])
    if not words:
        raise last.stop("the file is empty: expected `discount: ...`, `states: ...` and so on")
    heads = []  # position and length of each header
    for i, word in enumerate(words):
        length = 3 if word == "start" and words[i + 1 : i + 2] in (["include"], ["exclude"]) else 2
        is_name = word in NAMES_TOO and words[i - 1 : i] == [":"]  # as in T: E: far
        if word in HEADERS and words[i + length - 1 : i + length] == [":"] and not is_name:
            heads.append((i, length))
    if not heads or heads[0][0]:
        raise DataError(f"{name}:{lines[0]}: expected one of {', '.join(HEADERS)}, and a colon; got {quote(words[0])}")
    preamble: dict[str, Section] = {}
    entries: list[Section] = []
    for (i, length), (end, _) in zip(heads, [*heads[1:], (len(words), 0)], strict=True):
        key, body = words[i], slice(i + length, end)
        section = Section(name, " ".join(words[i : i + length - 1]), lines[i], words[body], lines[body])
        if key in PLACES or key in NAMES_TOO:
            entries.append(section)
        elif entries:
            raise section.stop(f"{key!r} must come before the first T, O, R or E, which is on line {entries[0].line}")
        elif key in preamble:
            raise section.stop(f"{key!r} is given twice, first on line {preamble[key].line}")
        else:
            preamble[key] = section
    return preamble, entries, last


def only(section: Section, rule: str, fits: Callable[[str], bool]) -> str:
    """The one token of a section."""
    if len(section.words) != 1 or not fits(section.words[0]):
        got, at = " ".join(section.words[:4]), len(section.words) > 1
        raise section.stop(f"{section.word!r} must be {rule}; got {quote(got)}", int(at))
    return section.words[0]


def read_labels(section: Section) -> Sequence[int | str]:
    """The names, or the indices of a count: a range, so that a large count allocates nothing before it is checked."""
    words = section.words or [""]
    if len(words) == 1 and (words[0] == "" or NUMBER.fullmatch(words[0])):
        if not INDEX.fullmatch(words[0]) or not 1 <= int(words[0]) <= POMDP_NAMES:
            rule = f"a count from 1 to {POMDP_NAMES} or a list of names"
            raise section.stop(f"{section.word!r} must be {rule}; got {quote(words[0])}", 0)
        return range(int(words[0]))
    seen: set[str] = set()
    for i, word in enumerate(words):
        if word == ":" and i and (near := did_you_mean(words[i - 1], HEADERS)):
            raise section.stop(f"expected one of {', '.join(HEADERS)} before a colon; got {quote(words[i - 1])}{near}", i)
        if why := "it is given twice" if word in seen else unfit(word):
            raise section.stop(f"{quote(word)} cannot be a name in {section.word!r}: {why}", i)
        seen.add(word)
    return words


def unfit(name: str) -> str:
    """Why this cannot be a name; empty where it can."""
    if not name:
        return "a name has at least one character"
    if not TOKEN.fullmatch(name) or name == ":" or "#" in name:
        return "a name has no space, colon or #"
    if name == "*" or NUMBER.fullmatch(name):
        return "a number is an index, and * stands for all"
    return "it is a word of the format (is a colon missing?)" if name in RESERVED else ""


def find(section: Section, at: int, kind: str, index: dict[str, int]) -> int:
    """The state, action or observation that token `at` means."""
    word = section.words[at]
    if word in index:
        return index[word]
    if INDEX.fullmatch(word) and int(word) < len(index):
        return int(word)
    if not index:
        raise section.stop(f"{quote(word)} is no observation of this MDP, which has none: expected *", at)
    some = ", ".join(quote(n) for n in list(index)[:6]) + (", ..." if len(index) > 6 else "")
    raise section.stop(f"{quote(word)} is none of the {kind}: expected {some}, or an index from 0 to {len(index) - 1}", at)


def read_numbers(section: Section, first: int, shape: tuple[int, ...]) -> np.ndarray:
    """The tokens from `first` on: exactly as many numbers as the shape holds, probabilities unless they are rewards."""
    want, size = int(np.prod(shape)), " x ".join(str(n) for n in shape if n > 1)
    wanted = "one number" if want == 1 else f"{want} numbers" + (f" ({size})" if " " in size else "")
    values: list[float] = []
    sign = ""
    for word, line in zip(section.words[first:], section.lines[first:], strict=True):
        if not sign and word in ("+", "-"):  # in the grammar a sign is a token of its own
            sign = word
            continue
        word = sign + word
        sign = ""
        is_number = NUMBER.fullmatch(word) is not None
        value = float(word) if is_number else 0.0
        wrong = ""
        if not is_number or len(values) == want:
            why = "one too many" if is_number else "which is not a number"
            wrong = f"expected {wanted}; got {len(values)} and then {quote(word)}, {why}"
        elif not np.isfinite(value):
            wrong = f"expected a finite number; got {quote(word)}"
        elif section.word != "R" and not 0 <= value <= 1 + ROUNDING:
            wrong = f"expected a probability, from 0 to 1; got {quote(word)}"
        if wrong:
            raise DataError(f"{section.source}:{line}: {wrong}")
        values.append(value)
    if sign or len(values) < want:
        raise section.stop(f"{section.word!r} needs {wanted}; got {len(values)} up to the next entry or the end")
    return np.array(values).reshape(shape) + 0.0  # + 0.0: no -0.0


def read_states(section: Section, index: dict[str, int]) -> list[int]:
    """The states of a list."""
    if not section.words:
        raise section.stop(f"{section.word!r} takes a list of states; got nothing")
    return [find(section, i, "states", index) for i in range(len(section.words))]
