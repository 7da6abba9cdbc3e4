"""Every promise about faults has a test, and `make faults` counts what these tests tried."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clock import HANGS
from tests.promises import PROMISES

ROOT = Path(__file__).parents[1]


def named(marks: list[ast.expr]) -> tuple[set[str], bool]:
    """The numbers of the `fault` markers among the decorators, and whether one is `parity`."""
    numbers, parity = set(), False
    for mark in (part for one in marks for part in ast.walk(one)):
        if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Attribute) and mark.func.attr == "fault":
            numbers |= {argument.value for argument in mark.args if isinstance(argument, ast.Constant)}
        parity |= isinstance(mark, ast.Attribute) and mark.attr == "parity"
    return numbers, parity


def promises_with_a_test() -> set[str]:
    """Numbers that a test outside `make parity` carries."""
    numbers = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        marks = [n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"]
        whole, parity = named(marks)
        for function in (n for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")):
            own, own_parity = named(function.decorator_list)
            numbers |= set() if parity or own_parity else whole | own
    return numbers


def test_every_promise_has_a_test():
    assert set(PROMISES) <= promises_with_a_test()


def test_promises_are_numbered_in_order_and_are_one_sentence_each():
    assert list(PROMISES) == [f"F{i}" for i in range(1, len(PROMISES) + 1)]
    for number, promise in PROMISES.items():
        assert (
            promise["promise"].endswith(".") and ". " not in promise["promise"] and promise.keys() <= {"promise", "elsewhere"}
        ), number


EXAMPLE = """
import pytest

@pytest.mark.fault("F1", "F3")
@pytest.mark.parametrize("moment", [1, 2])
def test_counts(trials, moment):
    trials.add(10 * moment)

@pytest.mark.fault("F3")
def test_is_one_trial():
    pass

def test_of_something_else():
    assert True
"""


def session(directory: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`make faults` of one test file."""
    (directory / "test_example.py").write_text(text)
    (directory / "pytest.ini").write_text(
        "[pytest]\ntestpaths = test_example.py\nmarkers =\n  fault(number, ...): checks promises\n"
    )
    words = [sys.executable, "-m", "pytest", "-p", "tests.promises", "-p", "no:cacheprovider", *options]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, timeout=HANGS)


def row(page: Path, number: str) -> str:
    return next(line for line in page.read_text().splitlines() if line.startswith(f"| {number} |")).split(" | ", 2)[2]


@pytest.mark.parametrize("workers", [[], pytest.param(["-n", "2"], marks=pytest.mark.slow)])
def test_the_table_counts_tests_trials_and_losses(tmp_path, workers):
    """Every promise has a test here, so that only the losses decide the exit status."""
    others = [number for number in PROMISES if number not in ("F1", "F3")]
    rest = f"\n@pytest.mark.fault({', '.join(map(repr, others))})\ndef test_of_the_others():\n    pass\n"
    page = tmp_path / "page.md"
    done = session(tmp_path, EXAMPLE + rest, "--faults-page", "page.md", *workers)
    assert done.returncode == 0 and "wrote page.md" in done.stdout, done.stdout
    assert (row(page, "F1"), row(page, "F3"), row(page, "F4")) == ("2 | 30 | 0 |", "3 | 31 | 0 |", "1 | 1 | 0 |")
    before = page.read_bytes()
    assert session(tmp_path, EXAMPLE + rest, "--faults-page", "page.md", *workers).returncode == 0 and page.read_bytes() == before
    lost = EXAMPLE.replace("trials.add(10 * moment)", "trials.add(10); trials.lost(moment)").replace(
        "pass", "pytest.skip('no disk')"
    )
    done = session(tmp_path, lost + rest, "--faults-page", "page.md", *workers)
    assert done.returncode == 1
    assert (row(page, "F1"), row(page, "F3"), row(page, "F4")) == ("2 | 20 | 3 |", "3 | 21 | 4 |", "1 | 1 | 0 |")


def test_a_failed_test_is_a_loss_and_an_error_in_its_fixture_too(tmp_path):
    broken = EXAMPLE.replace("pass", "assert False") + "\n@pytest.fixture\ndef disk():\n    raise OSError\n"
    broken += "\n@pytest.mark.fault('F8')\ndef test_with_a_fixture(disk):\n    pass\n"
    assert session(tmp_path, broken, "--faults-page", "page.md").returncode == 1
    assert row(tmp_path / "page.md", "F3") == "3 | 31 | 1 |" and row(tmp_path / "page.md", "F8") == "1 | 1 | 1 |"


def test_a_promise_without_a_test_fails_the_session(tmp_path):
    done = session(tmp_path, EXAMPLE, "--faults-page", "page.md")
    assert done.returncode == 1 and row(tmp_path / "page.md", "F4") == "0 | 0 | 0 |"


@pytest.mark.parametrize(
    "options", [[], ["--faults-page", "page.md", "-k", "counts"], ["--faults-page", "page.md", "test_example.py"]]
)
def test_without_the_option_and_for_some_of_the_tests_nothing_is_written(tmp_path, options):
    assert session(tmp_path, EXAMPLE, *options).returncode == 0
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    "end, workers",
    [("raise KeyboardInterrupt", []), pytest.param("os.kill(os.getpid(), signal.SIGKILL)", ["-n", "1"], marks=pytest.mark.slow)],
)
def test_a_session_that_does_not_reach_its_end_leaves_the_page(tmp_path, end, workers):
    (tmp_path / "page.md").write_text("of an earlier session")
    ends = f"import os, signal\n{EXAMPLE}\n@pytest.mark.fault('F8')\ndef test_that_ends():\n    {end}\n"
    assert session(tmp_path, ends, "--faults-page", "page.md", *workers).returncode != 0
    assert (tmp_path / "page.md").read_text() == "of an earlier session"


@pytest.mark.parametrize("marker", ["fault", "fault()", "fault('F99')", "fault('F1', 'f2')", "fault(number='F1')"])
def test_a_marker_without_a_number_or_with_an_unknown_one_fails_collection(tmp_path, marker):
    done = session(tmp_path, f"import pytest\n@pytest.mark.{marker}\ndef test_one():\n    pass\n")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "takes numbers of promises.toml" in done.stderr
