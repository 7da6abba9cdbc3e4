"""`lindm doctor`: is this machine ready? One line for each check; exit code 1 where one fails."""

import importlib.metadata
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lindm.cli.option_parser import Command

LOCK = Path(__file__).parents[2] / "requirements" / "lock.txt"
FREE_GB = 1.0


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check versions, devices, precision, disk, fonts and the lock."""

    out: Path = Path("results")
    """Directory for results; its disk is checked."""


class Check(NamedTuple):
    """One check, whether it passed, and what the machine has."""

    name: str
    ok: bool
    result: str


def locked_versions(lock: Path) -> dict[str, str]:
    """Package -> version that a hashed lock has for this Python and platform."""
    from packaging.requirements import Requirement

    lines = [line.rstrip("\\ ") for line in lock.read_text(encoding="utf-8").splitlines() if not line.startswith((" ", "#"))]
    requirements = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    return {r.name: str(r.specifier).removeprefix("==") for r in requirements}


def check_lock() -> Check:
    if not LOCK.exists():
        return Check("lock", True, "none here; nothing to compare with")
    wrong = []
    for package, version in locked_versions(LOCK).items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed != version:
            wrong.append(f"{package} {installed}, locked {version}")
    shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    return Check("lock", not wrong, shown or f"as in {LOCK.name}")


def check_jax() -> list[Check]:
    try:
        import jax
        import jax.numpy as jnp

        devices = jax.devices()
        with jax.enable_x64(True):
            dtype = jnp.zeros(1).dtype
    except Exception as e:
        return [Check("jax", False, f"{type(e).__name__}: {e}")]
    return [
        Check("devices", bool(devices), ", ".join(str(d) for d in devices)),
        Check("64-bit floats", dtype == "float64", f"jax gives {dtype}"),
    ]


def check_output(directory: Path) -> list[Check]:
    here = next(p for p in [directory.resolve(), *directory.resolve().parents] if p.exists())
    try:
        with tempfile.TemporaryFile(dir=here):
            writable = Check("output", True, f"{here} is writable")
    except OSError as e:
        writable = Check("output", False, f"{here}: {e.strerror}")
    free = shutil.disk_usage(here).free / 1e9
    return [writable, Check("free disk", free >= FREE_GB, f"{free:.1f} GB (needs {FREE_GB:g})")]


def check_fonts() -> Check:
    try:
        from matplotlib import font_manager

        return Check("fonts", True, Path(font_manager.findfont("DejaVu Sans", fallback_to_default=False)).name)
    except Exception as e:
        return Check("fonts", False, f"{type(e).__name__}: {e}")


def doctor(directory: str | Path = "results") -> list[Check]:
    """Check versions, devices, precision, disk, fonts and the lock.

    Args:
      directory: that results would be written to.

    >>> [check.name for check in ld.doctor()][:3]
    ['python', 'lindm', 'jax']
    """
    from lindm.io.executor import available_cores

    version = ".".join(map(str, sys.version_info[:3]))
    versions = []
    for package in ("lindm", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "matplotlib"):
        try:
            versions.append(Check(package, True, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            versions.append(Check(package, False, "not installed"))
    return [
        Check("python", sys.version_info >= (3, 11), f"{version} (needs >= 3.11)"),
        *versions,
        check_lock(),
        *check_jax(),
        Check("cores", True, str(available_cores())),
        *check_output(Path(directory)),
        check_fonts(),
    ]


def run(options: Doctor) -> int:
    """Print the checks; 0 when all are ok, 1 when one fails."""
    results = doctor(options.out)
    for check in results:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<14} {check.result}")
    return int(not all(check.ok for check in results))


COMMAND = Command(name="doctor", options=Doctor, run=run, examples=("lindm doctor",))
