"""What the pages show runs as it stands: every Python block of a page, one after the other, and the file that a page shows."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

from lindm.problems import cassandra

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "lindm/README.md"])
def test_the_python_of_a_page_runs(page):
    code = [block for block in blocks(page, "python") if "..." not in block]
    assert code
    scope: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as said, jax.numpy_rank_promotion("allow"):
        for block in code:
            exec(compile(block, page, "exec"), scope)
    assert said.getvalue().strip()


def test_the_file_of_the_page_is_the_problem_of_its_arrays():
    file = next(block for block in blocks("lindm/README.md", "") if block.startswith("discount:"))
    model = cassandra.parse(file)
    scope: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(blocks("lindm/README.md", "python")[0], "page", "exec"), scope)
    there, here = scope["machine"], cassandra.to_pomdp(model, 6)
    assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True))
    assert model.actions == ("run", "inspect", "replace")
