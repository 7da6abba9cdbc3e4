"""Every command is registered with what it does with a stop."""

import signal

import pytest

from lindm.cli import main
from lindm.cli.lifecycle import LIFECYCLES, ending

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
