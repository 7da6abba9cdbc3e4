"""A parent process that watches a training process and gives it a meaningful exit code. Nothing heavy is imported here.

When a process is lost or does not join, jax's coordination service ends all others by `abort` from a thread of its own: at the
start, within a collective, in idle Python, and again at exit. No handler within the process can turn that into an exit code. So a
process of several forks before anything is imported that starts threads: the child trains; the parent forwards stderr and
signals, and ends as the child does, or with the exit code of `LostPeerError` and a message that names the lost process.
"""

import contextlib
import os
import re
import select
import signal
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from lindm.errors import LostPeerError, Preempted
from lindm.io import signals
from lindm.io.memory import end_with_parent

STDERR_TAIL = 1 << 16  # bytes at the end of the child's stderr that are searched for the cause of an abort
ABORT_MESSAGE = "JAX distributed service detected fatal errors"


def detect_launcher(environment: dict[str, str]) -> str | None:
    """The launcher that started this process as one of several: slurm, ompi or tpu; None for a single process."""
    # a batch script has a rank too, but only processes that `srun` starts have the list of nodes of a step
    step = {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys()
    if step and int(environment.get("SLURM_NTASKS", "1") or 1) > 1:
        return "slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1") or 1) > 1:
        return "ompi"
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return "tpu"
    # jax asks the metadata server of a Cloud TPU machine for its neighbors
    chips = any(Path("/dev").glob("accel[0-9]*")) or Path("/dev/vfio/0").exists()
    usable = not environment.get("JAX_PLATFORMS", "").startswith("cpu") and find_spec("libtpu") is not None
    return "tpu" if chips and usable and environment.get("TPU_SKIP_MDS_QUERY") != "1" else None


def supervise(exit_codes: Mapping[type[BaseException], int]) -> None:
    """Fork: returns in the child; the parent watches the child and raises SystemExit with its exit code.

    Call it before any thread is started, but that of `signals.watch`, which goes on in the child.
    """
    ending = signals.unwatch()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)  # until there are handlers on both sides
    sys.stdout.flush()
    sys.stderr.flush()
    stderr_read, stderr_write = os.pipe()
    parent_read, parent_write = os.pipe()  # nothing is written: it closes when the parent ends for any reason
    child = os.fork()
    if child == 0:
        os.close(stderr_read)
        os.close(parent_write)
        os.dup2(stderr_write, 2)
        os.close(stderr_write)
        if ending is not None:
            signals.watch(ending)
        signals.release()
        end_with_parent(parent_read)
        return
    os.close(stderr_write)
    os.close(parent_read)

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in signals.STOP_SIGNALS:
        signal.signal(number, forward)
    signals.release()
    status, tail = _forward_stderr(stderr_read, child)
    os.close(parent_write)
    raise SystemExit(_exit_code(status, tail.decode(errors="replace"), exit_codes))


def _forward_stderr(pipe: int, child: int) -> tuple[int, bytes]:
    """Forward the child's stderr until it ends: its wait status, and the tail of its stderr."""
    tail, status = b"", None
    while True:
        ready = select.select([pipe], [], [], 0.2)[0]
        if ready and (data := os.read(pipe, 1 << 16)):
            _write_stderr(data)
            tail = (tail + data)[-STDERR_TAIL:]
        elif ready:
            return os.waitpid(child, 0)[1] if status is None else status, tail
        elif status is not None:  # a grandchild holds the pipe open
            return status, tail
        elif (ended := os.waitpid(child, os.WNOHANG))[0]:
            status = ended[1]


def _write_stderr(data: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more: no reason to end
        while data:
            data = data[os.write(2, data) :]


def _exit_code(status: int, stderr: str, exit_codes: Mapping[type[BaseException], int]) -> int:
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    code, reason = 128 + number, f"ended by {signal.Signals(number).name}"
    if number in signals.STOP_SIGNALS:  # a process with unsaved work handles these signals
        code, reason = exit_codes[Preempted], f"stopped by {signal.Signals(number).name}; the same command resumes"
    elif number == signal.SIGABRT and (lost := diagnose_abort(stderr)):
        code, reason = exit_codes[LostPeerError], lost
    _write_stderr(f"lindm: error: {reason}\n".encode())
    return code


def diagnose_abort(stderr: str) -> str | None:
    """Which process is lost, by the message of the coordination service before it aborted; None for any other abort.

    The message names processes by number, one per line (older versions as /job:jax_worker/replica:0/task:1), and process 0 by its
    role as the leader.
    """
    start = stderr.rfind(ABORT_MESSAGE)
    if start < 0:
        return None
    message = stderr[start:]
    if "RegisterTask" in message:
        return "the processes did not find each other in time: one did not start, or the coordinator's address is wrong"
    number = r"(?:\S*task:)?(\d+)"
    lists = re.findall(rf"(?:stopped sending heartbeats\)|timed out task names):((?:\s+{number}(?=\s))+)", stderr)
    lost = {int(n) for block, _ in lists for n in re.findall(number, block)}
    lost |= {int(n) for n in re.findall(rf"[Tt]ask {number} heartbeat timeout", stderr)}
    if lost:
        peers = f"process {', '.join(map(str, sorted(lost)))}"
    elif "leader task" in message or "/Heartbeat" in message:
        peers = "process 0, the coordinator"
    else:
        peers = "another process"
    return f"lost {peers}: it ended or stopped responding; the same command resumes from the last common checkpoint"
