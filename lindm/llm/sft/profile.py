"""`--profile FROM:TO`: a trace of some steps, and a table of the operations that take most of their time.

    OUT/profile/plugins/profile/...    the trace, for TensorBoard's profile plugin (xprof) and, as trace.json.gz, for Perfetto
    OUT/profile/operations.txt         the table

The first process traces its own devices. An operation counts for the time that it and no operation within it runs, so a loop does
not count for its body. Where the compiler kept it, the place in the model stands beside the operation.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from lindm.io import directories, files
from lindm.io.tables import format_table

PROFILE, TABLE = "profile", "operations.txt"
NUM_OPERATIONS = 20
PLACE = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)


class StepProfiler:
    """Traces the steps of a range.

    Args:
      out: directory of the run. steps: first and last step, from 1; None traces nothing.
      programs: the texts of the compiled programs, which say where an operation comes from.
      is_main: whether this is the process that traces. All of them have the steps: they wait for the same ones, where a stop
        that is requested meanwhile is noticed.
    """

    def __init__(self, out: Path, steps: tuple[int, int] | None, programs: Callable[[], Iterable[str]], is_main: bool):
        self.directory, self.steps, self.programs, self.is_main = out / PROFILE, steps, programs, is_main
        self.running = False

    def changes_after(self, step: int) -> bool:
        """Whether the trace begins or ends when this many steps are finished."""
        return self.steps is not None and step in (self.steps[0] - 1, self.steps[1])

    def after(self, step: int) -> str | None:
        """Begin or end the trace; at its end, the table. No step may be running.

        Raises:
          StorageError: the disk is full or not writable.
        """
        if self.steps is None or not self.is_main:
            return None
        if step == self.steps[0] - 1:
            directories.remove(self.directory)  # of an earlier run of these steps
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # its events would crowd out those of the devices
            with files.storage_errors(self.directory):
                jax.profiler.start_trace(str(self.directory), profiler_options=options)
            self.running = True
            return None
        if step != self.steps[1] or not self.running:
            return None
        self.close()
        table = operations_table(self.directory, self.steps, self.programs())
        files.write_atomic(self.directory / TABLE, table + "\n")
        return table

    def close(self) -> None:
        """End a trace that runs; what it has is written."""
        if self.running:
            self.running = False
            with files.storage_errors(self.directory):
                jax.profiler.stop_trace()


def operations_table(directory: Path, steps: tuple[int, int], programs: Iterable[str]) -> str:
    """The table: time, calls and place of the operations that took most time in the newest trace of a directory."""
    places = {name: place for text in programs for name, place in PLACE.findall(text)}
    (trace,) = directory.glob("plugins/profile/*/*.xplane.pb")
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for name, self_seconds in self_times(_operations(line)):
                seconds[name] += self_seconds
                calls[name] += 1
    total, num_steps = sum(seconds.values()), steps[1] - steps[0] + 1
    slowest = sorted(seconds, key=lambda name: (-seconds[name], name))[:NUM_OPERATIONS]
    rows = [["operation", "ms a step", "share", "calls a step", "place"]]
    for name in slowest:
        share, place = seconds[name] / total, places.get(name, "").removeprefix("jit(train_step)/")
        ms = 1e3 * seconds[name] / num_steps
        rows.append([name, f"{ms:,.3f}", f"{share:.1%}", f"{calls[name] / num_steps:,.3g}", place])
    title = f"steps {steps[0]} to {steps[1]}: {len(seconds)} operations, {1e3 * total / num_steps:,.1f} ms a step on all threads"
    return f"{title}\n\n{format_table(rows)}"


def self_times(events: Iterable[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """(name, time within the event and within no event inside of it) of the events (name, start, duration) of one thread."""
    times: list[list[Any]] = []
    open_events: list[tuple[float, int]] = []  # (end, index), the innermost last
    for name, start, duration in sorted(events, key=lambda event: (event[1], -event[2])):
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        if open_events:
            times[open_events[-1][1]][1] -= duration
        open_events.append((start + duration, len(times)))
        times.append([name, duration])
    return [(name, duration) for name, duration in times]


def _operations(line: Any) -> list[tuple[str, float, float]]:
    """(name, start, duration), in seconds, of the operations of a program among the events of a thread or a device's queue."""
    operations = []
    for event in line.events:
        stats = dict(event.stats)
        if "hlo_op" in stats or line.name == "XLA Ops":  # the latter on TPUs
            name = str(stats.get("hlo_op") or event.name.split(" = ")[0].lstrip("%"))
            operations.append((name, event.start_ns * 1e-9, event.duration_ns * 1e-9))
    return operations
