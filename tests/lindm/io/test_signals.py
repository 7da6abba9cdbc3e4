"""Signals that stop a run: an exception where finished work is on disk, a flag where it has to be saved first."""

import os
import signal

import pytest

from lindm.errors import Preempted
from lindm.io import signals


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(signals, "_stop_requested", False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_stop_on_signals_raises_preempted_with_the_name_of_the_signal():
    signals.stop_on_signals()
    with pytest.raises(Preempted, match="stopped by SIGTERM; the same command resumes"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.stop_requested()


def test_note_signals_sets_a_flag_alone():
    signals.note_signals()
    signals.raise_if_stopped()
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.stop_requested()
    with pytest.raises(Preempted):
        signals.raise_if_stopped()


def test_handlers_and_flag_are_put_back_after_a_run_that_was_stopped():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Preempted), signals.restored():
        signals.stop_on_signals()
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    signals.raise_if_stopped()


@pytest.mark.fault("F27")
def test_a_signal_that_arrives_in_a_deferred_block_is_handled_at_its_end():
    finished = []
    signals.stop_on_signals()
    with pytest.raises(Preempted, match="stopped by SIGTERM"), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        finished.append(True)
    assert finished == [True]
