"""Directories verified against the SHA-256 in their manifest.json.

A manifest is a JSON file with a checksum of itself and `outputs`: relative file name -> SHA-256. A directory within another one
that has a manifest of its own is listed there by its manifest alone.

    lindm-manifest-2    of runs, verifications, evaluations and reports, with provenance (`lindm.io.manifest`)
    lindm-files-1       of models, adapters and exports: the files alone, so that the same files have the same manifest
    lindm-checkpoint-2  of checkpoints (`lindm.llm.sft.checkpoints`)

Files that are not listed are not lindm's, and nothing is said about them.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lindm.errors import DataError
from lindm.io import files

MANIFEST, PROVENANCE = "manifest.json", "provenance.json"
FILES_FORMAT = "lindm-files-1"
OTHER_KINDS = {"lindm-dataset-": "a dataset of `lindm data make`", "lindm-manifest-": "a run or another result of lindm"}
CHANGED = f"is not what was written (its SHA-256 is not that of {MANIFEST})"


class Damage(NamedTuple):
    """A file that is missing or is not what was written."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


def hashes_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """File name -> SHA-256 of these files of a directory. DataError where one cannot be read."""
    return {name: files.sha256(directory / name) for name in names}


def files_below(directory: Path) -> list[str]:
    """The files below a directory by relative name, without its manifest."""
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)


def write_file_list(directory: Path) -> None:
    """Write manifest.json with the SHA-256 of the other files below a directory that is complete.

    Provenance, which has a checksum of itself, is not listed: the same model has the same manifest.
    """
    names = [name for name in files_below(directory) if name != PROVENANCE]
    files.write_json(directory / MANIFEST, {"outputs": hashes_of(directory, names)}, format=FILES_FORMAT)


def add_to_file_list(directory: Path, names: Iterable[str]) -> None:
    """Put new files into the list of a directory that may have the files of other exports, too.

    Raises:
      DataError: manifest.json is damaged, or is no list of files.
    """
    listed = read_manifest(directory, FILES_FORMAT)["outputs"] if (directory / MANIFEST).exists() else {}
    files.write_json(directory / MANIFEST, {"outputs": listed | hashes_of(directory, names)}, format=FILES_FORMAT)


def read_manifest(directory: Path, format: str) -> dict:
    """The manifest of a directory. DataError where it is missing, damaged, or of another format."""
    path = directory / MANIFEST
    manifest = files.read_json(path, format=format)
    outputs = manifest.get("outputs")
    if not isinstance(outputs, dict) or not all(isinstance(digest, str) for digest in outputs.values()):
        raise DataError(f"{path}: outputs must be an object with the SHA-256 of each file")
    if outside := [name for name in outputs if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name]:
        raise DataError(f"{path}: outputs must name files of its own directory; got {outside[0]!r}")
    return manifest


def find_damage(directory: Path, outputs: Mapping[str, str]) -> list[Damage]:
    """The files among the `outputs` of a manifest that are missing or are not what was written."""
    damaged = []
    for name, digest in outputs.items():
        path = directory / name
        try:
            if not path.is_file():
                damaged.append(Damage(path, "is no regular file" if path.exists() else "is missing"))
            elif files.sha256(path) != digest:
                damaged.append(Damage(path, CHANGED))
        except DataError:
            damaged.append(Damage(path, "cannot be read"))
    return damaged


def verify_file_list(directory: Path, chosen: Callable[[str], bool] = lambda name: True, required: bool = False) -> None:
    """Compare the files of a model or an adapter with its manifest, if lindm wrote one. Each file is read once in a process.

    Args:
      chosen: by name, the files that are about to be read.
      required: the directory is part of a run, so that lindm wrote its manifest.

    Raises:
      DataError: names the first file that is missing or is not what was written.
    """
    path = directory / MANIFEST
    content = files.read_json(path) if path.exists() else {}
    if not required and not content.keys() & {"format", "outputs", "checksum"}:
        return  # made by another program, which may have a manifest.json of its own
    config = content.get("config")  # that of a dataset names its format
    format = str(content.get("format") or (config.get("format") if isinstance(config, dict) else None))
    for start, kind in OTHER_KINDS.items():
        if format.startswith(start):
            raise DataError(f"{directory} is {kind}, and neither a model nor an adapter")
    outputs = read_manifest(directory, FILES_FORMAT)["outputs"]
    if damaged := find_damage(directory, {name: digest for name, digest in outputs.items() if chosen(name)}):
        raise DataError(f"{damaged[0]}; if the change is intended, remove {path}")
