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
