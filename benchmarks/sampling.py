"""Peak memory of sampling few and many images to disk: ``python -m benchmarks.sampling``."""

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import DEVICE, peak_mib, peak_of
from diffit.configs.presets import debug
from diffit.sampling.generate import generate_to_disk
from diffit.training.step import build_network
from diffit.utils.distributed import Processes

FEW, MANY = 64, 2048


def sample(count: int, format_: str) -> None:
    config = debug()
    net = build_network(config).to(DEVICE).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        one = Processes(0, 1, DEVICE)
        generate_to_disk(net, config, range(count), Path(folder), one, batch=FEW, npz=format_ == "npz")


def main() -> None:
    for format_ in ("png", "npz"):
        few, many = (peak_of("benchmarks.sampling", count, format_) for count in (FEW, MANY))
        print(
            f"sampling to {format_}, batch {FEW}: {MANY} images take {many / few:.3f} of the memory of {FEW} "
            f"({many:.0f} MiB : {few:.0f} MiB)",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sample(int(sys.argv[1]), sys.argv[2])
        print(peak_mib())
    else:
        main()
