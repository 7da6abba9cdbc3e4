"""Trackers: copies of the metrics for other programs. A tracker that fails or hangs neither stops nor slows a run.

Records go through a queue to a thread. An error of the tracker ends the tracker with one warning; metrics.jsonl has every record.
"""

import math
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lindm.errors import UsageError

MAX_WAITING = 10_000  # records that wait for a tracker; later ones are dropped
CLOSE_SECONDS = 10.0  # that the end of a run waits for a tracker


class Writer(Protocol):
    """What writes records in the thread."""

    def write(self, kind: str, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class BackgroundTracker:
    """Hands records to a writer in a thread.

    Args:
      name: of the tracker, for warnings.
      make_writer: called in the thread.
    """

    def __init__(self, name: str, make_writer: Callable[[], Writer], warn: Callable[[str], None]):
        self.name, self.make_writer, self.warn = name, make_writer, warn
        self.waiting: queue.Queue[tuple[str, int, dict[str, float]] | None] = queue.Queue(MAX_WAITING)
        self.dropped, self.failed = 0, False
        self.thread = threading.Thread(target=self._write, name=name, daemon=True)  # a hung one does not keep the process alive
        self.thread.start()

    def log(self, kind: str, step: int, values: dict[str, object]) -> None:
        """Hand over the finite numbers of a record; never waits."""
        if self.failed:
            return
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        try:
            self.waiting.put_nowait((kind, step, numbers))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Let the tracker write what waits, for at most `CLOSE_SECONDS`."""
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

    def _write(self) -> None:
        try:
            writer = self.make_writer()
            while (record := self.waiting.get()) is not None:
                writer.write(*record)
            writer.close()
        except Exception as e:
            self.failed = True
            self.warn(f"{self.name} failed and gets no more records ({type(e).__name__}: {e}); metrics.jsonl has all")


def tensorboard_writer(directory: Path, purge_step: int) -> Callable[[], Writer]:
    """Makes the writer of a file of TensorBoard events, which hides earlier events from `purge_step` on.

    tensorboardX's `SummaryWriter` would hand the events to one more thread, for which the process waits at its end.

    Raises:
      UsageError: tensorboardX is not installed.
    """
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore  (made at import)
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
    except ImportError as e:
        raise UsageError(f"TensorBoard events need tensorboardX: pip install 'lindm[track]' ({e})") from e

    class EventsFile:
        def __init__(self):
            directory.mkdir(exist_ok=True)
            self.file = EventsWriter(str(directory / "events"))
            self.file.write_event(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

        def write(self, kind: str, step: int, values: dict[str, float]) -> None:
            parts = [Summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in values.items()]
            self.file.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=parts)))
            self.file.flush()

        def close(self) -> None:
            self.file.close()

    return EventsFile
