"""A process starts itself again with large pages once, and only where the kernel gives them on request."""

import os
import subprocess
import sys

import pytest

from lindm.io import huge_pages


@pytest.fixture
def starts(monkeypatch, tmp_path):
    """The calls of execve, in a process without tunables on a kernel that gives large pages on request."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(huge_pages, "MODE", tmp_path / "enabled")
    huge_pages.MODE.write_text("always [madvise] never\n")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "lindm", "sft", "--steps", "3"])
    return calls


def test_the_same_program_starts_again_with_the_tunable(starts):
    huge_pages.use_huge_pages()
    ((program, words, environment),) = starts
    assert program == words[0] == sys.executable and words[1:] == ["-m", "lindm", "sft", "--steps", "3"]
    assert environment == dict(os.environ) | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def test_nothing_starts_again_where_the_user_or_the_kernel_has_decided(starts, monkeypatch):
    huge_pages.MODE.write_text("[always] madvise never\n")
    huge_pages.use_huge_pages()
    huge_pages.MODE.unlink()
    huge_pages.use_huge_pages()
    huge_pages.MODE.write_text("always [madvise] never\n")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    huge_pages.use_huge_pages()
    assert not starts


def test_a_program_that_cannot_start_again_goes_on(monkeypatch):
    monkeypatch.setattr(huge_pages, "huge_page_environment", lambda: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    monkeypatch.setattr(sys, "executable", "/nowhere/python3")
    huge_pages.use_huge_pages()


def test_a_process_keeps_its_number_arguments_and_blocked_signals(tmp_path):
    mode = tmp_path / "enabled"
    mode.write_text("always [madvise] never\n")
    code = (
        "import os, pathlib, signal, sys; from lindm.io import huge_pages; print(os.getpid(), flush=True);"
        f"huge_pages.MODE = pathlib.Path({str(mode)!r});"
        "signal.pthread_sigmask(signal.SIG_BLOCK, () if 'GLIBC_TUNABLES' in os.environ else (signal.SIGTERM,));"
        "huge_pages.use_huge_pages();"
        "blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ());"
        "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], signal.SIGTERM in blocked)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", code, "sft", "a b"]
    first, again, last = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert first == again and last == "glibc.malloc.hugetlb=1 ['sft', 'a b'] True"
