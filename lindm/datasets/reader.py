"""Datasets read again: verified against the manifest, tasks and episodes as rows and as nouns. Needs no pyarrow.

What is to be trusted carries a seal, the SHA-256 of the rest of it; the manifest has the SHA-256 of every other file.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lindm.errors import DataError
from lindm.io import files
from lindm.types import APOMDP, MDP, POMDP, Episodes, Labels, Problem

FORMAT = "lindm-dataset-1"
CONFIG, MANIFEST = "config.json", "manifest.json"
ENDINGS = (".jsonl", ".parquet")
# columns of the episodes and the fields that they hold
STEPS = {"state": "s", "model": "m", "observation": "o", "action": "a", "reward": "r"}
ORACLE = {"label": "action", "Q": "Q", "certificate": "certificate", "regret": "regret"}


def sealed(value: dict) -> dict:
    """With its own SHA-256."""
    return value | {"seal": hashlib.sha256(files.canonical_json(value).encode()).hexdigest()}


def unsealed(value: dict) -> dict | None:
    """What was sealed; None if it is not what it was."""
    bare = {key: v for key, v in value.items() if key != "seal"}
    return bare if value == sealed(bare) else None


def read_manifest(directory: Path) -> dict:
    """The manifest of a finished dataset; DataError where there is none."""
    path = directory / MANIFEST
    if not path.exists() and (directory / CONFIG).exists():
        raise DataError(f"{directory} is not finished: make it again with the same options, and it goes on where it was")
    manifest = files.read_json(path)
    if not isinstance(config := manifest.get("config"), dict) or config.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a dataset in the format {FORMAT}")
    if unsealed(manifest) is None:
        raise DataError(f"{path} is damaged: its seal does not fit; make the dataset again and it is repaired")
    return manifest


def load(directory: Path) -> Iterator[tuple[dict, list[dict]]]:
    """Every task of a finished dataset with its episodes, in order: rows as dicts, floats to the last bit. Needs no pyarrow.

    The files are verified as they are reached. DataError, naming the file, where one is missing or is not what was written.
    """
    records = {record["point"]["shard"]: record for record in read_manifest(directory)["shards"]}
    common: dict = {}
    for name, record in records.items():
        if name == "problem":
            (common,) = _read_rows(directory, "problem", record)
            continue
        episodes = _read_rows(directory, f"episodes-{name}", record)
        each = len(episodes) // record["tasks"]
        for i, task in enumerate(_read_rows(directory, f"tasks-{name}", record)):
            yield task | common, episodes[i * each : (i + 1) * each]


def _read_rows(directory: Path, stem: str, record: dict) -> list[dict]:
    name = f"{stem}{ENDINGS[0]}"
    path = directory / name
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    if hashlib.sha256(data).hexdigest() != record["files"][name]["sha256"]:
        raise DataError(f"{path} is damaged: its SHA-256 is not that of {MANIFEST}; make the dataset again and it is repaired")
    return [json.loads(line) for line in data.splitlines()]


def problem_of(task: Mapping[str, Any]) -> Problem:
    """The problem of a row of `load`, or of the Parquet files (for a fixed problem, joined with its one row)."""
    present = [field.name for field in fields(POMDP) if field.name in task]
    arrays = {k: jnp.asarray(np.array(task[k], float).reshape(np.array(task[f"{k}_shape"]))) for k in present}
    if task["kind"] == "mdp":
        return MDP(**arrays)
    return POMDP(**arrays) if task["kind"] == "pomdp" else APOMDP(models=POMDP(**arrays), alpha=jnp.asarray(task["alpha"]))


def episodes_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Episodes, Labels]:
    """Episodes and labels [n, H] of rows of one dataset, as numpy arrays."""

    def stacked(columns: Mapping[str, str]) -> dict[str, Any]:
        kinds = {"reward": np.float64, "Q": np.float64, "regret": np.float64, "certificate": np.int8}
        present = {column: field for column, field in columns.items() if column in rows[0]}
        return {field: np.array([row[column] for row in rows], kinds.get(column, np.int32)) for column, field in present.items()}

    return Episodes(**stacked(STEPS)), Labels(**stacked(ORACLE))
