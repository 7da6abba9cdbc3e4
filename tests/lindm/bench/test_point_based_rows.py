"""The rows beside pomdp-solve and SARSOP, with programs in their place that write known policies."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from lindm.bench import point_based
from lindm.families.rocksample import rocksample
from lindm.problems.cassandra import parse
from lindm.problems.cassandra_writer import write
from lindm.solvers.point_based import solve

SOLVE = """#!{python}
import sys
assert float(sys.argv[sys.argv.index("-stop_delta") + 1]) == 1e-6
prefix = sys.argv[sys.argv.index("-o") + 1]
vectors = ["0\\n{value:.25f} {value:.25f} \\n\\n", "1\\n-5.0000000000000000000000000 -5.0000000000000000000000000 \\n\\n"]
open(prefix + ".alpha", "w").write("".join(vectors))
"""
# as pomdpsol prints: a table of progress, then the last line once more
SARSOP = """#!{python}
import sys
option = lambda name: sys.argv[sys.argv.index(name) + 1]
tiger = "open-left" in open(sys.argv[1]).read()
lower, upper, width, states = (19.3714, 19.3714, 8.7943e-07, 2) if tiger else ({lower}, {upper}, {width}, 9)
numbers = f"{{lower}} " * states
vector = '<Vector action="2" obsValue="0">' + numbers + "</Vector>"
open(option("--output"), "w").write('<Policy><AlphaVector numVectors="1">' + vector + "</AlphaVector> </Policy>")
open(sys.argv[0] + ".timeout", "w").write(option("--timeout"))
print("  loading time : 0.00s")
print(" Time   |#Trial |#Backup |LBound    |UBound    |Precision  |#Alphas |#Beliefs  ")
print(" 0       2       51       -6.2981    99.5      105.798     7        16       ")
print(f" 15.25   439     6600     {{lower}}     {{upper}}   {{width}}     3037     2408     ")
print("-------")
print("  Actual Time : 15.250000s")
print(f" 15.36   439     6600     {{lower}}     {{upper}}   {{width}}     3029     2408     ")
"""


def install(directory, name: str, text: str) -> None:
    (directory / name).write_text(text)
    (directory / name).chmod(0o755)


def install_sarsop(directory, lower: float, upper: float, digits: int = 6) -> None:
    numbers = {name: f"{x:.{digits}g}" for name, x in {"lower": lower, "upper": upper, "width": upper - lower}.items()}
    install(directory, "pomdpsol", SARSOP.format(python=sys.executable, **numbers))


@pytest.fixture
def peers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(point_based, "SIZES", ((2, 1),))
    install(tmp_path, "pomdp-solve", SOLVE.format(python=sys.executable, value=19.371368))
    bounds = solve(rocksample(2, 1), tolerance=1e-6)
    install_sarsop(tmp_path, bounds.lower - 1, bounds.upper + 2)
    return tmp_path, bounds


def test_the_peers_read_the_same_file_and_their_policies_are_valued_at_the_start(peers):
    tiger, *_, time, lower, upper, width = point_based.benchmark()
    assert tiger["peer_name"] == "pomdp-solve" and tiger["peer"] > 0 and tiger["unit"] == time["unit"] == "CPU-s"
    directory, bounds = peers
    assert (lower["ours"], upper["ours"]) == pytest.approx((bounds.lower, bounds.upper), abs=1e-6)
    assert lower["peer"] == pytest.approx(bounds.lower - 1, rel=1e-5) and upper["peer"] == pytest.approx(
        bounds.upper + 2, rel=1e-5
    )
    assert width["peer"] == pytest.approx(3, rel=1e-5) and width["ours"] == upper["ours"] - lower["ours"]
    assert time["peer"] > 0 and time["ours"] == float((directory / "pomdpsol.timeout").read_text())
    assert time["ratio"] == pytest.approx(time["peer"] / time["ours"])
    assert lower["ratio"] is upper["ratio"] is width["ratio"] is None  # ours is known to the tolerance
    np.testing.assert_array_equal(parse(write(point_based.tiger())).r, point_based.tiger().r)


def rocks(directory):
    return point_based.beside_sarsop("rocks", rocksample(2, 1), directory)


def test_widths_are_compared_where_neither_side_has_met(peers, monkeypatch):
    directory, bounds = peers
    apart = dataclasses.replace(bounds, upper=bounds.lower + 6)
    monkeypatch.setattr(point_based, "timed_search", lambda problem, seconds: (apart, 1.0))
    assert rocks(directory)[-1]["ratio"] == pytest.approx(0.5, rel=1e-4)
    install_sarsop(directory, bounds.lower, bounds.lower)
    assert rocks(directory)[-1]["ratio"] is None


def test_six_digits_of_bounds_that_meet_are_no_disagreement(peers):
    directory, bounds = peers
    install_sarsop(directory, bounds.lower, bounds.upper)
    _, lower, _, _ = rocks(directory)
    assert lower["peer"] > bounds.upper + 2e-5  # it was rounded up
    install_sarsop(directory, bounds.lower - 1, bounds.upper - 5e-5, digits=12)
    _, _, upper, _ = rocks(directory)
    assert upper["peer"] < bounds.lower - 2e-5


@pytest.mark.parametrize("lower, upper", [(1, 2), (-2, -1), (0, -1), (2e-4, 1), (-1, -2e-4)])
def test_bounds_that_exclude_each_other_end_the_bench(peers, lower, upper):
    directory, bounds = peers
    install_sarsop(directory, bounds.lower + lower, bounds.upper + upper)
    with pytest.raises(RuntimeError, match="bounds of SARSOP and ours exclude each other"):
        rocks(directory)


def test_values_that_disagree_and_peers_that_fail_end_the_bench(peers, monkeypatch):
    directory, _ = peers
    install(directory, "pomdpsol", (directory / "pomdpsol").read_text().replace("print(", "str("))
    with pytest.raises(RuntimeError, match="pomdpsol printed no line with bounds"):
        rocks(directory)
    install(directory, "pomdp-solve", SOLVE.format(python=sys.executable, value=18.0))
    with pytest.raises(RuntimeError, match=r"pomdp-solve and ours have different values: 18\.0"):
        point_based.benchmark()
    install(directory, "pomdp-solve", f"#!{sys.executable}\nprint('no such option')\n")
    with pytest.raises(RuntimeError, match=r"pomdp-solve wrote no policy \(exit code 0\):\nno such option"):
        point_based.benchmark()
    install(directory, "pomdp-solve", f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run(command, **{**options, "timeout": 0.1}))
    with pytest.raises(RuntimeError, match="pomdp-solve did not end within 360 seconds"):
        point_based.benchmark()
