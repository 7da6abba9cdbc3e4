"""Who stands beside this process, and what becomes of it when one of them is lost. Nothing heavy is imported here.

When a process is lost, or does not come, jax's coordination service ends all others by `abort`, from a thread of its own: at the
start, in the middle of a collective, in idle Python and again at exit. No handler in the same process can make an exit code of
that. So a process beside others divides before anything is imported that starts threads: the child does the work; the parent
passes on its stderr and the signals, and ends as the child did, or with exit code 8 and the name of the process that is missing.
"""

import contextlib
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from lindm.errors import LostPeerError, Preempted

TAIL = 1 << 16  # bytes at the end of what the child said that are looked at
FATAL = "JAX distributed service detected fatal errors"


def launcher(environment: dict[str, str]) -> str | None:
    """Who started this process beside others: slurm, ompi or tpu; None if nobody did."""
    # a batch script has a rank among its tasks too, but only what `srun` starts has a step's list of nodes
    step = {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys()
    if step and int(environment.get("SLURM_NTASKS", "1") or 1) > 1:
        return "slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1") or 1) > 1:
        return "ompi"
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return "tpu"
    # a Cloud TPU machine tells its neighbours by its metadata server, which jax asks
    chips = any(Path("/dev").glob("accel[0-9]*")) or Path("/dev/vfio/0").exists()
    meant = not environment.get("JAX_PLATFORMS", "").startswith("cpu") and find_spec("libtpu") is not None
    return "tpu" if chips and meant and environment.get("TPU_SKIP_MDS_QUERY") != "1" else None


def guard(exit_codes: Mapping[type[Exception], int]) -> None:
    """Go on in a child; this process watches it, and ends (SystemExit) as it ends. To be called before any thread is started."""
    sys.stdout.flush()
    sys.stderr.flush()
    heard, said = os.pipe()
    watched, alive = os.pipe()  # nothing is written: it closes when the parent is gone, however that came
    child = os.fork()
    if child == 0:
        os.close(heard)
        os.close(alive)
        os.dup2(said, 2)
        os.close(said)
        threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
        return
    os.close(said)
    os.close(watched)

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    status, tail = _listen(heard, child)
    os.close(alive)
    raise SystemExit(_code(status, tail.decode(errors="replace"), exit_codes))


def _end_with(pipe: int) -> None:
    """A child whose parent was killed is not to go on alone."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _listen(pipe: int, child: int) -> tuple[int, bytes]:
    """Pass on what the child says until it has ended: its status, and the end of what it said."""
    tail, status = b"", None
    while True:
        ready = select.select([pipe], [], [], 0.2)[0]
        if ready and (data := os.read(pipe, 1 << 16)):
            _pass_on(data)
            tail = (tail + data)[-TAIL:]
        elif ready:
            return os.waitpid(child, 0)[1] if status is None else status, tail
        elif status is not None:  # a process that the child left behind holds the pipe
            return status, tail
        elif (ended := os.waitpid(child, os.WNOHANG))[0]:
            status = ended[1]


def _pass_on(data: bytes) -> None:
    with contextlib.suppress(OSError):  # whoever was reading is gone: no reason to end
        while data:
            data = data[os.write(2, data) :]


def _code(status: int, said: str, exit_codes: Mapping[type[Exception], int]) -> int:
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    code, why = 128 + number, f"ended by {signal.Signals(number).name}"
    if number in (signal.SIGTERM, signal.SIGINT):  # whoever has something to save does not die of these
        code, why = exit_codes[Preempted], f"stopped by {signal.Signals(number).name}; the same command resumes"
    elif number == signal.SIGABRT and (lost := verdict(said)):
        code, why = exit_codes[LostPeerError], lost
    _pass_on(f"lindm: error: {why}\n".encode())
    return code


def verdict(said: str) -> str | None:
    """Which process is missing, by what the coordination service said before it ended this one; None if it was not that.

    It names processes by number, one a line (older ones as /job:jax_worker/replica:0/task:1), and the one that coordinates, 0,
    by its role.
    """
    start = said.rfind(FATAL)
    if start < 0:
        return None
    if "RegisterTask" in said[start:]:
        return "the processes did not find each other in time: one did not start, or the coordinator's address is not its own"
    number = r"(?:\S*task:)?(\d+)"
    listed = re.findall(rf"(?:stopped sending heartbeats\)|timed out task names):((?:\s+{number}(?=\s))+)", said)
    named = {int(n) for block, _ in listed for n in re.findall(number, block)}
    named |= {int(n) for n in re.findall(rf"[Tt]ask {number} heartbeat timeout", said)}
    if named:
        who = f"process {', '.join(map(str, sorted(named)))}"
    elif "leader task" in said[start:] or "/Heartbeat" in said[start:]:
        who = "process 0, which coordinates"
    else:
        who = "another process"
    return f"lost {who}: it ended or was not heard of any more; the same command resumes where all saved last"
