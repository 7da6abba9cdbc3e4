r"""Episodes as text, and back: documents are parsed exactly, and the positions of their actions are known by construction.

A document is K demonstrations and a query, the episode in progress. A `Template` (data, never code) defines its text:

    opening  ( episode  step*  closing )^K  episode  step*  [ open step: a step up to its action ]

The query is never closed, so the pieces of a history are the first pieces of each of its continuations. Tokenized piece by
piece, so are its tokens, and one key-value cache of the demonstrations serves every query. An action symbol contains its own
leading space, because most byte-pair vocabularies have " A" as one token; no space may stand in front of {action}.

`step` is a list of parts with at most one field each: {state} and {legal}, the list of legal actions, in front of {action};
{model}, {observation}, {reward} behind it. `legal` is a part with {legal} that steps have only where some actions are not legal.
A part with a field is left out where the step does not have that field. A part without a field, and the part of the action, are
always written; an open step ends where the symbol of the action would start. So one template serves MDPs, POMDPs and ambiguous
POMDPs, with rewards or without. Symbols are names, taken literally, or a pattern such as "s{}" whose hole is the index in
decimal; a literal brace is doubled except in names. Rewards are written by `repr`, so every bit is preserved.

A template is refused when it is built if one of its texts could be read in two ways (criterion and proof: `grammar.py`).
"""

import dataclasses
import json
import operator
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lindm.errors import DataError, unknown
from lindm.io import inputs, limits
from lindm.text.grammar import FIELDS, SYMBOL_ARGUMENTS, Grammar, Part, Symbols, split_field


@dataclass(frozen=True, slots=True)
class Step:
    """One decision. None for what the problem does not have or the text does not show."""

    action: int | None  # None in an open step, which is the last step of a query
    state: int | None = None  # observed before the action
    model: int | None = None  # the model that nature took, after the action
    observation: int | None = None  # after the action
    reward: float | None = None
    legal: tuple[int, ...] | None = None  # the actions that were legal, rising


@dataclass(frozen=True, slots=True)
class Document:
    """Demonstrations and the episode in progress, which may be empty and may end in an open step."""

    demonstrations: tuple[tuple[Step, ...], ...] = ()
    query: tuple[Step, ...] = ()


class Piece(NamedTuple):
    """An action symbol and nothing else, or text between two of them as far as it belongs to one step."""

    text: str
    action: int | None  # None: not an action symbol
    episode: int  # the one that the piece is in, or opens; the query is number K
    step: int | None  # None: not in a step


@dataclass(frozen=True, kw_only=True)
class Template:
    """How documents are written. ValueError, naming the argument, if they could not be parsed exactly."""

    name: str
    opening: str = ""  # once, before everything
    episode: str = ""  # before every episode
    step: tuple[str, ...]  # the parts of a step
    closing: str = ""  # after every demonstration
    actions: Symbols
    states: Symbols | None = None  # with {state}, and only then; the next two likewise
    models: Symbols | None = None
    observations: Symbols | None = None
    legal: str | None = None  # the part of a step that shows the legal actions, {legal}, of problems in which others are not
    grammar: Grammar = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for argument in ("name", "opening", "episode", "closing", "step", *SYMBOL_ARGUMENTS.values(), "legal"):
            value = getattr(self, argument)
            if value is None and argument in ("states", "models", "observations", "legal"):
                continue
            if isinstance(value, list | tuple) and argument in ("step", *SYMBOL_ARGUMENTS.values()):
                texts = tuple(value)
                object.__setattr__(self, argument, texts)  # a list may come from a file
            elif argument == "step":
                raise ValueError(f"step must be a list of texts, got {value!r}")
            else:
                texts = (value,)
            if not all(isinstance(t, str) and t == t.encode(errors="replace").decode() for t in texts):
                raise ValueError(f"{argument} must contain text, and only what UTF-8 can encode, got {value!r}")
        symbols = {field: getattr(self, argument) for field, argument in SYMBOL_ARGUMENTS.items()}
        grammar = Grammar(self.name, self.opening, self.episode, self.step, self.closing, symbols)
        object.__setattr__(self, "grammar", grammar)
        if self.legal is not None and (split_field(self.legal, "legal", ("legal",)).field is None or "legal" in grammar.fields):
            raise ValueError(f"legal must contain {{legal}}, and step must then not contain it, got {self.legal!r}")

    def with_legal_actions(self) -> "Template":
        """The template whose steps have the part `legal`, after the state or just before the action; unchanged without it."""
        if self.legal is None:
            return self
        fields = [split_field(part, "step", FIELDS).field for part in self.step]
        place = fields.index("state") + 1 if "state" in fields else fields.index("action")
        return dataclasses.replace(self, step=(*self.step[:place], self.legal, *self.step[place:]), legal=None)

    def action_symbol(self, action: int) -> str:
        """How an action is written; ValueError for an index without a symbol."""
        return self.grammar.write("action", action, "query[0]")


def render(document: Document, template: Template) -> tuple[Piece, ...]:
    """The pieces of a document, none of them empty. The pieces of a history are the first pieces of each of its continuations.

    ValueError names the step that has a field which the template does not show, an index without a symbol, a reward that is not
    finite, or no action although it is not the last step of the query.
    """
    grammar, last = template.grammar, len(document.demonstrations)
    pieces = []
    for e, steps in enumerate((*document.demonstrations, document.query)):
        pieces.append(Piece(grammar.separator if e else grammar.opening, None, e, None))
        for t, step in enumerate(steps):
            where = f"query[{t}]" if e == last else f"demonstrations[{e}][{t}]"
            has = {field for field in FIELDS if getattr(step, field) is not None}
            if unknown := has - grammar.fields:
                raise ValueError(f"{where}.{min(unknown)} has no place in the steps of template {template.name!r}, got {step}")
            pieces.append(Piece(_write(grammar, grammar.before, step, where), None, e, t))
            if step.action is not None:
                pieces.append(Piece(grammar.write("action", step.action, where), operator.index(step.action), e, t))
                pieces.append(Piece(_write(grammar, grammar.after, step, where), None, e, t))
            elif e < last or t < len(steps) - 1 or has - {"state", "legal"}:
                raise ValueError(f"{where}.action may be None in the last step of the query only, nothing after it, got {step}")
    return tuple(piece for piece in pieces if piece.text)


def _write(grammar: Grammar, parts: list[Part], step: Step, where: str) -> str:
    """The text of some parts of a step."""
    texts = []
    for front, field, back in parts:
        value = getattr(step, field) if field else None
        if not field or value is not None:
            texts += [front, grammar.write(field, value, where) if field else "", back]
    return "".join(texts)


def text(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def action_spans(pieces: Iterable[Piece]) -> list[tuple[int, int, int, int]]:
    """(start, end, episode, step) of every action symbol, in characters of the text."""
    spans, end = [], 0
    for piece in pieces:
        start, end = end, end + len(piece.text)
        if piece.action is not None:
            spans.append((start, end, piece.episode, piece.step))
    return spans


def parse(text: str, template: Template) -> Document:
    """The one document with this text. ValueError "line:column: expected ..., got ..." where there is none."""
    *demonstrations, query = (
        tuple(Step(**{"action": None} | fields) for fields in episode) for episode in template.grammar.read(text)
    )
    return Document(tuple(demonstrations), query)


def load_template(path: str | Path) -> Template:
    """A template from a JSON or TOML file with the arguments of `Template`. DataError, with path:line, where it is not one."""
    path, source = Path(path), ""
    arguments = [field.name for field in dataclasses.fields(Template) if field.init]
    try:
        source = inputs.read_text(path, limits.TEXT_TEMPLATE_FILE)
        given = tomllib.loads(source) if path.suffix == ".toml" else json.loads(source, object_pairs_hook=_once)
        if not isinstance(given, dict):
            raise ValueError(f"a template must be an object with {', '.join(arguments)}, got {type(given).__name__}")
        for name in given.keys() - arguments:
            raise ValueError(f"{name} is not an argument of a template; its arguments are {', '.join(arguments)}")
        if missing := {"name", "step", "actions"} - given.keys():
            raise ValueError(f"a template must have {', '.join(sorted(missing))}")
        return Template(**given)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}:{_line(source, e)}: {e}") from e


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    if len(given) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return given


def _line(source: str, error: Exception) -> int:
    """The line that an error is about: its own, or that of the argument which its message begins with, or the first."""
    if isinstance(error, json.JSONDecodeError | tomllib.TOMLDecodeError):
        return int(match[1]) if (match := re.search(r"line (\d+)", str(error))) else source.count("\n") + 1
    argument = re.escape(str(error).partition(" ")[0])
    match = re.search(rf"""(?<!\\)"{argument}"\s*:|^\s*["']?{argument}["']?\s*=""", source, re.MULTILINE)
    return source.count("\n", 0, match.end()) + 1 if match else 1


_SHIPPED = {path.stem: path for path in sorted((Path(__file__).parents[1] / "templates").glob("*.json"))}
COMPACT, READABLE = load_template(_SHIPPED["compact"]), load_template(_SHIPPED["readable"])
FAMILY_TEMPLATES = tuple(name for name in _SHIPPED if name not in ("compact", "readable"))
"""Templates that name the things of one family of problems; a text then has the problem's own names."""


def find_template(template: str | Template | None) -> Template | None:
    """A template by its name (compact, readable or a family's) or by the path of its file.

    Raises:
      ValueError: neither a name nor a file.
      DataError: the file holds no template.
    """
    if not isinstance(template, str):
        return template
    if template in _SHIPPED:
        return load_template(_SHIPPED[template])
    if not Path(template).suffix and not Path(template).exists():
        raise ValueError(unknown("template", template, (*_SHIPPED, "a JSON or TOML file")))
    return load_template(template)
