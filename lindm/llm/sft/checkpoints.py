"""Checkpoints that are complete or absent: Orbax writes the arrays, and a manifest of SHA-256 verifies them.

    DIRECTORY/00000200/state/          Orbax: every array, with its sharding; restores onto any mesh
    DIRECTORY/00000200/progress.json   state of the training loop
    DIRECTORY/00000200/manifest.json   format, step, and SHA-256 of every other file; written last

A checkpoint is written under a hidden name and renamed when everything is on disk. Orbax does not notice a flipped bit, so a
checkpoint is restored only after every file was compared with the manifest, and the newest intact checkpoint is used. One that is
intact and cannot be restored is an error.

Training goes on while a checkpoint is written: `CheckpointWriter.save` returns when the state is in the memory of the host. Each
process then writes and hashes its own part in a thread. The thread of process 0 collects the hashes, which come as files of the
hidden directory, writes the manifest and renames. The threads start no operation on the devices: its place among the
training steps would differ between processes.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from lindm.errors import CheckpointError, DataError, LindmError, LostPeerError, StorageError, failed_to_allocate
from lindm.io import files, signals, verification
from lindm.io.directories import atomic_directory, remove
from lindm.io.temporaries import stays_removed, temporary_path
from lindm.io.verification import MANIFEST
from lindm.llm.parallel.processes import barrier, detect_lost_peer

FORMAT = "lindm-checkpoint-2"
STATE, PROGRESS = "state", "progress.json"
HASHES = "hashes.{process}.json"  # of the files of a process other than 0, until they are in the manifest
PEER_SECONDS = 600  # that process 0 waits for the hashes of another process
ABANDON_SECONDS = 20  # that a process which failed waits for its own write, which may wait for the others
JOIN_SECONDS = 0.1  # between two looks at the stop flag
logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every phase of every save


class Checkpoint(NamedTuple):
    """A restored checkpoint."""

    step: int
    state: Any  # like the template, with its shardings
    progress: dict[str, Any]  # of the training loop
    skipped: tuple[str, ...]  # newer checkpoints that are damaged, and how


def checkpoint_name(step: int) -> str:
    return f"{step:08d}"


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps with a checkpoint, damaged or not, oldest first."""
    return sorted(int(p.name) for p in directory.glob("[0-9]" * 8) if p.is_dir()) if directory.is_dir() else []


class CheckpointWriter:
    """Writes checkpoints in the background, one after the other. A context: at its end the last one is complete.

    All processes call `save` and `wait` in the same order.
    """

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, directory: Path, step: int, state: Any, progress: dict[str, Any], keep: int) -> None:
        """Begin to write a checkpoint, after which all but the newest `keep` are removed. The arrays of `state` may be donated
        as soon as this returns: on a CPU, the step that takes them then copies them.

        Raises:
          StorageError: the disk is full or not writable, for this checkpoint or the one before. Earlier checkpoints stay intact
            and no partial one is left behind.
        """
        self.wait()
        final, is_main = directory / checkpoint_name(step), jax.process_index() == 0
        with _write_errors(final), ExitStack() as stack:
            if is_main:
                directory.mkdir(exist_ok=True)  # in a directory that is there: that of a run that was removed does not come back
                stack.enter_context(stays_removed(directory))
            hidden = stack.enter_context(atomic_directory(final, replace=True) if is_main else nullcontext(temporary_path(final)))
            barrier(f"before checkpoint {step}")
            arrays = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=_ASYNC)
            stack.callback(arrays.close)
            with detect_lost_peer():
                arrays.save((hidden / STATE).absolute(), args=ocp.args.StandardSave(state))
            writing = stack.pop_all()

        def finish() -> None:
            try:
                with _write_errors(final), writing:
                    _wait_for_arrays(arrays)
                    _write_manifest(hidden, step, progress)
                if is_main:
                    remove_old(directory, keep)
            except BaseException as e:
                self.error = e

        self.thread = threading.Thread(target=finish, name=f"checkpoint {step}", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raise the error of a write that has failed; waits for nothing."""
        if self.thread is not None and not self.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; its error is raised here. StorageError as in `save`."""
        if self.thread is not None:
            _join(self.thread)
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is None:
            self.wait()
        elif self.thread is not None and not isinstance(error, LostPeerError):  # without its peer, it never ends
            _join(self.thread, math.inf if jax.process_count() == 1 else ABANDON_SECONDS)


def _join(thread: threading.Thread, seconds: float = math.inf) -> None:
    """Wait for a thread. A signal is noticed meanwhile: otherwise it would end the process before the thread has written."""
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end:
        signals.stop_requested()
        thread.join(min(JOIN_SECONDS, end - time.monotonic()))


_ASYNC = ocp.options.AsyncOptions(create_directories_asynchronously=False)


def save(directory: Path, step: int, state: Any, progress: dict[str, Any], keep: int) -> None:
    """`CheckpointWriter.save`, complete when this returns."""
    with CheckpointWriter() as writer:
        writer.save(directory, step, state, progress, keep)
    barrier(f"after checkpoint {step}")


@contextmanager
def _write_errors(final: Path) -> Iterator[None]:
    """Turn whatever keeps a checkpoint from being written into a `StorageError`, but for a lack of memory."""
    try:
        yield
    except LindmError:
        raise
    except Exception as e:
        if failed_to_allocate(e):
            raise
        raise StorageError(f"cannot write {final}: {_reason(e)}") from e


def _wait_for_arrays(arrays: ocp.AsyncCheckpointer) -> None:
    """Wait until the processes have written their arrays. LostPeerError where one of them is gone."""
    with detect_lost_peer():
        try:
            arrays.wait_until_finished()
        except TimeoutError as e:  # Orbax's name for any failure of a barrier
            raise e.__cause__ or e from e


def _write_manifest(hidden: Path, step: int, progress: dict[str, Any]) -> None:
    """Hash the files of this process; in process 0, write the manifest of all files."""
    process, processes = jax.process_index(), jax.process_count()
    parts = [f"{STATE}/ocdbt.process_{k}/" for k in range(processes)]
    if process > 0:
        mine = [name for name in verification.files_below(hidden) if name.startswith(parts[process])]
        files.write_json(hidden / HASHES.format(process=process), verification.hashes_of(hidden, mine))
        return
    files.write_json(hidden / PROGRESS, progress)
    theirs: dict[str, str] = {}
    for k in range(1, processes):
        theirs |= _take_hashes(hidden / HASHES.format(process=k), k)
    names = [name for name in verification.files_below(hidden) if not name.startswith(tuple(parts[1:]))]
    files.write_json(hidden / MANIFEST, {"step": step, "outputs": theirs | verification.hashes_of(hidden, names)}, format=FORMAT)


def _take_hashes(path: Path, process: int) -> dict[str, str]:
    """The hashes of the files of another process, which writes them to `path`, a file that is removed."""
    end = time.monotonic() + PEER_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise LostPeerError(f"process {process} did not write its part of a checkpoint within {PEER_SECONDS} s")
        time.sleep(0.02)
    hashes = files.read_json(path)
    path.unlink()
    return hashes


def remove_old(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, of which the last is intact."""
    for old in checkpoint_steps(directory)[:-keep]:
        remove(directory / checkpoint_name(old))


def restore(directory: Path, template: Any, step: int | None = None) -> Checkpoint | None:
    """The newest intact checkpoint; None if there is none, damaged or not.

    Args:
      template: the state with a `ShapeDtypeStruct` that has a sharding in place of each array.
      step: of the checkpoint that is restored, and no other one.

    Raises:
      CheckpointError: all checkpoints are damaged, with the damage of each; or Orbax cannot read one whose files are all as they
        were written: with an older one in its place, the processes of a run could go on from different steps.
    """
    damaged: list[str] = []
    for number in reversed(checkpoint_steps(directory)) if step is None else (step,):
        path = directory / checkpoint_name(number)
        if (damage := find_damage(path)) is not None:
            damaged.append(damage)
            continue
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader, detect_lost_peer():
                state = reader.restore((path / STATE).absolute(), args=ocp.args.StandardRestore(template))
        except LindmError:
            raise
        except (Exception, GeneratorExit) as e:  # the latter where a coroutine of Orbax ends early
            if failed_to_allocate(e):
                raise
            raise CheckpointError(f"{path} is intact, but Orbax cannot restore it: {_reason(e)}") from e
        return Checkpoint(number, state, json.loads((path / PROGRESS).read_bytes()), tuple(damaged))
    if damaged:
        raise CheckpointError("no usable checkpoint:\n  " + "\n  ".join(damaged))
    return None


def find_damage(path: Path) -> str | None:
    """How a checkpoint differs from its manifest; None if it is intact."""
    try:
        manifest = verification.read_manifest(path, FORMAT)
        damaged = verification.find_damage(path, manifest["outputs"])
    except DataError as e:
        return e.message
    if manifest["step"] != int(path.name):
        return f"{path / MANIFEST} is of another step"
    return str(damaged[0]) if damaged else None


def _reason(e: BaseException) -> str:
    """The line of an error message that names the cause."""
    lines = [line.strip() for line in (str(e) or type(e).__name__).splitlines() if line.strip()]
    cause = next((line for line in lines if "No space" in line or "ermission" in line or "Read-only" in line), lines[0])
    return cause[:300]
