"""Damaged and hostile files: random changes of bytes and of JSON values, and paths that are no regular files."""

import contextlib
import copy
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

PATIENCE = 120  # seconds of a busy machine after which a read has blocked

places = st.floats(0, 1, exclude_max=True)
changes = st.lists(st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "zero"]), places, st.integers(0, 255)), max_size=4)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5
)
children = st.lists(st.integers(0, 50), max_size=5)
edits = st.lists(st.tuples(children, st.just(...) | values), min_size=1, max_size=3)
finite_edits = st.lists(st.tuples(children, st.just(...) | st.integers(0, 9) | st.text("ab", max_size=3)), min_size=1, max_size=3)


def change_bytes(data: bytes, changed: list[tuple[str, float, int]]) -> bytes:
    """Bytes after flips, overwritten numbers, cuts and insertions at places that are fractions of the length."""
    result = bytearray(data)
    for kind, place, value in changed:
        at = int(place * len(result))
        if kind == "flip" and result:
            result[at] ^= 1 << value % 8
        elif kind == "set":
            result[at : at + 8] = bytes([value]) * len(result[at : at + 8])
        elif kind == "cut":
            del result[at:]
        elif kind == "insert":
            result[at:at] = bytes([value]) * value
        else:
            result[at : at + 4] = bytes(len(result[at : at + 4]))
    return bytes(result)


def change_json(value: Any, edited: list[tuple[list[int], Any]]) -> Any:
    """A JSON value after parts of it were replaced, or removed (...); a part is found by a list of numbers of children."""
    value = copy.deepcopy(value)
    for path, new in edited:
        parent, key, child = None, None, value
        for number in path:
            if not isinstance(child, dict | list) or not child:
                break
            parent = child
            key = list(child)[number % len(child)] if isinstance(child, dict) else number % len(child)
            child = child[key]
        if parent is None:
            continue
        if new is ...:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(new)
    return value


def fifo(path: Path) -> None:
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


NO_FILES: dict[str, Callable[[Path], None]] = {"FIFO": fifo, "directory": directory, "device": device}


@contextlib.contextmanager
def not_blocked() -> Iterator[None]:
    """Fail where a block of code takes longer than any busy machine would: it waits for a writer of a FIFO, or never ends."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"blocked for {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
