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
EXTRAS = {  # of pyproject.toml, by what they are for
    "data": "datasets and evaluations",
    "gym": "Gymnasium environments",
    "minari": "Minari datasets",
    "track": "TensorBoard events",
    "wandb": "Weights & Biases",
    "ray": "Ray",
}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check versions, devices, precision, disk, fonts, requirements and the lock."""

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


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shown(wrong: list[str]) -> str:
    return "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")


def is_locked_environment() -> bool:
    """Whether `make` installed this environment from the lock."""
    return (Path(sys.prefix) / ".ready").exists() and Path(sys.prefix).resolve() == (LOCK.parents[1] / ".venv").resolve()


def check_lock() -> Check:
    """Other versions fail only where the lock was installed; `pip install -e .` does not use it."""
    if not LOCK.exists():
        return Check("lock", True, "none here; nothing to compare with")
    locked = {package: (version, _installed(package)) for package, version in locked_versions(LOCK).items()}
    if not is_locked_environment():
        same = sum(version == here for version, here in locked.values())
        return Check("lock", True, f"not used by this environment; {same} of {len(locked)} packages have its versions")
    wrong = [f"{p} {here or 'missing'}, locked {version}" for p, (version, here) in locked.items() if here != version]
    return Check("lock", not wrong, _shown(wrong) or f"as in {LOCK.name}")


def check_requirements(declared: list[str]) -> list[Check]:
    """Installed versions against those that lindm allows, and the extras that are not installed.

    Args:
      declared: requirements with markers, as `importlib.metadata.requires` lists them.
    """
    from packaging.requirements import Requirement

    wrong, missing = [], {}
    for requirement in map(Requirement, declared):
        extras = [e for e in ("", *EXTRAS) if requirement.marker is None or requirement.marker.evaluate({"extra": e})]
        if not extras:
            continue
        version = _installed(requirement.name)
        if version is None and extras[0] == "":
            wrong.append(f"{requirement.name} missing, needs {requirement.specifier}")
        elif version is None:
            missing |= {extra: f"{extra} ({EXTRAS[extra]})" for extra in extras}
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, needs {requirement.specifier}")
    absent = ", ".join(text for extra in EXTRAS if (text := missing.get(extra)))
    return [
        Check("requirements", not wrong, _shown(wrong) or "as lindm allows"),
        Check("extras", True, f"not installed: {absent}" if absent else "all installed"),
    ]


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
    """Check versions, devices, precision, disk, fonts, requirements and the lock.

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
        *(check_requirements(importlib.metadata.requires("lindm") or []) if _installed("lindm") else []),
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
