"""The rows of `lindm bench solvers` about POMDPs without an end: ours beside pomdp-solve and SARSOP, where they are on the PATH.

pomdp-solve (A. R. Cassandra; its version 5.5) and `pomdpsol` (SARSOP: Kurniawati, Hsu and Lee, RSS 2008) read the same `.pomdp`
file in the same run, pinned to the same core. The tiger is solved until the value at the start is known to 1e-6; pomdp-solve
knows it at every belief then. Two sizes of RockSample are searched for a number of seconds; pomdpsol, whose limit counts
CPU-seconds, gets those that ours took. The bounds and the time at the end are compared. The peers' values are those of the alpha
vectors that they write, at the start; their CPU-seconds include reading the file.
"""

import re
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lindm.bench.timing import LESS, NEITHER, Row, row
from lindm.families.rocksample import rocksample
from lindm.io.temporaries import scratch_directory
from lindm.problems.cassandra import Model
from lindm.problems.cassandra_writer import write
from lindm.problems.stationary import StationaryPOMDP, stationary
from lindm.solvers import point_based
from lindm.solvers.alpha_file import read_alpha
from lindm.solvers.stationary_solution import StationarySolution

SECONDS = 15
SIZES = ((3, 4), (4, 4))  # cells of a side and rocks
TOLERANCE = 1e-6
GROWL = 0.85  # probability that a growl is heard on the side of the tiger
SIX_DIGITS = 5e-6  # relative error of a number of pomdpsol, which writes six digits

NUMBER = r"[-+]?[0-9.]+(?:e[-+]?[0-9]+)?"
# a line of pomdpsol: time, trials, backups, lower bound, upper bound, precision, numbers of vectors and of beliefs
PROGRESS = re.compile(rf"^\s*{NUMBER}\s+[0-9]+\s+[0-9]+\s+{NUMBER}\s+({NUMBER})\s+({NUMBER})\s+[0-9]+\s+[0-9]+\s*$", re.MULTILINE)


class Peer(NamedTuple):
    """What a peer found."""

    lower: float  # value at the start of the vectors that it wrote
    rounding: float  # by which `lower` is off at most, if the vectors have six digits
    seconds: float  # of CPU
    printed: str


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


def run_peer(program: str, model: Model, directory: Path, seconds: float) -> Peer | None:
    """What a peer finds; None where it is not on the PATH.

    Args:
      seconds: of CPU, after which pomdpsol ends. pomdp-solve ends at `TOLERANCE` alone: its -time_limit prints times and goes on.

    Raises:
      RuntimeError: it wrote no policy, or ran twenty times as long and a minute.
    """
    path = shutil.which(program)
    if path is None:
        return None
    file = directory / "problem.pomdp"
    file.write_text(write(model), encoding="utf-8")
    if program == "pomdp-solve":
        policy = directory / "problem.alpha"
        # it ends where the value is within half of stop_delta: an interval as wide as ours
        command = [path, "-pomdp", str(file), "-o", str(directory / "problem"), "-stop_delta", str(TOLERANCE)]
    else:
        policy = directory / "problem.policy"
        command = [path, str(file), "--timeout", str(seconds), "--precision", str(TOLERANCE), "--output", str(policy)]
    policy.unlink(missing_ok=True)
    limit = 20 * seconds + 60
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as e:
        raise RuntimeError(f"{program} did not end within {limit:.0f} seconds") from e
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not policy.is_file():
        raise RuntimeError(f"{program} wrote no policy (exit code {done.returncode}):\n{(done.stdout + done.stderr)[-1000:]}")
    _, vectors = read_alpha(policy, len(model.states), len(model.actions))
    best = vectors[(vectors @ model.start).argmax()]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Peer(float(best @ model.start), SIX_DIGITS * float(abs(best) @ model.start), cpu, done.stdout)


def timed_search(problem: StationaryPOMDP, seconds: float) -> tuple[StationarySolution, float]:
    """Our solution, and its CPU-seconds."""
    start = time.process_time()
    solution = point_based.solve(problem, tolerance=TOLERANCE, timeout=seconds)
    return solution, time.process_time() - start


def beside_pomdp_solve(directory: Path) -> list[Row]:
    """The row of the tiger."""
    ours, seconds = timed_search(stationary(tiger()), 20 * SECONDS)
    peer = run_peer("pomdp-solve", tiger(), directory, SECONDS)
    if peer and abs(peer.lower - ours.lower) > 1e-5:
        raise RuntimeError(f"pomdp-solve and ours have different values: {peer.lower} and {ours.lower}")
    name = "pomdp-solve" if peer else "pomdp-solve (not on the PATH)"
    work = f"POMDP tiger without an end, to {TOLERANCE:g}"
    return [row(work, seconds, peer.seconds if peer else None, name, "CPU-s", LESS)]


def beside_sarsop(work: str, problem: StationaryPOMDP, directory: Path) -> list[Row]:
    """CPU-seconds, both bounds and the width between them, of a problem that is searched for `SECONDS`.

    Raises:
      RuntimeError: of `run_peer`; pomdpsol prints no bounds; a lower bound is above an upper one.
    """
    ours, seconds = timed_search(problem, SECONDS)
    peer = run_peer("pomdpsol", as_model(problem), directory, seconds)
    lower = upper = width = None
    if peer:
        lower = peer.lower
        found = PROGRESS.findall(peer.printed)
        if not found:
            raise RuntimeError(f"pomdpsol printed no line with bounds:\n{peer.printed[-1000:]}")
        upper, width = map(float, found[-1])
        lowest = min(ours.upper, upper + SIX_DIGITS * abs(upper))
        if lower - peer.rounding > lowest + TOLERANCE or ours.lower > lowest + TOLERANCE:
            theirs = f"[{lower}, {upper}]"
            raise RuntimeError(f"bounds of SARSOP and ours exclude each other: {theirs} and [{ours.lower}, {ours.upper}]")
    name = "pomdpsol (SARSOP)" if peer else "pomdpsol (SARSOP, not on the PATH)"
    gap = ours.upper - ours.lower
    compared = min(gap, gap if width is None else width) > TOLERANCE  # smaller ones are rounding
    return [
        row(f"{work}: time", seconds, peer.seconds if peer else None, name, "CPU-s", LESS),
        row(f"{work}: lower bound", ours.lower, lower, name, "reward", NEITHER),
        row(f"{work}: upper bound", ours.upper, upper, name, "reward", NEITHER),
        row(f"{work}: width", gap, width, name, "reward", LESS if compared else NEITHER),
    ]


def benchmark() -> list[Row]:
    """The rows of the table. Takes at most about `SECONDS` for each size and side."""
    with scratch_directory() as directory:
        table = beside_pomdp_solve(directory)
        table += beside_sarsop("POMDP tiger without an end", stationary(tiger()), directory)
        for size, rocks in SIZES:
            work = f"POMDP rocksample, {size} cells, {rocks} rocks, {SECONDS:g} s"
            table += beside_sarsop(work, rocksample(size, rocks), directory)
        return table
