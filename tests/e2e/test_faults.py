"""Short forms of the rows of `make faults` that hurt training runs from outside; see docs/reliability.md."""

import os
import signal

import pytest
from benchmarks import faults_training as faults

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="sends signals")]


def test_killed_at_a_random_moment_a_run_ends_in_the_same_bytes():
    row = faults.kills(1, seed=0)
    assert not row.failures, row


def test_when_one_of_two_processes_dies_the_other_saves_and_says_so():
    row = faults.lost_rank(signal.SIGKILL, timeout_minutes=1)
    assert not row.failures, row


def test_a_launcher_that_is_told_to_end_leaves_one_state_and_no_process():
    (row,) = faults.signals(2, [signal.SIGTERM], streamed=True, phases=["step"])
    assert not row.failures, row


def test_of_two_samplings_into_one_folder_the_second_is_told():
    row = faults.pairs(1)
    assert not row.failures, row
