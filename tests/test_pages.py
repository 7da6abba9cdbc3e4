"""The pages run as they stand: the `python` and `console` blocks of README.md, CONTRIBUTING.md and docs/ are executed.

The blocks of a page run in order, in one directory. A block is skipped only if the line before it is a comment
`<!-- not executed: reason -->`. A page with a comment `<!-- slow -->` before one of its blocks runs in `make test-long` only. A
block with a title (```pomdp title="machine.pomdp") is a file that the page shows: it is written before the commands that follow.
The Python blocks of a page are one program, which runs after the commands.

What a page shows as output is what is printed (tests/outputs.py says what may differ): the lines after a command in a console
block, and the `text` block after a Python block. A command fails only where the page shows its line `lindm: error: ...`.
`make outputs` (pytest --write-outputs) runs the same blocks and writes what differs into the pages.
"""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lindm.cli import sft
from lindm.cli.main import NAMES, module_of
from lindm.cli.option_parser import options_of
from lindm_experiments.harness.experiments import experiment_names
from tests.outputs import printed_lines, rewritten

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if not p.is_relative_to(ROOT / "docs" / "_build")
)
EVERY_PAGE = [
    *PAGES,
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "theory").rglob("*.md")),
    "CHANGELOG.md",
    "SECURITY.md",
]
BLOCK = re.compile(r"^(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


BETWEEN = "\x1e\n"  # printed before each Python block of a program


class Block(NamedTuple):
    note: str  # of the comment before the block
    language: str
    title: str  # name of the file that the block is
    text: str
    line: int  # number of its first line in the page

    @property
    def skipped(self) -> bool:
        return self.note.startswith("not executed: ")

    @property
    def executed(self) -> bool:
        return self.language in ("python", "console") and not self.skipped

    @property
    def is_output(self) -> bool:
        """Of the Python block before it."""
        return self.language == "text" and not self.title and not self.skipped


class Output(NamedTuple):
    """Lines of a page that show what a command or a program prints."""

    line: int  # number of the first in the page
    shown: list[str]
    printed: list[str]

    def difference(self, page: str) -> list[str]:
        """The lines of a diff, with the line of the page where it begins; nothing if what is shown is what was printed."""
        new = rewritten(self.shown, self.printed)
        diff = list(difflib.unified_diff(self.shown, new, n=2, lineterm=""))[2:]
        first = next(
            (i for i, lines in enumerate(zip(self.shown, new, strict=False)) if lines[0] != lines[1]),
            min(len(self.shown), len(new)),
        )
        return [f"{page}:{self.line + first}: the page shows (-) what is not printed (+)", *diff] if diff else []


def blocks(page: str) -> list[Block]:
    all_blocks, text = [], (ROOT / page).read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        language, _, rest = match["info"].partition(" ")
        title = re.fullmatch(r'title="([\w.-]+)"', rest)
        line = text.count("\n", 0, match.start("text")) + 1
        all_blocks.append(Block(match["note"] or "", language, title[1] if title else "", match["text"], line))
    return all_blocks


def commands(block: Block) -> list[tuple[str, int, list[str]]]:
    """Of a console block: each command, with its continuation lines, the page's line after it, and the lines of its output."""
    found: list[tuple[str, int, list[str]]] = []
    continued = False
    for number, line in enumerate(block.text.splitlines(), block.line):
        if continued or line.startswith("$ "):
            command = f"{found.pop()[0][:-1]} {line}" if continued else line[2:]
            continued = line.endswith("\\")
            found.append((command, number + 1, []))
        elif found:
            found[-1][2].append(line)
    return found


def run(command: list[str], directory: Path, fails: bool = False) -> str:
    """What a command prints, on both streams. It must print something, unless its output goes into a file."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONUNBUFFERED"] = "1"  # the streams meet in the order of a terminal
    done = subprocess.run(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    assert (done.returncode != 0) == fails, f"{command[-1]} ends with {done.returncode}\n{done.stdout[-5000:]}"
    assert done.stdout.strip() or ">" in command[-1], f"{command[-1]} prints nothing"
    return done.stdout


def outputs(page: str, directory: Path) -> list[Output]:
    """Run the blocks of a page: what it shows as output, beside what was printed."""
    found, program, shown_by_program = [], "", []
    all_blocks = blocks(page)
    for block, following in zip(all_blocks, [*all_blocks[1:], None], strict=True):
        if block.title:
            (directory / block.title).write_text(block.text, encoding="utf-8")
        elif block.executed and block.language == "python":
            program += f"print({BETWEEN!r}, end='')\n{block.text}\n"
            shown_by_program.append(following if following and following.is_output else None)
        elif block.executed:
            assert commands(block), f"a console block of {page} has no command: {block.text[:80]}"
            for command, line, shown in commands(block):
                printed = run(["bash", "-c", command], directory, fails=any(s.startswith("lindm: error: ") for s in shown))
                found += [Output(line, shown, printed_lines(printed))] if shown else []
    if program:
        printed = run([sys.executable, "-c", program], directory).split(BETWEEN)[1:]
        for text, part in zip(shown_by_program, printed, strict=True):
            found += [Output(text.line, text.text.splitlines(), printed_lines(part))] if text else []
    return found


def cases() -> list:
    with_code = [page for page in PAGES if any(block.executed for block in blocks(page))]
    return [
        pytest.param(page, marks=[pytest.mark.slow] if any(b.note == "slow" for b in blocks(page)) else [], id=page)
        for page in with_code
    ]


def write(page: str, found: list[Output]) -> None:
    """Put what was printed into a page, where it is not what the page shows."""
    lines = (ROOT / page).read_text(encoding="utf-8").split("\n")
    for output in sorted(found, reverse=True):
        place = slice(output.line - 1, output.line - 1 + len(output.shown))
        assert lines[place] == output.shown, f"{page} was changed while its code was running: run it again"
        lines[place] = rewritten(output.shown, output.printed)
    (ROOT / page).write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("page", cases())
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page, tmp_path, request):
    for name in ("tests", "experiments", "theory"):  # pages name files of the repository
        (tmp_path / name).symlink_to(ROOT / name)
    found = outputs(page, tmp_path)
    if request.config.getoption("--write-outputs"):
        write(page, found)
        return
    differences = [line for output in found for line in output.difference(page)]
    assert not differences, "\n".join([*differences, f"to write what is printed into the page: make outputs ARGS='-k {page}'"])


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_code_is_executed_or_has_a_reason_not_to(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("\n```") + text.startswith("```") == 2 * len(blocks(page)), (
        "a fence is not closed, or not at the start of a line"
    )
    all_blocks = blocks(page)
    for i, block in enumerate(all_blocks):
        assert block.language, f"a block of {page} has no language: {block.text[:80]}"
        if block.is_output:
            before = all_blocks[i - 1] if i else None
            assert before and before.executed and before.language == "python", (
                f"{page}:{block.line}: a text block shows the output of the Python block before it; of another, give the reason"
            )
        if block.note.startswith("not executed"):
            assert re.fullmatch(r"not executed: \w.{9,}", block.note), f"{page}: give the reason after 'not executed: '"


def unknown_words(text: str) -> list[str]:
    """The command, experiment and options that `lindm ...` names and that do not exist. Words in capitals stand for others."""
    words, _, of_sft = re.sub(r'"[^"]*"', "QUOTED", text).partition(" -- ")
    name, *rest = [word for word in words.split() if not word.isupper() or word.startswith("--")][1:] or ["--help"]
    if name not in NAMES:
        return [] if name in ("--help", "--version") or words.split()[1].isupper() else [name]
    module = module_of(name)
    if name == "run":  # the options are those of the experiment
        return [
            word
            for word in rest[:1]
            if word not in experiment_names() and not word.endswith(".py") and word not in ("--list", "--help")
        ]
    known = getattr(module, "COMMANDS", {"": getattr(module, "COMMAND", None)})
    chosen = rest[0].split("|") if "" not in known and rest else [*known]
    flags = {option.flag for second in chosen if second in known for option in options_of(known[second].options)}
    given = [word.partition("=")[0] for word in rest if word.startswith("--")]
    given_to_sft = {word.partition("=")[0] for word in of_sft.split() if word.startswith("--")}
    return [
        *(second for second in chosen if second not in known),
        *(word for word in given if word not in flags | {"--help"}),
        *(given_to_sft - {option.flag for option in options_of(sft.COMMAND.options)}),
    ]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_options_that_a_page_names_exist(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`(lindm [^`]+)`", text)  # executed or not
    named += [command for block in blocks(page) if block.language == "console" for command, _, _ in commands(block)]
    parts = [part.strip() for command in named for part in re.split(r" \| | > | #|;", command)]
    unknown = {part: unknown_words(part) for part in parts if part.startswith("lindm ")}
    assert not {part: words for part, words in unknown.items() if words}


@pytest.mark.parametrize(
    "text, unknown",
    [
        ("lindm", []),
        ("lindm COMMAND --help", []),
        ("lindm solve FILE --horizon=2", []),
        ("lindm solve FILE --horizons 2", ["--horizons"]),
        ("lindm sovle FILE", ["sovle"]),
        ("lindm data export DIR --to trl", []),
        ("lindm data exports DIR", ["exports"]),
        ("lindm run ladder --seeds 3", []),
        ("lindm run ladders", ["ladders"]),
        ("lindm launch slurm|tpu -- --model DIR --date DIR", ["--date"]),
    ],
)
def test_a_command_or_option_that_does_not_exist_is_found(text, unknown):
    assert unknown_words(text) == unknown


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_the_links_and_figures_of_a_page_exist(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [t for t in targets if not re.match(r"[a-z]+:", t) and not (ROOT / page).parent.joinpath(t).exists()]
    assert not missing


def test_the_readme_is_a_front_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_a_page_with_a_wrong_command_fails(tmp_path):
    with pytest.raises(AssertionError, match="nonsense"):
        run(["bash", "-c", "lindm nonsense"], tmp_path)


@pytest.mark.parametrize("page, least", [("docs/where-to-change-what.md", 60), ("SECURITY.md", 15), ("CONTRIBUTING.md", 8)])
def test_every_file_that_a_map_of_the_sources_names_exists(page, least):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = [name for name in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if "COMMAND" not in name]
    missing = [
        name for name in named if not (ROOT / name).exists() and not (ROOT / "experiments/lindm_experiments" / name).exists()
    ]
    assert len(named) > least and not missing
