"""Checkpoints that are whole or not there: Orbax writes the arrays, a manifest of SHA-256 says that they are what was written.

    DIRECTORY/00000200/state/          Orbax: every array, cut as it lay on the mesh; restores onto any other mesh
    DIRECTORY/00000200/host.json       what the host needs to go on
    DIRECTORY/00000200/manifest.json   SHA-256 of every other file, written last

A step is written under a hidden name and renamed when everything is on disk; Orbax does not notice a flipped bit, so a step is
restored only after every file has been compared with the manifest, and the newest step that passes is used.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from lindm.errors import CheckpointError, LindmError, StorageError
from lindm.io import files
from lindm.io.directories import sync
from lindm.io.files import TEMPORARY_SUFFIX
from lindm.llm.parallel.processes import barrier, together

FORMAT = "lindm-checkpoint-1"
STATE, HOST, MANIFEST = "state", "host.json", "manifest.json"
logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every step of every save


class Restored(NamedTuple):
    step: int
    state: Any  # as the template, on its shardings
    host: dict[str, Any]
    skipped: tuple[str, ...]  # newer steps that are damaged, and how


def name_of(step: int) -> str:
    return f"{step:08d}"


def steps(directory: Path) -> list[int]:
    """Steps that seem to be there, oldest first."""
    return sorted(int(p.name) for p in directory.glob("[0-9]" * 8) if p.is_dir()) if directory.is_dir() else []


def save(directory: Path, step: int, state: Any, host: dict[str, Any], keep: int) -> None:
    """Write one step, called by all processes at once; then remove all but the newest `keep`.

    Raises:
      LindmError: the disk refuses (7), in every process; what was there before is intact and nothing half-written is left.
    """
    hidden, final = directory / f".{name_of(step)}{TEMPORARY_SUFFIX}", directory / name_of(step)
    first = jax.process_index() == 0
    if first:
        with files.storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        clean(directory)
    barrier(f"before step {step}")
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
            together(lambda: writer.save((hidden / STATE).absolute(), args=ocp.args.StandardSave(state)))
        if first:
            files.write_json(hidden / HOST, host)
            files.write_json(hidden / MANIFEST, {"step": step, "files": _sums(hidden)}, format=FORMAT)
            with files.storage_errors(final):
                _sync(hidden)
                shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
                os.replace(hidden, final)
                sync(directory)
    except BaseException as e:
        if first:
            shutil.rmtree(hidden, ignore_errors=True)
        if isinstance(e, LindmError) or not isinstance(e, Exception):
            raise
        raise StorageError(f"cannot write {final}: {_reason(e)}") from e
    barrier(f"after step {step}")
    if first:
        for old in steps(directory)[:-keep]:
            remove(directory / name_of(old))


def remove(path: Path) -> None:
    """A step goes at once: under a hidden name first, so that a half-removed one is never taken for a step."""
    hidden = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    shutil.rmtree(hidden, ignore_errors=True)
    with files.storage_errors(path):
        os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clean(directory: Path) -> None:
    """Remove what a killed writer left."""
    for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)


def restore(directory: Path, template: Any) -> Restored | None:
    """The newest step that is intact; None if none was ever written.

    Args:
      template: the state with a `ShapeDtypeStruct` and its sharding in the place of each array.

    Raises:
      LindmError: there are steps but none is intact (4), with what is wrong with each.
    """
    damaged: list[str] = []
    for step in reversed(steps(directory)):
        path = directory / name_of(step)
        if (fault := fault_of(path)) is not None:
            damaged.append(f"{path}: {fault}")
            continue
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                state = together(lambda p=path: reader.restore((p / STATE).absolute(), args=ocp.args.StandardRestore(template)))
        except LindmError:
            raise
        except Exception as e:
            damaged.append(f"{path}: {_reason(e)}")
            continue
        return Restored(step, state, json.loads((path / HOST).read_bytes()), tuple(damaged))
    if damaged:
        raise CheckpointError("no usable checkpoint:\n  " + "\n  ".join(damaged))
    return None


def fault_of(path: Path) -> str | None:
    """What is wrong with a step, by its manifest; None if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        wanted = dict(manifest["files"])
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, not {FORMAT!r}"
        if manifest["step"] != int(path.name):
            return "its manifest is of another step"
    except OSError as e:
        return f"its manifest cannot be read ({e.strerror})"
    except (ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    try:
        found = _sums(path)
    except OSError as e:
        return f"{e.filename} cannot be read ({e.strerror})"
    if missing := sorted(wanted.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if wrong := sorted(name for name in wanted if wanted[name] != found[name]):
        return f"{wrong[0]} is not what was written"
    return None


def _sums(path: Path) -> dict[str, str]:
    """SHA-256 of every file below a step but the manifest, by relative name."""
    found = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p != path / MANIFEST):
        with file.open("rb") as f:
            found[file.relative_to(path).as_posix()] = hashlib.file_digest(f, "sha256").hexdigest()
    return found


def _sync(path: Path) -> None:
    """Everything below a directory is on disk before the directory gets its name."""
    for file in path.rglob("*"):
        sync(file)


def _reason(e: Exception) -> str:
    lines = [line.strip() for line in (str(e) or type(e).__name__).splitlines() if line.strip()]
    telling = next((line for line in lines if "No space" in line or "ermission" in line or "Read-only" in line), lines[0])
    return telling[:300]
