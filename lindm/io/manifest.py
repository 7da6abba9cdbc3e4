"""The manifest of a directory: its provenance, and the SHA-256 of every file in it."""

from pathlib import Path
from typing import Any

from lindm.io.files import sha256, write_json
from lindm.io.provenance import provenance

FORMAT = "lindm-manifest-1"


def write_manifest(directory: Path, **extra: Any) -> None:
    """manifest.json: provenance, `extra`, and the SHA-256 of every other file below `directory`."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != "manifest.json" and not p.name.startswith("."))
    outputs = {p.relative_to(directory).as_posix(): sha256(p) for p in files}
    write_json(directory / "manifest.json", provenance() | extra | {"outputs": outputs}, format=FORMAT)
