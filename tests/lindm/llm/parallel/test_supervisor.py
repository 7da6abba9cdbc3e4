"""The parent of a process of a run: exit codes, signals and output pass through, and an abort names the lost process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lindm.llm.parallel import supervisor
from tests.clock import HANGS
from tests.lindm.llm.parallel.test_processes import ended

ROOT = Path(__file__).parents[4]
GUARDED = """
import sys
from lindm.llm.parallel.supervisor import supervise
from lindm.cli.exit_codes import EXIT_CODES
supervise(EXIT_CODES)
import os, signal, threading, time
print("out", flush=True); print("err", file=sys.stderr, flush=True)
"""


def guarded(rest: str, **settings) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", GUARDED + rest], capture_output=True, text=True, env=environment, timeout=HANGS)


@pytest.mark.parametrize("code", [0, 3, 75])
def test_a_guarded_process_ends_as_it_would_alone(code):
    done = guarded(f"sys.exit({code})")
    assert (done.returncode, done.stdout, done.stderr) == (code, "out\n", "err\n")


def test_the_error_of_a_guarded_process_names_its_cause():
    killed = guarded("os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == 128 + 9 and killed.stderr == "err\nlindm: error: ended by SIGKILL\n"
    aborted = guarded("os.abort()")
    assert aborted.returncode == 128 + 6 and "lindm: error: ended by SIGABRT" in aborted.stderr


def test_a_guarded_process_gets_signals_and_its_output_is_passed_on():
    output = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    output += "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(20)"
    assert guarded(output).returncode == 75
    many = guarded("sys.stderr.write('x' * 300_000); sys.stderr.flush(); os._exit(4)")
    assert many.returncode == 4 and many.stderr == "err\n" + "x" * 300_000


@pytest.mark.fault("F4")
def test_a_guarded_process_does_not_wait_for_what_it_left_behind():
    left = "import subprocess; left = subprocess.Popen(['sleep', '1000'], stdout=subprocess.DEVNULL); print(left.pid, flush=True)"
    done = guarded(f"{left}; os._exit(0)")
    pid = int(done.stdout.split()[-1])
    assert done.returncode == 0 and not ended(pid)
    os.kill(pid, signal.SIGKILL)


BEFORE = """E1128 01:02:08.899440   11253 coordination_service.cc:1549] [1] Use error polling to propagate the following error:
UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
{}
The tasks have crashed. Check the task logs for an earlier error [type.googleapis.com/tensorflow.CoordinationServiceError='']
"""
LAST = "F1128 01:02:08.9   11264 client.h:80] Terminating process because the JAX distributed service detected fatal errors. "


@pytest.mark.fault("F4")
@pytest.mark.parametrize(
    "output, named",
    [
        (BEFORE.format("1") + LAST, "lost process 1:"),
        (BEFORE.format("1\n12") + LAST, "lost process 1, 12:"),
        (BEFORE.format("/job:jax_worker/replica:0/task:3") + LAST, "lost process 3:"),
        (LAST + "Barrier failed because: UNAVAILABLE: Task 2 heartbeat timeout.", "lost process 2:"),
        (LAST + "Some timed out task names:\n0\n [type.googleapis", "lost process 0:"),
        (LAST + "UNAVAILABLE: Either the leader task was preempted/died", "lost process 0, the coordinator:"),
        (
            LAST + "DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/Heartbeat",
            "lost process 0, the coordinator:",
        ),
        (LAST + "DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/RegisterTask", "did not find each other"),
        (LAST + "something new", "lost another process:"),
    ],
)
def test_messages_of_the_coordination_service_name_the_lost_process(output, named):
    assert named in (supervisor.diagnose_abort(output) or "")


@pytest.mark.fault("F4")
def test_an_abort_of_something_else_is_no_lost_process():
    assert supervisor.diagnose_abort("F1128 Check failed: x == y. The leader task was here") is None
    assert supervisor.diagnose_abort("") is None
