"""Provenance of a run, to repeat it: versions, commit, machine, flags, and the SHA-256 of every file that it wrote."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from lindm.io.files import sha256, write_json

FORMAT = "lindm-manifest-1"
PACKAGE = Path(__file__).parent


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def provenance() -> dict:
    """Versions, git commit, platform, devices and flags of this process."""
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
    write_json(directory / "manifest.json", provenance() | extra | {"outputs": outputs}, format=FORMAT)
