"""The rows of `lindm bench solvers` about POMDPs without an end: ours beside pomdp-solve and SARSOP, where they are on the PATH.

pomdp-solve (A. R. Cassandra) and `pomdpsol` (SARSOP: Kurniawati, Hsu and Lee, RSS 2008) read the same `.pomdp` file in the same
run. The tiger is solved until the value is known to 1e-6. Two sizes of RockSample are searched for a number of seconds, and the
bounds that are reached then are compared. The peers' values are those of the alpha vectors that they write, at the start.
"""

import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np

from lindm.bench.timing import LESS, MORE, Row, row
from lindm.families.rocksample import rocksample
from lindm.io.temporaries import scratch_directory
from lindm.problems.cassandra import Model
from lindm.problems.cassandra_writer import write
from lindm.problems.stationary import StationaryPOMDP, stationary
from lindm.solvers import point_based
from lindm.solvers.alpha_file import read_alpha

SECONDS = 15
SIZES = ((3, 4), (4, 4))  # cells of a side and rocks
TOLERANCE = 1e-6
GROWL = 0.85  # probability that a growl is heard on the side of the tiger

Bounds = tuple[float, float | None]  # of the value at the start; the upper one where the peer tells it


def tiger() -> Model:
    """The tiger problem (Kaelbling, Littman and Cassandra, Artificial Intelligence 101, 1998)."""
    half, heard = np.full((2, 2), 0.5), np.array([[GROWL, 1 - GROWL], [1 - GROWL, GROWL]])
    return Model(
        states=("left", "right"),
        actions=("listen", "open-left", "open-right"),
        observations=("hear-left", "hear-right"),
        discount=0.95,
        P=np.stack([np.eye(2), half, half], axis=1),
        O=np.stack([heard, half, half]),
        r=np.array([[-1.0, -100, 10], [-1, 10, -100]]),
        start=half[0],
    )


def as_model(problem: StationaryPOMDP) -> Model:
    """A small problem with dense arrays, to be written."""
    return Model(
        states=problem.states,
        actions=problem.actions,
        observations=problem.observations,
        discount=problem.discount,
        P=np.stack([P.toarray() for P in problem.P], axis=1),
        O=np.stack([O.toarray() for O in problem.O]),
        r=problem.r,
        start=problem.rho,
    )


def run_peer(program: str, model: Model, directory: Path, seconds: float) -> tuple[Bounds, float] | None:
    """What a peer finds in so many seconds, and its CPU-seconds; None where it is not on the PATH.

    Raises:
      RuntimeError: it wrote no policy.
    """
    path = shutil.which(program)
    if path is None:
        return None
    file = directory / "problem.pomdp"
    file.write_text(write(model), encoding="utf-8")
    if program == "pomdp-solve":
        policy = directory / "problem.alpha"
        command = [path, "-pomdp", str(file), "-o", str(directory / "problem"), "-time_limit", str(int(seconds))]
    else:
        policy = directory / "problem.policy"
        command = [path, str(file), "--timeout", str(int(seconds)), "--precision", str(TOLERANCE), "--output", str(policy)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=20 * seconds + 60, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not policy.is_file():
        raise RuntimeError(f"{program} wrote no policy (exit code {done.returncode}):\n{(done.stdout + done.stderr)[-1000:]}")
    _, vectors = read_alpha(policy, len(model.states), len(model.actions))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (float((vectors @ model.start).max()), _upper(done.stdout)), cpu


def _upper(printed: str) -> float | None:
    """The last upper bound in the table of pomdpsol: time, trials, backups, lower bound, upper bound, ..."""
    number = r"[-+]?[0-9.]+(?:e[-+]?[0-9]+)?"
    found = re.findall(rf"^\s*{number}\s+[0-9]+\s+[0-9]+\s+{number}\s+({number})\s", printed, re.MULTILINE)
    return float(found[-1]) if found else None


def benchmark() -> list[Row]:
    """The rows of the table. Takes `SECONDS` for each size and side."""
    with scratch_directory() as directory:
        start = time.process_time()
        ours = point_based.solve(stationary(tiger()), tolerance=TOLERANCE, timeout=20 * SECONDS)
        ours_seconds = time.process_time() - start
        peer = run_peer("pomdp-solve", tiger(), directory, 20 * SECONDS)
        name = "pomdp-solve" if peer else "pomdp-solve (not on the PATH)"
        if peer and abs(peer[0][0] - ours.lower) > 1e-5:
            raise RuntimeError(f"pomdp-solve and ours have different values: {peer[0][0]} and {ours.lower}")
        work = f"POMDP tiger without an end, to {TOLERANCE:g}"
        table = [row(work, ours_seconds, peer[1] if peer else None, name, "CPU-s", LESS)]
        for size, rocks in SIZES:
            problem = rocksample(size, rocks)
            solution = point_based.solve(problem, tolerance=TOLERANCE, timeout=SECONDS)
            peer = run_peer("pomdpsol", as_model(problem), directory, SECONDS)
            name = "pomdpsol (SARSOP)" if peer else "pomdpsol (SARSOP, not on the PATH)"
            lower, upper = peer[0] if peer else (None, None)
            if upper is not None and lower is not None and (lower > solution.upper + 1e-6 or upper < solution.lower - 1e-6):
                raise RuntimeError(
                    f"bounds of SARSOP and ours exclude each other: {peer} and [{solution.lower}, {solution.upper}]"
                )
            work = f"POMDP rocksample, {size} cells, {rocks} rocks, {SECONDS:g} s"
            table.append(row(f"{work}: lower bound", solution.lower, lower, name, "reward", MORE))
            table.append(row(f"{work}: upper bound", solution.upper, upper, name, "reward", LESS))
    return table
