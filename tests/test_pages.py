"""The pages run as they stand: the `python` and `console` blocks of README.md, CONTRIBUTING.md and docs/ are executed.

The blocks of a page run in order, in one directory. A block is skipped only if the line before it is a comment
`<!-- not executed: reason -->`. A page with a comment `<!-- slow -->` before one of its blocks runs in `make test-long` only. A
block with a title (```pomdp title="machine.pomdp") is a file that the page shows: it is written before the commands that follow.
The Python blocks of a page are one program, which runs after the commands.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

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


class Block(NamedTuple):
    note: str  # of the comment before the block
    language: str
    title: str  # name of the file that the block is
    text: str

    @property
    def executed(self) -> bool:
        return self.language in ("python", "console") and not self.note.startswith("not executed: ")


def blocks(page: str) -> list[Block]:
    all_blocks = []
    for match in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")):
        language, _, rest = match["info"].partition(" ")
        title = re.fullmatch(r'title="([\w.-]+)"', rest)
        all_blocks.append(Block(match["note"] or "", language, title[1] if title else "", match["text"]))
    return all_blocks


def commands(text: str) -> list[str]:
    """The commands of a console block: what follows `$ `, with continuation lines; the other lines are output."""
    joined = text.replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def run(command: list[str], directory: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.strip() or ">" in command[-1], f"{command[-1]} prints nothing"


def cases() -> list:
    with_code = [page for page in PAGES if any(block.executed for block in blocks(page))]
    return [
        pytest.param(page, marks=[pytest.mark.slow] if any(b.note == "slow" for b in blocks(page)) else [], id=page)
        for page in with_code
    ]


@pytest.mark.parametrize("page", cases())
def test_the_code_of_a_page_runs(page, tmp_path):
    for name in ("tests", "experiments", "theory"):  # pages name files of the repository
        (tmp_path / name).symlink_to(ROOT / name)
    program = ""
    for block in blocks(page):
        if block.title:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        elif block.executed and block.language == "python":
            program += block.text + "\n"
        elif block.executed:
            assert commands(block.text), f"a console block of {page} has no command: {block.text[:80]}"
            for command in commands(block.text):
                run(["bash", "-c", command], tmp_path)
    if program:
        run([sys.executable, "-c", program], tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_code_is_executed_or_has_a_reason_not_to(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("\n```") + text.startswith("```") == 2 * len(blocks(page)), (
        "a fence is not closed, or not at the start of a line"
    )
    for block in blocks(page):
        assert block.language, f"a block of {page} has no language: {block.text[:80]}"
        if block.note.startswith("not executed"):
            assert re.fullmatch(r"not executed: \w.{9,}", block.note), f"{page}: give the reason after 'not executed: '"


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
