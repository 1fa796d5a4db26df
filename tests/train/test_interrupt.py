"""Signals that ask a run to stop are noted, and whoever sent them is told."""

import os
import pty
import signal
import sys

import pytest

from householder.train.interrupt import stop_on_signals


@pytest.fixture
def interruptible():
    """Take interrupts: Python does not where it was begun in the background by a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_noted_and_the_second_acts(interruptible):
    with stop_on_signals() as stop:
        assert (stop.signum, stop.name) == (None, "no signal")
        signal.raise_signal(signal.SIGINT)
        assert (stop.signum, stop.name) == (signal.SIGINT, "SIGINT")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_on_a_terminal_the_first_signal_is_answered(monkeypatch):
    """A step may take long, and silence invites a second signal, which loses what was trained."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with stop_on_signals():
            signal.raise_signal(signal.SIGTERM)
        told = os.read(ours, 100).decode()
    os.close(ours)
    assert told.strip() == "stopping after this step; once more: at once"


def test_in_a_log_file_nothing_is_added(capfd):
    with stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == ""
