"""Shared by the benchmarks: CPU-seconds, processes pinned to a core, peak memory, growth exponents, and the table.

Costs are CPU-seconds of a process (`time.process_time`), the best of several repeats, because other load only adds to them. Each
side of a comparison is measured in its own process, pinned to one core and with one thread in every pool, because idle threads
use CPU time. A row of a benchmark has

    work, ours, peer, peer_name, ratio, unit

where `ratio` is the factor by which ours is better (rates: ours / peer; costs: peer / ours), null for counts and exponents. The
peer is null if its library is not installed.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from lindm.io.files import strict_json
from lindm.io.memory import end_with_parent
from lindm.io.signals import at_stop
from lindm.io.tables import format_table

Row = dict[str, Any]
Result = TypeVar("Result")

MORE, LESS, NEITHER = 1, -1, 0  # the better direction of a quantity; NEITHER has no ratio
PARENT = "LINDM_BENCH_PARENT"  # number of the pipe that closes when the process of the command ends
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


# --- one measurement ---------------------------------------------------------------------------------------------------


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """CPU-seconds of `work()`, asynchronous computation included, and its result."""
    start = time.process_time()
    result = jax.block_until_ready(work())
    return time.process_time() - start, result


def cpu_seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """CPU-seconds of `work()`, the best of `repeats` calls."""
    return min(timed(work)[0] for _ in range(repeats))


def peak() -> float:
    """Peak resident set of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage reports at least the peak of the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def peak_growth(work: Callable[[], Any]) -> float:
    """MiB by which the resident set grows, at its peak, while `work()` runs.

    On Linux the peak is reset first; elsewhere an earlier peak can hide part of the growth.
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


def in_worker(
    module: str, *arguments: str, variables: Mapping[str, str] | None = None, timeout: float | None = None
) -> dict[str, Any]:
    """The JSON object that `python -m module arguments...` prints as its last line; the module calls `answer`.

    Args: variables: of the environment, beside those of this process; timeout: in seconds.

    Raises:
      RuntimeError: the process failed, or took longer than `timeout` seconds; the message has the end of its stderr.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **dict.fromkeys(ONE_THREAD, "1"), **(variables or {})}
    worker = [sys.executable, "-m", module, *arguments]
    worker_end, parent_end = os.pipe()
    with os.fdopen(parent_end, "wb"), os.fdopen(worker_end, "rb"):
        environment[PARENT] = str(worker_end)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pass_fds": (worker_end,)}
        with subprocess.Popen(worker, **pipes, text=True, env=environment) as process, at_stop(process.kill):
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired as e:
                process.kill()
                raise RuntimeError(f"the bench process `{' '.join(arguments)}` took longer than {timeout:.0f} seconds") from e
            except BaseException:  # KeyboardInterrupt in a notebook
                process.kill()
                raise
    if process.returncode != 0:
        command = " ".join(arguments)
        raise RuntimeError(f"the bench process `{command}` failed with exit code {process.returncode}:\n{stderr[-2000:]}")
    return json.loads(stdout.splitlines()[-1])


def answer(measurement: Callable[..., dict[str, Any]], pinned: bool = True) -> None:
    """In the worker: pin this process to one core, run the measurement by the command line, and print the result."""
    if (pipe := os.environ.pop(PARENT, None)) is not None:
        end_with_parent(int(pipe))
    if pinned and hasattr(os, "sched_setaffinity"):  # before the first computation: XLA sizes its pool by the available cores
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(strict_json(measurement(*sys.argv[1:])))


# --- the table ---------------------------------------------------------------------------------------------------------


def row(work: str, ours: float | None, peer: float | None, peer_name: str, unit: str, better: int) -> Row:
    """One row; `better` is `MORE`, `LESS` or `NEITHER`. No ratio without a peer, or to zero."""
    ratio = (ours / peer) ** better if ours and peer and better != NEITHER else None
    return {"work": work, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": ratio, "unit": unit}


def show(table: Sequence[Row], as_json: bool) -> None:
    """Print the rows, as JSON or for reading."""
    if as_json:
        print(strict_json(table, indent=1))
        return
    shown = [("work", "ours", "peer", "ratio", "unit", "peer is")]
    for r in table:
        shown.append((r["work"], _number(r["ours"]), _number(r["peer"]), _number(r["ratio"]), r["unit"], r["peer_name"]))
    print(format_table(shown))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
