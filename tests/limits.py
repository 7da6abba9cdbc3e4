"""Limits of the operating system for tests: full disks, directories that may not be written, sockets that may not be opened.

They act below Python, so they hold for native code, and need neither mounting nor other privileges.
"""

import contextlib
import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

CAPABILITY_VERSION_3 = 0x20080522
DAC_OVERRIDE = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: what is written beyond that fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Nothing can be created in a directory, not by root either, which gives up the right to ignore permissions."""
    mode = directory.stat().st_mode
    directory.chmod(0o555)
    try:
        with _obeys_permissions():
            try:
                (directory / "probe").touch()
            except OSError:
                pass
            else:
                raise AssertionError(f"{directory} can still be written: this test would check nothing")
            yield
    finally:
        directory.chmod(mode)


@contextlib.contextmanager
def _obeys_permissions() -> Iterator[None]:
    if os.geteuid() != 0 or sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)  # this thread
    held = ctypes.create_string_buffer(24)  # effective, permitted, inheritable, twice
    assert libc.capget(header, held) == 0, os.strerror(ctypes.get_errno())
    effective, *others = struct.unpack("6I", held.raw)
    assert libc.capset(header, struct.pack("6I", effective & ~DAC_OVERRIDE, *others)) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held.raw) == 0


# --- sockets -----------------------------------------------------------------------------------------------------------------

SOCKET_CALL = {"x86_64": 41, "aarch64": 198}  # the system call socket(family, type, protocol)
FAMILIES = {"AF_UNIX": 1, "AF_NETLINK": 16}  # of this machine: what may be opened
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, KILL = 0x7FFF0000, 0x80000000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # of the filter's machine: load a word, jump if equal, return
SYSTEM_CALL, FIRST_ARGUMENT = 0, 16  # offsets of what a filter sees


def forbid_network() -> None:
    """From now on the kernel ends this process and its children with SIGSYS when they open a socket to another machine.

    It is a filter of system calls: native code cannot avoid it, and a process needs no privileges to set it.
    """
    number = SOCKET_CALL[os.uname().machine]
    allowed = sorted(FAMILIES.values())
    program = [(LOAD, 0, 0, SYSTEM_CALL), (EQUAL, 0, len(allowed) + 2, number), (LOAD, 0, 0, FIRST_ARGUMENT)]
    program += [(EQUAL, len(allowed) - i, 0, family) for i, family in enumerate(allowed)]
    program += [(RETURN, 0, 0, KILL), (RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0)):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
