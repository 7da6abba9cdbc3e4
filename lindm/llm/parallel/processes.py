"""Several processes as one run: how they join, and what happens when one is lost.

`initialize` is called before the first array. Explicit addresses take precedence; otherwise SLURM, Open MPI and TPU hosts are
detected from the environment, from which `jax.distributed.initialize` reads the rest. A single process opens no socket.

The coordination service notices a dead process after `HEARTBEAT_TIMEOUT` seconds (immediately if it was the coordinator); a
collective that finds the connection closed notices it sooner. The others cannot continue, since the arrays that they hold are
shards. jax ends them by `abort`, and the parent process of `lindm.llm.parallel.supervisor` reports which process was lost.
"""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from lindm.errors import LostPeerError
from lindm.io import signals
from lindm.llm.parallel.supervisor import detect_launcher

HEARTBEAT_TIMEOUT = 30  # seconds after which a silent process counts as lost
INITIALIZATION_TIMEOUT = 300  # seconds to wait for all processes at the start
# parts of the messages of collectives and of the coordination service about a lost process
LOST_PEER_SIGNS = (
    "gloo",
    "connection closed",
    "connection reset",
    "unavailable",
    "heartbeat",
    "coordination service",
    "deadline_exceeded",
)


def initialize(coordinator: str | None = None, processes: int | None = None, rank: int | None = None) -> None:
    """Join the other processes, if there are any.

    Args:
      coordinator: host:port of process 0; processes: their number; rank: the number of this process. All three or none.

    Raises:
      ValueError: some but not all of the three, or one out of its range.
      LostPeerError: the other processes did not join in time.
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
        # no cluster detection: the environment of a launcher would hide all accelerators but one
        _initialize(
            coordinator_address=coordinator, num_processes=processes, process_id=rank, cluster_detection_method="deactivate"
        )
    elif (launcher := detect_launcher(dict(os.environ))) is not None:
        _initialize(local_device_ids=slurm_device_ids(dict(os.environ)) if launcher == "slurm" else None)


def slurm_device_ids(environment: dict[str, str]) -> list[int] | None:
    """All GPUs of a node for its only process, where jax would use one per process; None leaves the choice to jax."""
    if environment.get("JAX_LOCAL_DEVICE_IDS") or environment.get("SLURM_STEP_NUM_NODES") != environment.get("SLURM_NTASKS"):
        return None
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if gpus.isdigit() and int(gpus) > 1 else None


def _initialize(**arguments: Any) -> None:
    # jax's preemption service would take SIGTERM away from our handlers and from a launcher's threads
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _default_signal_handlers():
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=INITIALIZATION_TIMEOUT,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
    except Exception as e:  # gRPC raises types of its own
        raise LostPeerError(f"the processes did not find each other within {INITIALIZATION_TIMEOUT} s: {_first_line(e)}") from e


@contextlib.contextmanager
def _default_signal_handlers() -> Iterator[None]:
    """SIGTERM and SIGINT end the process immediately: Python cannot run its handlers while jax waits for the other processes."""
    kept = signals.is_watching() or threading.current_thread() is not threading.main_thread()
    numbers = () if kept else signals.STOP_SIGNALS
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def barrier(name: str) -> None:
    """Wait for all processes; returns immediately if there is one."""
    if jax.process_count() > 1:
        with detect_lost_peer():
            multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def detect_lost_peer() -> Iterator[None]:
    """Turn an error that means that another process is gone into a `LostPeerError`."""
    try:
        yield
    except Exception as e:
        if jax.process_count() > 1 and (message := _lost_peer_message(str(e))):
            raise LostPeerError(message) from e
        raise


def _lost_peer_message(message: str) -> str | None:
    """Which process is lost, by the message of a collective or of the coordination service; None for any other error."""
    if not any(sign in message.lower() for sign in LOST_PEER_SIGNS):
        return None
    lost = sorted({int(n) for n in re.findall(r"task[:/= ]+(\d+)", message)} - {jax.process_index()})
    peers = f"process {', '.join(map(str, lost))}" if lost else "another process"
    return f"process {jax.process_index()} lost {peers}: {message.strip().splitlines()[0][:300]}"


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:300]
