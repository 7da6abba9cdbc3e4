"""Settings of the process and of XLA for every run."""

import contextlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator

from lindm.io.compilation import use_compilation_cache


def configure_xla(single_process: bool = False) -> None:
    """Set XLA's flags and the compilation cache. Call it before jax is imported; flags of the user win.

    One thread a process, except for a single process: worker processes are the parallelism. Optimization level 1: most of a
    quick run is compiling, which takes a third less time at this level, and the compiled programs are as fast (level 0 makes
    them slow).
    """
    flags = "--xla_backend_optimization_level=1"
    if not single_process:
        flags += " --xla_cpu_multi_thread_eigen=false"
        for name in ("NPROC", "PJRT_NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # the newer emitters take almost twice as long to compile and the programs are no faster; later versions have only them
        flags += " --xla_cpu_use_fusion_emitters=false"
        if not single_process:  # a program in one piece: pieces serve several threads, and compiling them takes 15 % more time
            flags += " --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    use_compilation_cache()


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Experiments switch 64-bit floats on and set environment variables; all of these are put back."""
    environment = dict(os.environ)
    jax = sys.modules.get("jax")
    double = jax is not None and jax.config.jax_enable_x64
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if "jax" in sys.modules:
            double = double or (jax is None and environment.get("JAX_ENABLE_X64", "0").lower() in ("1", "true"))
            config = sys.modules["jax"].config
            if (
                config.jax_enable_x64 != double
            ):  # the value of a `with jax.enable_x64(...)` around this call must not become the global one
                config.update("jax_enable_x64", double)
