"""Property tests draw the same examples everywhere, a busy machine does not fail them, and no cache outlives a test."""

import os
import signal

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before any client reads it: no test may depend on the network
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers that each use all cores stand in line
    os.environ["OMP_NUM_THREADS"] = "1"

for number in (signal.SIGINT, signal.SIGHUP) if hasattr(signal, "SIGHUP") else ():
    if signal.getsignal(number) == signal.SIG_IGN:  # the tests themselves may run under nohup, or in the background
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

settings.register_profile("diffit", deadline=None, derandomize=True)
settings.load_profile("diffit")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.delenv("DIFFIT_INCEPTION", raising=False)
