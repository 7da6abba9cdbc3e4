"""The tutorials run: every script of docs/tutorials is executed as a whole, in an empty directory.

A tutorial is a notebook, as a script in the percent format of jupytext. `make docs` executes it again, as a notebook.
"""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_pages import ROOT, run

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
HEADER = "# ---\n# jupyter:\n#   kernelspec:\n#     display_name: Python 3\n#     language: python\n#     name: python3\n# ---\n"
CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
FIGURE = re.compile(r"\brender\(|\.plot\(\"|\.plot\(\)")  # calls whose figure the notebook shows
CPU_SECONDS = 180
PAGE = 90  # characters of code in the width of a page of the site


class Cell(NamedTuple):
    head: str  # what follows `# %%`
    text: str

    @property
    def markdown(self) -> bool:
        return self.head.strip() == "[markdown]"


def cells(tutorial: Path) -> list[Cell]:
    before, *parts = CELL.split(tutorial.read_text(encoding="utf-8"))
    assert before.strip() == HEADER.strip(), "a tutorial begins with the header that names its kernel"
    return [Cell(head, text) for head, text in zip(parts[::2], parts[1::2], strict=True)]


def prose(tutorial: Path) -> str:
    return "\n".join(re.sub("^# ?", "", cell.text, flags=re.MULTILINE) for cell in cells(tutorial) if cell.markdown)


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_as_a_script_in_an_empty_directory(tutorial, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    before = os.times()
    run([sys.executable, str(tutorial)], tmp_path)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < CPU_SECONDS
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".png"]) >= 2


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_has_a_title_and_alternative_texts_and_names_the_how_to_guides(tutorial):
    first, *_, last = cells(tutorial)
    assert first.markdown and first.text.startswith("# # ")
    assert last.markdown and len(re.findall(r"\]\(\.\./[\w./-]+\.md\)", last.text)) >= 2
    for cell in cells(tutorial):
        if not cell.markdown and FIGURE.search(cell.text):
            text = re.fullmatch(r' mystnb=\{"image": \{"alt": "([^"]+)"\}\}', cell.head)
            assert text and len(text[1]) >= 60, f"a cell with a figure says in its head what is seen: {cell.text[:80]}"


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_the_prose_of_a_tutorial_has_no_code_that_is_not_executed_and_its_links_exist(tutorial):
    assert "```" not in prose(tutorial), "code is in a cell"
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(tutorial))
    assert not [t for t in targets if not re.match(r"[a-z]+:", t) and not (tutorial.parent / t).exists()]


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_the_code_of_a_tutorial_is_no_wider_than_a_page(tutorial):
    lines = [line for cell in cells(tutorial) if not cell.markdown for line in cell.text.splitlines()]
    assert [line for line in lines if len(line) > PAGE] == []


def test_a_tutorial_that_fails_is_seen(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("print(1)\nassert 1 == 2\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="assert 1 == 2"):
        run([sys.executable, str(wrong)], tmp_path)
