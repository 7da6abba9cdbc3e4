"""Killed workers, killed parents, errors: only the running task is lost, and nothing is written afterwards."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from lindm.errors import DataError, LindmError, UsageError
from lindm.io import executor, task_queue
from lindm.io.executor import TaskPool, WorkerDied, run_tasks
from tests.clock import HANGS


def work(task):
    kind, value = task
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(3)
    if kind == "data":
        raise DataError("bad input")
    if kind == "bug":
        raise RuntimeError(f"bug {value}\nmore")
    if kind == "pid":
        return os.getpid()
    if kind == "wait for":  # as many tasks as this to be running
        directory, number = value
        Path(directory, str(os.getpid())).touch()
        deadline = time.monotonic() + HANGS
        while len(os.listdir(directory)) < number:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{number} tasks did not run together")
            time.sleep(0.01)
        return number
    if kind == "env":
        return os.environ.get("EXECUTOR_TEST")
    return value**2


def prepare():
    os.environ["EXECUTOR_TEST"] = "set"


def values(results):
    return [None if r is None else r.value for r in results]


@pytest.mark.parametrize("kind", ["serial", "local"])
def test_values_come_in_the_order_of_the_tasks(kind):
    tasks = [("square", i) for i in range(7)]
    assert values(run_tasks(work, tasks, executor=kind, workers=2)) == [i**2 for i in range(7)]
    assert run_tasks(work, [], executor=kind, workers=2) == []


@pytest.mark.fault("F17")
def test_a_worker_that_dies_costs_its_one_task():
    tasks = [("square", 2), ("kill", 0), ("square", 3), ("exit", 0), ("square", 4)]
    results = run_tasks(work, tasks, workers=2, groups=[0] * 5)
    assert values(results) == [4, None, 9, None, 16]
    assert all(isinstance(results[i].error, WorkerDied) for i in (1, 3))
    assert (results[1].error.message, results[3].error.message) == ("worker died (signal 9)", "worker died (exit 3)")


@pytest.mark.parametrize("kind", ["serial", "local"])
def test_an_error_is_returned_and_ends_its_group_only(kind):
    tasks = [("bug", 1), ("square", 2), ("data", 0), ("square", 3)]
    results = run_tasks(work, tasks, executor=kind, workers=1, groups=["a", "a", "b", "c"])
    assert results[0].error.message == "RuntimeError: bug 1" and "RuntimeError: bug 1\nmore" in results[0].traceback
    assert results[1] is None
    assert isinstance(results[2].error, DataError) and results[2].error.message == "bad input" and not results[2].traceback
    assert results[3].value == 9


def test_events_report_every_start_and_end():
    events = []
    run_tasks(work, [("square", i) for i in range(4)], workers=2, on_event=events.append)
    assert Counter(e.index for e in events if e.result is None) == Counter(range(4))
    assert {e.index: e.result.value for e in events if e.result} == {i: i**2 for i in range(4)}


def test_an_exception_of_the_caller_ends_the_workers():
    pids = []

    def stop(event):
        if event.result:
            pids.append(event.result.value)
            raise LindmError("stop")

    with pytest.raises(LindmError, match="stop"):
        run_tasks(work, [("pid", 0)] * 4, workers=1, on_event=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_workers_live_as_long_as_the_pool_and_are_initialized():
    with TaskPool("local", 1, prepare) as pool:
        first, second = (values(pool.run(work, [("pid", 0), ("env", 0)])) for _ in range(2))
    assert first == second and first[1] == "set" and first[0] != os.getpid()


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match="executor must be one of serial, local, ray; got 'threads'"):
        TaskPool("threads")  # pyright: ignore
    with pytest.raises(UsageError, match="workers must be >= 1; got 0"):
        TaskPool("local", 0)


def test_a_worker_stays_with_its_group_and_helps_only_where_much_is_left(monkeypatch):
    monkeypatch.setattr(task_queue, "HELP_AFTER", 20.0)
    queue = task_queue.TaskQueue(["a", "a", "a", "b", "b"])
    assert (queue.take(None), queue.take(None)) == (0, 3)  # two workers, two groups
    queue.end(3, 1.0)
    assert queue.take("b") == 4
    queue.end(4, 1.0)
    assert queue.take("b") is None  # how long "a" takes is not known yet
    queue.end(0, 9.0)
    assert queue.take("b") is None and queue.take("a") == 1  # 18 seconds are left: a second worker would not help
    queue = task_queue.TaskQueue(["a", "a", "a"])
    assert queue.take(None) == 0
    queue.end(0, 11.0)
    assert queue.take("b") == 1  # 22 seconds are left
    queue = task_queue.TaskQueue(["a", "a", "a"])
    assert queue.take(None) == 0
    queue.note_running(0, 10.0)
    assert queue.take(None) is None  # as far as is known
    queue.note_running(0, 10.1)
    assert queue.take(None) == 1


@pytest.mark.slow
def test_a_second_worker_helps_before_the_first_task_of_a_group_ends(monkeypatch):
    monkeypatch.setattr(task_queue, "HELP_AFTER", 0.1)
    started: list[int] = []

    def note(event):
        if event.result is None:
            started.append(event.index)
        else:
            assert started == [0, 1]  # both were running when the first one ended

    tasks = [("wait for", 2), ("wait for", 2)]
    with tempfile.TemporaryDirectory() as directory:
        results = run_tasks(work, [(kind, (directory, n)) for kind, n in tasks], workers=2, groups=["a", "a"], on_event=note)
    assert values(results) == [2, 2]


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from lindm.io import signals
from lindm.io.executor import run_tasks

def write(task):
    for i in range(200):
        with open(task, "a") as f:
            f.write(f"{{i}}\\n")
        time.sleep(0.05)

if __name__ == "__main__":
    signals.watch(lambda number, kept: signals.Ending(75, "stopped"))
    run_tasks(write, ["a.txt", "b.txt"], workers=2)
"""


@pytest.mark.slow
@pytest.mark.fault("F2", "F15")
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_workers_do_not_write_after_the_parent_has_ended(tmp_path, number, code):
    (tmp_path / "slow.py").write_text(SLOW.format(here=str(Path(executor.__file__).parents[2])))
    process = subprocess.Popen(
        [sys.executable, "slow.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    deadline = time.monotonic() + HANGS
    while not all(p.exists() for p in paths) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # a terminal signals all
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == code and "Traceback" not in err, err
    time.sleep(0.5)
    sizes = [p.stat().st_size for p in paths]
    time.sleep(0.5)
    assert sizes == [p.stat().st_size for p in paths]


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import math\nfrom lindm.io.executor import run_tasks\n\n"
        "print([r.value for r in run_tasks(math.sqrt, [4.0, 9.0], workers=2)], __file__)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0 and done.stdout == f"[2.0, 3.0] {script}\n", done.stderr


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # Ray forks its workers while jax runs threads here
def test_ray_gives_the_same_results_and_survives_a_killed_worker(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    tasks = [("square", 2), ("kill", 0), ("square", 3), ("data", 0), ("env", 0)]
    with TaskPool("ray", 2, prepare) as pool:
        results = pool.run(work, tasks, groups=[0, 0, 0, 1, 2])
        again = pool.run(work, [("square", i) for i in range(5)])
    assert values(results) == [4, None, 9, None, "set"]
    assert isinstance(results[1].error, WorkerDied) and isinstance(results[3].error, DataError)
    assert values(again) == [i**2 for i in range(5)]
