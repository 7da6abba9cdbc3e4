"""Several operating system processes as one run: the same numbers, and what is left when one of them is lost."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from lindm.llm.parallel import processes as distributed
from lindm.llm.parallel import supervisor
from tests.clock import HANGS, Stopwatch
from tests.lindm.llm import tiny

ROOT = Path(__file__).parents[4]
HEARTBEAT = 3

# a process of a run: `lindm sft` begins and ends like this; after so many steps it waits, in a collective or in Python, or ends
CHILD = """
import os, signal, sys, time
kind, devices, coordinator, processes, rank, heartbeat, patience, then = sys.argv[1:9]
if kind == "guarded":
    from lindm.llm.parallel.supervisor import supervise
    from lindm.cli.exit_codes import EXIT_CODES
    supervise(EXIT_CODES)
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
os.environ["JAX_PLATFORMS"] = "cpu"
from lindm_experiments.harness.xla import configure_xla
configure_xla()
import jax, json
from lindm.errors import LindmError
from lindm.cli.exit_codes import exit_code
from lindm.io import signals
from lindm.llm.parallel import processes as distributed
from lindm.llm.parallel import sharding
distributed.HEARTBEAT_TIMEOUT, distributed.INITIALIZATION_TIMEOUT = int(heartbeat), int(patience)
from lindm.cli.lifecycle import ending
signals.watch(ending("resumes"))
def say(**what):
    print(json.dumps(what), flush=True)
say(waits=True)
if coordinator == "environment":
    distributed.initialize()
else:
    distributed.initialize(coordinator, int(processes), int(rank))
watch = jax.config.jax_enable_preemption_service
say(pid=os.getpid(), rank=jax.process_index(), processes=jax.process_count(), devices=len(jax.devices()), watch=watch)
from tests.lindm.llm import tiny
try:
    if then == "train":
        mesh = sharding.make_mesh({"fsdp": len(jax.devices()) // 2, "tensor": 2})
        say(metrics=tiny.train([tiny.batch(i) for i in range(3)], mesh).metrics)
    elif then == "meet":
        distributed.barrier("all are here")
    elif then == "idle":
        say(step=0)
        time.sleep(100)
    elif then == "steps":
        unsaved = signals.unsaved_work(lambda: "")
        unsaved.__enter__()
        for step in range(1, 2000):
            with distributed.detect_lost_peer():
                all_stop = tiny.largest(int(signals.stop_requested()))
            if all_stop or step == 3:
                say(step=step, noted=signals.stop_requested(), all_stop=all_stop)
            if all_stop:
                sys.exit(75)
            time.sleep(0.02)
except LindmError as e:
    print(e, file=sys.stderr)
    sys.exit(exit_code(e))
"""


class Output(NamedTuple):
    process: subprocess.Popen
    out: Path
    err: Path

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.out.read_text().splitlines() if line.startswith("{")]

    def wait_for(self, key: str, seconds: float = HANGS) -> dict:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if matches := [line for line in self.lines() if key in line]:
                return matches[0]
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no {key} within {seconds} s: {self.out.read_text()} {self.err.read_text()}")


def free_port(low: int = 0, high: int = 1) -> int:
    """A port that is free now; with `low` and `high`, in that range."""
    for port in range(low, high):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return s.getsockname()[1]
    raise AssertionError("no free port")


@pytest.fixture
def run(tmp_path):
    """run(then, ...) -> the processes; whatever is left of them is killed at the end."""
    started = []

    def start(then, *, ranks=(0, 1), processes=2, kind="guarded", devices=1, environments=None, patience=60):
        coordinator = "environment" if environments else f"127.0.0.1:{free_port()}"
        for rank in ranks:
            out, err = tmp_path / f"{rank}.out", tmp_path / f"{rank}.err"
            words = [kind, str(devices), coordinator, str(processes), str(rank), str(HEARTBEAT), str(patience), then]
            environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
            environment |= {"PYTHONPATH": str(ROOT)} | (environments[rank] if environments else {})
            with out.open("w") as o, err.open("w") as e:
                process = subprocess.Popen([sys.executable, "-c", CHILD, *words], stdout=o, stderr=e, env=environment, cwd=ROOT)
            started.append(Output(process, out, err))
        return started

    yield start
    for output in started:
        output.process.kill()
        for line in output.lines():
            if "pid" in line:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(line["pid"], signal.SIGKILL)
        output.process.wait()


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one_device_does(run):
    output = run("train", devices=4)
    metrics = [s.wait_for("metrics")["metrics"] for s in output]
    assert [s.process.wait(HANGS) for s in output] == [0, 0]
    for rank, s in enumerate(output):
        assert s.lines()[1] | {"pid": 0} == {"pid": 0, "rank": rank, "processes": 2, "devices": 8, "watch": False}
    alone = tiny.train([tiny.batch(i) for i in range(3)]).metrics
    assert metrics[0] == metrics[1]
    for there, here in zip(metrics[0], alone, strict=True):
        assert there["loss"] == pytest.approx(here["loss"], abs=1e-5) and there["grad_norm"] == pytest.approx(
            here["grad_norm"], rel=1e-5
        )
        assert (there["num_labels"], there["accuracy"]) == (here["num_labels"], here["accuracy"])


@pytest.mark.slow
@pytest.mark.fault("F4")
@pytest.mark.parametrize(
    "victim, then, processes", [(1, "steps", 2), (0, "steps", 2), (1, "idle", 2), (0, "idle", 2), (1, "steps", 3)]
)
def test_when_a_process_is_killed_the_others_end_with_exit_code_8_and_name_it(run, trials, victim, then, processes):
    output = run(then, ranks=range(processes), processes=processes)
    pids = [s.wait_for("pid")["pid"] for s in output]
    for s in output:
        s.wait_for("step")
    output[victim].process.kill()
    stopwatch = Stopwatch()
    for other in (*output[:victim], *output[victim + 1 :]):
        assert other.process.wait(HANGS) == 8, other.err.read_text()
        assert stopwatch.seconds() < HEARTBEAT + 5
        assert f"lindm: error: lost process {victim}" in other.err.read_text().splitlines()[-1]
        trials.add()
    assert all(ended(pid) for pid in pids)  # nobody trains on without a parent


@pytest.mark.slow
@pytest.mark.fault("F4")
def test_when_a_process_stops_answering_the_other_ends_too(run):
    output = run("steps")
    pid = output[1].wait_for("pid")["pid"]
    for s in output:
        s.wait_for("step")
    os.kill(pid, signal.SIGSTOP)
    stopwatch = Stopwatch()
    assert output[0].process.wait(HANGS) == 8
    assert stopwatch.seconds() < HEARTBEAT + 5
    assert "lindm: error: lost process 1" in output[0].err.read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.fault("F4")
def test_without_a_guard_the_others_end_too_but_by_abort(run):
    output = run("steps", kind="alone")
    for s in output:
        s.wait_for("step")
    output[1].process.kill()
    assert output[0].process.wait(HANGS) == -signal.SIGABRT
    assert supervisor.diagnose_abort(output[0].err.read_text()) is not None


@pytest.mark.slow
@pytest.mark.fault("F3")
@pytest.mark.parametrize("signaled, processes", [(0, 2), (1, 2), (1, 3)])
def test_sigterm_to_one_process_stops_all_after_the_same_step(run, trials, signaled, processes):
    """The signal was noted before `start`, and jax's own watch for it must not take it away."""
    output = run("steps", ranks=range(processes), processes=processes)
    for s in output:
        s.wait_for("step")
    output[signaled].process.terminate()
    assert [s.process.wait(HANGS) for s in output] == [75] * processes
    last = [s.lines()[-1] for s in output]
    assert len({line["step"] for line in last}) == 1 and all(line["all_stop"] for line in last)
    assert [line["noted"] for line in last] == [rank == signaled for rank in range(processes)]
    trials.add(processes)


@pytest.mark.slow
@pytest.mark.fault("F4")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_others_never_come_ends_with_exit_code_8(run, rank):
    (output,) = run("steps", ranks=(rank,), patience=3)
    assert output.process.wait(HANGS) == 8
    assert "the processes did not find each other" in output.err.read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.fault("F2")
def test_a_process_that_waits_for_others_can_be_stopped(run):
    (output,) = run("steps", ranks=(1,), patience=100)
    output.wait_for("waits")
    time.sleep(1)
    output.process.terminate()
    assert output.process.wait(HANGS) == 75
    assert "stopped by SIGTERM; the same command resumes" in output.err.read_text()


@pytest.mark.slow
def test_processes_that_slurm_starts_find_each_other_by_their_environment(run):
    port = free_port(65535 - 2**12 + 1, 65535)  # jax takes one by the job's number
    environments = [
        {
            "SLURM_JOB_ID": str(7 * 2**12 + port - (65535 - 2**12 + 1)),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "2",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": "0",
        }
        for rank in range(2)
    ]
    output = run("meet", environments=environments)
    for rank, s in enumerate(output):
        assert s.process.wait(HANGS) == 0, s.err.read_text()
        assert s.lines()[1]["rank"] == rank and s.lines()[1]["processes"] == 2


# --- launchers: which processes belong to a run --------------------------------------------------------------------------

SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "environment, launcher",
    [
        ({}, None),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # the batch script itself
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "tpu"),
    ],
)
def test_a_launcher_is_known_by_what_it_sets(environment, launcher):
    assert supervisor.detect_launcher(environment | {"JAX_PLATFORMS": "cpu"}) == launcher


@pytest.mark.parametrize(
    "environment, devices",
    [
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "8", "SLURM_GPUS_ON_NODE": "4"}, None),  # a process for each
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2"}, None),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "4", "JAX_LOCAL_DEVICE_IDS": "1"}, None),
    ],
)
def test_the_only_process_of_a_node_of_slurm_takes_all_its_gpus(environment, devices):
    assert distributed.slurm_device_ids(environment) == devices


@pytest.mark.parametrize(
    "arguments, output",
    [
        (("a:1", None, None), "coordinator, processes and rank must be given together; got a:1, None and None"),
        ((None, 2, 0), "must be given together"),
        (("a", 2, 0), "coordinator must be host:port; got 'a'"),
        (("a b:1", 2, 0), "coordinator must be host:port"),
        (("a:1", 2, 2), "rank must be from 0 to 1; got 2"),
        (("a:1", 2, -1), "rank must be from 0 to 1; got -1"),
    ],
)
def test_an_address_that_is_none_is_refused(arguments, output):
    with pytest.raises(ValueError, match=output):
        distributed.initialize(*arguments)


def test_a_single_process_joins_no_group(monkeypatch):
    monkeypatch.setattr(distributed, "_initialize", lambda **_: pytest.fail("a socket would be opened"))
    for name in ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialize()
    distributed.initialize("127.0.0.1:1", 1, 0)
    distributed.barrier("nobody else")
