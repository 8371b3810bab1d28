"""Run folders as training leaves them, without training."""

import json
import socket
from pathlib import Path

import torch

from diffit.configs.presets import get_preset
from diffit.configs.schema import Config, Data
from diffit.models import build
from diffit.weights import save_network

NAMES = ("ant", "bee", "<b>cat</b>")


def config_of(side: int, **sampling) -> Config:
    config = get_preset("debug")
    model = config.model.model_copy(update={"num_classes": 3, "image_size": (side, side)})
    return config.model_copy(
        update={
            "model": model,
            "data": Data(cond=True, class_names=NAMES),
            "sampling": config.sampling.model_copy(update={"steps": 4} | sampling),
        }
    )


def write_run(
    folder: Path, *, side: int = 16, kimg: tuple[int, ...] = (1, 2), name: str = "00000-a-debug-gpus1-batch8"
):
    """A run folder with snapshots whose weights differ, statistics, a log and grids."""
    run = folder / name
    run.mkdir(parents=True)
    config = config_of(side)
    (run / "training_options.json").write_text(config.model_dump_json())
    for number in kimg:
        torch.manual_seed(number)
        net = build(config.model).eval()
        torch.nn.init.normal_(net.head.weight, std=0.1)
        save_network(run / f"network-snapshot-{number:06d}.safetensors", net.state_dict(), config, kimg=number)
    write_stats(run, 1000)
    (run / "log.txt").write_text("begun\n")
    return run


def write_stats(run: Path, images: int, loss: float = 0.5) -> None:
    line = {
        "images": images, "kimg": images / 1000, "loss": loss, "loss_sigma_0_0.11": loss / 2,
        "loss_sigma_0.11_inf": loss * 2, "img_per_sec": 100.0, "sec": 10.0, "skipped_steps": 0,
    }  # fmt: skip
    with (run / "stats.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
