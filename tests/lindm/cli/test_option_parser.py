"""Options from dataclasses: types, markers, defaults, messages, and the help page."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from lindm.cli.option_parser import Command, Positional, Repeated, options_of, options_of_source, parse, parser_of, run_command
from lindm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base class."""

    size: int
    """Number of things, counted with care and described in so many words that the line has to be broken between them."""


@dataclass(frozen=True, kw_only=True)
class Example(Base):
    """Do something. And say so at length."""

    files: Annotated[tuple[Path, ...], Positional("FILE")]
    """Files to read."""
    out: Path | None = None
    """Directory. [default: results/here]"""
    rate: float = 0.5  # share of everything, in %
    method: Literal["tree", "net-of-points"] = "tree"
    """The method."""
    only: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (1, 2)
    policy: Annotated[tuple[str, ...], Repeated("POLICY")] = ()
    fresh: bool = False
    """Start over."""


COMMAND = Command(name="example", options=Example, run=lambda options: 0, examples=("lindm example a --size 2",))


def parsed(words: str) -> Example:
    return parse(COMMAND, words.split())


def help_page(columns: int, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return parser_of(
        "lindm example", Example.__doc__ or "", options_of(Example), COMMAND.examples, {"size": "Numbers"}
    ).format_help()


def test_words_become_the_fields_of_the_dataclass():
    assert parsed("a --size 3") == Example(files=(Path("a"),), size=3)
    words = "a b --size=3 --out x --rate -0.5 --method net-of-points --only p q --lengths 4 5 --policy r --policy s --fresh"
    assert parsed(words) == Example(
        files=(Path("a"), Path("b")),
        size=3,
        out=Path("x"),
        rate=-0.5,
        method="net-of-points",
        only=("p", "q"),
        lengths=(4, 5),
        policy=("r", "s"),
        fresh=True,
    )


def test_positional_arguments_may_stand_on_both_sides_of_the_options():
    assert parsed("a --size 3 b --policy r c").files == (Path("a"), Path("b"), Path("c"))


def test_an_empty_list_is_a_value():
    assert parsed("a --size 3 --lengths").lengths == ()


@pytest.mark.parametrize(
    "words, said",
    [
        ("a", "the following arguments are required: --size"),
        ("--size 1", "the following arguments are required: FILE"),
        ("a --size many", "--size must be a whole number; got 'many'"),
        ("a --size 1 --rate high", "--rate must be a finite number; got 'high'"),
        ("a --size 1 --method tre", "--method must be one of tree, net-of-points; got 'tre'; did you mean tree?"),
        ("a --size", "--size expected one argument"),
        ("a --sise 1", "lindm example has no option --sise; did you mean --size?"),
        ("a --size 1 --si 2", "lindm example has no option --si"),
        ("a --size 1 --xyzzy", "lindm example has no option --xyzzy"),
        ("a --size 1 -q", "-q"),
    ],
)
def test_a_wrong_word_is_a_usage_error_in_one_line(words, said):
    with pytest.raises(UsageError) as caught:
        parsed(words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_words_after_two_hyphens_are_handed_on():
    got: list[Any] = []
    command = Command(name="x", options=Base, run=lambda options, words: got.extend([options, words]) or 0, rest="-- MORE")
    assert run_command(command, ["--size", "2", "--", "--size", "three"]) == 0
    assert got == [Base(size=2), ["--size", "three"]]


@pytest.mark.parametrize("columns", [40, 72, 200])
def test_a_help_page_breaks_lines_between_words_and_fits_the_terminal(columns, monkeypatch):
    page = help_page(columns, monkeypatch)
    assert max(len(line) for line in page.splitlines() if "lindm example a" not in line) <= min(columns, 100)
    words = " ".join(page.split())
    assert "counted with care and described in so many words that the line has to be broken between them." in words


def test_a_help_page_has_arguments_options_sections_examples_and_one_default_each(monkeypatch):
    page = help_page(100, monkeypatch)
    assert page.startswith("usage: lindm example FILE ... [OPTIONS]\n")
    order = ["Do something.", "Arguments:", "Options:", "--rate NUMBER", "Numbers:", "--size INT", "Help:", "Examples:"]
    assert [page.index(part) for part in order] == sorted(page.index(part) for part in order)
    words = " ".join(page.split())
    assert "share of everything, in % [default: 0.5]" in words and "[default: 1 2]" in words
    assert "--out PATH Directory. [default: results/here]" in words and page.count("[default") == 4
    assert "--fresh Start over. Numbers: --size INT" in words and "\x1b" not in page


SOURCE = '''
"""A question."""
from jax import nothing_that_exists

class Config:
    seeds: int = 5
    N: tuple[int, ...] = (4, 16)  # training lengths
    pool: int = 32 * BLOCK
    model: str = "tiny"
    """a model"""
    more: bool = True
    kind: Literal["a", "b"] | None = None

    def __post_init__(self):
        pass

QUICK = Config(seeds=3)
FULL = replace(QUICK, N=(1, 2, 3))
'''


def test_options_are_read_from_a_source_without_importing_it():
    quick = {o.name: o for o in options_of_source(SOURCE, "quick")}
    assert [o.type for o in quick.values()] == [int, tuple[int, ...], int, str, bool, Literal["a", "b"]]
    assert [o.default for o in quick.values()] == [3, (4, 16), "32 * BLOCK", "tiny", True, None]
    assert quick["N"].help == "training lengths" and quick["model"].help == "a model" and quick["more"].flag == "--no-more"
    full = {o.name: o.default for o in options_of_source(SOURCE, "full")}
    assert full["N"] == (1, 2, 3) and full["seeds"] == 3


def test_a_type_that_no_option_can_have_is_an_error_that_names_the_field():
    for kind in ("dict", "tuple[int, float]"):
        with pytest.raises(UsageError, match="the type of Config.x must be int, float" + ".*" + re.escape(f"got {kind}")):
            options_of_source(f"class Config:\n    x: {kind} = 1\n", "quick")
    with pytest.raises(TypeError, match="no command-line option has the type"):
        parser_of("x", "", [o for o in options_of_source("class Config:\n    x: None = None\n", "quick")])


def test_parsing_errors_never_end_the_process():
    parser = parser_of("lindm example", "", options_of(Example))
    with pytest.raises((UsageError, argparse.ArgumentError)):
        parser.parse_args(["--size"])
