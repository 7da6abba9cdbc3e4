"""Every command is registered with what it does with a stop."""

import resource
import signal
import tomllib

import pytest

from lindm.cli import main
from lindm.cli.lifecycle import LIFECYCLES, ending
from tests.lindm.cli.stops.phases import ROOT, run

pytestmark = pytest.mark.fault("F27")


def command_names() -> set[str]:
    """The names of all commands, as they are called."""
    names = {"ray_job"}  # not one of `lindm`, but a program of its own
    for name in main.NAMES:
        module = main.module_of(name)
        names |= {command.name for command in module.COMMANDS.values()} if hasattr(module, "COMMANDS") else {name}
    return names


def test_every_command_is_registered_and_has_phases():
    assert LIFECYCLES.keys() == command_names()
    assert all(lifecycle.phases[0] == "import" for lifecycle in LIFECYCLES.values())


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_only_a_command_that_resumes_promises_it(number, code):
    name = signal.Signals(number).name
    assert ending("starts over")(number, "") == (code, f"stopped by {name}; the same command starts over")
    assert ending("resumes")(number, "") == (75, f"stopped by {name}; the same command resumes")
    kept = "the last checkpoint is step 4"
    assert ending("resumes")(number, kept) == (75, f"stopped by {name}: {kept}; the same command resumes")


# --- before the watcher ------------------------------------------------------------------------------------------------------

FIRST = "lindm.errors:"  # the first import of the command line


def test_both_programs_begin_where_signals_are_held_back():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {"lindm": "lindm.cli.entry:main"}
    assert "from lindm.cli.entry import main\n" in (ROOT / "lindm" / "__main__.py").read_text()


@pytest.mark.parametrize("limited", [False, True], ids=["", "limited memory"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["sft", "solve"])
def test_a_signal_during_the_first_imports_has_the_code_of_the_command(command, number, limited, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_AS)
    if limited:  # the command then runs in a child process
        resource.setrlimit(resource.RLIMIT_AS, (2**40, before[1]))
    try:
        done = run([command], tmp_path, STOP_AT=FIRST, STOP_SIGNAL=str(int(number)), STOP_MARK=str(tmp_path / "reached"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    stop = LIFECYCLES[command].stop
    code, what = (75, "the same command resumes") if stop == "resumes" else (128 + number, "the same command starts over")
    assert (tmp_path / "reached").exists() and done.returncode == code, done.stderr
    assert done.stderr == f"lindm: stopped by {number.name}; {what}\n"
