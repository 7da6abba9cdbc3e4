"""Solutions on disk: one .npz file with the problem, the tables of the method, and a header with the
version of the format and the provenance of the solution."""

import dataclasses
import hashlib
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lindm.errors import DataError
from lindm.io import files, inputs, limits
from lindm.io.provenance import provenance
from lindm.solvers import belief_net, hsvi, tree
from lindm.solvers.solve import Solution
from lindm.types import APOMDP, MDP, POMDP, Plan, RewardFunction

FORMAT = "lindm-solution-2"
KINDS: dict[str, type] = {
    kind.__name__: kind for kind in (MDP, POMDP, APOMDP, RewardFunction, Plan, tree.Tree, hsvi.Bounds, belief_net.Net, Solution)
}

# what numpy and zipfile raise for damaged headers, names and members
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, OSError)
DAMAGED += (zipfile.BadZipFile, zlib.error, struct.error)


def save_solution(path: Path, solution: Solution, names: dict[str, tuple[str, ...]]) -> None:
    """Write a solved problem to `path`, atomically; `names`: of states, actions, observations and models."""
    arrays: dict[str, np.ndarray] = {}
    header = {"format": FORMAT, "provenance": provenance(), "solution": _store(solution, "solution", arrays)}
    header |= {"names": {part: list(words) for part, words in names.items()}}
    header |= {"arrays": {name: _sha256(array) for name, array in arrays.items()}}
    text = files.canonical_json(files.with_checksum(header))
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array(text), **arrays)  # pyright: ignore[reportArgumentType]
    files.make_parent(path)
    files.write_atomic(path, buffer.getvalue())


def load_solution(path: Path) -> tuple[Solution, dict[str, tuple[str, ...]]]:
    """Read a file of `save_solution`. DataError where it is none, or one of another version."""
    try:
        stored = _read_arrays(path)
        header = inputs.parse_json(str(stored["header"]), str(path))
        files.check_format(path, header["format"], FORMAT)
        if files.verified(header) is None:
            raise DataError(f"{path} is damaged: the checksum of its header is wrong")
        for name, digest in header["arrays"].items():
            if _sha256(stored[name]) != digest:
                raise DataError(f"{path} is damaged: {name} is not what was written")
        solution = _restore(header["solution"], "solution", stored)
        if not isinstance(solution, Solution):
            raise ValueError(f"it holds a {type(solution).__name__}")
        return solution, {part: tuple(names) for part, names in header["names"].items()}
    except DAMAGED as e:
        raise DataError(f"{path}: not a solution of `lindm`: {e}") from e


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, which are stored without compression, so that they take no more memory than the file."""
    size = inputs.check_file(path, limits.SOLUTION_FILE)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > size or len(members) > limits.SOLUTION_MEMBERS:
            raise ValueError("its members are compressed, overlap, or are too many")
        return {m.filename.removesuffix(".npy"): inputs.parse_npy(archive.read(m), f"{path}: {m.filename}") for m in members}


def _sha256(array: np.ndarray) -> str:
    """SHA-256 of an array with its type and shape."""
    head = f"{array.dtype.str} {array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _store(value: Any, at: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Put the arrays of a nested dataclass into `arrays`; its kinds and texts."""
    described: dict[str, Any] = {"kind": type(value).__name__}
    for field in dataclasses.fields(value):
        part, key = getattr(value, field.name), f"{at}.{field.name}"
        if isinstance(part, str):
            described[field.name] = part
        elif dataclasses.is_dataclass(part):
            described[field.name] = _store(part, key, arrays)
        elif part is not None:
            arrays[key] = np.asarray(part)
    return described


def _restore(described: dict[str, Any], at: str, stored: Any) -> Any:
    kind, values = KINDS[described["kind"]], {}
    for field in dataclasses.fields(kind):
        part, key = described.get(field.name), f"{at}.{field.name}"
        if part is None and key not in stored and field.default is None:
            continue  # what this problem does not have
        is_kind = isinstance(part, dict)
        values[field.name] = _restore(part, key, stored) if is_kind else part if part is not None else jnp.asarray(stored[key])
    return kind(**values)
