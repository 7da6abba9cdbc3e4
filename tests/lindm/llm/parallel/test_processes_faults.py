"""`lindm sft` as two processes: stopped, killed and resumed, they end with the same bits as an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from lindm.io import files, temporaries
from lindm.llm.parallel.processes import HEARTBEAT_TIMEOUT
from lindm.llm.sft import checkpoints
from tests.clock import HANGS, Stopwatch
from tests.lindm.llm.parallel.test_processes import ROOT, ended, free_port

pytestmark = pytest.mark.slow

STEPS = 36
SIZES = f"--steps {STEPS} --batch 4 --save-every 5 --eval-every 18 --eval-tasks 0 --held-out 0.2".split()


class Pair(NamedTuple):
    """The two processes of a run, each with what it says."""

    processes: list[subprocess.Popen]
    said: list[Path]
    out: Path

    def codes(self, seconds: float = HANGS) -> list[int]:
        return [process.wait(seconds) for process in self.processes]

    def lines(self) -> list[str]:
        """The last line of each."""
        return [path.read_text().splitlines()[-1] for path in self.said]

    def wait_for_step(self, step: int) -> None:
        path, end = self.out / "metrics.jsonl", time.monotonic() + HANGS
        while not path.exists() or not path.read_text().count('"kind":"train"') >= step:
            assert all(p.poll() is None for p in self.processes) and time.monotonic() < end, [p.read_text() for p in self.said]
            time.sleep(0.02)


def command(micro, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "lindm",
        "sft",
        "--model",
        str(micro.model),
        "--data",
        str(micro.mdp),
        "--out",
        str(out),
        *SIZES,
        *more,
    ]


def environment() -> dict[str, str]:
    flags = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    return flags | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def start(micro):
    """start(out, ...) -> two processes of `lindm sft`."""
    started: list[subprocess.Popen] = []

    def pair(out: Path, *more: str) -> Pair:
        there = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
        said = [out.with_suffix(f".{rank}") for rank in range(2)]
        mine = []
        for rank, path in enumerate(said):
            words = command(micro, out, *more, *there, "--rank", str(rank))
            with path.open("w") as f:
                mine.append(subprocess.Popen(words, env=environment(), stdout=f, stderr=f, cwd=ROOT))
        started.extend(mine)
        return Pair(mine, said, out)

    yield pair
    for process in started:  # the children of those that are killed end by themselves
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """The run that nobody touched."""
    pair = start(tmp_path_factory.mktemp("reference") / "out")
    assert pair.codes() == [0, 0], [path.read_text() for path in pair.said]
    return pair.out


def result(out: Path) -> dict[str, str]:
    """What two runs must have in common to the last byte."""
    step = out / "checkpoints" / checkpoints.checkpoint_name(checkpoints.checkpoint_steps(out / "checkpoints")[-1])
    return {
        "model": files.sha256(out / "model" / "model.safetensors"),
        "metrics": (out / "metrics.jsonl").read_text(),
        "progress": (step / "progress.json").read_text(),
    }


def children(process: subprocess.Popen) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


@pytest.mark.fault("F1", "F3", "F4")
def test_two_processes_that_are_stopped_and_killed_end_with_the_bits_of_two_that_are_not(start, reference, tmp_path):
    out = tmp_path / "out"

    # one gets SIGTERM, all save the same step
    pair = start(out)
    pair.wait_for_step(5)
    pair.processes[1].send_signal(signal.SIGTERM)
    stopwatch = Stopwatch()
    assert pair.codes() == [75, 75] and stopwatch.seconds() < 30
    stopped = checkpoints.checkpoint_steps(out / "checkpoints")[-1]
    assert all(f"saved step {stopped} of {STEPS}; the same command resumes" in line for line in pair.lines())
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == stopped

    # F4: one is killed, the other says which
    for victim, step in ((1, stopped + 3), (0, stopped + 9)):
        pair = start(out)
        pair.wait_for_step(step)
        theirs = children(pair.processes[victim])
        pair.processes[victim].kill()
        stopwatch = Stopwatch()
        assert pair.processes[1 - victim].wait(HANGS) == 8
        assert stopwatch.seconds() < HEARTBEAT_TIMEOUT + 5
        assert f"lindm: error: lost process {victim}" in pair.lines()[1 - victim]
        assert theirs and all(ended(pid) for pid in theirs)

    pair = start(out)
    assert pair.codes() == [0, 0], [path.read_text() for path in pair.said]
    assert "resumed at step" in pair.said[0].read_text()
    assert result(out) == result(reference)
    assert not list(out.rglob(f"*{temporaries.TEMPORARY_SUFFIX}*"))


def test_two_processes_train_as_one_does(micro, reference, tmp_path):
    out = tmp_path / "one"
    alone = subprocess.run(command(micro, out), env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert alone.returncode == 0, alone.stderr
    there, here = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (reference, out))
    assert [r["step"] for r in there] == [r["step"] for r in here] and len(here) == STEPS + 3
    assert [r.get("batch_sha256") for r in there] == [r.get("batch_sha256") for r in here]
    for one, other in zip(there[:10], here[:10], strict=True):  # later on, what was rounded in other ways has grown
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_an_error_in_every_process_ends_each_with_its_exit_code(start, tmp_path):
    pair = start(tmp_path / "out", "--mesh", "fsdp=3")
    assert pair.codes() == [2, 2]
    assert all("mesh must use all 2 devices" in path.read_text() for path in pair.said)
