"""A disk that is full after any number of bytes or files: the checkpoint before it stays, and nothing is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]

# Saves step 3 with room and step 6 with more and more room, until it is there. Prints one line for each save.
# `space` and `inodes` are limits of a small disk that it mounts; `size` is the largest size of a file, which needs no mount.
CHILD = """
import json, os, shutil, subprocess, sys
from pathlib import Path
kind, place = sys.argv[1], Path(sys.argv[2])
def mount(*options):
    subprocess.run(["mount", *options, str(place)], check=True)
def disk_use():
    s = os.statvfs(place)
    return (s.f_blocks - s.f_bfree) * s.f_frsize, s.f_files - s.f_ffree
if kind != "size":
    mount("-t", "tmpfs", "-o", "size=64m,nr_inodes=10000", "tmpfs")
import jax
from tests.limits import largest_file
from tests.lindm.llm.sft.test_checkpoints import arrays, mesh_of, placed, template
from lindm.errors import StorageError
from lindm.llm.sft import checkpoints
mesh = mesh_of(1, 1)
def save(step):
    checkpoints.save(place / "checkpoints", step, placed(arrays(step), mesh), {"step": step}, keep=2)
(place / "checkpoints").mkdir()
save(3)
whole, inodes = disk_use() if kind != "size" else (0, 0)
sizes = sorted({p.stat().st_size for p in place.rglob("*") if p.is_file()})
limits = {
    "space": range(0, 1 << 22, 4096),
    "inodes": range(1000),
    "size": [0, 1, *(n for s in sizes for n in (s // 2, s - 1)), 1 << 20],
}
for limit in limits[kind]:
    if kind == "space":
        mount("-o", f"remount,size={whole + limit},nr_inodes=10000")
    elif kind == "inodes":
        mount("-o", f"remount,size=64m,nr_inodes={inodes + limit}")
    try:
        if kind == "size":
            with largest_file(limit):
                save(6)
        else:
            save(6)
        error = None
    except StorageError as e:
        error = str(e)
    # threads of Orbax may still write when a save has failed; the next save removes that
    names = sorted(p.name for p in (place / "checkpoints").iterdir() if error is None or not p.name.startswith("."))
    damage = [checkpoints.find_damage(place / "checkpoints" / name) for name in names]
    print(json.dumps({"limit": limit, "error": error, "names": names, "damage": damage}), flush=True)
    if error is None:
        break
restored = checkpoints.restore(place / "checkpoints", template(mesh))
assert restored.step == 6 and not restored.skipped
"""


def begin(kind: str, place: Path) -> list[str]:
    """The child's words, in a mount namespace of its own where it mounts."""
    unshare = [] if kind == "size" else ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    return [*unshare, sys.executable, "-c", CHILD, kind, str(place)]


def may_mount() -> bool:
    """Whether a small disk can be mounted here, by root or in a user namespace."""
    words = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.fault("F7")
@pytest.mark.parametrize("kind", ["space", "inodes", "size"])
def test_a_disk_that_is_full_at_any_point_of_a_save_keeps_the_checkpoint_before_it(tmp_path, trials, kind):
    """Where no disk can be mounted, the largest size of a file stands for all three."""
    kind = kind if may_mount() else "size"
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(begin(kind, tmp_path), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    *full, last = map(json.loads, done.stdout.splitlines())
    assert len(full) >= 5, "points of a save"
    for outcome in full:
        assert outcome["error"].startswith("cannot write ") and outcome["names"] == ["00000003"], outcome
        assert outcome["damage"] == [None], outcome
        trials.add()
    assert last["names"] == ["00000003", "00000006"] and last["damage"] == [None, None]
