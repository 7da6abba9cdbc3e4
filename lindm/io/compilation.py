"""JAX's persistent compilation cache: compiled programs are kept for later runs of the same environment.

The directory is `<environment>/.cache/lindm/jax/<CPU>` in a virtual environment that can be written, and otherwise
`$XDG_CACHE_HOME/lindm/jax/<CPU>` (`~/.cache` by default). `JAX_COMPILATION_CACHE_DIR` moves it, `JAX_ENABLE_COMPILATION_CACHE=0`
turns it off. An entry is used only for the same program, flags and versions, so results do not depend on it. Several processes
can use it at a time: an entry that is only partly written cannot be read, and its program is compiled again.
"""

import hashlib
import os
import platform
import sys
import warnings
from pathlib import Path

MIN_COMPILE_SECONDS = "0.1"  # what compiles faster is not stored


def cache_directory() -> Path:
    """The default directory. Programs compiled for a CPU may not run on another one, so its features are part of the path."""
    in_environment = sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK)
    root = Path(sys.prefix, ".cache") if in_environment else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "lindm" / "jax" / _cpu()


def use_compilation_cache() -> None:
    """Turn the cache on for this process and its children. Call it before jax is imported."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_directory()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", MIN_COMPILE_SECONDS)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _cpu() -> str:
    """Architecture and a hash of the features of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    features = sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))}) or lines[:1]
    return f"{platform.machine()}-{hashlib.sha256(repr(features).encode()).hexdigest()[:12]}"
