"""Where memory is limited, a process that cannot allocate ends with exit code 6, however it ended below Python."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from lindm.cli import main
from lindm.errors import DataError, OutOfMemoryError, from_library, library_errors
from lindm.io import executor, memory
from tests.clock import HANGS

REPORTED = "import os, resource, sys; from lindm.io import memory; {limit}; memory.report_lack_of_memory(6); {then}"
LIMIT = "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))"


def reported(then, limit=LIMIT):
    command = [sys.executable, "-c", REPORTED.format(limit=limit, then=then)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.fault("F16")
@pytest.mark.parametrize(
    "then, code, message",
    [
        ("os.abort()", 6, "ended by SIGABRT under a memory limit of 4096 MiB: try a smaller problem"),
        ("os.kill(os.getpid(), 11)", 6, "ended by SIGSEGV under a memory limit"),
        ("os._exit(127)", 6, "ended by a library under a memory limit"),
        ("sys.exit(75)", 75, ""),
        ("print('done')", 0, ""),
        ("os.kill(os.getpid(), 9)", 137, ""),
    ],
)
def test_the_parent_reports_what_the_child_cannot(then, code, message):
    done = reported(then)
    assert done.returncode == code and message in done.stderr and bool(done.stderr) == bool(message)


def test_without_a_limit_there_is_no_parent():
    assert memory.memory_limit() is None or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    assert reported("os.abort()", limit="pass").returncode == -signal.SIGABRT


@pytest.mark.fault("F16", "F27")
def test_a_stop_reaches_the_child():
    then = "import signal; signal.signal(15, lambda *_: sys.exit(75)); os.kill(os.getppid(), 15); signal.pause()"
    assert reported(then).returncode == 75


def die(task):
    os.kill(os.getpid(), task)


@pytest.mark.fault("F16")
def test_a_worker_that_aborts_under_a_memory_limit_is_out_of_memory(monkeypatch):
    (died,) = executor.run_tasks(die, [signal.SIGABRT], workers=1)
    assert type(died.error) is executor.WorkerDied
    monkeypatch.setattr(executor, "memory_limit", lambda: 1 << 30)
    (died,) = executor.run_tasks(die, [signal.SIGABRT], workers=1)
    assert isinstance(died.error, OutOfMemoryError)
    assert died.error.message.startswith("worker died (signal 6) under a memory limit of 1024 MiB: ")


@pytest.mark.fault("F16")
def test_errors_of_libraries_become_errors_with_advice():
    full = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.\nmore")
    for error in (full, MemoryError()):
        known = from_library(error)
        assert isinstance(known, OutOfMemoryError) and "; try a smaller problem" in known.message and "\n" not in known.message
    other = KeyError("x")
    assert from_library(other) is other
    with (
        pytest.raises(OutOfMemoryError, match=r"^the step does not .*12345 bytes\.; try less$") as stop,
        library_errors("the step", "less"),
    ):
        raise full
    assert stop.value.__cause__ is full
    with pytest.raises(DataError), library_errors():
        raise DataError("file")


@pytest.mark.parametrize("platform, reason", [("cuda", ""), ("nonsense", "Unable to initialize backend 'nonsense'")])
def test_a_platform_without_a_device_is_one_line_of_usage(platform, reason):
    code = "import sys; from lindm.cli.main import guarded; import jax; sys.exit(guarded(lambda: len(jax.devices())))"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0 and platform == "cuda":
        pytest.skip("this machine has a GPU")
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and line.startswith("lindm: error: JAX_PLATFORMS must name a platform whose devices jax can use")
    assert repr(platform) in line and reason in line


@pytest.mark.fault("F16")
@pytest.mark.parametrize(
    "error", [SystemError("returned NULL without setting an exception"), ImportError("failed to map segment")]
)
def test_errors_of_native_code_under_a_memory_limit_are_a_lack_of_memory(monkeypatch, capsys, error):
    def fail():
        raise error

    monkeypatch.setattr(main, "memory_limit", lambda: 2**30)
    assert main.guarded(fail) == 6 and f"under a memory limit of 1024 MiB: {error}; try a smaller" in capsys.readouterr().err
    monkeypatch.setattr(main, "memory_limit", lambda: None)
    assert main.guarded(fail) == 70


@pytest.mark.slow
@pytest.mark.fault("F16")
def test_a_command_under_a_small_memory_limit_is_exit_6(tmp_path):
    (tmp_path / "a.pomdp").write_text(
        "discount: 0.9\nvalues: reward\nstates: 2\nactions: 2\nobservations: 2\nT: * identity\nO: * uniform\nR: * : 0 : * : * 1\n"
    )
    for mebibytes in (1000, 1200):
        words = f"ulimit -v {mebibytes << 10}; exec {sys.executable} -m lindm solve a.pomdp --horizon 2"
        done = subprocess.run(["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
        assert done.returncode == 6 and "a smaller problem" in done.stderr.splitlines()[-1]
