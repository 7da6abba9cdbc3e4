r"""Episodes as text, and back: the text of a document is read back exactly, and where its action tokens are is known by construction.

A document is K demonstrations and a query, the episode in progress. A `Template` (data, never code) says how it is written:

    opening  ( episode  step*  closing )^K  episode  step*  [ an open step: a step up to its action ]

The query is never closed, so the pieces of a history are the first pieces of each of its continuations: pieces that are tokenised
one by one give token lists with the same property, and one key-value cache of the demonstrations serves every query. For the same
reason an action symbol carries its own leading space (" A" is one token of most byte-pair vocabularies, and what follows a
trailing space is not), and a template whose text before the action ends in a space is refused.

`step` is a list of parts with at most one field each: {state} in front of {action}; {model}, {observation}, {reward} behind it. A
part with a field is left out where the step does not have that field; text alone always stands, and so does the part of the
action (an open step stops where the symbol would start). One template thus serves MDPs, POMDPs and ambiguous POMDPs, with rewards
or without. A literal brace is doubled. Symbols are a list of names, taken as they are, or a pattern such as "s{}" whose hole is
the index in decimal; rewards are written by `repr`, so every bit comes back.

Why a text has one reading. The template is turned into a nondeterministic automaton over characters, without empty moves: a chain
for each text, a tree for each list of names, a loop for the digits of an index, and for rewards an automaton of

    -?(0|[1-9][0-9]*)\.(0|[0-9]*[1-9])   or   -?[1-9](\.[0-9]*[1-9])?e[+-][0-9]{2,3}   (a little more than what `repr` writes).

A document is an accepting path and its characters, and differs from another document in one of the two, because (i) some text
always stands in front of an action, so that a question differs from no question and steps do not touch, and (ii) closing and
episode are not both empty. Hence two documents share a text only if two different paths do, which is the case only if the product
of the automaton with itself reaches, after a character on which the two copies part, a pair of equal or of two accepting nodes.
A template with such a pair is refused when it is built, and the error shows the shortest such text. In an automaton that passes,
every node is reached by at most one path of the text read so far, so that reading needs no search: one link back for each node.
"""

import dataclasses
import json
import math
import operator
import re
import string
import tomllib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lindm.files import DATA, Stop

TABLES = {"state": "states", "action": "actions", "model": "models", "observation": "observations"}
FIELDS = (*TABLES, "reward")
Symbols = tuple[str, ...] | str


@dataclass(frozen=True, slots=True)
class Step:
    """One decision; what a problem does not have, or does not show, is None."""

    action: int | None  # None in an open step, the last one of a query: the question
    state: int | None = None  # seen before the action
    model: int | None = None  # the model of the cloud that nature took, after the action
    observation: int | None = None  # after the action
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """Demonstrations and the episode in progress, which may be empty and may end in an open step."""

    demonstrations: tuple[tuple[Step, ...], ...] = ()
    query: tuple[Step, ...] = ()


class Piece(NamedTuple):
    """A stretch of text: an action symbol and nothing else, or text between two of them."""

    text: str
    action: int | None  # None: not an action symbol
    episode: int  # the one that the piece belongs to or opens; the query has the number K
    step: int | None  # None: between episodes


@dataclass(frozen=True, kw_only=True)
class Template:
    """How documents are written. ValueError, naming the argument, where it could not be read back."""

    name: str
    opening: str = ""  # once, before everything
    episode: str = ""  # before each episode
    step: tuple[str, ...]  # the parts of a step
    closing: str = ""  # after each demonstration
    actions: Symbols
    states: Symbols | None = None  # needed with {state}; the next two likewise
    models: Symbols | None = None
    observations: Symbols | None = None
    grammar: "Grammar" = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for argument in ("name", "opening", "episode", "step", "closing", *TABLES.values()):
            value = getattr(self, argument)
            if isinstance(value, list | tuple) and argument in ("step", *TABLES.values()):
                object.__setattr__(self, argument, value := tuple(value))
                strings = value
            elif isinstance(value, str) and argument != "step":
                strings = (value,)
            elif value is None and argument in TABLES.values() and argument != "actions":
                continue
            else:
                raise ValueError(f"{argument} must be {'a list of texts' if argument == 'step' else 'text'}, got {value!r}")
            for s in strings:
                if not isinstance(s, str) or any("\ud800" <= c <= "\udfff" for c in s):
                    raise ValueError(f"{argument} must hold text that UTF-8 can encode, got {s!r}")
        object.__setattr__(self, "grammar", Grammar(self))


class Part(NamedTuple):
    """A field and the text around it, or text alone (then it is all in front)."""

    front: str
    field: str | None
    back: str


def cut(text: str, argument: str, fields: Iterable[str]) -> Part:
    """The one place where braces are read. ValueError for two fields, for any other field and for single braces."""
    texts, found = [""], []
    for i, token in enumerate(re.split(r"(\{\{|\}\}|\{[^{}]*\}|[{}])", text)):
        if i % 2 == 0 or token in ("{{", "}}"):
            texts[-1] += token[:1] if i % 2 else token
        elif len(token) == 1 or token[1:-1] not in fields:
            known = ", ".join(f"{{{f}}}" for f in fields) or "none"
            raise ValueError(f"{argument} has {token!r} in {text!r}: fields here are {known}; a literal brace is doubled")
        else:
            found.append(token[1:-1])
            texts.append("")
    if len(found) > 1:
        raise ValueError(f"{argument} may hold one field in each text, got {text!r}")
    return Part(texts[0], found[0] if found else None, texts[-1] if found else "")


class Table:
    """The symbols of one field: names, or the index in decimal between two fixed texts."""

    def __init__(self, argument: str, symbols: Symbols | None):
        self.argument = argument
        self.names, self.front, self.back = None, "", ""
        if symbols is None:
            raise ValueError(f"{argument} are missing: step has a field that needs them")
        if isinstance(symbols, str):
            self.front, hole, self.back = cut(symbols, argument, ("",))
            if hole is None:
                raise ValueError(f"{argument} must be a list of names or a pattern with the hole {{}}, got {symbols!r}")
            return
        self.names, self.index = symbols, {name: i for i, name in enumerate(symbols)}
        if not symbols or "" in self.index:
            raise ValueError(f"{argument} must be names that are not empty, got {symbols!r}")
        if len(self.index) < len(symbols):
            twice = next(name for i, name in enumerate(symbols) if self.index[name] != i)
            raise ValueError(f"{argument} must all differ, got {twice!r} twice")

    def spell(self, index: int) -> str:
        return f"{self.front}{index}{self.back}" if self.names is None else self.names[index]

    def read(self, symbol: str) -> int:
        return int(symbol[len(self.front) : len(symbol) - len(self.back)]) if self.names is None else self.index[symbol]

    def __str__(self) -> str:
        if self.names is None:
            return f"one of the {self.argument} ({self.spell(0)!r}, {self.spell(1)!r}, ...)"
        return f"one of the {len(self.names)} {self.argument} ({', '.join(map(repr, self.names[:4]))}{', ...' * (len(self.names) > 4)})"


NON_ZERO, DIGITS = "123456789", "0123456789"
FLOAT = (  # from, characters, to; a number starts at "" and may end where the node's name ends in "!"
    *(("", "-", "minus"), ("", "0", "integer"), ("minus", "0", "integer"), ("", NON_ZERO, "digit"), ("minus", NON_ZERO, "digit")),
    *(("digit", DIGITS, "digits"), ("digits", DIGITS, "digits"), ("digit", ".", "point"), ("digits", ".", "point")),
    *(("integer", ".", "point"), ("point", "0", "zero!"), ("point", NON_ZERO, "fraction!"), ("zero!", "0", "zeros")),
    *(("zero!", NON_ZERO, "fraction!"), ("zeros", "0", "zeros"), ("zeros", NON_ZERO, "fraction!"), ("fraction!", "0", "zeros")),
    *(("fraction!", NON_ZERO, "fraction!"), ("fraction!", "e", "e"), ("digit", "e", "e"), ("e", "+-", "sign")),
    *(("sign", DIGITS, "ten"), ("ten", DIGITS, "two!"), ("two!", DIGITS, "three!")),
)


class Grammar:
    """The automaton of a template (module docstring) and its texts with the braces read."""

    def __init__(self, template: Template):
        opening, episode, closing = (cut(getattr(template, a), a, ()).front for a in ("opening", "episode", "closing"))
        self.opening, self.turn = opening + episode, closing + episode
        if not self.turn:
            raise ValueError("closing and episode must not both be empty: nothing would part one episode from the next")
        parts = [cut(part, "step", FIELDS) for part in template.step]
        self.shown = [part.field for part in parts if part.field is not None]
        if len(set(self.shown)) < len(self.shown) or "action" not in self.shown:
            raise ValueError(f"step must hold {{action}} once and every other field at most once, got {template.step!r}")
        k = next(i for i, part in enumerate(parts) if part.field == "action")
        if {part.field for part in parts[:k]} - {"state", None} or "state" in (part.field for part in parts[k:]):
            raise ValueError(f"step must hold {{state}} before {{action}} and all other fields after it, got {template.step!r}")
        self.before = [*parts[:k], Part(parts[k].front, None, "")]
        self.after = [Part(parts[k].back, None, ""), *parts[k + 1 :]]
        bare = "".join(part.front for part in self.before if part.field is None)
        if not bare:
            raise ValueError(f"step must have text, in a part without {{state}}, before {{action}}, got {template.step!r}")
        if bare.endswith(" ") or "".join(f"{p.front}{p.field}{p.back}" if p.field else p.front for p in self.before).endswith(" "):
            raise ValueError(f"step must not have a space just before {{action}}: it belongs to the actions, got {template.step!r}")
        self.tables = {f: Table(TABLES[f], getattr(template, TABLES[f])) for f in TABLES if f in self.shown}
        for field, argument in TABLES.items():
            if field not in self.shown and getattr(template, argument) is not None:
                raise ValueError(f"{argument} are given, but step has no {{{field}}}")
        self.build()
        if found := self.two_readings():
            text, *paths = found
            first, second = (self.describe(text, path) for path in paths)
            raise ValueError(f"template {template.name!r} is ambiguous: {text!r} can be read as {first} and as {second}")

    # --- the automaton: a node is a number, what leads to it is one kind of character

    def node(self, what: str, field: str | None = None, before: bool = False) -> int:
        self.moves.append({})
        self.what.append(what)
        self.field.append(field)
        self.is_before.append(before)
        return len(self.moves) - 1

    def link(self, sources: Iterable[int], characters: str, target: int) -> None:
        for source in sources:
            for c in characters:
                self.moves[source].setdefault(c, []).append(target)

    def chain(self, sources: set[int], text: str, what: str, field: str | None = None, before: bool = False) -> set[int]:
        for c in text:
            target = self.node(what, field, before)
            self.link(sources, c, target)
            sources = {target}
        return sources

    def symbols(self, sources: set[int], field: str, before: bool) -> set[int]:
        """All symbols of a field, from any of the sources; where they end."""
        if field == "reward":
            nodes = {name: self.node("a reward", field) for name in dict.fromkeys(target for *_, target in FLOAT)}
            for source, characters, target in FLOAT:
                self.link([nodes[source]] if source else sources, characters, nodes[target])
            return {node for name, node in nodes.items() if name.endswith("!")}
        table = self.tables[field]
        if table.names is None:
            sources = self.chain(sources, table.front, str(table), field, before)
            zero, loop = (self.node(str(table), field, before) for _ in range(2))
            self.link(sources, "0", zero)
            self.link([*sources], NON_ZERO, loop)
            self.link([loop], DIGITS, loop)
            return self.chain({zero, loop}, table.back, str(table), field, before)
        end = self.node(str(table), field, before)
        tree: dict[str, set[int]] = {"": sources}
        for name in table.names:
            for k in range(1, len(name)):
                if name[:k] not in tree:
                    tree[name[:k]] = self.chain(tree[name[: k - 1]], name[k - 1], str(table), field, before)
            self.link(tree[name[:-1]], name[-1], end)
        return {end}

    def sequence(self, sources: set[int], parts: list[Part], before: bool) -> set[int]:
        for front, field, back in parts:
            ends = self.chain(sources, front, repr(front), None, before)
            if field is not None:
                ends = self.chain(self.symbols(ends, field, before), back, repr(back), None, before)
            sources = ends if field is None else ends | sources
        return sources

    def build(self) -> None:
        self.moves: list[dict[str, list[int]]] = []
        self.what, self.field, self.is_before = list[str](), list[str | None](), list[bool]()
        (self.fresh,) = self.chain({self.node("")}, self.opening, repr(self.opening))  # an episode begins
        asked = self.sequence({self.fresh}, self.before, True)
        ends = self.sequence(self.symbols(asked, "action", False), self.after, False)
        self.link(self.chain({self.fresh}, self.turn[:-1], repr(self.turn)), self.turn[-1], self.fresh)
        for end in ends:
            for c, targets in self.moves[self.fresh].items():
                self.moves[end].setdefault(c, []).extend(targets)
        self.accepting = {self.fresh} | ends | asked

    def two_readings(self) -> tuple[str, list[int], list[int]] | None:
        """A shortest text with two accepting paths, and these; None where there is none."""
        came: dict[tuple[int, int, bool], Any] = {(0, 0, False): None}
        queue = deque(came)
        while queue:
            here = p, q, parted = queue.popleft()
            if parted and (p == q or {p, q} <= self.accepting):
                walk: list[tuple[str, int, int]] = []
                while came[here]:
                    walk.append((came[here][1], here[0], here[1]))
                    here = came[here][0]
                walk[:0] = reversed([(c, v, v) for c, v in self.way_out(p)] if p == q else [])
                return "".join(c for c, *_ in reversed(walk)), [0, *(v for _, v, _ in walk[::-1])], [0, *(w for *_, w in walk[::-1])]
            for c in self.moves[p].keys() & self.moves[q].keys():
                for v in self.moves[p][c]:
                    for w in self.moves[q][c]:
                        if (following := (v, w, parted or v != w)) not in came:
                            came[following] = (here, c)
                            queue.append(following)
        return None

    def way_out(self, node: int) -> list[tuple[str, int]]:
        """A shortest way from a node to an accepting one."""
        ways, queue = {node: list[tuple[str, int]]()}, deque([node])
        while (here := queue.popleft()) not in self.accepting:
            for c, targets in self.moves[here].items():
                for v in targets:
                    if v not in ways:
                        ways[v] = [*ways[here], (c, v)]
                        queue.append(v)
        return ways[here]

    def spans(self, path: list[int]) -> list[list[dict[str, tuple[int, int]]]]:
        """Where the fields of every step of every episode are in the text of a path."""
        episodes: list[list[dict[str, tuple[int, int]]]] = [[]]
        for i in range(len(self.opening), len(path) - 1):
            here, following = path[i], path[i + 1]
            if following == self.fresh:
                episodes.append([])
            elif self.is_before[following] and not self.is_before[here]:
                episodes[-1].append({})
            if field := self.field[following]:
                start, _ = episodes[-1][-1].get(field, (i, i))
                episodes[-1][-1][field] = start, i + 1
        return episodes

    def describe(self, text: str, path: list[int]) -> str:
        steps = [["(" + " ".join(f"{f} {text[i:j]!r}" for f, (i, j) in s.items()) + ")" for s in e] for e in self.spans(path)]
        return "[" + " | ".join(" ".join(e) for e in steps) + "]"

    def expected(self, nodes: Iterable[int]) -> str:
        following = dict.fromkeys(self.what[v] for u in nodes for targets in self.moves[u].values() for v in targets)
        return " or ".join([*following, *["the end"] * any(u in self.accepting for u in nodes)])
