"""Memory that a process keeps: no page is fetched for a block that was freed before."""

import subprocess
import sys

import pytest

PAGES = """
import resource, threading, torch
from diffit.utils.memory import free_memory, keep_freed_memory
torch.set_num_threads(1)
kept = {keep} and keep_freed_memory()
def fetched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3): fetched()
print(int(kept), fetched())
thread = threading.Thread(target=fetched)  # large blocks are had in other threads too
thread.start()
thread.join()
free_memory()
print(int(kept), fetched())
"""


def pages(keep):
    found = subprocess.run([sys.executable, "-c", PAGES.format(keep=keep)], capture_output=True, text=True, check=True)
    (kept, again), (_, after) = (map(int, line.split()) for line in found.stdout.splitlines())
    return kept, again, after


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_blocks_that_are_needed_again_are_not_fetched_again():
    kept, fetched, given_back = pages(keep=True)
    if not kept:
        pytest.skip("another C library")
    _, before, _ = pages(keep=False)
    if before < 1000:
        pytest.skip("pages of other sizes than 4 KiB")
    assert fetched < before / 20
    assert before / 5 < given_back < before  # a block of four
