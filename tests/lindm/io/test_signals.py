"""How a process ends that is asked to stop: at once, or after it has saved."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from lindm.errors import Preempted
from lindm.io import signals
from tests.clock import HANGS

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.fault("F2", "F27")

WATCHED = """
import hashlib, os, signal, sys, threading, time
from lindm.io import signals
from lindm.io.signals import Ending

def native_work():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which no handler of Python runs

def kill(number=signal.SIGTERM, seconds=0.0):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()

signals.watch(lambda number, kept: Ending(75 if kept else 128 + number, f"stopped by {signal.Signals(number).name} {kept}"))
"""


def watched(code: str) -> subprocess.CompletedProcess[str]:
    """A process that is watched and runs `code`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = WATCHED + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANGS, env=environment)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("work", ["native_work()", "time.sleep(60)", "while True: pass"])
def test_a_signal_ends_a_watched_process_whatever_it_does(number, code, work):
    done = watched(f"print('printed before')\nkill({int(number)}, 0.2)\n{work}")
    assert (done.returncode, done.stdout) == (code, "printed before\n")
    assert done.stderr == f"lindm: stopped by {number.name} \n"


def test_no_library_takes_a_stop_for_an_error_of_its_own():
    done = watched(
        """
        while True:
            try:
                kill()
                for i in range(10**9): pass
            except BaseException:
                print("swallowed", flush=True)
        """
    )
    assert (done.returncode, done.stdout) == (143, "")


def test_what_is_registered_is_cleaned_up_and_what_hangs_is_left_behind(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.write_text("")
    done = watched(
        f"""
        signals.CLEAN_UP_SECONDS = 0.5
        with signals.at_stop(lambda: print("no longer registered")):
            pass
        with signals.at_stop(lambda: os.unlink({str(temporary)!r})), signals.at_stop(native_work), signals.at_stop(lambda: 1 / 0):
            kill()
            native_work()
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "lindm: stopped by SIGTERM \n")
    assert not temporary.exists()


def test_the_main_thread_writes_nothing_more_while_the_process_ends():
    done = watched(
        """
        written = []
        def still_writes():
            time.sleep(0.5)
            before = len(written)
            time.sleep(0.5)
            print(len(written) > before, flush=True)

        with signals.at_stop(still_writes):
            kill()
            while True:
                written.append(None)
                time.sleep(0.001)
        """
    )
    assert (done.returncode, done.stdout) == (143, "False\n")


def test_unsaved_work_is_saved_first():
    done = watched(
        """
        signals.GRACE = 0.5
        try:
            with signals.unsaved_work(lambda: "with step 1"):
                kill()
                while not signals.stop_requested():
                    time.sleep(0.01)
                time.sleep(1)  # saving may take longer than the grace period
                print("saved")
        except BaseException as e:
            print(e)
        signals.ignore()  # as at the end of every command
        """
    )
    message = "stopped by a signal: with step 1; the same command resumes"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"saved\n{message}\n", "")


@pytest.mark.parametrize("work", ["native_work()", "time.sleep(60)"])
def test_a_process_that_does_not_save_in_time_ends_with_what_is_kept(work):
    done = watched(f"signals.GRACE = 0.3\nwith signals.unsaved_work(lambda: 'with step 1'):\n    kill()\n    {work}")
    assert (done.returncode, done.stderr) == (75, "lindm: stopped by SIGTERM with step 1\n")


def test_a_second_signal_ends_a_process_that_is_saving():
    done = watched(
        """
        with signals.unsaved_work(lambda: "with step 1"):
            kill(signal.SIGINT)
            while not signals.stop_requested():
                time.sleep(0.01)
            kill(signal.SIGINT, 0.1)  # the same Ctrl-C once more, from a launcher
            kill(signal.SIGINT, 4 * signals.AGAIN)
            time.sleep(1.5 * signals.AGAIN)
            print("still saving", flush=True)
            time.sleep(60)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "still saving\n", "lindm: stopped by SIGINT with step 1\n")


def test_more_time_is_given_where_a_step_takes_long():
    done = watched(
        """
        signals.GRACE = 0.1
        with signals.unsaved_work(lambda: "with step 1"):
            signals.allow_seconds(30)
            kill()
            time.sleep(2)
            print(signals.stop_requested(), flush=True)
            os._exit(0)
        """
    )
    assert (done.returncode, done.stdout) == (0, "True\n")


def test_a_stop_after_the_block_of_unsaved_work_ends_the_process_at_once():
    done = watched("with signals.unsaved_work(lambda: 'with step 1'):\n    pass\nkill()\nnative_work()")
    assert (done.returncode, done.stderr) == (143, "lindm: stopped by SIGTERM \n")


def test_a_finished_process_exits_as_it_would_without_a_signal():
    done = watched("signals.ignore()\nos.kill(os.getpid(), signal.SIGTERM)\nos.kill(os.getpid(), signal.SIGINT)\nsys.exit(3)")
    assert (done.returncode, done.stderr) == (3, "")


def test_a_started_process_gets_no_stop_signal_and_the_start_is_finished():
    done = watched(
        """
        import subprocess
        with signals.deferred():
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1); print('whole')"])
            os.kill(child.pid, signal.SIGINT)  # as a terminal sends it to both
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
            print(child.wait(), flush=True)
        print("after the block", flush=True)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "whole\n0\n", "lindm: stopped by SIGINT \n")


# --- in a process of its own handlers, such as a notebook ---------------------------------------------------------------------


@pytest.fixture
def own_handlers():
    """Handlers of a notebook; they have to be the same afterwards."""

    def handler(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in signals.STOP_SIGNALS}
    yield
    after = {number: signal.signal(number, old) for number, old in before.items()}
    assert set(after.values()) == {handler}


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_unsaved_work_of_a_notebook_sets_a_flag_and_raises_at_the_end(own_handlers, number):
    done = []
    message = "stopped by a signal: with step 1; the same command resumes"
    with pytest.raises(Preempted, match=message), signals.unsaved_work(lambda: "with step 1"):
        os.kill(os.getpid(), number)
        assert signals.stop_requested()
        done.append("saved")
    assert done == ["saved"] and not signals.stop_requested()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_a_second_signal_does_what_it_did_before(own_handlers, monkeypatch):
    monkeypatch.setattr(signals, "AGAIN", 0.0)
    with pytest.raises(KeyboardInterrupt), signals.unsaved_work(lambda: ""):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert not signals.stop_requested()


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.unsaved_work(lambda: ""):
            os.kill(os.getpid(), signal.SIGINT)
            assert not signals.stop_requested()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_leaves_the_handlers_alone(own_handlers):
    def work():
        with signals.unsaved_work(lambda: ""), signals.deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    seen, before = [], signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_that_arrives_in_a_deferred_block_is_handled_at_its_end(own_handlers):
    finished = []
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        finished.append(True)
    assert finished == [True]
