"""What a step takes on 1 to 64 GPUs: ``python -m benchmarks.scale [RESULTS.json] [--plot FILE]``.

A model, not a measurement: the time of a step on one GPU is that of ``make gpu``, read from its results; reading and
saving are measured here, on one core; what goes between GPUs follows from the assumptions below.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.host import write_images, write_latents
from benchmarks.measure import machine
from diffit.configs.resolve import resolve
from diffit.data.archive import ImageArchive
from diffit.data.latents import LatentArchive
from diffit.models.cost import estimate
from diffit.training.checkpoint import StateWriter

GPUS = (1, 2, 4, 8, 16, 32, 64)
A_NODE = 8  # GPUs
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends together
BACKWARD = 2 / 3  # of a step's time: two products for each of the forward pass
USABLE = 0.8  # of a nominal bandwidth
STATE_MINUTES = 10.0  # between states, as by default
CASES = (("cifar10", 512), ("ffhq64", 64), ("imagenet256", 32), ("imagenet512", 8))


@dataclass(frozen=True)
class Network:
    """Nominal bytes a second that a GPU sends within a node, and all of a node to another; seconds for a message.

    Rings go through all GPUs of a node and leave it by all of its cards, so that these are one way out.
    """

    name: str
    within: float
    between: float
    latency: float = 2e-5

    def all_reduce(self, gradients: int, sent: float, gpus: int) -> float:
        """Seconds for ``gradients`` bytes, each sending so many: the bandwidth of a ring, the latency of a tree."""
        bandwidth = self.within if gpus <= A_NODE else min(self.within, self.between)
        hops = 2 * math.log2(gpus) if gpus > 1 else 0
        return sent / (USABLE * bandwidth) + math.ceil(gradients / BUCKET) * hops * self.latency


NETWORKS = (
    Network("NVLink in a node, 400 Gb/s for each GPU between", 450e9, 8 * 50e9),
    Network("NVLink in a node, 100 Gb/s for the node between", 450e9, 12.5e9),
    Network("PCIe in a node, 100 Gb/s for the node between", 25e9, 12.5e9),
)


def step_seconds(alone: float, gradients: int, sent: float, network: Network, gpus: int) -> float:
    """Buckets go out while the backward pass makes the next; the last has nothing to hide behind."""
    if gpus == 1:
        return alone
    took, buckets = network.all_reduce(gradients, sent, gpus), math.ceil(gradients / BUCKET)
    hidden = BACKWARD * alone * (1 - 1 / buckets)
    return alone + max(took - hidden, took / buckets)


def images_a_core(side: int, count: int = 200) -> float:
    """Images of a zip of PNG files that one core reads in a second: a picture with some noise."""
    y, x = np.mgrid[:side, :side] / side
    noise = np.random.default_rng(0).normal(0, 4, (side, side, 3))
    picture = 127 + 90 * np.sin(7 * np.stack([x + y, x - y, x * y], axis=-1)) + noise
    with tempfile.TemporaryDirectory() as folder:
        path = write_images(Path(folder) / "images.zip", count, picture.clip(0, 255).astype(np.uint8))
        archive = ImageArchive(path)
        began = time.process_time()
        archive.load(range(count), workers=1)
        return count / (time.process_time() - began)


def latents_a_core() -> float:
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder), 1024)
        archive = LatentArchive(Path(folder) / "latents")
        began = time.process_time()
        for i in np.random.default_rng(0).permutation(1024).tolist():
            archive[i]
        return 1024 / (time.process_time() - began)


def pause_a_byte() -> float:
    """Seconds that training waits for a state, from the second on."""
    net = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(16)))
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    net(torch.zeros(1, 1024)).sum().backward()
    optimizer.step()
    size = 4 * sum(parameter.nbytes for parameter in net.parameters())
    writer, waited = StateWriter(), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(4):
            began = time.process_time()
            writer.save(Path(folder) / f"training-state-{number:06d}", net, net, optimizer, {})
            waited.append(time.process_time() - began)
            writer.wait()
    return min(waited) / size


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    read = {side: images_a_core(side) for side in (32, 64)} | {"latents": latents_a_core()}
    pause, found = pause_a_byte(), []
    for preset, batch in CASES:
        measured = results.get(f"step, {preset}, {batch} images, bf16")
        if measured is None:
            continue
        alone = batch / measured["images per second"]
        for gpus in GPUS:
            config = resolve(preset, {"batch": batch * gpus, "batch_gpu": batch, "precision": "bf16"})
            cost = estimate(config, batch, "bf16", "cuda", gpus)
            rate = read["latents" if config.autoencoder else config.model.sample_shape[-1]]
            for network in NETWORKS:
                seconds = step_seconds(alone, 4 * cost.parameters, cost.sent_bytes, network, gpus)
                found.append({
                    "preset": preset, "images a GPU": batch, "GPUs": gpus, "network": network.name, "seconds": seconds,
                    "efficiency": alone / seconds, "images per second": batch * gpus / seconds,
                    "cores for reading": batch / seconds / rate,
                    "waiting for states": 16 * cost.parameters * pause / (60 * STATE_MINUTES),
                })  # fmt: skip
    return found


def plot(found: list[dict[str, Any]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    presets = list(dict.fromkeys(row["preset"] for row in found))
    figure, panels = plt.subplots(1, len(presets), figsize=(3.4 * len(presets), 3.2), sharey=True, squeeze=False)
    for panel, preset in zip(panels[0], presets, strict=True):
        for network in NETWORKS:
            line = [row for row in found if (row["preset"], row["network"]) == (preset, network.name)]
            panel.plot([r["GPUs"] for r in line], [r["efficiency"] for r in line], marker="o", ms=3, label=network.name)
        panel.set(
            title=f"{preset}, {line[0]['images a GPU']} images a GPU", xscale="log", xlabel="GPUs", ylim=(0, 1.05)
        )
        panel.set_xticks(GPUS, map(str, GPUS))
        panel.minorticks_off()
    panels[0][0].set_ylabel("of one GPU's speed")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=1, frameon=False)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    newest = sorted(Path(__file__).with_name("results").glob("*nvidia*.json"))
    parser.add_argument("results", nargs="?", type=Path, default=newest[-1] if newest else None)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.results is None:
        parser.error("no results of a GPU: run `make gpu` on one, or name a file")
    results = json.loads(arguments.results.read_text())
    torch.set_num_threads(1)
    print(f"a GPU's step: {results['machine']}\nreading and saving: {machine()}")
    found = rows(results)
    for network in NETWORKS:
        print(f"\n{network.name}\n{'preset':12} " + " ".join(f"{gpus:>8}" for gpus in GPUS) + "   GPUs")
        for preset, _ in CASES:
            line = [row for row in found if (row["preset"], row["network"]) == (preset, network.name)]
            print(f"{preset:12} " + " ".join(f"{row['efficiency']:8.2f}" for row in line) + "   of one GPU's speed")
            print(f"{'':12} " + " ".join(f"{row['images per second']:8.0f}" for row in line) + "   images per second")
    print()
    for row in found:
        if row["GPUs"] == 1 and row["network"] == NETWORKS[0].name:
            print(
                f"{row['preset']}: {row['cores for reading']:.2f} cores a GPU read as fast; "
                f"states every {STATE_MINUTES:g} minutes take {row['waiting for states']:.2%} of the time"
            )
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
