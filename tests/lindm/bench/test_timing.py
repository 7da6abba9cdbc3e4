"""Measurement functions of the benchmarks."""

import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from lindm.bench import timing
from tests.clock import HANGS
from tests.lindm.cli.stops.phases import ROOT, group_ended


def test_the_exponent_of_a_power_law_is_recovered():
    assert timing.exponent((1, 10, 100), [3.0, 3 * 10**1.5, 3 * 10**3.0]) == pytest.approx(1.5)


def test_the_cost_is_that_of_the_best_call_and_counts_every_one():
    calls = []

    def work():
        calls.append(sum(range(200_000 if len(calls) == 1 else 2_000_000)))
        return jnp.zeros(2)

    few = timing.cpu_seconds(work, repeats=3)
    assert len(calls) == 3
    assert 0 < few < timing.cpu_seconds(lambda: sum(range(2_000_000)))


def test_a_timed_call_returns_its_result():
    seconds, result = timing.timed(lambda: {"x": np.arange(3), "y": jnp.ones(2)})
    assert seconds >= 0
    np.testing.assert_array_equal(result["x"], [0, 1, 2])


def test_memory_is_what_the_work_holds_at_its_peak():
    code = """
import numpy as np
from lindm.bench.timing import peak, peak_growth
print(peak_growth(lambda: np.ones((64, 1 << 17)).sum()), peak_growth(lambda: None), peak())
"""
    # a fresh process: where the peak cannot be set back, an earlier test's would hide this one's
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    large, none, peak = map(float, done.stdout.split())
    assert 60 < large < 100 and none < 10 and peak > large


def test_a_ratio_is_the_factor_by_which_ours_is_better():
    assert timing.row("w", 6.0, 2.0, "p", "1/s", timing.MORE)["ratio"] == 3
    assert timing.row("w", 6.0, 2.0, "p", "s", timing.LESS)["ratio"] == pytest.approx(1 / 3)
    assert timing.row("w", 6.0, 2.0, "p", "steps", timing.NEITHER)["ratio"] is None
    assert timing.row("w", 6.0, None, "p", "s", timing.LESS)["ratio"] is None
    assert timing.row("w", None, 2.0, "p", "s", timing.LESS)["ratio"] is None
    assert timing.row("w", 6.0, 0.0, "p", "MiB", timing.LESS)["ratio"] is None


def test_the_table_is_shown_whole_and_its_json_is_the_rows(capsys):
    table = [
        timing.row("solve", 0.5, None, "nobody", "s", timing.LESS),
        timing.row("grow", 12345.6, 2.0, "them", "1/s", timing.MORE),
    ]
    timing.show(table, as_json=True)
    assert json.loads(capsys.readouterr().out) == table
    timing.show(table, as_json=False)
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["work", "ours", "peer", "ratio", "unit", "peer", "is"]
    assert first.split() == ["solve", "0.5", "-", "-", "s", "nobody"]
    assert second.split() == ["grow", "12,346", "2", "6,173", "1/s", "them"]


MODULE = """
import os, sys
from lindm.bench.timing import answer
if __name__ == "__main__":
    print("something else")
    answer(lambda *words: {"words": words, "cores": len(os.sched_getaffinity(0)), "threads": os.environ["OMP_NUM_THREADS"]})
"""


def test_a_worker_is_a_process_of_its_own_on_one_core_with_one_thread(tmp_path, monkeypatch):
    (tmp_path / "measures_nothing.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert timing.in_worker("measures_nothing", "a b", "c") == {"words": ["a b", "c"], "cores": 1, "threads": "1"}


def test_a_worker_that_fails_reports_its_error(tmp_path, monkeypatch):
    (tmp_path / "measures_nothing.py").write_text("raise SystemExit('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"`ours time` failed with exit code 1:\nno such thing"):
        timing.in_worker("measures_nothing", "ours", "time")


def test_a_worker_ends_with_an_error_when_its_measurement_does(tmp_path):
    code = "from lindm.bench.timing import answer; answer(lambda: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr


SLOW_WORKER = """
import time
from pathlib import Path
from lindm.bench.timing import answer
answer(lambda: (Path("started").touch(), time.sleep(600)))
"""
STOPPED = """
import os, sys, threading, time
from pathlib import Path
from lindm.io import signals
from lindm.bench.timing import in_worker

def stop_when_started():
    while not Path("started").exists():
        time.sleep(0.02)
    os.kill(os.getpid(), int(sys.argv[1]))

signals.watch(lambda number, kept: signals.Ending(128 + number, "stopped"))
threading.Thread(target=stop_when_started, daemon=True).start()
in_worker("slow_worker")
"""


@pytest.mark.fault("F26", "F27")
@pytest.mark.parametrize(
    "number, code, error", [(signal.SIGTERM, 143, "lindm: stopped\n"), (signal.SIGKILL, -9, "")], ids=["stopped", "killed"]
)
def test_the_process_of_a_bench_ends_with_the_command(tmp_path, number, code, error):
    (tmp_path / "slow_worker.py").write_text(SLOW_WORKER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(int(number))],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.communicate(timeout=HANGS)[1] == error and process.returncode == code
    assert group_ended(process.pid)
