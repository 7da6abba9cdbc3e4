"""Progress: nothing for short work, no estimate before there is something to estimate from."""

import io
import time

import pytest
from rich.console import Console

from lindm.io import progress, signals
from lindm.io.progress import Progress, format_seconds


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    monkeypatch.setattr(progress, "time", clock := Clock())
    return clock


@pytest.fixture
def stream():
    return io.StringIO()


def lines(stream):
    return stream.getvalue().splitlines()


def test_short_work_prints_nothing(clock, stream):
    with Progress(Console(file=stream, width=200)) as shown:
        task = shown.add("tasks", total=3)
        for done in range(4):
            task.update(done)
            clock.now += 0.5
    assert lines(stream) == []


def test_plain_lines_have_count_rate_time_elapsed_and_time_left(clock, stream):
    with Progress(Console(file=stream, width=200)) as shown:
        task = shown.add("tasks", total=100)
        task.update(0)
        for done in (10, 20, 30):
            clock.now += 5
            task.update(done)
        clock.now += 5
        task.update(40, detail="loss 0.5")
    assert lines(stream) == [
        "tasks: 10 of 100, 0:05 elapsed",  # the first advance is no estimate: it may have waited for a compiler
        "tasks: 30 of 100, 2/s, 0:15 elapsed, 0:35 left",
    ]


def test_earlier_progress_does_not_count_for_the_rate(clock, stream):
    with Progress(Console(file=stream, width=200)) as shown:
        task = shown.add("tasks")
        task.update(90, 100)
        assert task.rate is None and task.seconds_left is None
        clock.now += 100
        task.update(91, 100)
        assert task.rate is None and task.seconds_left is None
        clock.now += 2
        task.update(92, 100)
        assert task.rate == 0.5 and task.seconds_left == 16


def test_lines_that_stay_are_printed_and_quiet_prints_none(clock, stream):
    with Progress(Console(file=stream, width=200)) as shown:
        shown.print("step [1] of 2")
    with Progress(Console(file=stream, width=200), quiet=True) as shown:
        shown.print("step 2 of 2")
        clock.now += 60
        shown.add("tasks").update(1, 2)
    assert lines(stream) == ["step [1] of 2"]


def test_a_display_within_another_shows_nothing(clock, stream):
    with Progress(Console(file=stream, width=200)) as outer:
        with Progress(Console(file=stream, width=200)) as inner:
            clock.now += 60
            inner.add("weights").update(1, 2)
        outer.print("loaded")
    with Progress(Console(file=stream, width=200)) as alone:
        alone.print("alone again")
    assert lines(stream) == ["loaded", "alone again"]


def test_a_terminal_shows_a_bar_after_the_silent_seconds_and_removes_it(stream, monkeypatch):
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    console = Console(file=stream, width=100, force_terminal=True)
    with Progress(console) as shown:
        shown._timer.join()
        shown.add("tasks", total=4).update(2)
        assert shown._live is not None and "2/4" in "".join(s.text for s in console.render(shown._bars()))
    assert not shown._live.is_started


def test_a_bar_is_removed_when_a_signal_ends_the_process(stream, monkeypatch):
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(signals, "_clean_ups", clean_ups := [])
    with Progress(Console(file=stream, force_terminal=True)) as shown:
        shown._timer.join()
        for clean_up in clean_ups:
            clean_up()
        assert not shown._live.is_started
    assert clean_ups == []


def test_durations_are_clocks():
    assert [format_seconds(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]


def test_a_count_that_stands_still_is_printed_again_with_the_time_elapsed(monkeypatch, stream):
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    with Progress(Console(file=stream, width=200)) as shown, shown.repeated(shown.add("meshes compiled")) as task:
        while_unknown = len(lines(stream))
        task.update(0, 2, "fsdp=8")
        deadline = time.monotonic() + 60
        while len(lines(stream)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert while_unknown == 0
    assert len(lines(stream)) >= 3 and set(lines(stream)) <= {
        f"meshes compiled: 0 of 2, fsdp=8, 0:0{n} elapsed" for n in range(10)
    }
