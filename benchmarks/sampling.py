"""Peak memory of sampling few and many images to disk: ``python -m benchmarks.sampling``."""

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import DEVICE, peak_mib, peak_of
from diffit.configs.presets import debug
from diffit.sampling import Model, NpzFile, PngFolder
from diffit.training.step import build_network

FEW, MANY = 64, 2048


def sample(count: int, format_: str) -> None:
    config = debug()
    net = build_network(config).to(DEVICE).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        Model(net, config).save((NpzFile if format_ == "npz" else PngFolder)(Path(folder)), range(count), batch=FEW)


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
