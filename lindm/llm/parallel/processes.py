"""Several processes as one run: how they find each other, and what happens when one is lost.

`start` comes before the first array. Explicit addresses win; otherwise SLURM, Open MPI and TPU hosts are recognised by what they
set in the environment, and `jax.distributed.initialize` reads the rest there. A process that was started alone opens no socket.

A process that dies is noticed by the coordination service after `HEARTBEAT` seconds (at once if it was the one that coordinates),
or sooner by a collective that finds the connection closed. They cannot go on: the arrays they hold are parts of a whole. jax then
ends the others by `abort`; what the parent of `lindm.llm.parallel.supervisor` makes of that is exit code 8 and the name of the
missing one.
"""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from lindm.errors import LostPeerError
from lindm.llm.parallel.supervisor import launcher

HEARTBEAT = 30  # seconds after which a silent process counts as lost
PATIENCE = 300  # seconds to wait for all processes at the start
Outcome = TypeVar("Outcome")


def start(coordinator: str | None = None, processes: int | None = None, rank: int | None = None) -> None:
    """Join the other processes, if there are any.

    Args:
      coordinator: host:port of the first process; processes: how many; rank: this one's number. All three or none.

    Raises:
      ValueError: some but not all of the three, or one out of its range.
      LindmError: the others did not come in time (8).
    """
    given = (coordinator, processes, rank)
    if any(x is not None for x in given) and any(x is None for x in given):
        raise ValueError(f"coordinator, processes and rank must be given together; got {coordinator}, {processes} and {rank}")
    if coordinator is not None and processes is not None and rank is not None:
        if not re.fullmatch(r"\S+:\d+", coordinator):
            raise ValueError(f"coordinator must be host:port; got {coordinator!r}")
        if not 0 <= rank < processes:
            raise ValueError(f"rank must be from 0 to {processes - 1}; got {rank}")
        if processes == 1:
            return
        # what else the environment tells of launchers is not asked: it would hide all accelerators but one
        _initialize(
            coordinator_address=coordinator, num_processes=processes, process_id=rank, cluster_detection_method="deactivate"
        )
    elif (by := launcher(dict(os.environ))) is not None:
        _initialize(local_device_ids=devices_of_slurm(dict(os.environ)) if by == "slurm" else None)


def devices_of_slurm(environment: dict[str, str]) -> list[int] | None:
    """All GPUs of a node for its only process, where jax would take one for each process; None leaves the choice to jax."""
    if environment.get("JAX_LOCAL_DEVICE_IDS") or environment.get("SLURM_STEP_NUM_NODES") != environment.get("SLURM_NTASKS"):
        return None
    there = environment.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(there))) if there.isdigit() and int(there) > 1 else None


def _initialize(**arguments: Any) -> None:
    # jax's own watch for SIGTERM takes the signal away from whoever notes it, a launcher's threads too, and nobody asks it
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _mortal():
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=PATIENCE,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )
    except Exception as e:  # grpc has its own kinds
        raise LostPeerError(f"the processes did not find each other within {PATIENCE} s: {_first_line(e)}") from e


@contextlib.contextmanager
def _mortal() -> Iterator[None]:
    """SIGTERM and SIGINT end the process at once: Python does not get to its handlers while jax waits for the others."""
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def barrier(name: str) -> None:
    """Wait for all processes; at once if there is one."""
    if jax.process_count() > 1:
        together(lambda: multihost_utils.sync_global_devices(name))


def together(work: Callable[[], Outcome]) -> Outcome:
    """What may fail because another process is gone: then it ends as LostPeerError."""
    try:
        return work()
    except Exception as e:
        if jax.process_count() > 1 and (found := _lost(str(e))):
            raise LostPeerError(found) from e
        raise


def _lost(message: str) -> str | None:
    """What an error of a collective or of the coordination service says about who is missing; None if it is about something
    else.
    """
    signs = (
        "gloo",
        "connection closed",
        "connection reset",
        "unavailable",
        "heartbeat",
        "coordination service",
        "deadline_exceeded",
    )
    if not any(sign in message.lower() for sign in signs):
        return None
    named = sorted({int(n) for n in re.findall(r"task[:/= ]+(\d+)", message)} - {jax.process_index()})
    who = f"process {', '.join(map(str, named))}" if named else "another process"
    return f"process {jax.process_index()} lost {who}: {message.strip().splitlines()[0][:300]}"


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:300]
