"""Runs an experiment and survives being interrupted. It knows no science.

An experiment is any module of this directory that claims.toml names. A run directory holds

    config.json     what was asked: configuration, preset, fingerprints of the criteria and of the code; another one is refused
    records.jsonl   the result: one line per point, appended and synced; no time in it, so that a killed and resumed run
                    ends with the same bytes as an uninterrupted one
    metrics.jsonl   how long each point took
    manifest.json   versions, git commit, devices, seeds, SHA-256 of the outputs
    *.png, *.pdf    drawn from the records alone; table.csv, where the experiment has a table, too
"""

import csv
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import lindm
import lindm_experiments
from lindm.errors import DataError, NonFiniteError, Preempted, UsageError, unknown
from lindm.io.directories import sole_writer
from lindm.io.files import (
    append_line,
    canonical_json,
    find_non_finite,
    read_json_lines,
    storage_errors,
    to_jsonable,
    write_atomic,
    write_json,
)
from lindm.io.signals import stop_requested
from lindm_experiments.harness.claims import CLAIMS, claim_ids, claims_hash
from lindm_experiments.harness.verdicts import Verdict

HERE = Path(__file__).parent
JUDGED = ("verdicts.json", "report.html")  # of `lindm run`; `lindm verify` has one of each for all experiments
WRITTEN = ("config.json", "records.jsonl", "metrics.jsonl", "manifest.json", "error.log", "table.csv", *JUDGED, "*.png", "*.pdf")


# --- discovery ----------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Every module at the top of the package `lindm_experiments`, by name."""
    return {path.stem: path for directory in lindm_experiments.__path__ for path in sorted(Path(directory).glob("*.py"))}


def discover() -> dict[str, tuple[str, ...]]:
    """Name of each experiment -> the claims it decides."""
    return {name: claim_ids(name) for name in dict.fromkeys(c.experiment for c in CLAIMS.values())}


def find(name: str) -> Path:
    """The source of an experiment; UsageError with the known names when there is none."""
    if name not in discover():
        raise UsageError(unknown("EXPERIMENT", name, list(discover())))
    return modules()[name]


def load(name: str) -> ModuleType:
    """Import one experiment with 64-bit floats on; UsageError with the known names when there is none."""
    find(name)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", True)
    else:
        os.environ["JAX_ENABLE_X64"] = "1"
    return importlib.import_module(f"lindm_experiments.{name}")


def code_fingerprint(name: str) -> str:
    """SHA-256 over the sources that a record of this experiment can depend on."""
    root = Path(lindm.__file__).parents[1]
    sources = {p.relative_to(root).as_posix(): p for top in ("lindm", "theory/lindm_theory") for p in (root / top).rglob("*.py")}
    sources |= {p.relative_to(root).as_posix(): p for p in (root / "lindm/templates").glob("*.json")}
    idle = ("__main__.py", "files.py")
    sources = {k: p for k, p in sources.items() if p.name not in idle and p.parent.name not in ("cli", "bench")}
    others = discover().keys() - {name}
    sources |= {f"experiments/{stem}": p for stem, p in modules().items() if stem not in others}
    sources |= {f"experiments/lib/{p.stem}": p for p in sorted((HERE.parent / "lib").glob("*.py"))}
    digest = hashlib.sha256()
    for key, path in sorted(sources.items()):
        digest.update(key.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def settle_xla(alone: bool = False) -> None:
    """Settings of XLA for every run, before jax is imported; flags of the user win.

    One thread a process, unless it is alone: the processes of `harness.executor` are the parallelism. Optimisation level 1: most
    of a quick run is compiling, which takes a third less time at this level, and the compiled programs are as fast (0 makes them
    slow).
    """
    ours = "--xla_backend_optimization_level=1"
    if not alone:
        ours += " --xla_cpu_multi_thread_eigen=false"
        for name in ("NPROC", "PJRT_NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # the newer emitters take almost twice as long to compile and the programs are no faster; later versions have only them
        ours += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{ours} {os.environ.get('XLA_FLAGS', '')}".strip()


# --- the run ------------------------------------------------------------------


def describe(module: ModuleType, cfg: Any, preset: str) -> dict:
    """What config.json holds."""
    name = module.__name__.rpartition(".")[2]
    return {
        "experiment": name,
        "preset": preset,
        "config": json.loads(canonical_json(asdict(cfg))),
        "criteria": claims_hash(claim_ids(name)),
        "code": code_fingerprint(name),
    }


def differences(old: dict, new: dict) -> list[str]:
    """`field: old -> new` for every field that differs."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{key}.{line}" for line in differences(a, b)]
        elif a != b:
            short = [str(v)[:12] + "..." if key in ("criteria", "code") else json.dumps(v) for v in (a, b)]
            lines.append(f"{key}: {short[0]} -> {short[1]}")
    return lines


def claim_directory(directory: Path, wanted: dict) -> None:
    """Write config.json, or check that the one there asks for the same; UsageError with the differences when not."""
    path = directory / "config.json"
    if not path.exists():
        return write_json(path, wanted)
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{path}: not JSON: {e}") from e
    if changed := differences(there, wanted):
        raise UsageError(
            f"{directory} holds another run ({'; '.join(changed)}): choose another --out, or start over with --fresh",
        )


def run(
    module: ModuleType,
    cfg: Any,
    directory: Path,
    *,
    preset: str = "custom",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict]:
    """Measure the points of `cfg` that `directory` does not hold yet; all records, in the order of the points.

    `progress(done, total)` is called before the first and after each point. NonFiniteError, before anything of it is written,
    when a record is not finite; StorageError when the disk refuses; UsageError when the directory holds another run or is being
    written.
    """
    with sole_writer(directory):
        claim_directory(directory, describe(module, cfg, preset))
        path = directory / "records.jsonl"
        points = module.points(cfg)
        keys = [canonical_json(p) for p in points]
        if len(set(keys)) != len(keys):
            raise DataError(f"{module.__name__}.points gives the same point twice")
        records: dict[str, dict] = {}
        for number, record in enumerate(read_json_lines(path, repair=True), start=1):
            key = canonical_json(record["point"])
            if key in records or key not in keys:
                raise DataError(
                    f"{path}:{number}: the point {key} is {'there twice' if key in records else 'not one of this run'}"
                )
            records[key] = record
        in_order = list(records) == keys[: len(records)]
        progress(len(records), len(points))
        for key, point in zip(keys, points, strict=True):
            if key in records:
                continue
            if stop_requested():
                raise Preempted("stopped; the same command resumes")
            started = time.perf_counter()
            record = {"point": point} | to_jsonable(module.measure(cfg, point))
            if where := find_non_finite(record):
                raise NonFiniteError(f"not finite in {module.__name__}, point {key}: {where}; nothing of this point was written")
            line = canonical_json(record)
            append_line(path, line)
            seconds = round(time.perf_counter() - started, 4)
            append_line(directory / "metrics.jsonl", canonical_json({"point": point, "seconds": seconds}))
            records[key] = json.loads(line)
            progress(len(records), len(points))
        ordered = [records[k] for k in keys]
        if not in_order:  # points were missing in the middle: same content as a run in order
            write_atomic(path, "".join(canonical_json(r) + "\n" for r in ordered))
        return ordered


def start_over(directory: Path) -> None:
    """Remove what an earlier run wrote into `directory`, and nothing else."""
    if not directory.exists():
        return
    with sole_writer(directory), storage_errors(directory):
        for pattern in WRITTEN:
            for path in directory.glob(pattern):
                path.unlink()


def decide(module: ModuleType, records: list[dict]) -> list[Verdict]:
    """The verdicts of the records, one for each claim of the experiment, before any correction for their number."""
    verdicts = list(module.check(records))
    expected = sorted(claim_ids(module.__name__.rpartition(".")[2]))
    if sorted(v.id for v in verdicts) != expected:
        raise ValueError(f"check must decide each of {expected} once; got {sorted(v.id for v in verdicts)}")
    return verdicts


def draw(module: ModuleType, records: list[dict], directory: Path) -> list[str]:
    """Figures of the records as PNG and PDF, and table.csv where the experiment has a table; the names of the figures."""
    import matplotlib

    matplotlib.use("Agg")
    import logging

    from matplotlib import pyplot

    from lindm_experiments.harness.style import STYLE

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it remarks on the missing date of every font it embeds

    with pyplot.rc_context(STYLE):  # pyright: ignore
        figures = module.plot(records)
        for name, figure in figures.items():
            for ending, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=ending, metadata=metadata)  # no dates: the same records give the same bytes
                write_atomic(directory / f"{name}.{ending}", buffer.getvalue())
            pyplot.close(figure)
    if hasattr(module, "table"):
        write_atomic(directory / "table.csv", as_csv(module.table(records)))
    return list(figures)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
