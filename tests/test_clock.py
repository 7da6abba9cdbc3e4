"""No test depends on how busy the machine is: limits are far away, in CPU time, or leave out the time without a core."""

import ast
import time
from pathlib import Path

import pytest

from tests import clock

TESTS = Path(__file__).parent
ENOUGH = 300  # a limit below this is met by a busy machine alone
POLL = 5  # a wait below this is a step of a loop, or a moment to kill at
CLOCKS = ("time.time()", "time.monotonic()", "time.perf_counter()")


def limits(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of every limit on wall time: a timeout, or a comparison of a difference of clock readings."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            values = [k.value for k in node.keywords if k.arg == "timeout"]
            values += node.args[:1] if name in ("wait", "communicate", "join") else []
            found += [
                (node.lineno, ast.unparse(node))
                for value in values
                if isinstance(value, ast.Constant) and isinstance(value.value, int | float) and POLL <= value.value < ENOUGH
            ]
        elif isinstance(node, ast.Compare):
            differences = [n for n in ast.walk(node) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub)]
            if any(name in ast.unparse(n) for n in differences for name in CLOCKS):
                found.append((node.lineno, ast.unparse(node)))
    return found


def test_no_test_limits_wall_time_closely():
    for file in sorted(TESTS.rglob("*.py")):
        for line, text in limits(ast.parse(file.read_text(encoding="utf-8"))):
            pytest.fail(f"{file}:{line}: {text}: take HANGS or Stopwatch of tests/clock.py, an event, or CPU time")


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("subprocess.run(words, timeout=60)", 1),
        ("process.wait(30)", 1),
        ("assert time.monotonic() - start < 10", 1),
        ("subprocess.run(words, timeout=HANGS)", 0),
        ("process.wait(0.1)", 0),
        ("while time.monotonic() < end: pass", 0),
        ("assert time.process_time() - start < 1", 0),
    ],
)
def test_a_limit_is_recognized(code, number):
    assert len(limits(ast.parse(code))) == number


def test_a_stopwatch_leaves_out_the_time_without_a_core(tmp_path, monkeypatch):
    pressure = tmp_path / "cpu"
    monkeypatch.setattr(clock, "PRESSURE", pressure)
    readings = iter([100.0, 130.0, 130.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(readings))
    pressure.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=5000000\nfull avg10=0.00 total=0\n")
    stopwatch = clock.Stopwatch()
    pressure.write_text("some avg10=99.00 avg60=0.00 avg300=0.00 total=25000000\nfull avg10=0.00 total=0\n")
    assert stopwatch.seconds() == 10.0
    pressure.unlink()
    assert clock.seconds_without_a_core() == 0.0
