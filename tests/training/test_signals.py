"""Requests to stop, sent by this process to itself."""

import os
import signal
import time

import pytest

from diffit.training import signals as module
from diffit.training.signals import StopSignals


@pytest.fixture
def signals(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with StopSignals() as found:
        yield found


def interrupted_by(number, done):
    def work():
        done.append("begun")
        os.kill(os.getpid(), number)
        done.append("ended")

    return work


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_whoever_is_in_haste_cuts_a_grid_short_and_the_next_is_not_begun(signals, name, capfd):
    number, done = getattr(signal, name), []
    signals.unless_in_haste(interrupted_by(number, done))
    signals.unless_in_haste(lambda: done.append("another"))
    assert done == ["begun"]
    assert (signals.number, signals.requested, signals.in_haste) == (number, True, True)
    assert "stopping after this step" in capfd.readouterr().err


def test_ctrl_c_lets_a_grid_be_finished_and_the_second_leaves_at_once(signals):
    done = []
    signals.unless_in_haste(interrupted_by(signal.SIGINT, done))
    assert done == ["begun", "ended"]
    assert signals.requested
    assert not signals.in_haste
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_a_grid_only_for_a_while(signals, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    done = []

    def endless():
        interrupted_by(signal.SIGINT, done)()
        while True:
            time.sleep(0.001)

    signals.unless_in_haste(endless)
    assert done == ["begun", "ended"]
    assert signals.in_haste
    signals.unless_in_haste(lambda: done.append("another"))
    assert done == ["begun", "ended"]


def test_under_a_launcher_the_second_ctrl_c_is_the_same_one_and_there_is_haste(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with StopSignals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.in_haste


def test_a_process_whose_launcher_is_gone_is_asked_to_stop(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "getppid", lambda: 4321)  # the tests' own may be 1, in the background or in a container
    with StopSignals() as signals:
        assert not signals.requested
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert signals.requested
        assert signals.number == signal.SIGTERM


def test_handlers_are_put_back(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopSignals():
        assert signal.getsignal(signal.SIGUSR1) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup leaves SIGHUP: the run goes on when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
