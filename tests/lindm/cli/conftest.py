"""Commands that are called in the process of the tests."""

import pytest


@pytest.fixture
def no_signal_handlers(monkeypatch):
    monkeypatch.setattr("lindm.io.signals.stop_on_signals", lambda: None)
