"""A command line from dataclasses: every field is an option, and the string below the field is its help text.

Nothing heavy is imported here. Parsing is done by argparse; a misspelled option or choice is answered with the nearest one.
"""

import argparse
import ast
import inspect
import math
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

from lindm.errors import UsageError, did_you_mean, unknown

MIN_WIDTH, MAX_WIDTH = 40, 100  # columns of a help page
NO_DEFAULT = object()
OTHER_NAMES = {  # of options in other programs that train language models, and in another command
    **{"--lr": "--learning-rate", "--epochs": "--steps", "--num-epochs": "--steps", "--num-train-epochs": "--steps"},
    **{"--max-steps": "--steps", "--batch-size": "--batch", "--per-device-train-batch-size": "--batch"},
    **{"--gradient-accumulation-steps": "--accumulate", "--max-seq-length": "--max-length", "--output-dir": "--out"},
    **{"--model-name-or-path": "--model", "--dataset": "--data", "--max-new-tokens": "--max-tokens"},
    **{"--seed-offset": "--base-seed", "--base-seed": "--seed-offset"},  # of `verify` and `run`
}
LONGEST_CHOICES = 36  # characters of choices beside an option; longer ones are in its help, where lines break


class Positional(NamedTuple):
    """Marks a field as a positional argument: `Annotated[Path, Positional("DIR")]`."""

    metavar: str


class Repeated(NamedTuple):
    """Marks a tuple whose flag takes one value and may be given several times."""

    metavar: str


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option or positional argument."""

    name: str  # as in Python; the flag has hyphens
    type: Any
    default: Any = NO_DEFAULT
    help: str = ""
    mark: Positional | Repeated | None = None

    @property
    def flag(self) -> str:
        return f"--{'no-' if self.default is True else ''}{self.name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its options as a dataclass, whose docstring describes it, and the function that runs it."""

    name: str
    options: type
    run: Callable[..., int]
    rest: str = ""  # the words after a --, which `run` gets, too
    examples: tuple[str, ...] = ()
    sections: Mapping[str, str] = field(default_factory=dict)  # first field of each section of the help page -> its title
    table: tuple[str, Mapping[str, str]] | None = None  # title and rows of a table at the end of the help page

    @property
    def summary(self) -> str:
        """The first sentence of the description."""
        return inspect.getdoc(self.options).split(". ")[0].split("\n\n")[0].rstrip(".")  # pyright: ignore


# --- options from a dataclass ------------------------------------------------------------------------------------------------


def options_of(kind: type) -> list[Option]:
    """The options that the fields of a dataclass are: its own, then those of its base classes."""
    hints, docs = get_type_hints(kind, include_extras=True), {}
    for base in reversed(kind.__mro__):
        if base.__module__ != "builtins":
            source = textwrap.dedent(inspect.getsource(base))
            docs |= field_docs(source, ast.parse(source).body[0])
    defaults = {f.name: NO_DEFAULT if f.default is MISSING else f.default for f in fields(kind)}
    defaults = dict(sorted(defaults.items(), key=lambda item: item[0] not in kind.__annotations__))
    return [option(name, hints[name], default, docs.get(name, "")) for name, default in defaults.items()]


def option(name: str, hint: Any, default: Any, text: str) -> Option:
    """An option; a marker inside `Annotated` and `| None` are taken out of its type."""
    mark = None
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        mark = next((m for m in marks if isinstance(m, Positional | Repeated)), None)
    if get_origin(hint) in (Union, UnionType):
        parts = tuple(part for part in get_args(hint) if part is not NoneType)
        hint = Union[parts]  # noqa: UP007  # one part alone is that part
    return Option(name=name, type=hint, default=default, help=text, mark=mark)


def field_docs(source: str, node: ast.AST) -> dict[str, str]:
    """Field -> the string below it, or else the comment behind it, of a class in `source`."""
    docs, lines = {}, source.splitlines()
    body = getattr(node, "body", [])
    for here, below in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[here.target.id] = " ".join(below.value.value.split())
        elif here.end_lineno is not None:
            docs[here.target.id] = lines[here.end_lineno - 1][here.end_col_offset :].strip().removeprefix("#").strip()
    return docs


# --- parsing -----------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists all options")


def page_width() -> int:
    """Columns of a help page: those of the terminal, within limits."""
    return max(MIN_WIDTH, min(shutil.get_terminal_size((80, 24)).columns, MAX_WIDTH))


def wrap(text: str, indent: int = 0) -> list[str]:
    """Lines that fit a page; words are not broken."""
    return textwrap.wrap(text, page_width() - indent, break_long_words=False, break_on_hyphens=False)


def two_columns(rows: Mapping[str, str]) -> list[str]:
    """Lines of a table of two columns, the second wrapped; on a narrow page, the text is below the name."""
    indent = max(map(len, rows)) + 4
    if indent > page_width() // 2:
        return [line for name, text in rows.items() for line in (f"  {name}", *(f"      {part}" for part in wrap(text, 6)))]
    lines = []
    for name, text in rows.items():
        first, *rest = wrap(text, indent) or [""]
        lines += [f"  {name:<{indent - 2}}{first}", *(" " * indent + line for line in rest)]
    return lines


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=min(32, page_width() // 3), width=page_width())

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        def filled(paragraph: str) -> str:
            if paragraph.startswith("  ") or ":\n  " in paragraph:  # a table, or a list with its title
                return paragraph
            return textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)

        return "\n\n".join(filled(paragraph) for paragraph in text.split("\n\n"))


def _number(kind: type, rule: str) -> Callable[[str], Any]:
    def convert(word: str) -> Any:
        try:
            value = kind(word)
            if not math.isfinite(value):
                raise ValueError
            return value
        except (ValueError, OverflowError):  # a whole number can be beyond every float
            raise argparse.ArgumentTypeError(f"must be {rule}; got {word!r}") from None

    return convert


def _converter(kind: Any) -> Callable[[str], Any]:
    if kind is int:
        return _number(int, "a whole number")
    if kind is float:
        return _number(float, "a finite number")
    if kind in (str, Path):
        return kind
    if get_origin(kind) in (Union, UnionType):  # a number, or a word that stands for one
        words = [word for part in get_args(kind) if get_origin(part) is Literal for word in get_args(part)]
        number = _number(int, f"a whole number or {' or '.join(words)}")
        return lambda word: word if word in words else number(word)
    if get_origin(kind) is Literal:

        def convert(word: str) -> str:
            if word not in get_args(kind):
                raise argparse.ArgumentTypeError(unknown("", word, get_args(kind)).lstrip())
            return word

        return convert
    raise TypeError(f"no command-line option has the type {kind}")


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if get_origin(kind) in (Union, UnionType):
        return "|".join(_metavar(part).strip("{}") for part in get_args(kind))
    return {int: "INT", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def _help(option: Option) -> str:
    default = option.default
    if default is NO_DEFAULT or default is None or default == () or isinstance(default, bool) or "[default" in option.help:
        return option.help
    words = map(str, default) if isinstance(default, tuple) else [str(default)]
    return f"{option.help} [default: {' '.join(words)}]".lstrip()


def _add(group: Any, option: Option) -> None:
    """Declare an option to argparse."""
    rest: dict[str, Any] = {"help": _help(option).replace("%", "%%"), "default": argparse.SUPPRESS}
    if option.type is bool:
        group.add_argument(option.flag, dest=option.name, action=f"store_{str(option.default is not True).lower()}", **rest)
        return
    several = get_origin(option.type) is tuple
    kind = get_args(option.type)[0] if several else option.type
    rest["type"] = _converter(kind)
    rest["metavar"] = option.mark.metavar if option.mark else _metavar(kind)
    if not option.mark and len(rest["metavar"]) > LONGEST_CHOICES:
        rest["help"] = f"One of {', '.join(get_args(kind))}. {rest['help']}"
        rest["metavar"] = option.name.upper()
    needed = option.default is NO_DEFAULT
    if isinstance(option.mark, Positional):
        group.add_argument(option.name, nargs=("+" if needed else "*") if several else None if needed else "?", **rest)
        return
    if several:
        fewest = "+" if needed or not option.default else "*"  # a flag without a value would change nothing
        rest |= {"action": "append"} if isinstance(option.mark, Repeated) else {"action": "extend", "nargs": fewest}
    group.add_argument(option.flag, dest=option.name, required=needed, **rest)


def _usage(option: Option, mark: Positional) -> str:
    """A positional argument in the usage line; brackets if it is optional."""
    word = mark.metavar + (" ..." if get_origin(option.type) is tuple else "")
    return word if option.default is NO_DEFAULT else f"[{word}]"


def parser_of(
    prog: str,
    description: str,
    options: Sequence[Option],
    examples: Sequence[str] = (),
    sections: Mapping[str, str] | None = None,
    rest: str = "",
    table: tuple[str, Mapping[str, str]] | None = None,
) -> argparse.ArgumentParser:
    """A parser; its help page has the positional arguments first, then the options under their sections, a table and examples."""
    ends = ["\n".join([f"{table[0]}:", *two_columns(table[1])])] if table else []
    ends += ["\n".join(["Examples:", *(f"  {line}" for line in examples)])] if examples else []
    words = [_usage(o, o.mark) for o in options if isinstance(o.mark, Positional)]
    parser = _Parser(
        prog=prog,
        usage=" ".join(filter(None, [prog, *words, "[OPTIONS]", rest])),
        description=description,
        epilog="\n\n".join(ends) or None,
        formatter_class=_Formatter,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    arguments = parser.add_argument_group("Arguments")
    group = parser.add_argument_group("Options")
    for o in options:
        if isinstance(o.mark, Positional):
            _add(arguments, o)
            continue
        if title := (sections or {}).get(o.name):
            group = parser.add_argument_group(title)
        _add(group, o)
    group = parser.add_argument_group("Help")
    group.add_argument("-h", "--help", action="help", help="Show this page.")
    return parser


def _suggestion(flag: str, flags: Sequence[str]) -> str:
    """The option that has another name in other programs, or the nearest ones."""
    if (here := OTHER_NAMES.get(flag.replace("_", "-"))) in flags:
        counts = ", which counts steps and no epochs" if "epochs" in flag else ""
        return f"; did you mean {here}{counts}?"
    return did_you_mean(flag, flags)


def parse_options(parser: argparse.ArgumentParser, options: Sequence[Option], words: Sequence[str]) -> dict[str, Any]:
    """The values that `words` give, by name; what is not given is left out.

    Raises:
      UsageError: an option is unknown, missing, or has a value that it cannot have.
      SystemExit: after --help.
    """
    flags = [o.flag for o in options if not isinstance(o.mark, Positional)] + ["--help"]
    ahead = list(words[: words.index("--")]) if "--" in words else list(words)
    for flag in (word.partition("=")[0] for word in ahead if word.startswith("--")):
        if flag not in flags and not {"-h", "--help"} & set(ahead):
            after = (parser.usage or "").partition(" -- ")[2].lower()
            hint = f" ({after} come after a --)" if after else ""
            raise UsageError(f"{parser.prog} has no option {flag}{hint}{_suggestion(flag, flags)}")
    try:
        given, rest = parser.parse_known_intermixed_args(list(words))
    except argparse.ArgumentError as e:
        message = e.message.replace("ignored explicit argument", "takes no value; got")  # of a flag such as --json=true
        raise UsageError(f"{e.argument_name} {message}") from None
    if rest:
        raise UsageError(f"{parser.prog} does not take the argument {rest[0]!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}


def parse(command: Command, words: Sequence[str]) -> Any:
    """An instance of the command's dataclass."""
    options = options_of(command.options)
    prog, description = f"lindm {command.name}", inspect.getdoc(command.options) or ""
    parser = parser_of(prog, description, options, command.examples, command.sections, command.rest, command.table)
    return command.options(**parse_options(parser, options, words))


def run_command(command: Command, words: Sequence[str]) -> int:
    """Parse the options of a command and run it; its exit code."""
    if not command.rest:
        return command.run(parse(command, words))
    cut = list(words).index("--") if "--" in words else len(words)
    return command.run(parse(command, words[:cut]), list(words[cut + 1 :]))


# --- options from a source that is not imported -----------------------------------------------------------------------------


TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "Path": Path, "None": NoneType}


def _type(node: ast.expr) -> Any:
    """The type of an annotation; TypeError where no option can have it."""
    match node:
        case ast.Name(id=name) if name in TYPES:
            return TYPES[name]
        case ast.Constant(value=None):
            return NoneType
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _type(left) | _type(right)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, ast.Constant()])):
            return tuple[_type(item), ...]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            words = ast.literal_eval(inner)
            return Literal[words if isinstance(words, tuple) else (words,)]
    raise TypeError


def _constant(node: ast.expr) -> Any:
    """The value of a literal; its text where it is an expression."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def options_of_source(source: str, preset: str) -> list[Option]:
    """The options that the fields of a module's class `Config` are; a call `PRESET = Config(...)` in it gives the defaults.

    Raises:
      UsageError: a field has a type that no option can have.
    """
    tree = ast.parse(source)
    config = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    if config is None:
        return []
    defaults = dict(_keywords(tree, preset.upper()))
    docs = field_docs(source, config)
    options = []
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, value = node.target.id, node.value
            default = defaults.get(name, "" if value is None else _constant(value))
            try:
                hint = _type(node.annotation)
            except TypeError:
                rule = f"{', '.join(TYPES)}, Literal[...], tuple[..., ...] of one of these, or one of these | None"
                kind = ast.unparse(node.annotation)
                raise UsageError(f"the type of Config.{name} must be {rule}, since it is an option; got {kind}") from None
            options.append(option(name, hint, default, docs.get(name, "")))
    return options


def _keywords(tree: ast.Module, name: str) -> Iterator[tuple[str, Any]]:
    """The keyword arguments of the call that `name` is assigned."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Call(args=base, keywords=keywords)) if target == name:
                for other in base:
                    if isinstance(other, ast.Name):  # dataclasses.replace(OTHER, ...)
                        yield from _keywords(tree, other.id)
                yield from ((k.arg, _constant(k.value)) for k in keywords if k.arg is not None)
