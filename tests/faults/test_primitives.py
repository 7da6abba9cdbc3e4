"""Every kill point of the functions that change the disk: the old or the new state, and the same call again finishes."""

import itertools
import shutil

import pytest

pytestmark = pytest.mark.fault("F1", "F26")
IMPORTS = ("lindm.io.files", "lindm.io.directories")

HEAD = """
import sys
from pathlib import Path
from lindm.io.directories import *
from lindm.io.files import *
from lindm.io.temporaries import *
"""
REPLACED = "write_atomic(Path('a.json'), 'new' * 1000)"
APPENDED = """
path = Path('records.jsonl')
done = [record['point']['i'] for record in read_json_lines(path, repair=True)]
for i in range(3):
    if i not in done:
        append_record(path, {'point': {'i': i}})
"""
DIRECTORY = """
if not Path('model').exists():
    with atomic_directory(Path('model')) as temporary:
        (temporary / 'below').mkdir()
        write_atomic(temporary / 'below' / 'weights', b'1' * 1000)
        copy_file(Path('notes'), temporary / 'copy')
"""
REPLACED_DIRECTORY = """
with atomic_directory(Path('old'), replace=True) as temporary:
    write_atomic(temporary / 'a', 'new')
"""
REMOVED = "remove(Path('old')); remove(Path('a.json')); remove(Path('link')); remove(Path('none'))"
SCRATCH = """
with scratch_directory() as scratch:
    write_atomic(scratch / 'a', 'x')
"""
LOCKED = """
with sole_writer(Path('out')):
    write_atomic(Path('out/a'), 'x')
"""


@pytest.fixture
def start(tmp_path):
    """Files of a user, an old file and an old directory."""
    start = tmp_path / "start"
    (start / "old" / "below").mkdir(parents=True)
    for name in ("notes", "a.json", "old/a", "old/below/b"):
        (start / name).write_text(f"old {name}")
    (start / "link").symlink_to("old")
    return start


@pytest.mark.parametrize(
    "code",
    [REPLACED, APPENDED, DIRECTORY, REPLACED_DIRECTORY, REMOVED, SCRATCH, LOCKED],
    ids=lambda code: code.split("(")[0].strip(),
)
def test_after_a_kill_at_any_point_the_same_call_finishes(killed, start, code):
    killed([], source=HEAD + code, start=start).check()


def states(kill_server, tmp_path, start, code):
    """The files that are not hidden after a kill at each point, and after the end."""
    seen, die = [], 1
    while True:
        root = tmp_path / "root"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(start, root, symlinks=True)
        done = kill_server.run(root, [], die, half=True, code=HEAD + code)
        files = [
            p for p in root.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
        ]
        seen.append({p.relative_to(root).as_posix(): p.read_text() for p in files})
        if done.code == 0:
            return seen
        die += 1


@pytest.mark.parametrize("code", [REPLACED, DIRECTORY])
def test_a_reader_sees_the_old_or_the_new_state_and_nothing_between(kill_server, tmp_path, start, code):
    seen = states(kill_server, tmp_path, start, code)
    changes = sum(a != b for a, b in itertools.pairwise(seen))
    assert len(seen) >= 4 and changes == 1


def test_a_directory_that_is_replaced_or_removed_is_whole_or_absent(kill_server, tmp_path, start):
    for code in (REPLACED_DIRECTORY, REMOVED):
        for state in states(kill_server, tmp_path, start, code):
            old = {name: text for name, text in state.items() if name.startswith("old/")}
            assert old in ({"old/a": "old old/a", "old/below/b": "old old/below/b"}, {"old/a": "new"}, {})
