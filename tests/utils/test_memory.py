"""Memory that a process keeps: no page is fetched for a block that was freed before."""

import subprocess
import sys

import pytest

PAGES = """
import resource, threading, torch
from diffit.utils.memory import keep_freed_memory
torch.set_num_threads(1)
kept = {keep} and keep_freed_memory()
def fetched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3): fetched()
print(int(kept), fetched())
thread = threading.Thread(target=fetched)
thread.start()
thread.join()
"""


def pages(keep):
    found = subprocess.run([sys.executable, "-c", PAGES.format(keep=keep)], capture_output=True, text=True, check=True)
    return map(int, found.stdout.split())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_blocks_that_are_needed_again_are_not_fetched_again():
    kept, fetched = pages(keep=True)
    if not kept:
        pytest.skip("another C library")
    _, before = pages(keep=False)
    assert before > 1000  # 64 MiB four times, by pages of 4 KiB or larger ones
    assert fetched < before / 20
