"""Stops a command in each of its phases, with real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lindm.cli.lifecycle import LIFECYCLES

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[4]
TIGER = ROOT / "tests" / "lindm" / "problems" / "files" / "tiger.pomdp"
FINISHED = (0, 1)  # 1: the preset smoke decides nothing, so no verdict is the expected one
PATIENCE = 300  # seconds for a command on a busy machine; native code and a lost stop take 600


def run(words: Sequence[str], directory: Path, **stop: str) -> subprocess.CompletedProcess[str]:
    """`lindm WORDS` in a process group of its own; everything in this group must end with it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    (temporary := directory / "tmp").mkdir(exist_ok=True)
    paths = os.pathsep.join([str(HERE), str(ROOT), str(ROOT / "experiments"), str(ROOT / "theory")])
    environment = kept | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "TMPDIR": str(temporary)} | stop
    process = subprocess.Popen(
        [sys.executable, "-m", "lindm", *words],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=PATIENCE)
        assert group_ended(process.pid), f"processes of {words} live on"
    finally:
        if not group_ended(process.pid, 0.0):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def group_ended(group: int, seconds: float = 20.0) -> bool:
    """Whether no process of a group is left, or none within so many seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)


def stop_in_every_phase(name: str, words: Sequence[str], phases: Mapping[str, str], directory: Path, first: int) -> None:
    """Start the command again and again in one directory, stop it in its next phase, and at last let it finish.

    Args:
      phases: phase -> where it is, as in `sitecustomize.py`; `!` in front: the main thread is in native code.
      first: the signal of the first phase; the next phase gets the other one.
    """
    lifecycle, number = LIFECYCLES[name], first
    assert tuple(phases) == lifecycle.phases, "every phase of the table is stopped"
    for phase, place in phases.items():
        mark = directory / f"{phase}.reached"
        given = {"STOP_AT": place.lstrip("!"), "STOP_NATIVE": str(int(place.startswith("!")))}
        done = run(words, directory, STOP_SIGNAL=str(number), STOP_MARK=str(mark), **given)
        what = f"{phase}, {signal.Signals(number).name}: {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
        assert mark.exists(), f"the phase was not reached: {what}"
        assert "Traceback" not in done.stderr and "leaked" not in done.stderr, what
        last = done.stderr.splitlines()[-1]
        if lifecycle.stop == "resumes":
            assert done.returncode == 75 and last.startswith("lindm: stopped by "), what
            assert last.endswith("; the same command resumes"), what
        else:
            assert done.returncode == 128 + number, what
            assert last == f"lindm: stopped by {signal.Signals(number).name}; the same command starts over", what
            assert not list(directory.rglob("*.lindm-tmp")), what
        number = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM
    done = run(words, directory)
    assert done.returncode in FINISHED, done.stderr
    assert not list(directory.rglob("*.lindm-tmp"))
