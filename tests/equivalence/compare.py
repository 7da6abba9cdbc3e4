"""Compare two directories of `freeze.py` under the rename map: equal, equal to 1e-12, or listed.

    python tests/equivalence/compare.py frozen/old frozen/new

Prints one line per output (equal, within 1e-12, or the first differences) and exits with 1 if any output differs. Names of fields
and of policies are translated by `renames.toml` before the comparison. Fields that describe the run and not its result (paths,
times, versions, hashes of code) are left out.
"""

import json
import math
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

RENAMES = tomllib.loads((Path(__file__).parent / "renames.toml").read_text(encoding="utf-8"))
TOLERANCE = 1e-12


def translated(value: Any) -> Any:
    """The value with old names of fields and old words replaced by the new ones, and without fields that are not results."""
    fields, words, ignored = RENAMES["fields"], RENAMES["words"], RENAMES["ignored"]["fields"]
    if isinstance(value, dict):
        return {fields.get(k, k): translated(v) for k, v in value.items() if k not in ignored}
    if isinstance(value, list):
        return [translated(v) for v in value]
    return words.get(value, value) if isinstance(value, str) else value


def content(path: Path) -> Any:
    """The records of one file."""
    if path.suffix == ".safetensors":
        return {name: array for name, array in sorted(load_file(path).items())}
    text = path.read_text(encoding="utf-8")
    return translated([json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text))


def differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[float, str]]:
    """(relative difference, description) for every place where the two differ; infinity where they are no numbers."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key in old and key in new:
                yield from differences(old[key], new[key], f"{where}.{key}")
            else:
                yield math.inf, f"{where}.{key}: only in the {'old' if key in old else 'new'} one"
    elif isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        if old.shape != new.shape or not np.array_equal(old, new):
            yield math.inf, f"{where}: arrays differ"
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield math.inf, f"{where}: {len(old)} items against {len(new)}"
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            yield from differences(a, b, f"{where}[{i}]")
    elif old != new:
        size = math.inf
        if isinstance(old, int | float) and isinstance(new, int | float) and not isinstance(old, bool):
            size = abs(old - new) / max(abs(old), abs(new), 1.0)
        yield size, f"{where}: {old!r} against {new!r}"


def files(directory: Path) -> dict[str, Path]:
    """The files that hold results, by their path in the directory."""
    kinds = ("records.jsonl", "metrics.jsonl", "model.safetensors", "episodes", "tasks", "problem")
    kept = [p for p in directory.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".safetensors")]
    return {
        p.relative_to(directory).as_posix(): p
        for p in sorted(kept)
        if (p.parent.name in ("solve", "eval") or p.name.startswith(kinds))
        and not ("runs/" in p.as_posix() and p.name.startswith("metrics"))
    }


def main(old: Path, new: Path) -> int:
    there, here = files(old), files(new)
    worst = 0
    for name in sorted(there.keys() | here.keys()):
        if name not in there or name not in here:
            print(f"{name}: only in the {'old' if name in there else 'new'} directory")
            worst = 1
            continue
        deviations = sorted(differences(content(there[name]), content(here[name])), reverse=True, key=lambda d: d[0])
        large = [text for size, text in deviations if size > TOLERANCE]
        print(
            f"{name}: "
            + ("equal" if not deviations else f"{len(large)} differences" if large else f"within {deviations[0][0]:.1e}")
        )
        for text in large[:5]:
            print(f"    {text}")
        worst |= bool(large)
    return worst


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"compare.py needs two directories, the old and the new one; got {len(sys.argv) - 1} arguments")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
