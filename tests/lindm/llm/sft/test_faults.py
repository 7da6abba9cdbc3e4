"""What a run must survive, with real processes: kills, requests to stop, full disks, damage. It ends with the same bits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lindm.io import files, temporaries
from lindm.llm.sft import checkpoints
from tests.clock import HANGS, Stopwatch

pytestmark = pytest.mark.slow

STEPS, EVERY = 40, 5
# no socket may be connected: a run has nobody to ask
DOOR = """
import sys
def watch(event, arguments):
    if event == "socket.connect":
        print("a socket was connected", arguments, file=sys.stderr, flush=True)
        import os
        os._exit(99)
sys.addaudithook(watch)
from lindm.cli.main import main
sys.exit(main())
"""


def command(micro, out, *more):
    sizes = f"--steps {STEPS} --batch 4 --save-every {EVERY} --eval-every 20 --eval-tasks 2 --held-out 0.2"
    given = ["sft", "--model", str(micro.model), "--data", str(micro.mdp), "--out", str(out), *sizes.split(), *more]
    return [sys.executable, "-c", DOOR, *given]


def environment():
    flags = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    return flags | {"JAX_PLATFORMS": "cpu"}


def start(micro, out, *more):
    """A run that goes on beside the test; what it says goes to a file beside its directory."""
    with out.with_suffix(".said").open("w") as said:
        return subprocess.Popen(command(micro, out, *more), env=environment(), stderr=said, stdout=said)


def run(micro, out, *more, before=()):
    return subprocess.run([*before, *command(micro, out, *more)], env=environment(), capture_output=True, text=True, check=False)


def lines(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition, process, out, patience=HANGS):
    end = time.monotonic() + patience
    while not condition():
        assert process.poll() is None and time.monotonic() < end, out.with_suffix(".said").read_text()
        time.sleep(0.01)


def result(out):
    """What two runs must have in common to the last byte."""
    last = checkpoints.checkpoint_steps(out / "checkpoints")[-1]
    return {
        "model": files.sha256(out / "model" / "model.safetensors"),
        "metrics": (out / "metrics.jsonl").read_text(),
        "step": last,
        "progress": (out / "checkpoints" / checkpoints.checkpoint_name(last) / "progress.json").read_text(),
    }


def leftovers(out):
    return [p for p in out.rglob(f"*{temporaries.TEMPORARY_SUFFIX}*")]


@pytest.fixture(scope="module")
def reference(micro, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "out"
    done = run(micro, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.fault("F1", "F20")
def test_the_uninterrupted_run_is_whole(reference):
    assert result(reference)["step"] == STEPS and lines(reference) == STEPS + 3 and not leftovers(reference)


@pytest.mark.fault("F1", "F10", "F11")
def test_killed_at_random_moments_it_ends_with_the_same_bits(micro, reference, tmp_path):
    out, rng, kept = tmp_path / "out", random.Random(0), 0
    for _ in range(3):
        process = start(micro, out)
        enough = min(lines(out) + rng.randint(3, 9), STEPS)
        wait_for(lambda enough=enough: lines(out) >= enough, process, out)
        time.sleep(rng.random() / 20)
        process.kill()
        process.wait()
        steps = checkpoints.checkpoint_steps(out / "checkpoints")
        assert not steps or steps[-1] >= kept, "a step that was saved is not lost"
        done = json.loads((out / "metrics.jsonl").read_bytes().splitlines()[-2])["step"]
        lost = done - (steps[-1] if steps else 0)
        assert lost <= 2 * EVERY, "one interval is lost, and another one at most, whose checkpoint was being written"
        kept = steps[-1] if steps else 0
    done = run(micro, out)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    assert result(out) == result(reference) and not leftovers(out)


@pytest.mark.fault("F2", "F11")
def test_after_sigterm_it_saves_and_ends_with_75_within_seconds(micro, reference, tmp_path):
    out = tmp_path / "out"
    process = start(micro, out)
    wait_for(lambda: lines(out) >= 7, process, out)
    stopwatch = Stopwatch()
    process.send_signal(signal.SIGTERM)
    code, said = process.wait(HANGS), out.with_suffix(".said").read_text()
    assert code == 75 and stopwatch.seconds() < 30, said
    saved = checkpoints.checkpoint_steps(out / "checkpoints")[-1]
    assert f"saved step {saved} of {STEPS}; the same command resumes" in said
    assert json.loads((out / "metrics.jsonl").read_bytes().splitlines()[-1])["step"] == saved
    process = start(micro, out)  # and before training begins there is nothing to save
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANGS) in (75, -signal.SIGTERM)
    assert run(micro, out).returncode == 0
    assert result(out) == result(reference)


@pytest.mark.fault("F5", "F6")
def test_a_flipped_bit_sends_it_back_one_checkpoint_and_no_intact_one_is_exit_4(micro, reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    shutil.rmtree(out / "model")
    newest, before = (out / "checkpoints" / checkpoints.checkpoint_name(s) for s in (STEPS, STEPS - EVERY))
    for step in (newest, before):
        path = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 8
        path.write_bytes(data)
        done = run(micro, out)
        if step == newest:
            assert (
                done.returncode == 0
                and "skipped a damaged checkpoint" in done.stderr
                and f"resumed at step {STEPS - EVERY}" in done.stderr
            )
            assert result(out) == result(reference)
            shutil.rmtree(out / "model")
            data = bytearray((newest / "progress.json").read_bytes())
            (newest / "progress.json").write_bytes(data[:-3])
    assert done.returncode == 4 and "no usable checkpoint" in done.stderr
    assert all(checkpoints.checkpoint_name(s) in done.stderr for s in (STEPS, STEPS - EVERY))


@pytest.mark.fault("F15")
def test_a_second_writer_is_refused_and_the_lock_of_a_killed_one_is_free(micro, tmp_path):
    out = tmp_path / "out"
    process = start(micro, out)
    wait_for(lambda: (out / "config.json").exists(), process, out)
    second = run(micro, out)
    assert second.returncode == 2 and "is being written by another process" in second.stderr
    process.kill()
    process.wait()
    assert run(micro, out).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A directory, the words before a command that has little room there, and what gives it room.

    The room is a disk of 700 kB or, where mounting is not allowed, files of at most 60 kB.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode == 0:
        yield disk, [], lambda: subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        subprocess.run(["umount", "-l", str(disk)], check=False)
    else:
        limited = ["bash", "-c", 'ulimit -f 60; exec "$0" "$@"']
        yield disk, limited, limited.clear


@pytest.mark.fault("F7")
def test_a_full_disk_is_exit_7_and_with_room_it_goes_on(micro, reference, small_disk):
    disk, limited, make_room = small_disk
    out = disk / "out"
    done = run(micro, out, "--keep", "2", before=limited)
    assert done.returncode == 7 and ("No space left" in done.stderr or "File too large" in done.stderr), done.stderr
    steps = checkpoints.checkpoint_steps(out / "checkpoints")
    assert all(checkpoints.find_damage(out / "checkpoints" / checkpoints.checkpoint_name(s)) is None for s in steps)
    assert not leftovers(out / "checkpoints")
    make_room()
    done = run(micro, out, "--keep", "2", before=limited)
    assert done.returncode == 0, done.stderr
    assert result(out) == result(reference)
