r"""The grammar of a template: which texts it writes, and a proof that each has one reading.

The template becomes a nondeterministic automaton over characters, without empty moves: a chain for a text, a tree for a list of
names, a loop for the digits of an index, and for rewards an automaton that accepts slightly more than `repr` writes,

    -?(0|[1-9][0-9]*)\.(0|[0-9]*[1-9])(e[+-][0-9]{2,3})?   or   -?[1-9]e[+-][0-9]{2,3}.

One loop over steps and over the texts that separate episodes reads demonstrations and the query alike; a text may end where a
step may begin, and just before an action. So a document is an accepting path with its characters. Two different documents
differ in one of the two, because (i) every step has text in front of its action, so that an open step differs from no step and
two steps are never adjacent, and (ii) closing and episode are not both empty. So two documents have the same text only if two
accepting paths do; then the product of the automaton with itself has a path from the pair of starts, over a pair of different
nodes, to a pair of accepting nodes. A template with such a path is refused, and the error shows the text of a shortest one.

Without such a path the text read so far reaches every node on at most one path (each node leads on to an accepting one).
Parsing keeps, for each reached node, the node before it, and needs no search: a text of n characters takes O(n) steps.
"""

import math
import operator
import re
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

SYMBOL_ARGUMENTS = {"state": "states", "action": "actions", "model": "models", "observation": "observations"}
FIELDS = (*SYMBOL_ARGUMENTS, "reward", "legal")
LIST_SEPARATOR = ","  # between the symbols of the actions that are legal
Symbols = tuple[str, ...] | str
Spans = list[list[dict[str, tuple[int, int]]]]  # where each field of each step of each episode is


class Ambiguous(ValueError):
    """A template has a text with two readings."""


class Part(NamedTuple):
    """A field and the text around it, or text alone (then all of it is in front)."""

    front: str
    field: str | None
    back: str


def split_field(text: str, argument: str, fields: Iterable[str]) -> Part:
    """A text cut at its field. ValueError for a single brace, a second field, or a field that is not in `fields`."""
    texts, names = [""], []
    for i, token in enumerate(re.split(r"(\{\{|\}\}|\{[^{}]*\}|[{}])", text)):
        if i % 2 == 0 or token in ("{{", "}}"):
            texts[-1] += token[0] if i % 2 else token
        elif len(token) == 1 or token[1:-1] not in fields or names:
            rule = f"one of {' '.join(f'{{{f}}}' for f in fields)} in each text" if fields else "no fields"
            raise ValueError(f"{argument} may hold {rule}, and literal braces doubled, got {token!r} in {text!r}")
        else:
            names.append(token[1:-1])
            texts.append("")
    return Part(texts[0], names[0], texts[1]) if names else Part(texts[0], None, "")


class SymbolTable:
    """The symbols of one field: names, or the index in decimal between two fixed texts."""

    def __init__(self, argument: str, symbols: Symbols | None):
        self.argument, self.front, self.back = argument, "", ""
        self.names = symbols if isinstance(symbols, tuple) else None
        if symbols is None:
            raise ValueError(f"{argument} must be given: step has a field that needs them")
        if isinstance(symbols, str):
            self.front, hole, self.back = split_field(symbols, argument, ("",))
            if hole is None:
                raise ValueError(f"{argument} must be a list of names or a pattern with the hole {{}}, got {symbols!r}")
        elif not symbols or "" in symbols or len(set(symbols)) < len(symbols):
            raise ValueError(f"{argument} must be names that are not empty and differ from each other, got {symbols!r}")
        else:
            self.index = {name: i for i, name in enumerate(symbols)}

    def write(self, index: int) -> str:
        return f"{self.front}{index}{self.back}" if self.names is None else self.names[index]

    def read(self, symbol: str) -> int:
        return int(symbol[len(self.front) : len(symbol) - len(self.back)]) if self.names is None else self.index[symbol]

    def __str__(self) -> str:
        some = [self.write(i) for i in range(4 if self.names is None else min(4, len(self.names)))]
        more = self.names is None or len(some) < len(self.names)
        return f"one of the {self.argument} {', '.join(map(repr, some))}{', ...' * more}"


# numerals: (from, characters, to); they start at "" and may end where the name of a node ends in "!"
NONZERO, DIGITS = "123456789", "0123456789"
INDEX = (("", "0", "zero!"), ("", NONZERO, "more!"), ("more!", DIGITS, "more!"))
REWARD = (
    *(("", "-", "minus"), ("", "0", "zero"), ("minus", "0", "zero"), ("", NONZERO, "digit"), ("minus", NONZERO, "digit")),
    *(("digit", DIGITS, "digits"), ("digits", DIGITS, "digits"), ("zero", ".", "."), ("digit", ".", "."), ("digits", ".", ".")),
    *((".", "0", ".0!"), (".", NONZERO, ".1!"), (".0!", "0", ".00"), (".0!", NONZERO, ".1!"), (".00", "0", ".00")),
    *((".00", NONZERO, ".1!"), (".1!", "0", ".00"), (".1!", NONZERO, ".1!"), (".0!", "e", "e"), (".1!", "e", "e")),
    *(("digit", "e", "e"), ("e", "+-", "sign"), ("sign", DIGITS, "ten"), ("ten", DIGITS, "two!"), ("two!", DIGITS, "three!")),
)


class Grammar:
    """Writes and parses the texts of a template. ValueError, naming the argument, where a text could have two readings."""

    def __init__(
        self, name: str, opening: str, episode: str, step: tuple[str, ...], closing: str, symbols: dict[str, Symbols | None]
    ):
        texts = {"opening": opening, "episode": episode, "closing": closing}
        texts = {argument: split_field(text, argument, ()).front for argument, text in texts.items()}
        self.opening, self.separator = texts["opening"] + texts["episode"], texts["closing"] + texts["episode"]
        if not self.separator:
            raise ValueError("closing and episode must not both be empty: nothing would separate one episode from the next")
        parts = [split_field(part, "step", FIELDS) for part in step]
        fields = [part.field for part in parts if part.field]
        k = next((i for i, part in enumerate(parts) if part.field == "action"), -1)
        in_front = [part.field for part in parts[:k] if part.field]
        led = set(in_front) <= {"state", "legal"} and not {"state", "legal"} & {part.field for part in parts[k + 1 :]}
        if k < 0 or not led or len(set(fields)) < len(fields):
            rule = "{action} once, {state} and {legal} at most once and before it, every other field at most once and after it"
            raise ValueError(f"step must contain {rule}, got {step!r}")
        self.fields = frozenset(fields)
        self.before = [*parts[:k], Part(parts[k].front, None, "")]
        self.after = [Part(parts[k].back, None, ""), *parts[k + 1 :]]
        always = "".join(part.front for part in self.before if not part.field)
        if not always:
            raise ValueError(f"step must have text that stands before {{action}} without {{state}} too, got {step!r}")
        if always.endswith(" ") or "".join(part.front + (part.field or "") + part.back for part in self.before).endswith(" "):
            raise ValueError(f"step must not have a space just before {{action}}: it belongs to the actions, got {step!r}")
        for field, argument in SYMBOL_ARGUMENTS.items():
            if field not in fields and symbols[field] is not None:
                raise ValueError(f"{argument} must not be given: step has no {{{field}}}")
        self.tables = {
            field: SymbolTable(SYMBOL_ARGUMENTS[field], symbols[field]) for field in SYMBOL_ARGUMENTS if field in fields
        }
        names = self.tables["action"].names or ()
        if "legal" in fields and any(LIST_SEPARATOR in name for name in names):
            raise ValueError(f"actions must have no {LIST_SEPARATOR!r} where step has {{legal}}, a list of them; got {names!r}")
        self._build()
        if ambiguity := self._find_ambiguity():
            one, other = (self._describe_reading(ambiguity[0], path) for path in ambiguity[1:])
            raise Ambiguous(f"template {name!r} is ambiguous: {ambiguity[0]!r} can be read as {one} and as {other}")

    # --- values and symbols

    def write(self, field: str, value: Any, where: str) -> str:
        """The symbol of a value; ValueError, naming `where` it is, if it has none."""
        if field == "reward":
            try:
                finite = math.isfinite(value)
            except (TypeError, OverflowError):
                finite = False
            if not finite:
                raise ValueError(f"{where}.reward must be a finite number, got {value!r}")
            return repr(float(value))
        if field == "legal":
            if not value:
                raise ValueError(f"{where}.legal must be at least one action, got {value!r}")
            return LIST_SEPARATOR.join(self.write("action", action, where) for action in value)
        table = self.tables[field]
        try:
            index = operator.index(value)
        except TypeError:
            raise ValueError(f"{where}.{field} must be an integer, got {value!r}") from None
        size = len(table.names) if table.names else 10**18  # a pattern has no last symbol; numerals stay within 64 bits
        if not 0 <= index < size:
            raise ValueError(f"{where}.{field} must be an index of {table.argument}, which has {size} symbols, got {index}")
        return table.write(index)

    def read(self, text: str) -> list[list[dict[str, Any]]]:
        """The fields of every step of every episode, the query last. ValueError "line:column: expected ..., got ..."."""
        links: list[dict[int, int]] = [{0: 0}]  # the nodes that the text so far reaches, each with the one before it
        for i, c in enumerate(text):
            links.append({v: u for u in links[-1] for v in self.moves[u].get(c, ())})
            if not links[-1]:
                raise self._syntax_error(text, i, self._expected(links[-2]))
        path = [node for node in links[-1] if node in self.accepting]
        if not path:
            raise self._syntax_error(text, len(text), self._expected(links[-1]))
        for link in reversed(links[1:]):
            path.append(link[path[-1]])
        episodes = self._spans(path[::-1])
        return [[{field: self._value(text, field, *span) for field, span in step.items()} for step in e] for e in episodes]

    def _value(self, text: str, field: str, start: int, end: int) -> int | float | tuple[int, ...]:
        symbol = text[start:end]
        try:
            if field == "legal":
                value = tuple(map(self.tables["action"].read, symbol.split(LIST_SEPARATOR)))
            else:
                value = float(symbol) if field == "reward" else self.tables[field].read(symbol)
            if self.write(field, value, "") == symbol:
                return value
        except ValueError:  # no value has this symbol
            pass
        raise self._syntax_error(text, start, [self._describe_field(field)])

    def _describe_field(self, field: str) -> str:
        if field == "legal":
            return f"some of the actions, {self.tables['action']}"
        return str(self.tables.get(field, "a finite number as `repr` writes it"))

    def _syntax_error(self, text: str, i: int, expected: Iterable[str]) -> ValueError:
        place = f"{text.count(chr(10), 0, i) + 1}:{i - text.rfind(chr(10), 0, i)}"
        got = repr(text[i : i + 12]) if i < len(text) else "the end of the text"
        return ValueError(f"{place}: expected {' or '.join(dict.fromkeys(expected))}, got {got}")

    def _expected(self, nodes: Iterable[int]) -> list[str]:
        """Descriptions of what may come next."""
        words = [self.incoming[v][0] for u in nodes for targets in self.moves[u].values() for v in targets]
        return [*words, *["the end of the text"] * any(u in self.accepting for u in nodes)]

    # --- the automaton: `moves[node][character]` are the next nodes; `incoming[node]` describes the character to a node:
    # (words for an error message, its field or None, whether it is before the action of a step)

    def _node(self, words: str, field: str | None, before: bool) -> int:
        self.moves.append({})
        self.incoming.append((words, field, before))
        return len(self.moves) - 1

    def _link(self, sources: Iterable[int], characters: str, target: int) -> None:
        for source in sources:
            for c in characters:
                self.moves[source].setdefault(c, []).append(target)

    def _chain(self, sources: set[int], text: str, words: str, field: str | None = None, before: bool = False) -> set[int]:
        """One node for each character, linked from all sources; returns the last nodes."""
        for c in text:
            target = self._node(words, field, before)
            self._link(sources, c, target)
            sources = {target}
        return sources

    def _symbols(self, sources: set[int], field: str, before: bool) -> set[int]:
        """Every symbol of a field, linked from all sources; returns the last nodes."""
        if field == "legal":
            again = self._node(repr(LIST_SEPARATOR), field, before)
            ends = self._symbols_of(self.tables["action"], sources | {again}, field, before)
            self._link(ends, LIST_SEPARATOR, again)
            return ends
        return self._symbols_of(self.tables.get(field), sources, field, before)

    def _symbols_of(self, table: SymbolTable | None, sources: set[int], field: str, before: bool) -> set[int]:
        """The symbols of a table, or without one the numerals of rewards."""
        words = self._describe_field(field)
        if table and table.names:
            tree, end = {"": sources}, self._node(words, field, before)
            for name in table.names:
                for k in range(1, len(name)):
                    if name[:k] not in tree:
                        tree[name[:k]] = self._chain(tree[name[: k - 1]], name[k - 1], words, field, before)
                self._link(tree[name[:-1]], name[-1], end)
            return {end}
        front, numeral, back = (table.front, INDEX, table.back) if table else ("", REWARD, "")
        sources = self._chain(sources, front, words, field, before)
        nodes = {name: self._node(words, field, before) for name in dict.fromkeys(target for *_, target in numeral)}
        for source, characters, target in numeral:
            self._link([nodes[source]] if source else sources, characters, nodes[target])
        return self._chain({node for name, node in nodes.items() if name.endswith("!")}, back, words, field, before)

    def _sequence(self, sources: set[int], parts: list[Part], before: bool) -> set[int]:
        """Parts in sequence; a part with a field is optional."""
        for front, field, back in parts:
            ends = self._chain(sources, front, repr(front), None, before)
            if field:
                ends = self._chain(self._symbols(ends, field, before), back, repr(back), None, before) | sources
            sources = ends
        return sources

    def _build(self) -> None:
        self.moves: list[dict[str, list[int]]] = []
        self.incoming: list[tuple[str, str | None, bool]] = []
        (step_start,) = self._chain(
            {self._node("", None, False)}, self.opening, repr(self.opening)
        )  # the first episode starts here
        open_ends = self._sequence({step_start}, self.before, True)
        ends = self._sequence(self._symbols(open_ends, "action", False), self.after, False)
        (self.episode_start,) = self._chain({step_start}, self.separator, repr(self.separator))  # every other episode starts here
        for end in (*ends, self.episode_start):  # a step or an episode start continues as the opening does
            for c, targets in self.moves[step_start].items():
                self.moves[end].setdefault(c, []).extend(targets)
        self.accepting = {step_start, self.episode_start} | open_ends | ends

    def _find_ambiguity(self) -> tuple[str, list[int], list[int]] | None:
        """A shortest text with two accepting paths, and the two paths; None if every text has one path."""
        previous: dict[tuple[int, int, bool], Any] = {(0, 0, False): None}
        queue = deque(previous)
        while queue:
            here = p, q, parted = queue.popleft()
            if parted and {p, q} <= self.accepting:
                way = [(here, "")]
                while previous[way[-1][0]]:
                    way.append(previous[way[-1][0]])
                way.reverse()
                return "".join(c for _, c in way), [p for (p, _, _), _ in way], [q for (_, q, _), _ in way]
            for c in (c for c in self.moves[p] if c in self.moves[q]):
                for v in self.moves[p][c]:
                    for w in self.moves[q][c]:
                        if (following := (v, w, parted or v != w)) not in previous:
                            previous[following] = here, c
                            queue.append(following)
        return None

    def _spans(self, path: list[int]) -> Spans:
        episodes: Spans = [[]]
        for i in range(len(self.opening), len(path) - 1):
            here, following = path[i], path[i + 1]
            _, field, before = self.incoming[following]
            if following == self.episode_start:
                episodes.append([])
            elif before and not self.incoming[here][2]:
                episodes[-1].append({})
            if field:
                step = episodes[-1][-1]
                step[field] = step.get(field, (i, i))[0], i + 1
        return episodes

    def _describe_reading(self, text: str, path: list[int]) -> str:
        def brief(step: dict[str, tuple[int, int]]) -> str:
            return "(" + " ".join(f"{field} {text[i:j]!r}" for field, (i, j) in step.items()) + ")"

        return " then ".join("[" + " ".join(map(brief, episode)) + "]" for episode in self._spans(path))
