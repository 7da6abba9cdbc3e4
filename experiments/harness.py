"""Runs an experiment and survives being interrupted. It knows no science.

An experiment is any module of this directory with `CLAIMS` and `measure`. A run directory holds

    config.json     what was asked: configuration, preset, fingerprints of the criteria and of the code; another one is refused
    records.jsonl   the result: one line per point, appended and synced; no time in it, so that a killed and resumed run
                    ends with the same bytes as an uninterrupted one
    metrics.jsonl   how long each point took
    manifest.json   versions, git commit, devices, seeds, SHA-256 of the outputs
    *.png, *.pdf    drawn from the records alone

The directory itself is locked (`flock`) while it is written: the lock dies with its process, so it cannot go stale.
"""

import ast
import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import experiments
from experiments.criteria import fingerprint
from experiments.statistics import Verdict

FAILED, USAGE, DATA, NON_FINITE, MEMORY, STORAGE, PREEMPTED = 1, 2, 3, 5, 6, 7, 75
HERE = Path(__file__).parent
MACHINERY = {"criteria", "harness", "pool", "progress", "report", "statistics", "style", "verify"}  # makes no record
TEMPORARY = ".lindm-tmp"


class Stop(Exception):
    """A run that ends here, with the exit code that says why."""

    def __init__(self, code: int, message: str):
        super().__init__(code, message)
        self.code, self.message = code, message

    def __str__(self) -> str:
        return self.message


# --- discovery ----------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Every module of the package `experiments`, by name."""
    return {path.stem: path for directory in experiments.__path__ for path in sorted(Path(directory).glob("*.py"))}


def discover() -> dict[str, tuple[str, ...]]:
    """Name of each experiment -> the claims it decides. Reads the sources; importing them would import jax."""
    found = {}
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        if not any(isinstance(node, ast.FunctionDef) and node.name == "measure" for node in tree.body):
            continue
        for node in tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id == "CLAIMS" and value is not None:
                found[name] = tuple(ast.literal_eval(value))
    return found


def load(name: str) -> ModuleType:
    """Import one experiment with 64-bit floats on; Stop(2) with the known names when there is none."""
    known = discover()
    if name not in known:
        raise Stop(USAGE, f"EXPERIMENT must be one of {', '.join(known)}; got {name!r}")
    import jax

    jax.config.update("jax_enable_x64", True)
    return importlib.import_module(f"experiments.{name}")


def code_fingerprint(name: str) -> str:
    """SHA-256 over the sources that a record of this experiment can depend on."""
    root = HERE.parent
    sources = {p.relative_to(root).as_posix(): p for top in ("lindm", "theory") for p in (root / top).rglob("*.py")}
    sources = {k: p for k, p in sources.items() if p.name not in ("cli.py", "doctor.py", "bench.py", "__main__.py")}
    others = (discover().keys() - {name}) | MACHINERY
    sources |= {f"experiments/{stem}": p for stem, p in modules().items() if stem not in others}
    digest = hashlib.sha256()
    for key, path in sorted(sources.items()):
        digest.update(key.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# --- files --------------------------------------------------------------------


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """A disk that refuses becomes exit 7 with the path and the reason."""
    try:
        yield
    except OSError as e:
        raise Stop(STORAGE, f"cannot write {path}: {e.strerror or e}") from e


def write_atomic(path: Path, content: str | bytes) -> None:
    """The file has its old or its new content, never a part; no temporary file is left behind."""
    data = content.encode() if isinstance(content, str) else content
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """One line, synced. Written with a single call: a kill leaves at worst a torn last line, which `read_lines` cuts off."""
    with storage(path):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(fd).st_size
            data = (line + "\n").encode()
            if os.write(fd, data) != len(data):
                os.ftruncate(fd, size)
                raise OSError("disk full")
            os.fsync(fd)
        finally:
            os.close(fd)


def canonical(value: Any) -> str:
    """The one spelling of a JSON value: equal points have equal keys. ValueError when a number is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(value: Any) -> Any:
    """Arrays and array scalars of any library as lists and numbers."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def read_lines(path: Path, repair: bool = False) -> list[dict]:
    """The records of a run. A torn last line is ignored (cut off with `repair`); any other bad line is Stop(3) with file:line."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise Stop(DATA, f"cannot read {path}: {e.strerror}") from e
    whole = data.rfind(b"\n") + 1
    if repair and whole < len(data):
        with storage(path):
            os.truncate(path, whole)
    records: list[dict] = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as e:
            raise Stop(DATA, f"{path}:{number}: not a JSON line: {e}") from e
        if not isinstance(record, dict) or not isinstance(record.get("point"), dict):
            raise Stop(DATA, f'{path}:{number}: a record must be an object with an object "point"')
        records.append(record)
    return records


def read_records(directory: Path) -> list[dict]:
    """All records of a run directory; Stop(3) when there are none."""
    records = read_lines(directory / "records.jsonl")
    if not records:
        raise Stop(DATA, f"no records in {directory / 'records.jsonl'}")
    return records


@contextlib.contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Refuse a second writer of the same run directory, in this or in another process."""
    with storage(directory):
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY)
    try:
        patience = time.monotonic() + 2  # a writer that was just killed takes a moment to go
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > patience:
                    busy = f"{directory} is being written by another process: wait for it, or choose another --out"
                    raise Stop(USAGE, busy) from None
                time.sleep(0.05)
        for leftover in directory.glob(f".*{TEMPORARY}"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(fd)


# --- interruption -------------------------------------------------------------

_asked_to_stop = False


def _on_signal(signum: int, frame: FrameType | None) -> None:
    global _asked_to_stop
    _asked_to_stop = True
    raise Stop(PREEMPTED, f"stopped by {signal.Signals(signum).name}; the same command resumes")


def asked_to_stop() -> bool:
    """Whether a signal came; the exception of its handler can be lost in a callback, this cannot."""
    return _asked_to_stop


def stop_on_signals() -> None:
    """SIGTERM and SIGINT end the run with exit 75. Every finished point is on disk already, so there is nothing left to save."""
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)


# --- the run ------------------------------------------------------------------


def describe(module: ModuleType, cfg: Any, preset: str) -> dict:
    """What config.json holds."""
    name = module.__name__.rpartition(".")[2]
    return {
        "experiment": name,
        "preset": preset,
        "config": json.loads(canonical(asdict(cfg))),
        "criteria": fingerprint(module.CLAIMS),
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
    """Write config.json, or check that the one there asks for the same; Stop(2) with the differences when not."""
    path = directory / "config.json"
    if not path.exists():
        return write_json(path, wanted)
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise Stop(DATA, f"{path}: not JSON: {e}") from e
    if changed := differences(there, wanted):
        raise Stop(
            USAGE,
            f"{directory} holds another run ({'; '.join(changed)}): choose another --out, or start over with --fresh",
        )


def non_finite(value: Any, path: str = "") -> str | None:
    """Where the first NaN or infinity of a JSON-like value is; None when all is finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path.lstrip('.')} = {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next(filter(None, (non_finite(v, f"{path}.{k}") for k, v in items)), None)


def run(
    module: ModuleType,
    cfg: Any,
    directory: Path,
    *,
    preset: str = "custom",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict]:
    """Measure the points of `cfg` that `directory` does not hold yet; all records, in the order of the points.

    `progress(done, total)` is called before the first and after each point. Stop(5), before anything of it is written, when
    a record is not finite; Stop(7) when the disk refuses; Stop(2) when the directory holds another run or is being written.
    """
    with sole_writer(directory):
        claim_directory(directory, describe(module, cfg, preset))
        path = directory / "records.jsonl"
        points = module.points(cfg)
        keys = [canonical(p) for p in points]
        if len(set(keys)) != len(keys):
            raise Stop(DATA, f"{module.__name__}.points gives the same point twice")
        records: dict[str, dict] = {}
        for number, record in enumerate(read_lines(path, repair=True), start=1):
            key = canonical(record["point"])
            if key in records or key not in keys:
                raise Stop(
                    DATA, f"{path}:{number}: the point {key} is {'there twice' if key in records else 'not one of this run'}"
                )
            records[key] = record
        in_order = list(records) == keys[: len(records)]
        progress(len(records), len(points))
        for key, point in zip(keys, points, strict=True):
            if key in records:
                continue
            if asked_to_stop():
                raise Stop(PREEMPTED, "stopped; the same command resumes")
            started = time.perf_counter()
            record = {"point": point} | plain(module.measure(cfg, point))
            if where := non_finite(record):
                raise Stop(
                    NON_FINITE, f"not finite in {module.__name__}, point {key}: {where}; nothing of this point was written"
                )
            line = canonical(record)
            append_line(path, line)
            seconds = round(time.perf_counter() - started, 4)
            append_line(directory / "metrics.jsonl", canonical({"point": point, "seconds": seconds}))
            records[key] = json.loads(line)
            progress(len(records), len(points))
        ordered = [records[k] for k in keys]
        if not in_order:  # points were missing in the middle: same content as a run in order
            write_atomic(path, "".join(canonical(r) + "\n" for r in ordered))
        return ordered


def start_over(directory: Path) -> None:
    """Remove what an earlier run wrote into `directory`, and nothing else."""
    if not directory.exists():
        return
    with sole_writer(directory), storage(directory):
        for pattern in ("config.json", "records.jsonl", "metrics.jsonl", "manifest.json", "error.log", "*.png", "*.pdf"):
            for path in directory.glob(pattern):
                path.unlink()


def decide(module: ModuleType, records: list[dict]) -> list[Verdict]:
    """The verdicts of the records, one for each claim of the experiment, before any correction for their number."""
    verdicts = list(module.check(records))
    if sorted(v.id for v in verdicts) != sorted(module.CLAIMS):
        raise ValueError(f"check must decide each of {sorted(module.CLAIMS)} once; got {sorted(v.id for v in verdicts)}")
    return verdicts


def draw(module: ModuleType, records: list[dict], directory: Path) -> list[str]:
    """Figures of the records as PNG and PDF; their names."""
    import matplotlib

    matplotlib.use("Agg")
    import io

    from matplotlib import pyplot

    from experiments.style import STYLE

    with pyplot.rc_context(STYLE):
        figures = module.plot(records)
        for name, figure in figures.items():
            for ending, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=ending, metadata=metadata)  # no dates: the same records give the same bytes
                write_atomic(directory / f"{name}.{ending}", buffer.getvalue())
            pyplot.close(figure)
    return list(figures)


# --- provenance ---------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def provenance() -> dict:
    """Versions, commit, machine and flags: what a reader needs in order to repeat a run."""
    versions = {}
    for package in ("lindm", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "matplotlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    status = _git("status", "--porcelain", "--untracked-files=no")
    flags = {k: os.environ[k] for k in ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_ENABLE_X64", "NPROC") if k in os.environ}
    devices = []
    if "jax" in sys.modules:
        import jax

        devices = [str(d) for d in jax.devices()]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": devices,
        "flags": flags,
    }


def write_manifest(directory: Path, **extra: Any) -> None:
    """manifest.json: provenance, `extra`, and the SHA-256 of every other file below `directory`."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != "manifest.json" and not p.name.startswith("."))
    outputs = {p.relative_to(directory).as_posix(): sha256(p) for p in files}
    write_json(directory / "manifest.json", provenance() | extra | {"outputs": outputs})
