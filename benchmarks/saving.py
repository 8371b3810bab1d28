"""How long training waits for its state: ``python -m benchmarks.saving [PRESET]``, in a folder of the disk to be used.

On the thread, and on this one as :func:`save_state` does; per GB of state, each in turns.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import machine
from diffit.configs.presets import get_preset
from diffit.models import build
from diffit.training.checkpoint import StateWriter, save_state

ROUNDS = 3


def main(preset: str = "latent-b") -> None:
    net = build(get_preset(preset).model)
    optimizer = torch.optim.Adam(net.parameters())
    for parameter in net.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)
        }  # fmt: skip
    size = 4 * sum(parameter.nbytes for parameter in net.parameters()) / 1e9
    print(f"{machine()}\n{preset}: a state of {size:.2f} GB")
    writer = StateWriter()
    writer.reserve(net, net, optimizer)  # as a run does after its first step
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for number in range(ROUNDS):
            began = time.perf_counter()
            save_state(Path(folder) / f"training-state-{number:06d}", net, net, optimizer, {})
            whole = time.perf_counter()
            writer.save(Path(folder) / f"training-state-{100 + number:06d}", net, net, optimizer, {})
            copied = time.perf_counter()
            writer.wait()
            written = time.perf_counter()
            waited, thread, alone = ((x - y) / size for x, y in ((copied, whole), (written, whole), (whole, began)))
            print(
                f"round {number} s/GB: waited {waited:.2f}, on disk after {thread:.2f}; without thread {alone:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
