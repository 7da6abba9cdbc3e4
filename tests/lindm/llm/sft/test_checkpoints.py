"""A checkpoint is whole or not there, survives another mesh bit by bit, and a damaged one is never restored."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lindm.errors import CheckpointError, LindmError, StorageError
from lindm.io import directories, temporaries
from lindm.llm.parallel.sharding import make_mesh
from lindm.llm.sft import checkpoints
from tests.clock import HANGS


def arrays(step=0):
    rng = np.random.default_rng(step)
    return {
        "kernel": rng.normal(size=(16, 8)).astype(np.float32),
        "bits": rng.integers(0, 255, (8, 4)).astype(np.uint8),
        "half": rng.normal(size=(8, 8)).astype(jnp.bfloat16),
        "step": np.int32(step),
    }


SPECS = {"kernel": ("fsdp", "tensor"), "bits": ("fsdp",), "half": (None, "tensor"), "step": ()}


def shardings(mesh):
    return {k: NamedSharding(mesh, PartitionSpec(*spec)) for k, spec in SPECS.items()}


def placed(values, mesh):
    return {k: jax.device_put(v, s) for (k, v), s in zip(values.items(), shardings(mesh).values(), strict=True)}


def template(mesh):
    return {k: jax.ShapeDtypeStruct(np.shape(v), v.dtype, sharding=shardings(mesh)[k]) for k, v in arrays().items()}


def mesh_of(fsdp, tensor):
    return make_mesh({"fsdp": fsdp, "tensor": tensor}, jax.devices()[: fsdp * tensor])


def same(restored, wanted):
    for k, v in wanted.items():
        assert np.asarray(restored[k]).tobytes() == np.asarray(v).tobytes(), k


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 3 and 6 on a mesh of eight; copied by each test that harms them."""
    root = tmp_path_factory.mktemp("checkpoints")
    for step in (3, 6):
        checkpoints.save(root, step, placed(arrays(step), mesh_of(4, 2)), {"best": 0.5 * step}, keep=2)
    return root


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.mark.fault("F12")
@pytest.mark.parametrize("fsdp, tensor", [(1, 1), (2, 1), (2, 2), (1, 2), (8, 1)])
def test_checkpoints_of_eight_devices_are_restored_exactly_on_other_meshes(saved, fsdp, tensor):
    mesh = mesh_of(fsdp, tensor)
    restored = checkpoints.restore(saved, template(mesh))
    assert (restored.step, restored.progress, restored.skipped) == (6, {"best": 3.0}, ())
    same(restored.state, arrays(6))
    assert all(restored.state[k].sharding == shardings(mesh)[k] for k in SPECS)


def test_an_earlier_checkpoint_is_restored_by_its_step_and_no_other_in_its_place(copied):
    restored = checkpoints.restore(copied, template(mesh_of(1, 1)), 3)
    assert restored.step == 3
    same(restored.state, arrays(3))
    (copied / "00000006" / "progress.json").unlink()
    with pytest.raises(CheckpointError, match=r"progress\.json is missing"):
        checkpoints.restore(copied, template(mesh_of(1, 1)), 6)


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    assert checkpoints.restore(tmp_path / "none", template(mesh_of(1, 1))) is None


def test_only_the_newest_checkpoints_are_kept(copied):
    mesh = mesh_of(1, 1)
    checkpoints.save(copied, 9, placed(arrays(9), mesh), {}, keep=2)
    assert sorted(p.name for p in copied.iterdir()) == ["00000006", "00000009"]


def every_file(directory):
    return sorted(p.relative_to(directory) for p in (directory / "00000006").rglob("*") if p.is_file())


@pytest.mark.fault("F5")
def test_one_flipped_bit_in_any_file_is_seen_and_the_step_before_is_used(copied):
    names = every_file(copied)
    assert len(names) > 6
    for name in names:
        path = copied / name
        good = path.read_bytes()
        if not good:
            continue
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bad)
        restored = checkpoints.restore(copied, template(mesh_of(1, 1)))
        assert restored.step == 3 and "00000006" in restored.skipped[0], name
        same(restored.state, arrays(3))
        path.write_bytes(good)
    assert checkpoints.restore(copied, template(mesh_of(1, 1))).step == 6


@pytest.mark.fault("F6")
@pytest.mark.parametrize("harm", ["missing", "empty", "truncated"])
def test_a_file_that_is_missing_empty_or_cut_is_seen(copied, harm):
    for name in every_file(copied):
        path = copied / name
        good = path.read_bytes()
        if len(good) < 2:
            continue
        path.unlink() if harm == "missing" else path.write_bytes(b"" if harm == "empty" else good[: len(good) // 2])
        assert checkpoints.find_damage(copied / "00000006") is not None, name
        path.write_bytes(good)


@pytest.mark.fault("F6")
def test_an_error_lists_the_damage_of_every_checkpoint(copied):
    (copied / "00000006" / "manifest.json").write_text("{")
    (copied / "00000003" / "progress.json").unlink()
    with pytest.raises(LindmError) as stop:
        checkpoints.restore(copied, template(mesh_of(1, 1)))
    assert isinstance(stop.value, CheckpointError)
    assert "00000006/manifest.json: not JSON" in str(stop.value) and "progress.json is missing" in str(stop.value)


@pytest.mark.fault("F5")
def test_a_damaged_step_is_written_again(copied):
    (copied / "00000006" / "progress.json").unlink()
    checkpoints.save(copied, 6, placed(arrays(6), mesh_of(1, 1)), {"best": 1.0}, keep=2)
    assert checkpoints.restore(copied, template(mesh_of(1, 1))).progress == {"best": 1.0}


@pytest.mark.fault("F7")
@pytest.mark.parametrize("where", ["writer", "manifest", "rename"])
def test_a_failed_write_is_exit_7_and_leaves_the_existing_checkpoints(copied, monkeypatch, where):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    if where == "writer":
        monkeypatch.setattr(checkpoints.ocp.AsyncCheckpointer, "save", refuse)
    elif where == "manifest":
        monkeypatch.setattr(checkpoints.files.os, "fsync", refuse)
    else:
        monkeypatch.setattr(directories.os, "rename", refuse)
    with pytest.raises(LindmError) as stop:
        checkpoints.save(copied, 9, placed(arrays(9), mesh_of(1, 1)), {}, keep=2)
    monkeypatch.undo()
    assert isinstance(stop.value, StorageError) and "No space left" in str(stop.value)
    assert sorted(p.name for p in copied.iterdir()) == ["00000003", "00000006"]
    assert checkpoints.restore(copied, template(mesh_of(1, 1))).step == 6


@pytest.fixture
def held_back(monkeypatch):
    """Writes wait before they are hashed, until this event is set."""
    release, hashes_of = threading.Event(), checkpoints.verification.hashes_of

    def wait(*arguments):
        assert release.wait(HANGS)
        return hashes_of(*arguments)

    monkeypatch.setattr(checkpoints.verification, "hashes_of", wait)
    yield release
    release.set()


@pytest.mark.fault("F1")
def test_steps_that_run_while_a_checkpoint_is_written_do_not_change_it(copied, held_back):
    mesh = mesh_of(4, 2)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), out_shardings=shardings(mesh), donate_argnums=0)
    with checkpoints.CheckpointWriter() as writer:
        state = placed(arrays(9), mesh)
        writer.save(copied, 9, state, {"best": 4.5}, keep=2)
        for _ in range(3):
            state = step(state)
            writer.check()
        assert int(state["step"]) == 12
        assert checkpoints.checkpoint_steps(copied) == [3, 6], "it has no name before it is complete"
        held_back.set()
    restored = checkpoints.restore(copied, template(mesh_of(1, 1)))
    assert (restored.step, restored.progress) == (9, {"best": 4.5})
    same(restored.state, arrays(9))
    assert checkpoints.checkpoint_steps(copied) == [6, 9]


@pytest.mark.fault("F27")
@pytest.mark.parametrize("error", [None, RuntimeError("of the run")], ids=["end", "error"])
def test_a_signal_is_noticed_while_the_main_thread_waits_for_a_write(copied, held_back, monkeypatch, error):
    """The write ends only when the flag is looked at: otherwise the process would end before it."""
    monkeypatch.setattr(checkpoints.signals, "stop_requested", held_back.set)
    with pytest.raises(RuntimeError) if error else nullcontext(), checkpoints.CheckpointWriter() as writer:
        writer.save(copied, 9, placed(arrays(9), mesh_of(1, 1)), {}, keep=2)
        assert not held_back.is_set()
        if error:
            raise error
    assert held_back.is_set() and checkpoints.restore(copied, template(mesh_of(1, 1))).step == 9


@pytest.mark.fault("F7")
def test_a_write_that_fails_in_the_background_is_an_error_at_the_next_look_and_leaves_nothing(copied, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    writer = checkpoints.CheckpointWriter()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.verification, "hashes_of", refuse)
        writer.save(copied, 9, placed(arrays(9), mesh_of(1, 1)), {}, keep=2)
        writer.thread.join()
    with pytest.raises(StorageError, match=r"cannot write .*00000009: .*No space left"):
        writer.check()
    writer.check()  # it is raised once
    assert sorted(p.name for p in copied.iterdir()) == ["00000003", "00000006"]
    with pytest.raises(RuntimeError, match="of the run"), writer:
        writer.save(copied, 9, placed(arrays(9), mesh_of(1, 1)), {}, keep=2)
        raise RuntimeError("of the run")
    assert checkpoints.restore(copied, template(mesh_of(1, 1))).step == 9, "an error of the run does not cut a write short"


@pytest.mark.fault("F8")
@pytest.mark.parametrize("removed", ["run", "checkpoints", "checkpoint"])
@pytest.mark.parametrize("fails", [True, False])
def test_a_directory_that_is_removed_during_a_save_and_made_anew_by_the_library_is_removed_again(
    tmp_path, monkeypatch, removed, fails
):
    run = tmp_path / "run"
    hidden = temporaries.temporary_path(run / "checkpoints" / "00000009")
    lost = {"run": run, "checkpoints": hidden.parent, "checkpoint": hidden}[removed]
    wait = checkpoints._wait_for_arrays

    def remove_and_make_anew(arrays):
        wait(arrays)
        shutil.rmtree(lost)
        (hidden / "state" / "d").mkdir(parents=True)
        if fails:
            raise OSError(2, "No such file or directory")

    run.mkdir()
    monkeypatch.setattr(checkpoints, "_wait_for_arrays", remove_and_make_anew)
    with pytest.raises(StorageError, match=r"cannot write .*00000009"):
        checkpoints.save(run / "checkpoints", 9, placed(arrays(9), mesh_of(1, 1)), {}, keep=2)
    assert run.exists() == (removed != "run") and (run / "checkpoints").exists() == (removed == "checkpoint")
    temporaries.remove_leftovers(run / "checkpoints")  # as the next run does
    assert not hidden.exists()


@pytest.mark.fault("F16")
def test_memory_that_runs_out_is_neither_a_full_disk_nor_a_damaged_checkpoint(copied, monkeypatch):
    def exhaust(*_, **__):
        jnp.zeros(2**46, jnp.float32).block_until_ready()

    monkeypatch.setattr(checkpoints.ocp.AsyncCheckpointer, "save", exhaust)
    monkeypatch.setattr(checkpoints.ocp.Checkpointer, "restore", exhaust)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        checkpoints.save(copied, 9, placed(arrays(9), mesh_of(1, 1)), {}, keep=2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        checkpoints.restore(copied, template(mesh_of(1, 1)))
    monkeypatch.undo()
    assert sorted(p.name for p in copied.iterdir()) == ["00000003", "00000006"]
    assert checkpoints.restore(copied, template(mesh_of(1, 1))).step == 6


@pytest.mark.fault("F5")
@pytest.mark.parametrize("error", [RuntimeError("no such codec"), KeyError("w"), GeneratorExit()], ids=lambda e: type(e).__name__)
def test_an_intact_checkpoint_that_cannot_be_restored_is_an_error_and_no_older_one_is_used(copied, monkeypatch, error):
    restore = checkpoints.ocp.Checkpointer.restore

    def refuse(self, path, **options):
        if path.parent.name == "00000006":
            raise error
        return restore(self, path, **options)

    monkeypatch.setattr(checkpoints.ocp.Checkpointer, "restore", refuse)
    with pytest.raises(CheckpointError, match=r"00000006 is intact, but Orbax cannot restore it: "):
        checkpoints.restore(copied, template(mesh_of(1, 1)))


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from pathlib import Path
from lindm.io import directories
from lindm.llm.sft import checkpoints as c

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def then_die(work):
    def both(*a, **k):
        work(*a, **k)
        die()
    return both

phase, directory = sys.argv[1], Path(sys.argv[2])
places = {"writer": (c.ocp.AsyncCheckpointer, "save"), "host": (c.files, "write_json"), "sums": (c.verification, "hashes_of")}
places |= {"sync": (directories, "_sync_tree"), "rename": (os, "rename"), "removal": (c, "remove")}
owner, name = places[phase.split("-")[0]]
work = getattr(owner, name)
deadly = then_die(work) if phase.endswith("-after") else die
if name == "rename":  # of the step itself, not of the files in it
    setattr(owner, name, lambda a, b: deadly(a, b) if Path(b).name.isdigit() else work(a, b))
else:
    setattr(owner, name, deadly)
c.save(directory, 9, {"x": jnp.arange(8.0, dtype=jnp.float32)}, {}, keep=1)
"""


PHASES = ["writer", "writer-after", "host-after", "sums", "sync-after", "rename", "rename-after", "removal"]


@pytest.mark.slow
@pytest.mark.fault("F1")
@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_any_phase_of_a_save_there_is_the_old_or_the_new_step(tmp_path, phase):
    mesh = mesh_of(1, 1)
    whole = NamedSharding(mesh, PartitionSpec())
    like = {"x": jax.ShapeDtypeStruct((8,), np.float32, sharding=whole)}
    checkpoints.save(tmp_path, 5, {"x": jnp.ones(8, jnp.float32)}, {}, keep=1)
    done = subprocess.run([sys.executable, "-c", KILLED, phase, str(tmp_path)], env={**os.environ, "XLA_FLAGS": ""}, check=False)
    assert done.returncode == -signal.SIGKILL
    restored = checkpoints.restore(tmp_path, like)
    assert restored.step == (9 if phase in ("rename-after", "removal") else 5)
    np.testing.assert_array_equal(restored.state["x"], np.arange(8.0) if restored.step == 9 else np.ones(8))
    temporaries.remove_leftovers(tmp_path)  # as a run does when it starts
    checkpoints.save(tmp_path, 12, {"x": jnp.zeros(8, jnp.float32)}, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["00000012"]
    assert json.loads((tmp_path / "00000012" / "manifest.json").read_text())["step"] == 12
