"""Host memory of what takes a whole data set: ``python -m benchmarks.host``, beside the data themselves.

Images and latents as one tensor, and a metric's features on the first process: the peak of all processes together
(proportional set sizes, in which what is shared counts once), less what they took before.
"""

import io
import os
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.measure import machine
from diffit.data.encode import encode_archive
from diffit.data.open import open_data
from diffit.metrics.features import Rows
from diffit.training.resident import load_resident
from diffit.utils.distributed import Processes, processes

IMAGES, SIDE = 40_000, 96
LATENTS, LATENT = 16_384, (4, 32, 32)
FEATURES, DIM = 131_072, 2048
BYTES = {"images": IMAGES * 3 * SIDE**2, "latents": LATENTS * 4 * 4 * 4 * 32**2, "features": FEATURES * DIM * 4}


def noise(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def write_images(path: Path, count: int, picture: np.ndarray) -> Path:
    """A zip of so many PNG files of one picture, uint8 ``(H, W, C)``."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    with zipfile.ZipFile(path, "w") as file:
        for i in range(count):
            file.writestr(f"img{i:08d}.png", data.getvalue())
    return path


def write_latents(folder: Path, count: int) -> None:
    """As of a VAE, which would take its time."""

    def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(len(images), *LATENT), torch.ones(len(images), *LATENT)

    facts = {"id": "none", "sha256": "0" * 64, "scale": 1.0, "tiling": False, "latent_shape": lambda size: LATENT}
    stub: Any = SimpleNamespace(encode=encode, **facts)
    encode_archive(write_images(folder / "small.zip", count, noise(8)), folder / "latents", stub)


def together(what: str, folder: Path, count: int) -> int:
    """Bytes that ``count`` processes take more at a time than before they began."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    room = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} for rank in range(count)]
    command = [sys.executable, "-m", "benchmarks.host", what, str(folder)]
    started = [subprocess.Popen(command, env=os.environ | room | each) for each in own]
    try:
        return peak_of_all([psutil.Process(process.pid) for process in started], folder)
    finally:
        for process in started:
            process.kill()
            process.wait()


def peak_of_all(family: list[psutil.Process], folder: Path) -> int:
    def all_are(stage: str) -> bool:
        assert all(process.status() != psutil.STATUS_ZOMBIE for process in family)
        return len(list(folder.glob(f"{stage}-*"))) == len(family)

    def taken() -> int:
        return sum(int(process.memory_full_info().pss) for process in family)

    for old in folder.glob("*-*"):
        old.unlink()
    while not all_are("ready"):
        time.sleep(0.1)
    before = peak = taken()
    (folder / "go").touch()
    while not all_are("done"):
        peak = max(peak, taken())
        time.sleep(0.02)
    (folder / "go").unlink()
    return max(peak, taken()) - before


def work(what: str, folder: Path) -> None:
    """One of the processes, which ends when it has been measured."""
    with processes() as procs:
        archive = open_data(folder / ("latents" if what == "latents" else "images.zip"), None, None)
        archive[0]
        procs.barrier()
        (folder / f"ready-{procs.rank}").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        kept = features(procs) if what == "features" else load_resident(archive, procs, 0)
        (folder / f"done-{procs.rank}").touch()
        time.sleep(600)
        del kept


def features(procs: Processes) -> torch.Tensor:
    rows = Rows()
    for positions in torch.arange(procs.rank, FEATURES, procs.count).split(64):
        rows.add(positions, positions[:, None].expand(-1, DIM))
    return rows.reduce(procs, DIM)


def main() -> None:
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(dir=".") as name:
        write_images(Path(name) / "images.zip", IMAGES, noise(SIDE))
        write_latents(Path(name), LATENTS)
        for what, data in BYTES.items():
            for count in (1, 4):
                ratio = together(what, Path(name), count) / data
                print(f"{what}, processes: {count}: {ratio:.2f} times their {data / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
