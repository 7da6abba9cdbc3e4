"""Checkpoints that are complete or absent: Orbax writes the arrays, and a manifest of SHA-256 verifies them.

    DIRECTORY/00000200/state/          Orbax: every array, with its sharding; restores onto any mesh
    DIRECTORY/00000200/progress.json   state of the training loop
    DIRECTORY/00000200/manifest.json   format, step, and SHA-256 of every other file; written last

A checkpoint is written under a hidden name and renamed when everything is on disk. Orbax does not notice a flipped bit, so a
checkpoint is restored only after every file was compared with the manifest, and the newest intact checkpoint is used. One that is
intact and cannot be restored is an error.
"""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from lindm.errors import CheckpointError, DataError, LindmError, StorageError, failed_to_allocate
from lindm.io import files, verification
from lindm.io.directories import atomic_directory, remove
from lindm.io.temporaries import temporary_path
from lindm.io.verification import MANIFEST
from lindm.llm.parallel.processes import barrier, detect_lost_peer

FORMAT = "lindm-checkpoint-2"
STATE, PROGRESS = "state", "progress.json"
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


def save(directory: Path, step: int, state: Any, progress: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, then remove all but the newest `keep`. A collective call: all processes call it for the same step.

    Raises:
      StorageError: the disk is full or not writable. Raised in every process; earlier checkpoints stay intact and no partial one
        is left behind.
    """
    final, is_main = directory / checkpoint_name(step), jax.process_index() == 0
    try:
        if is_main:
            directory.mkdir(exist_ok=True)  # in a directory that is there: that of a run that was removed does not come back
        with atomic_directory(final, replace=True) if is_main else nullcontext(temporary_path(final)) as hidden:
            barrier(f"before checkpoint {step}")
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer, detect_lost_peer():
                writer.save((hidden / STATE).absolute(), args=ocp.args.StandardSave(state))
            if is_main:
                files.write_json(hidden / PROGRESS, progress)
                hashes = verification.hashes_of(hidden, verification.files_below(hidden))
                files.write_json(hidden / MANIFEST, {"step": step, "outputs": hashes}, format=FORMAT)
    except LindmError:
        raise
    except Exception as e:
        if failed_to_allocate(e):
            raise
        raise StorageError(f"cannot write {final}: {_reason(e)}") from e
    barrier(f"after checkpoint {step}")
    if is_main:
        remove_old(directory, keep)


def remove_old(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, of which the last is intact."""
    for old in checkpoint_steps(directory)[:-keep]:
        remove(directory / checkpoint_name(old))


def restore(directory: Path, template: Any) -> Checkpoint | None:
    """The newest intact checkpoint; None if there is none, damaged or not.

    Args:
      template: the state with a `ShapeDtypeStruct` that has a sharding in place of each array.

    Raises:
      CheckpointError: all checkpoints are damaged, with the damage of each; or Orbax cannot read one whose files are all as they
        were written: with an older one in its place, the processes of a run could go on from different steps.
    """
    damaged: list[str] = []
    for step in reversed(checkpoint_steps(directory)):
        path = directory / checkpoint_name(step)
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
            raise CheckpointError(f"{path} is intact, and yet Orbax cannot restore it: {_reason(e)}") from e
        return Checkpoint(step, state, json.loads((path / PROGRESS).read_bytes()), tuple(damaged))
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
