"""Callbacks: copies of the metrics for other programs. One that fails or hangs neither stops nor slows a run.

Each callback has a thread, which gets the metrics through a queue. An error ends the callback with one warning; metrics.jsonl has
every record. TensorBoard and Weights & Biases are callbacks like those of a user:

    class Print:
        def start(self, config): print("begins after step", config["step"])
        def log(self, step, metrics): print(step, metrics)
        def finish(self): print("done")

    ld.finetune("data", "run", preset="tiny", callbacks=[Print()])
"""

import math
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from lindm.errors import UsageError

MAX_WAITING = 10_000  # records that wait for a callback; later ones are dropped
CLOSE_SECONDS = 10.0  # that the end of a run waits for a callback


class Callback(Protocol):
    """What gets the metrics of a run. The methods are called in one thread, in the first process of the run alone."""

    def start(self, config: dict[str, Any]) -> None:
        """Called first. config: the options of the run, and under "step" the number of steps that it has already."""
        ...

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Called after each step and each evaluation, with names such as train/loss and eval/gap. All numbers are finite."""
        ...

    def finish(self) -> None:
        """Called last: at the end of the run, or where it stops."""
        ...


class BackgroundCallback:
    """Hands records to a callback in a thread."""

    def __init__(self, callback: Callback, config: dict[str, Any], warn: Callable[[str], None]):
        self.name, self.callback, self.config, self.warn = type(callback).__name__, callback, config, warn
        self.waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MAX_WAITING)
        self.dropped, self.failed = 0, False
        # a callback that hangs does not keep the process alive
        self.thread = threading.Thread(target=self._call, name=self.name, daemon=True)
        self.thread.start()

    def log(self, kind: str, step: int, values: dict[str, object]) -> None:
        """Hand over the finite numbers of a record; never waits."""
        if self.failed:
            return
        numbers = {f"{kind}/{k}": float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        try:
            self.waiting.put_nowait((step, numbers))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Let the callback take what waits, for at most `CLOSE_SECONDS`."""
        end = time.monotonic() + CLOSE_SECONDS
        while self.thread.is_alive() and time.monotonic() < end:
            try:
                self.waiting.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self.thread.join(max(end - time.monotonic(), 0))
        if self.thread.is_alive():
            self.warn(f"{self.name} did not take all records within {CLOSE_SECONDS:g} s; metrics.jsonl has all")
        elif self.dropped and not self.failed:
            self.warn(f"{self.name} lacks {self.dropped} records; metrics.jsonl has all")

    def _call(self) -> None:
        try:
            self.callback.start(self.config)
            while (record := self.waiting.get()) is not None:
                self.callback.log(*record)
            self.callback.finish()
        except Exception as e:
            self.failed = True
            self.warn(f"{self.name} failed and gets no more records ({type(e).__name__}: {e}); metrics.jsonl has all")


class TensorBoard:
    """Writes a file of TensorBoard events, which hides events of an earlier, longer part of the run.

    tensorboardX's `SummaryWriter` would hand the events to one more thread, for which the process waits at its end.

    Raises:
      UsageError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path):
        try:
            import tensorboardX.event_file_writer
            import tensorboardX.proto.event_pb2
            import tensorboardX.proto.summary_pb2  # noqa: F401
        except ImportError as e:
            raise UsageError(f"TensorBoard events need tensorboardX: pip install -e '.[track]' ({e})") from e
        self.directory = directory

    def start(self, config: dict[str, Any]) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore  (made at import)

        self.directory.mkdir(exist_ok=True)
        self.file = EventsWriter(str(self.directory / "events"))
        begin = SessionLog(status=SessionLog.START)
        self.file.write_event(Event(wall_time=time.time(), step=config["step"] + 1, session_log=begin))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

        parts = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.file.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=parts)))
        self.file.flush()

    def finish(self) -> None:
        self.file.close()


class WeightsAndBiases:
    """Logs to Weights & Biases: to files below `directory` / wandb, which `wandb sync` uploads, or online.

    A run that resumes is another run of the same group, with the steps that it has.

    Raises:
      UsageError: wandb is not installed.
    """

    def __init__(self, directory: Path, mode: Literal["offline", "online"]):
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would send reports of its own errors
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise UsageError(f"--wandb needs wandb: pip install -e '.[wandb]' ({e})") from e
        self.wandb, self.directory, self.mode = wandb, directory, mode

    def start(self, config: dict[str, Any]) -> None:
        settings = self.wandb.Settings(console="off", disable_git=True, disable_code=True)  # nothing but config and metrics
        name = self.directory.absolute().name
        self.run = self.wandb.init(
            project="lindm", group=name, dir=str(self.directory), mode=self.mode, config=config, settings=settings
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.run.finish()
