"""`lindm`: find the command, parse its options, run it, turn an error into an exit code.

A command's module is imported when the command is used, and imports heavy libraries only when it runs, so that help is fast.

Exit codes: `lindm.cli.exit_codes`, and 141 where the reader of the output closed it.
LINDM_DEBUG=1 shows the traceback of every error; that of an unexpected one is always shown.
"""

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType

from lindm.cli.exit_codes import EXIT_CODES, INTERNAL, exit_code
from lindm.cli.lifecycle import LIFECYCLES, Stop, ending
from lindm.cli.option_parser import run_command, two_columns, wrap
from lindm.errors import (
    MEMORY_ADVICE,
    LindmError,
    OutOfMemoryError,
    Preempted,
    StorageError,
    UsageError,
    did_you_mean,
    library_errors,
)
from lindm.io import signals
from lindm.io.files import DISK_ERRORS
from lindm.io.memory import memory_limit, report_lack_of_memory

DESCRIPTION = (
    "In-context learning of sequential decisions: solve decision problems, fine-tune language models on them, measure how good "
    "their decisions are, and test a theory of attention layers."
)
GROUPS = {
    "Claims and experiments": ("verify", "run", "theory", "plot", "report"),
    "Decision problems and data": ("families", "estimate", "solve", "data"),
    "Language models and policies": ("model", "sft", "generate", "eval", "act", "export"),
    "Machines and files": ("doctor", "check", "plan", "launch", "bench"),
}
NAMES = tuple(name for names in GROUPS.values() for name in names)


def module_of(name: str) -> ModuleType:
    """The module of a command. It has COMMAND, or COMMANDS by the second word, or `run` for a list of words."""
    return importlib.import_module(f"lindm.cli.{name}")


def _summary(name: str) -> str:
    module = module_of(name)
    return module.COMMAND.summary if hasattr(module, "COMMAND") else module.SUMMARY


def overview() -> str:
    """The page of `lindm --help`."""
    lines = ["usage: lindm COMMAND [OPTIONS]", "", *wrap(DESCRIPTION)]
    for title, names in GROUPS.items():
        lines += ["", f"{title}:", *two_columns({name: _summary(name) for name in names})]
    lines += ["", "Options:", *two_columns({"--version": "Print the version.", "-h, --help": "Show this page."})]
    footer = "`lindm COMMAND --help` describes a command. LINDM_DEBUG=1 shows the traceback of an error."
    return "\n".join([*lines, "", *wrap(footer)])


def _group(name: str, module: ModuleType) -> str:
    """The page of a command that has commands of its own."""
    rows = {second: command.summary for second, command in module.COMMANDS.items()}
    lines = [f"usage: lindm {name} COMMAND [OPTIONS]", "", *wrap(f"{module.SUMMARY}."), "", "Commands:", *two_columns(rows)]
    return "\n".join([*lines, "", *wrap(f"`lindm {name} COMMAND --help` describes a command.")])


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from lindm import __version__

        print(__version__)
        return 0
    name, rest = words[0], list(words[1:])
    if name not in NAMES:
        what = "option" if name.startswith("-") else "command"
        raise UsageError(f"lindm has no {what} {name!r} (lindm --help lists the commands){did_you_mean(name, NAMES)}")
    module = module_of(name)
    if hasattr(module, "COMMANDS"):
        if not rest or rest[0] in ("-h", "--help"):
            print(_group(name, module))
            return 0
        if rest[0] not in module.COMMANDS:
            known = ", ".join(module.COMMANDS)
            raise UsageError(f"lindm {name} has the commands {known}; got {rest[0]!r}{did_you_mean(rest[0], module.COMMANDS)}")
        return run_command(module.COMMANDS[rest[0]], rest[1:])
    if hasattr(module, "COMMAND"):
        return run_command(module.COMMAND, rest)
    return module.run(rest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. Without arguments it is that of this process, which a signal then ends."""
    if arguments is not None:
        return guarded(lambda: _dispatch(list(arguments)))
    finished = report_lack_of_memory(EXIT_CODES[OutOfMemoryError])
    words = sys.argv[1:]
    lifecycle = LIFECYCLES.get(" ".join(words[:1])) or LIFECYCLES.get(" ".join(words[:2]))
    code = run_process(lambda: _dispatch(words), "starts over" if lifecycle is None else lifecycle.stop)
    finished(code)
    return code


def run_process(run: Callable[[], int], stop: Stop) -> int:
    """Call `run` as the only work of this process: SIGTERM and SIGINT end it. The exit code."""
    signals.watch(ending(stop))
    try:
        return guarded(run)
    finally:
        signals.ignore()


def guarded(run: Callable[[], int]) -> int:
    """Call `run`; an error is printed in one line and becomes an exit code. An unexpected one is printed with its traceback."""
    try:
        with library_errors():
            code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Preempted as e:
        print(f"lindm: {e}", file=sys.stderr)
        return exit_code(e)
    except Exception as e:
        if isinstance(e, OSError) and e.errno in DISK_ERRORS:
            e = StorageError(f"cannot write {e.filename or 'a temporary file'}: {e.strerror}")
        if isinstance(e, SystemError | ImportError) and not isinstance(e, LindmError) and (limit := memory_limit()) is not None:
            # native code that cannot allocate fails in these ways as well
            e = OutOfMemoryError(f"under a memory limit of {limit >> 20} MiB: {e}; try {MEMORY_ADVICE}")
        code = exit_code(e)
        unexpected = code == INTERNAL and not isinstance(e, LindmError)
        if unexpected or os.environ.get("LINDM_DEBUG") == "1":
            traceback.print_exception(e)
        hint = "" if isinstance(e, LindmError | ValueError) else f"{type(e).__name__}: "
        print(f"lindm: error: {hint}{e}", file=sys.stderr)
        if unexpected:
            print("lindm: this is a fault of lindm: please report it with the command and the traceback above", file=sys.stderr)
        return code
