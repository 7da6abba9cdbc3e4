"""The manifest of a directory: its provenance, and the SHA-256 of every file in it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lindm.errors import DataError
from lindm.io import inputs, limits
from lindm.io.files import read_json_lines, write_json
from lindm.io.provenance import provenance
from lindm.io.verification import MANIFEST, find_damage, hashes_of, read_manifest

FORMAT = "lindm-manifest-2"
RECORDS = "records.jsonl"


def write_manifest(directory: Path, outputs: Iterable[str], **extra: Any) -> None:
    """manifest.json: provenance, `extra`, and the SHA-256 of the files `outputs` of the directory.

    The caller has written or verified each of them: a manifest must not vouch for a damaged file.
    """
    hashes = hashes_of(directory, sorted(outputs))
    write_json(directory / MANIFEST, provenance() | extra | {"outputs": hashes}, format=FORMAT)


def update_outputs(directory: Path, names: Iterable[str]) -> None:
    """Put files that were written again into the manifest of a directory, if it has one; the other files are verified first.

    Raises:
      DataError: another file is missing or is not what was written, or the manifest is damaged.
    """
    if not (directory / MANIFEST).exists():
        return
    manifest, written = read_manifest(directory, FORMAT), hashes_of(directory, names)
    if damaged := find_damage(directory, {name: h for name, h in manifest["outputs"].items() if name not in written}):
        raise DataError(str(damaged[0]))
    write_json(directory / MANIFEST, manifest | {"outputs": manifest["outputs"] | written}, format=FORMAT)


def verify_output(directory: Path, name: str) -> None:
    """Compare one file with the manifest of its directory; a directory that is not finished has no manifest.

    Raises:
      DataError: the file is missing or is not what was written, or the manifest is damaged.
    """
    if (directory / MANIFEST).exists():
        outputs = read_manifest(directory, FORMAT)["outputs"]
        if name in outputs and (damaged := find_damage(directory, {name: outputs[name]})):
            raise DataError(str(damaged[0]))


def read_output(directory: Path, name: str) -> bytes | None:
    """The content of a file, compared with the manifest of its directory where there is one; None where there is no file.

    Raises:
      DataError: the file cannot be read or is not what was written, or the manifest is damaged.
    """
    path = directory / name
    verify_output(directory, name)
    return inputs.read_bytes(path, limits.OUTPUT_FILE) if path.exists() else None


def read_records(directory: Path) -> list[dict]:
    """All records of a run directory, each verified. DataError when there are none, or where they are not what was written."""
    records = read_json_lines(directory / RECORDS)
    verify_output(directory, RECORDS)
    if not records:
        raise DataError(f"no records in {directory / RECORDS}")
    return records
