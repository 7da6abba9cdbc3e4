"""Where compiled programs are kept, and what moves them."""

import os
import sys
from pathlib import Path

from lindm.io import compilation


def test_programs_are_kept_in_the_environment_for_each_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert compilation.cache_directory().is_relative_to(tmp_path / ".cache" / "lindm" / "jax")
    one = compilation.cache_directory()
    monkeypatch.setattr(compilation.Path, "read_text", lambda *_, **__: "flags: other\n")
    assert compilation.cache_directory() != one


def test_an_environment_that_cannot_be_written_has_them_in_the_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compilation.cache_directory().is_relative_to("/somewhere/lindm/jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compilation.cache_directory().is_relative_to(Path.home() / ".cache" / "lindm" / "jax")


def test_the_user_moves_the_directory(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    compilation.use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/mine"
