"""Safetensors files: reading the headers of a directory, and writing files tensor by tensor.

The format: eight bytes with the length of a JSON header (name -> dtype, shape, offsets), the header, the bytes of the tensors.
`safetensors` itself raises an error for a header of more than 100 MB, and for one whose tensors do not cover the file exactly, in
order and without overlap; nothing is allocated before that.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lindm.errors import DataError, NonFiniteError
from lindm.io import inputs
from lindm.io.files import read_json, storage_errors, write_json
from lindm.io.progress import Progress

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
READABLE_DTYPES = ("F32", "BF16", "F16")
FileDtype = Literal["f32", "f16", "bf16"]
_DTYPES: dict[str, tuple[str, np.dtype]] = {  # name in safetensors, and in numpy
    "f32": ("F32", np.dtype(np.float32)),
    "f16": ("F16", np.dtype(np.float16)),
    "bf16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a file, from its header."""

    file: Path
    dtype: str  # the name in safetensors
    shape: tuple[int, ...]


def open_file(file: Path) -> Any:
    """The open file. Raises: DataError if it is missing or damaged."""
    inputs.check_file(file)
    try:
        return safe_open(file, "numpy")
    except (SafetensorError, OSError) as e:
        raise DataError(f"{file}: not a safetensors file that can be read: {e}") from e


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name."""
    with open_file(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
        return {n: StoredTensor(file=file, dtype=str(s.get_dtype()), shape=tuple(s.get_shape())) for n, s in slices.items()}


def read_directory_headers(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face directory, by name: of its one file, or of all files that its index names.

    Raises:
      DataError: a tensor or file is missing, damaged, in another file than the index says, or a pickle; names file and key.
    """
    if (directory / SINGLE_FILE).exists():
        return read_header(directory / SINGLE_FILE)
    index = directory / INDEX_FILE
    if not index.exists():
        pickles = sorted(p.name for ending in ("bin", "pt", "pth") for p in directory.glob(f"*.{ending}"))
        why = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise DataError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{why}")
    places = _weight_map(index)
    names = sorted(set(places.values()))
    for file in names:
        if not (directory / file).is_file():
            raise DataError(f"{directory / file} is missing; {index.name} names it")
    tensors: dict[str, StoredTensor] = {}
    for file in names:
        for name, stored in read_header(directory / file).items():
            if places.get(name) != file:
                place = f"in {places[name]}" if name in places else "nowhere"
                raise DataError(f"{directory / file} has {name}, which is {place} according to {index.name}")
            tensors[name] = stored
    if missing := sorted(places.keys() - tensors.keys()):
        raise DataError(f"{directory / places[missing[0]]} lacks {missing[0]}, which {index.name} says is there")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name. File names have no directories, so that nothing outside the directory is opened."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise DataError(f"{index}: weight_map must be an object with an entry for each tensor")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise DataError(f"{index}: weight_map must name .safetensors files of its own directory; got {file!r} for {name}")
    return places


def write_shards(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], values: Iterable[np.ndarray], dtype: FileDtype, max_shard_bytes: int
) -> None:
    """Write one safetensors file, or several with an index; one tensor is in memory at a time.

    Args:
      values: the tensors in the order of `shapes`, of any dtype; dtype: of the files.
      max_shard_bytes: largest size of one file; a larger tensor has a file of its own.
    """
    size = _DTYPES[dtype][1].itemsize
    shards: list[dict[str, tuple[int, ...]]] = []
    filled = max_shard_bytes + 1
    for name, shape in shapes.items():
        n = math.prod(shape) * size
        if filled + n > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += n
    single = len(shards) == 1
    names = [SINGLE_FILE if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with Progress() as progress:
        stream = _counted(values, progress.add("write tensors", total=len(shapes)).update)
        for file, shard in zip(names, shards, strict=True):
            write_file(directory / file, shard, stream, dtype)
    if not single:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(math.prod(shape) * size for shape in shapes.values())
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def require_finite(values: np.ndarray, name: str, file: Path) -> None:
    """NonFiniteError where a tensor has a value that is NaN or infinite; names file and tensor."""
    if not (finite := np.isfinite(values)).all():
        n, at = int((~finite).sum()), tuple(int(i) for i in np.argwhere(~finite)[0])
        raise NonFiniteError(f"{file}: {name} is not finite: {n} of {values.size} values, the first is {values[at]} at {at}")


def _counted(values: Iterable[np.ndarray], update: Callable[[int], None]) -> Iterator[np.ndarray]:
    for done, value in enumerate(values):
        update(done)
        yield value


def write_file(path: Path, shapes: Mapping[str, tuple[int, ...]], values: Iterator[np.ndarray], dtype: FileDtype) -> None:
    """Write one file; takes as many values as there are shapes. NonFiniteError where one is NaN or infinite in this dtype."""
    dtype_name, numpy_dtype = _DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": dtype_name,
            "shape": list(shape),
            "data_offsets": [at, at := at + math.prod(shape) * numpy_dtype.itemsize],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors to 8 bytes
    with storage_errors(path), path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            value = next(values)
            if value.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}; got {list(value.shape)}")
            with np.errstate(over="ignore"):  # infinity of a value that does not fit
                stored = np.ascontiguousarray(value, dtype=numpy_dtype)
            require_finite(stored, name, Path(path.name))
            f.write(stored.reshape(-1).view(np.uint8).data)
