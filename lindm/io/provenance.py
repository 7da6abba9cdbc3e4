"""Provenance: where, when and by what a result was made. It is kept beside results, never in bytes that must be reproducible."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from lindm import __version__
from lindm.errors import DataError
from lindm.io.files import read_json, write_json
from lindm.io.verification import PROVENANCE

FORMAT = "lindm-provenance-1"
ROOT = Path(__file__).parents[2]  # of the checkout, or the site-packages of an installed wheel
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "scipy", "matplotlib")


def provenance() -> dict[str, Any]:
    """Date and time in UTC, the command line, and `environment()`."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": date, "command": command_line()} | environment()


def environment() -> dict[str, Any]:
    """Versions, git commit, platform, devices and flags of this process."""
    versions = {"lindm": __version__}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    flags = {k: os.environ[k] for k in ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_ENABLE_X64", "NPROC") if k in os.environ}
    devices = []
    if "jax" in sys.modules:
        import jax

        devices = [str(d) for d in jax.devices()]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git": checkout_state(ROOT),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": devices,
        "flags": flags,
    }


def write_provenance(directory: Path) -> None:
    """Write provenance.json to a directory whose other files depend on nothing but their inputs."""
    write_json(directory / PROVENANCE, provenance(), format=FORMAT)


def read_provenance(directory: Path) -> dict[str, Any] | None:
    """provenance.json of a directory; None where it is missing or damaged."""
    try:
        return read_json(directory / PROVENANCE, format=FORMAT)
    except DataError:
        return None


def is_from_this_command(directory: Path) -> bool:
    """Whether provenance.json of a directory has the command line of this process."""
    return (read_provenance(directory) or {}).get("command") == command_line()


def command_line() -> str:
    """The command line of this process as it was typed, without the directory of the program."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        name = f"python -m {program.parent.name}"
    elif program.name in ("", "-c", "-m"):  # no file: an interactive session, or a program on the command line
        name = f"python {program.name}".rstrip()
    else:
        name = shlex.quote(program.name)
    return " ".join([name, *map(shlex.quote, sys.argv[1:])])


def checkout_state(root: Path) -> dict[str, Any]:
    """Commit of lindm's own checkout and whether tracked files have changed; None for both where `root` is not its top.

    An environment may lie inside the repository of another project: `root` must be the top of a work tree, with lindm's
    pyproject.toml. The version of an installed wheel is among the versions of the libraries.
    """
    none = {"commit": None, "dirty": None}
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return none
    top = _git(root, "rev-parse", "--show-toplevel")
    if project.get("name") != "lindm" or top is None or Path(top).resolve() != root.resolve():
        return none
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails. Variables such as GIT_DIR, which a hook sets, would name another repository."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=directory,
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
