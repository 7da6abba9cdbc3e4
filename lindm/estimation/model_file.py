"""Estimated models as `.pomdp` files, which say in comments where they come from and carry a checksum."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lindm.errors import DataError, LindmError
from lindm.io import inputs, limits
from lindm.io.files import make_parent, write_atomic
from lindm.io.provenance import provenance
from lindm.problems import cassandra
from lindm.problems.cassandra_writer import write

FORMAT = "lindm-estimate-1"


def write_models(models: Sequence[cassandra.Model], path: Path, comments: Sequence[str]) -> list[Path]:
    """Write one model to a path, or several to paths with a number each; the paths.

    Raises:
      ValueError: the path does not end in .pomdp.
      DataError: a name cannot be a name in such a file. StorageError: a file cannot be written.
    """
    if path.suffix != ".pomdp":
        raise ValueError(f"the file of a model must end in .pomdp; got {str(path)!r}")
    facts = provenance()
    commit = facts["git"]["commit"]
    made = f"lindm {facts['versions']['lindm']}{f', commit {commit}' if commit else ''}, {facts['date']}"
    about = "".join(f"# {' '.join(line.split())}\n" for line in (facts["command"], made, *comments))
    paths = [path] if len(models) == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(len(models))]
    texts = []
    for model in models:
        try:
            texts.append(about + write(model))
        except LindmError:
            raise
        except ValueError as e:
            raise DataError(f"the log has a name that a .pomdp file cannot hold: {e}") from e
    make_parent(path)
    for one, text in zip(paths, texts, strict=True):
        write_atomic(one, f"# {FORMAT} sha256 {_sha256(text)}\n{text}")
    return paths


def is_estimate(path: Path) -> bool:
    """Whether a file is one that `write_models` wrote, damaged or not."""
    try:
        with inputs.open_file(path, limits.POMDP_FILE) as file:
            return file.read(64).startswith(f"# {FORMAT.rpartition('-')[0]}-".encode())
    except (LindmError, OSError):
        return False


def verify(path: Path) -> None:
    """DataError where a file is not what `write_models` wrote, or holds no model."""
    head, _, text = inputs.read_text(path, limits.POMDP_FILE).partition("\n")
    if head != f"# {FORMAT} sha256 {_sha256(text)}":
        raise DataError(f"{path} is damaged or was changed: its SHA-256 is not that of its first line")
    cassandra.parse(text, str(path))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
