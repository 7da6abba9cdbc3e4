"""Python imports this module at its start: it sends the process a signal in a phase of a command.

STOP_AT is `module:function[:n]`, the n-th call of a function, `module:` the import of a module, or `compiling` the first trace of
a program by jax. STOP_SIGNAL is the number of the signal, STOP_MARK a file that is written in the phase, and with STOP_NATIVE=1
the main thread is then in native code that takes minutes. Child processes get none of these variables.
"""

import ctypes
import importlib.abc
import os
import signal
import sys
import threading

AT, NUMBER = os.environ.pop("STOP_AT", ""), int(os.environ.pop("STOP_SIGNAL", "0"))
MARK, NATIVE = os.environ.pop("STOP_MARK", ""), os.environ.pop("STOP_NATIVE", "") == "1"
os.environ.setdefault("GLIBC_TUNABLES", "")  # or the program would start itself again, without these variables
MODULE, _, REST = AT.partition(":")
NAME, _, COUNT = REST.partition(":")


def send() -> None:
    # Ctrl-C goes to all processes of the terminal, SIGTERM to one
    os.killpg(0, NUMBER) if NUMBER == signal.SIGINT else os.kill(os.getpid(), NUMBER)


def stop() -> None:
    if os.path.exists(MARK):
        return
    with open(MARK, "w"):
        pass
    if not NATIVE:
        return send()
    signal.pthread_sigmask(signal.SIG_BLOCK, [NUMBER])  # no handler of Python runs in this thread, and no call is interrupted
    threading.Timer(0.2, send).start()
    ctypes.CDLL(None).sleep(600)


def wrap(module) -> None:
    *path, last = NAME.split(".")
    owner = module
    for part in path:
        owner = getattr(owner, part)
    function, calls = getattr(owner, last), []

    def wrapped(*arguments, **options):
        calls.append(None)
        if len(calls) >= int(COUNT or 1):
            stop()
        return function(*arguments, **options)

    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(wrapped, attribute, getattr(function, attribute))
    setattr(owner, last, wrapped)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        if not NAME:
            sys.meta_path.remove(self)
            stop()
            return None
        spec = next(spec for f in sys.meta_path if f is not self and (spec := f.find_spec(name, path, target)))
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            wrap(module)

        spec.loader.exec_module = exec_module
        return spec


def stop_at_trace(event: str, *_, **__) -> None:
    if "trace" in event:
        stop()


if MODULE == "compiling":
    AFTER_IMPORT = "jax.monitoring"

    class Listener(Finder):
        def find_spec(self, name, path, target=None):
            if name != AFTER_IMPORT:
                return None
            spec = next(spec for f in sys.meta_path if f is not self and (spec := f.find_spec(name, path, target)))
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                module.register_event_duration_secs_listener(stop_at_trace)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Listener())
elif MODULE:
    sys.meta_path.insert(0, Finder())
