"""Docstrings of lindm as reStructuredText: fields of data classes with their comments, formulas and doctests as they stand.

Docstrings are plain text in the style of Google, with code between single backticks. Formulas have characters that mean something
else in reStructuredText, so these are escaped outside of code; an indented block after a line that ends in a colon is literal.
"""

import ast
import dataclasses
import inspect
import re
import textwrap

from lindm.cli.option_parser import field_docs

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Example|Examples|Note|Notes):$")
SPECIAL = re.compile(r"([*|\\])|(?<=\w)(_)(?!\w)")


def escape(line: str) -> str:
    """Escape what reStructuredText would read as markup, outside of `code`."""
    parts = line.split("`")
    return "`".join(SPECIAL.sub(r"\\\g<0>", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def markup(lines: list[str]) -> list[str]:
    """The docstring with its formulas and doctests kept from reStructuredText."""
    made: list[str] = []
    literal_above = doctest = None  # the indentation of the line that a literal block belongs to; whether a doctest runs
    for number, line in enumerate(lines):
        if not line.strip():
            doctest = None
            made.append(line)
            continue
        if literal_above is not None and indent(line) <= literal_above:
            literal_above = None
        if literal_above is not None:
            made.append(line)
            continue
        doctest = doctest or line.lstrip().startswith(">>>")
        if doctest:
            made.append(line)
            continue
        after = lines[number + 1 : number + 3]
        if line.rstrip().endswith((":", ",")) and not SECTION.match(line.strip()) and opens_literal(line, after):
            literal_above = indent(line)
            made += [escape(line), *([] if line.rstrip().endswith(":") else [""])]
            made[-1 if line.rstrip().endswith(":") else -2] += ":" if line.rstrip().endswith(":") else " ::"
            continue
        made.append(escape(line))
    return made


def opens_literal(line: str, after: list[str]) -> bool:
    return len(after) == 2 and not after[0].strip() and bool(after[1].strip()) and indent(after[1]) > indent(line)


def field_notes(owner: type) -> dict[str, str]:
    """Fields of a data class -> the comment beside the field, or the sentence below it."""
    source = textwrap.dedent(inspect.getsource(owner))
    return field_docs(source, ast.parse(source).body[0])


def process_docstring(app, what, name, obj, options, lines):
    if what == "class" and dataclasses.is_dataclass(obj):
        notes = {
            f: n for owner in reversed(obj.__mro__) if dataclasses.is_dataclass(owner) for f, n in field_notes(owner).items()
        }
        documented = [f.name for f in dataclasses.fields(obj) if not f.name.startswith("_") and notes.get(f.name)]
        if documented and "Attributes:" not in lines:
            lines += ["", "Attributes:", *(f"  {field}: {notes[field]}" for field in documented)]
    lines[:] = markup(lines)


def setup(app):
    app.connect("autodoc-process-docstring", process_docstring, priority=100)  # before napoleon
    return {"parallel_read_safe": True}
