"""Runs with snapshots of two sizes, an archive, and the page served on a free port: made once for all tests."""

import pytest
import torch

from helpers import write_archive
from studio.folders import free_port, write_run


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    pytest.importorskip("gradio", reason="the page needs gradio: extra studio")
    from diffit.studio import Shelf

    folder = tmp_path_factory.mktemp("studio")
    write_run(folder / "runs", side=8, kimg=(3,), name="00001-b-debug-gpus1-batch8")
    write_run(folder / "runs")  # the newest: what the page shows first
    return Shelf(runs=folder / "runs", data=write_archive(folder / "a.zip", 12), device=torch.device("cpu"))


@pytest.fixture(scope="session")
def served(shelf):
    from diffit.studio.app import serve

    page, address = serve(shelf, port=free_port(), block=False)
    yield address
    page.close()
