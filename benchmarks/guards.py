"""What watching over a run costs: ``python -m benchmarks.guards``.

Steps with all guards on and with those that can be switched off; the work of the guards alone, as a share of a step;
and loading a network with its SHA-256 checked and without.
"""

import tempfile
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import DEVICE, in_turns, machine
from diffit.configs.presets import get_preset
from diffit.configs.schema import Config
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import Processes
from diffit.weights import load_network
from diffit.weights.file import save_network

STEPS = 20
BATCHES = {"small32": 16, "cifar10": 16}
GUARDS: dict[str, dict[str, Any]] = {
    "on": {"on_spike": "skip", "grad_clip": 1e6},
    "off": {"on_spike": "ignore", "grad_clip": None},
}


def prepare(preset: str, batch: int, **changes: object) -> tuple[Stepper, Iterator[tuple[Tensor, None]]]:
    config = get_preset(preset)
    training = config.training.model_copy(update={"batch": batch, "seed": 0} | changes)
    config = config.model_copy(update={"training": training})
    torch.manual_seed(0)
    stepper = Stepper(config, Processes(0, 1, DEVICE), build_network(config), "fp32")
    images = torch.randint(256, (batch, *config.image_shape), dtype=torch.uint8, device=DEVICE)
    return stepper, repeat((images, None))


def compare(preset: str, batch: int) -> None:
    steppers = {name: prepare(preset, batch, **changes) for name, changes in GUARDS.items()}
    for stepper, feed in steppers.values():
        for _ in range(STEPS):
            stepper.step(feed)
    held = [[*stepper.net.parameters(), *stepper.ema.parameters()] for stepper, _ in steppers.values()]
    same = all(torch.equal(a, b) for a, b in zip(*held, strict=True))

    (stepper, feed), (other, other_feed) = steppers.values()
    gradients = [torch.randn_like(parameter) for parameter in stepper.net.parameters()]

    def guard() -> None:
        norm = torch.nn.utils.get_total_norm(gradients)
        skip = stepper.guard.skips(norm)
        gradients[0].mul_(torch.where(skip, torch.nan, 1.0))
        torch.nn.utils.clip_grads_with_norm_(gradients, 1e6, norm)

    on, off, alone = in_turns(lambda: stepper.step(feed), lambda: other.step(other_feed), guard, rounds=15)
    print(
        f"{preset}, batch {batch}: weights after {STEPS} steps {'equal' if same else 'DIFFERENT'} with and without; "
        f"a step {on * 1e3:.1f} : {off * 1e3:.1f} ms ({on / off:.3f}); norm, decision and clipping alone "
        f"{alone / on:.2%} of it",
        flush=True,
    )


def load(preset: str, folder: Path) -> None:
    config: Config = get_preset(preset)
    path = folder / f"{preset}.safetensors"
    save_network(path, build_network(config).state_dict(), config)
    checked, plain = in_turns(lambda: load_network(path), lambda: load_network(path, verify=False), rounds=5)
    size = path.stat().st_size / 1e9
    cost = (checked - plain) / size
    print(f"{preset}: {size:.2f} GB loaded in {checked:.2f} s checked, {plain:.2f} s not: {cost:.2f} s/GB")


def main() -> None:
    print(machine(), flush=True)
    for preset, batch in BATCHES.items():
        compare(preset, batch)
    with tempfile.TemporaryDirectory() as folder:
        load("latent-b", Path(folder))


if __name__ == "__main__":
    main()
