"""Safetensors files: what a directory holds, found and checked from the headers alone; and files written tensor by tensor.

The format: eight bytes with the length of a JSON header (name -> dtype, shape, offsets), the header, the tensors' bytes in a row.
`safetensors` itself refuses headers that do not fit their file; nothing is allocated before that.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lindm.errors import DataError
from lindm.io.directories import sync
from lindm.io.files import storage_errors, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LIMIT = 5 * 10**9  # bytes of one file
READABLE = ("F32", "BF16", "F16")
DTYPES: dict[str, tuple[str, np.dtype]] = {
    "f32": ("F32", np.dtype(np.float32)),
    "bf16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a file, not read."""

    file: Path
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]


def opened(file: Path) -> Any:
    """The open file; DataError where it is missing or is not what it says."""
    try:
        return safe_open(file, "numpy")
    except (SafetensorError, OSError) as e:
        raise DataError(f"{file}: not a safetensors file that can be read: {e}") from e


def held_in(file: Path) -> dict[str, Stored]:
    """The tensors of one file, by name."""
    with opened(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
        return {n: Stored(file=file, dtype=str(s.get_dtype()), shape=tuple(s.get_shape())) for n, s in slices.items()}


def inventory(directory: Path) -> dict[str, Stored]:
    """The tensors of a Hugging Face directory, by name, of one file or of all that its index names.

    Raises:
      LindmError: 3, naming file and key, for what is missing, damaged, not where the index says, or a pickle.
    """
    if (directory / SINGLE).exists():
        return held_in(directory / SINGLE)
    index = directory / INDEX
    if not index.exists():
        pickles = sorted(p.name for ending in ("bin", "pt", "pth") for p in directory.glob(f"*.{ending}"))
        why = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise DataError(f"{directory} has neither {SINGLE} nor {INDEX}{why}")
    places = _places(index)
    names = sorted(set(places.values()))
    for file in names:
        if not (directory / file).is_file():
            raise DataError(f"{directory / file} is missing; {index.name} names it")
    found: dict[str, Stored] = {}
    for file in names:
        for name, stored in held_in(directory / file).items():
            if places.get(name) != file:
                said = f"in {places[name]}" if name in places else "nowhere"
                raise DataError(f"{directory / file} holds {name}, which is {said} according to {index.name}")
            found[name] = stored
    if missing := sorted(places.keys() - found.keys()):
        raise DataError(f"{directory / places[missing[0]]} lacks {missing[0]}, which {index.name} says is there")
    return found


def _places(index: Path) -> dict[str, str]:
    """Tensor name -> file name; a file is a plain name, so that nothing outside the directory is ever opened."""
    try:
        places = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(f"{index}: not a JSON object with a weight_map: {e!r}") from e
    if not isinstance(places, dict) or not places:
        raise DataError(f"{index}: weight_map must be an object with an entry for each tensor")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise DataError(f"{index}: weight_map must name .safetensors files of its own directory; got {file!r} for {name}")
    return places


def write(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], values: Iterable[np.ndarray], dtype: str, limit: int
) -> list[str]:
    """Safetensors files with an index where one would be over the limit; one tensor is in memory at a time.

    Args:
      values: the tensors, in the order of `shapes`, whatever their dtype; dtype: f32 or bf16, of the files;
      limit: bytes of one file, more only where one tensor has more.

    Returns:
      The names of the files written.
    """
    size = DTYPES[dtype][1].itemsize
    shards: list[dict[str, tuple[int, ...]]] = []
    filled = limit + 1
    for name, shape in shapes.items():
        n = math.prod(shape) * size
        if filled + n > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += n
    one = len(shards) == 1
    names = [SINGLE if one else f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    stream = iter(values)
    for file, shard in zip(names, shards, strict=True):
        write_one(directory / file, shard, stream, dtype)
    if one:
        return names
    places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(math.prod(shape) * size for shape in shapes.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return [*names, INDEX]


def write_one(path: Path, shapes: Mapping[str, tuple[int, ...]], values: Iterator[np.ndarray], dtype: str) -> None:
    """One file; takes as many values as there are shapes."""
    spelled, kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": spelled, "shape": list(shape), "data_offsets": [at, at := at + math.prod(shape) * kind.itemsize]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    with storage_errors(path):
        with path.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                value = next(values)
                if value.shape != shape:
                    raise ValueError(f"{name} must be {list(shape)}; got {list(value.shape)}")
                f.write(np.ascontiguousarray(value, dtype=kind).reshape(-1).view(np.uint8).data)
        sync(path)
