"""Time in tests. A machine that is busy makes every command slow, so no limit of a test is in seconds of its clock alone."""

import time
from pathlib import Path

HANGS = 1800.0  # seconds after which a process that a test waits for counts as one that never ends
PRESSURE = Path("/proc/pressure/cpu")


def seconds_without_a_core() -> float:
    """Seconds since the start of this machine in which a task waited for a core; zero where it is not known (not on Linux)."""
    if not PRESSURE.exists():
        return 0.0
    some = PRESSURE.read_text().splitlines()[0]
    return int(some.rpartition("total=")[2]) / 1e6


class Stopwatch:
    """Measures seconds in which no task of this machine had to wait for a core: how long something takes on an idle machine."""

    def __init__(self) -> None:
        self.begun, self.waited = time.monotonic(), seconds_without_a_core()

    def seconds(self) -> float:
        """Since the stopwatch was made."""
        return time.monotonic() - self.begun - (seconds_without_a_core() - self.waited)
