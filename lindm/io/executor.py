"""Run independent tasks in worker processes: on this machine, or on a Ray cluster.

    results = run_tasks(measure, tasks, executor="local", workers=4)

The calling process gets all results, and should be the one that writes them. A worker that is killed loses the task that it was
running; the others continue, and a new worker takes its place. Workers end with the calling process, however it ends; SIGINT and
SIGTERM are blocked in them, since the calling process handles both.

Each worker is a `concurrent.futures` executor of one process (one of several breaks with its first process), or an actor of Ray.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, Literal, Protocol, get_args

from lindm.errors import MEMORY_ADVICE, LindmError, UsageError, from_library, unknown
from lindm.io import task_queue
from lindm.io.memory import ALLOCATION_SIGNALS, WorkerDied, WorkerOutOfMemory, memory_limit
from lindm.io.signals import STOP_SIGNALS, at_stop, deferred

Executor = Literal["serial", "local", "ray"]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The value that a task returned, or the error that ended it (with its traceback where the error was not expected)."""

    value: Any = None
    error: LindmError | None = None
    traceback: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TaskEvent:
    """Task number `index` started (no result yet) or ended."""

    index: int
    result: TaskResult | None = None


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    executor: Executor = "local",
    workers: int | None = None,
    initializer: Callable[[], None] | None = None,
    groups: Sequence[Hashable] | None = None,
    on_event: Callable[[TaskEvent], None] | None = None,
) -> list[TaskResult | None]:
    """`function(task)` of every task, in the order of the tasks. Arguments as in `TaskPool` and `TaskPool.run`."""
    with TaskPool(executor, workers, initializer) as pool:
        return pool.run(function, tasks, groups=groups, on_event=on_event)


class TaskPool:
    """Worker processes that live until the `with` block ends.

    Args:
      executor: "local" (processes on this machine), "ray" (actors on the cluster at RAY_ADDRESS, or on a local one that is
        started and stopped here) or "serial" (no workers: tasks run in this process).
      workers: number of processes; default: one for each core of this machine, or of the cluster.
      initializer: called in every worker before it imports the function.

    Raises:
      UsageError: for an unknown executor, fewer than one worker, or Ray that is not installed.
    """

    def __init__(
        self, executor: Executor = "local", workers: int | None = None, initializer: Callable[[], None] | None = None
    ) -> None:
        if executor not in get_args(Executor):
            raise UsageError(unknown("executor", executor, get_args(Executor)))
        if workers is not None and workers < 1:
            raise UsageError(f"workers must be >= 1; got {workers}")
        self.executor, self.workers, self.initializer = executor, workers, initializer
        self._slots: list[_Slot] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "TaskPool":
        self._stack.enter_context(at_stop(self._kill))
        if self.executor == "serial":
            self._slots = [_SerialSlot()]
        elif self.executor == "local":
            self._slots = [_LocalSlot(self.initializer) for _ in range(self.workers or available_cores())]
        else:
            cores = self._stack.enter_context(_ray_cluster(self.workers))
            self._slots = [_RaySlot(self.initializer) for _ in range(self.workers or cores)]
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self._slots:
            slot.stop()
        self._stack.close()

    def _kill(self) -> None:
        for slot in self._slots:
            slot.kill()

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        *,
        groups: Sequence[Hashable] | None = None,
        on_event: Callable[[TaskEvent], None] | None = None,
    ) -> list[TaskResult | None]:
        """`function(task)` of every task, in the order of the tasks.

        Args:
          function: a function at the top of a module; tasks and values can be pickled.
          groups: tasks of one group share what a process imports and compiles. A worker stays with its group, and then
            takes the next group. When no group is left, it helps a group that would take long (`task_queue.HELP_AFTER`).
            Default: every task is its own group.
          on_event: called in this process when a task starts and when it ends; an exception that it raises ends the run.

        After an error that the function raised, the waiting tasks of its group are skipped: their result is None. A worker that
        dies costs its one task.
        """
        queue = task_queue.TaskQueue(groups if groups is not None else range(len(tasks)))
        results: list[TaskResult | None] = [None] * len(tasks)
        running: dict[Future, tuple[_Slot, int, float]] = {}  # with the time of the start
        notify = on_event or (lambda event: None)
        idle = list(self._slots)
        while True:
            for slot in list(idle):
                if (index := queue.take(slot.group)) is not None:
                    idle.remove(slot)
                    slot.group = queue.groups[index]
                    notify(TaskEvent(index=index))
                    running[slot.submit(function, tasks[index])] = slot, index, time.monotonic()
            if not running:
                return results
            patience = task_queue.HELP_AFTER if idle else None  # an idle worker helps a group whose first task takes long
            done, _ = concurrent.futures.wait(running, patience, return_when=concurrent.futures.FIRST_COMPLETED)
            for _, index, started in running.values():
                queue.note_running(index, time.monotonic() - started)
            for future in done:
                slot, index, _ = running.pop(future)
                result = results[index] = slot.result(future)
                failed = result.error is not None and not isinstance(result.error, WorkerDied)
                queue.end(index, result.seconds, failed)
                notify(TaskEvent(index=index, result=result))
                idle.append(slot)


def _call(function: Callable[[Any], Any], task: Any) -> TaskResult:
    """Run one task; errors become data, since not every exception can be pickled."""
    started = time.perf_counter()
    try:
        return TaskResult(value=function(task), seconds=time.perf_counter() - started)
    except Exception as e:
        if isinstance(known := from_library(e), LindmError):
            return TaskResult(error=known, traceback="" if known is e else traceback.format_exc())
        first = (str(e).splitlines() or [""])[0]
        return TaskResult(error=LindmError(f"{type(e).__name__}: {first}"), traceback=traceback.format_exc())


# --- workers ---------------------------------------------------------------------------------------------------------------


class _Slot(Protocol):
    """A place for one worker, which is started with the first task and again after its death."""

    group: Hashable

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future: ...

    def result(self, future: Future) -> TaskResult: ...

    def kill(self) -> None: ...

    def stop(self) -> None: ...


class _SerialSlot:
    group: Hashable = None

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        future: Future = Future()
        future.set_result(_call(function, task))
        return future

    def result(self, future: Future) -> TaskResult:
        return future.result()

    def kill(self) -> None:
        pass

    def stop(self) -> None:
        pass


def _start_worker(initializer: Callable[[], None] | None) -> None:
    """First call in a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer:
        initializer()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _script_not_imported(function: Callable[[Any], Any]) -> Iterator[None]:
    """A new worker imports the script of this process, which would start its work again where the script has no
    `if __name__ == "__main__":`. It does not need the script unless the function is defined there.
    """
    main = sys.modules["__main__"]
    names = () if function.__module__ == "__main__" else ("__spec__", "__file__")
    hidden = {name: main.__dict__[name] for name in names if name in main.__dict__}
    main.__dict__.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        main.__dict__.update(hidden)


def _start_resource_tracker() -> None:
    """Start the process of `multiprocessing` that removes the semaphores of a killed process. It shall not warn of doing so.

    It is started before the workers are, since it unblocks the signals.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker"]))
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


class _LocalSlot:
    def __init__(self, initializer: Callable[[], None] | None) -> None:
        self.group: Hashable = None
        self._initializer = initializer
        self._pool: ProcessPoolExecutor | None = None
        self._process: Any = None

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        if self._pool is not None:
            return self._pool.submit(_call, function, task)
        spawn = multiprocessing.get_context("spawn")
        _start_resource_tracker()
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_start_worker, initargs=(self._initializer,))
        with deferred():
            before = multiprocessing.active_children()
            with _script_not_imported(function):
                future = self._pool.submit(_call, function, task)
            self._process = next(p for p in multiprocessing.active_children() if p not in before)
        return future

    def result(self, future: Future) -> TaskResult:
        try:
            return future.result()
        except BrokenProcessPool:
            assert self._pool is not None
            self._pool.shutdown(wait=True)
            self._pool, code = None, self._process.exitcode
            died = f"worker died ({f'signal {-code}' if code < 0 else f'exit {code}'})"
            if (limit := memory_limit()) is not None and -code in ALLOCATION_SIGNALS:
                return TaskResult(
                    error=WorkerOutOfMemory(f"{died} under a memory limit of {limit >> 20} MiB: try {MEMORY_ADVICE}")
                )
            return TaskResult(error=WorkerDied(died))

    def kill(self) -> None:
        if self._pool is not None and self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """Kill the process: a worker has nothing to save, and the clean-up of jax at exit takes time."""
        if self._pool is not None:
            self.kill()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


@contextlib.contextmanager
def _ray_cluster(workers: int | None) -> Iterator[int]:
    """A connection to the cluster at RAY_ADDRESS, or a local cluster; the number of its cores."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as e:
        raise UsageError("executor ray needs the package ray: pip install -e '.[ray]'") from e
    usage = os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ["RAY_USAGE_STATS_ENABLED"] = usage or "0"
    connected = ray.is_initialized()
    if not connected:
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        address = os.environ.get("RAY_ADDRESS")
        cores = {} if address else {"num_cpus": workers or available_cores(), "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="warning", **cores)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray replaces them
                signal.signal(number, handler)
    try:
        with contextlib.nullcontext() if connected else at_stop(ray.shutdown):
            yield int(ray.cluster_resources()["CPU"])
    finally:
        if not connected:
            ray.shutdown()
        if usage is None:
            del os.environ["RAY_USAGE_STATS_ENABLED"]


class _RayWorker:
    def __init__(self, initializer: Callable[[], None] | None) -> None:
        if initializer:
            initializer()

    def call(self, function: Callable[[Any], Any], task: Any) -> TaskResult:
        return _call(function, task)


class _RaySlot:
    def __init__(self, initializer: Callable[[], None] | None) -> None:
        self.group: Hashable = None
        self._initializer = initializer
        self._actor: Any = None

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        import ray  # pyright: ignore[reportMissingImports]

        if self._actor is None:
            self._actor = ray.remote(num_cpus=1, max_restarts=0)(_RayWorker).remote(self._initializer)
        return self._actor.call.remote(function, task).future()

    def result(self, future: Future) -> TaskResult:
        import ray  # pyright: ignore[reportMissingImports]

        try:
            return future.result()
        except ray.exceptions.RayActorError:
            self._actor = None
            return TaskResult(error=WorkerDied("worker died"))

    def kill(self) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        if self._actor is not None:
            ray.kill(self._actor)

    def stop(self) -> None:
        self.kill()
        self._actor = None
