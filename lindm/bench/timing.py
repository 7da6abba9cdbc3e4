"""What the benches share: CPU-seconds, processes pinned to a core, peak memory, growth exponents, and the table.

Costs are CPU-seconds of a process (`time.process_time`), the best of several repeats: what else a machine does only ever adds.
Every side of a comparison is measured in a process of its own, pinned to one core and with its thread pools at one thread,
because idle threads burn CPU time without doing work. A row of a bench has

    work, ours, peer, peer_name, ratio, unit

where `ratio` says how many times better ours is (rates: ours / peer; costs: peer / ours), null for counts and exponents; the
peer is null where its library is not installed.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from lindm.io.tables import format_table

Row = dict[str, Any]
Outcome = TypeVar("Outcome")

MORE, LESS, NEITHER = 1, -1, 0  # which way a quantity is better; of neither there is no ratio
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


# --- one measurement ---------------------------------------------------------------------------------------------------


def timed(work: Callable[[], Outcome]) -> tuple[float, Outcome]:
    """CPU-seconds of `work()`, including what it left to be computed, and what it returned."""
    start = time.process_time()
    outcome = jax.block_until_ready(work())
    return time.process_time() - start, outcome


def cpu_seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """CPU-seconds of `work()`, the best of so many calls."""
    return min(timed(work)[0] for _ in range(repeats))


def peak() -> float:
    """Peak resident set of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: what getrusage reports there is at least the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def peak_growth(work: Callable[[], Any]) -> float:
    """MiB by which the resident set grows, at its peak, while `work()` runs.

    Linux lets the peak be set back to what is held now; elsewhere what came before can hide a part of the growth.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    jax.block_until_ready(work())
    return max(peak() - before, 0.0)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size, least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


# --- processes ---------------------------------------------------------------------------------------------------------


def in_worker(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module arguments...` prints as its last line, a JSON object; the module calls `answer`.

    Raises:
      RuntimeError: the process failed; with the end of what it wrote to stderr.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **dict.fromkeys(ONE_THREAD, "1")}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode != 0:
        asked = " ".join(arguments)
        raise RuntimeError(f"the bench process `{asked}` failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(measurement: Callable[..., dict[str, Any]]) -> None:
    """The worker's side: pin this process to one core, measure as the command line asks, print the outcome."""
    if hasattr(os, "sched_setaffinity"):  # before the first computation: XLA sizes its pool by the cores it may use
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(json.dumps(measurement(*sys.argv[1:])))


# --- the table ---------------------------------------------------------------------------------------------------------


def row(work: str, ours: float | None, peer: float | None, peer_name: str, unit: str, better: int) -> Row:
    """One row; `better` is `MORE`, `LESS` or `NEITHER`. Beside nothing, or beside zero, there is no ratio."""
    ratio = (ours / peer) ** better if ours and peer and better != NEITHER else None
    return {"work": work, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": ratio, "unit": unit}


def show(table: Sequence[Row], as_json: bool) -> None:
    """Print the rows, as JSON or for reading."""
    if as_json:
        print(json.dumps(table, indent=1))
        return
    shown = [("work", "ours", "peer", "ratio", "unit", "peer is")]
    for r in table:
        shown.append((r["work"], _number(r["ours"]), _number(r["peer"]), _number(r["ratio"]), r["unit"], r["peer_name"]))
    print(format_table(shown))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
