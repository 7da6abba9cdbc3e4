"""The rows beside pomdp-solve and SARSOP, with programs in their place that write known policies."""

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
prefix = sys.argv[sys.argv.index("-o") + 1]
open(prefix + ".alpha", "w").write("0\\n{value!r} {value!r}\\n\\n1\\n-5 -5\\n")
"""
SARSOP = """#!{python}
import sys
policy = sys.argv[sys.argv.index("--output") + 1]
numbers = " ".join(["{lower!r}"] * {states})
open(policy, "w").write('<Policy><AlphaVector><Vector action="2" obsValue="0">' + numbers + "</Vector></AlphaVector></Policy>")
print(" 0.01     2       51       3.5      99.5      96.0      3        2")
print(" 1.15     40      310      {lower}     {upper}      0.1      12       9")
"""


def install(directory, name: str, text: str) -> None:
    (directory / name).write_text(text)
    (directory / name).chmod(0o755)


@pytest.fixture
def peers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(point_based, "SIZES", ((2, 1),))
    install(tmp_path, "pomdp-solve", SOLVE.format(python=sys.executable, value=19.371368))
    bounds = solve(rocksample(2, 1), tolerance=1e-6)
    install(tmp_path, "pomdpsol", SARSOP.format(python=sys.executable, lower=bounds.lower - 1, upper=bounds.upper + 2, states=9))
    return tmp_path, bounds


def test_the_peers_read_the_same_file_and_their_policies_are_valued_at_the_start(peers):
    tiger, lower, upper = point_based.benchmark()
    assert tiger["peer_name"] == "pomdp-solve" and tiger["peer"] > 0 and tiger["unit"] == "CPU-s"
    _, bounds = peers
    assert (lower["ours"], upper["ours"]) == pytest.approx((bounds.lower, bounds.upper), abs=1e-6)
    assert lower["peer"] == pytest.approx(bounds.lower - 1) and upper["peer"] == pytest.approx(bounds.upper + 2)
    assert lower["ratio"] > 1 and upper["ratio"] > 1  # ours are closer on both sides
    np.testing.assert_array_equal(parse(write(point_based.tiger())).r, point_based.tiger().r)


def test_values_that_disagree_and_peers_that_fail_end_the_bench(peers):
    directory, bounds = peers
    install(directory, "pomdpsol", SARSOP.format(python=sys.executable, lower=bounds.upper + 1, upper=bounds.upper + 2, states=9))
    with pytest.raises(RuntimeError, match="bounds of SARSOP and ours exclude each other"):
        point_based.benchmark()
    install(directory, "pomdp-solve", SOLVE.format(python=sys.executable, value=18.0))
    with pytest.raises(RuntimeError, match=r"pomdp-solve and ours have different values: 18\.0"):
        point_based.benchmark()
    install(directory, "pomdp-solve", f"#!{sys.executable}\nprint('no such option')\n")
    with pytest.raises(RuntimeError, match=r"pomdp-solve wrote no policy \(exit code 0\):\nno such option"):
        point_based.benchmark()
