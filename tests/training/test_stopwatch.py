"""The time that a run takes is that in which it runs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from diffit.training import stopwatch
from diffit.training.stopwatch import Stopwatch

PROGRAM = """
import time
from diffit.training import stopwatch
stopwatch.STOPPED = 1.5
began = time.monotonic()
with stopwatch.Stopwatch() as watch:
    print("on", flush=True)
    while time.monotonic() - began < 5:
        time.sleep(0.05)
    print(watch.seconds(), time.monotonic() - began, flush=True)
"""


def test_time_without_a_look_at_the_clock_is_not_counted(monkeypatch):
    times = iter([100.0, 105.0, 114.0, 3714.0, 3714.0, 3715.0])
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: next(times))
    watch = Stopwatch(before=10.0)  # of the parts of the run before
    assert [watch.seconds() for _ in range(5)] == [15.0, 24.0, 24.0, 24.0, 25.0]  # left out once


@pytest.mark.slow
def test_a_process_that_is_stopped_and_goes_on_has_lost_no_time():
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(process.pid, signal.SIGCONT)
        ran, passed = map(float, process.stdout.readline().split())
    assert passed >= 5
    assert passed - ran == pytest.approx(3, abs=1.2)  # a look at the clock is due every second
