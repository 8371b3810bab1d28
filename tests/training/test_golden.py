"""Loss curves of 20 steps as they were when they were written down: a change that is not numerical leaves them.

They move with the noise, the order of the images, dropped labels, augmentation, schedule, optimiser and average. Where
one of those is meant to change, run this file as a program and paste what it prints.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffit.configs.resolve import DataFacts, resolve
from diffit.training.batches import feed, microbatches
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import Processes, alone

CPU = torch.device("cpu")
COUNT, CLASSES, STEPS = 48, 3, 20


def images() -> Tensor:
    """Uint8 ``(48, 3, 16, 16)``: waves whose direction is the class, by whole numbers alone."""
    n, c, y, x = torch.meshgrid(*map(torch.arange, (COUNT, 3, 16, 16)), indexing="ij")
    return ((n * 37 + c * 71 + 16 * ((n % CLASSES + 1) * x + y) + x * y) % 256).to(torch.uint8)


def moments() -> Tensor:
    """Float32 ``(48, 4, 4, 4, 4)``: means and deviations of latents, then those of their mirror images."""
    n, k, c, y, x = torch.meshgrid(*map(torch.arange, (COUNT, 2, 4, 4, 4)), indexing="ij")
    values = ((n * 5 + c * 3 + (n % CLASSES + 1) * x + 2 * y) % 16 - 7.5) / 2
    values = torch.where(k == 1, 0.1 + c / 8, values).float()
    return torch.cat([values, values.flip(-1)], dim=1)


def flat(net: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def run(preset: str) -> tuple[list[float], list[float]]:
    """The losses, and how far the weights and their average have come from where they began.

    Without dropout, whose stream on the CPU is not the same in every build of torch.
    """
    latent = preset == "latent-debug"
    facts = DataFacts(3, (32, 32) if latent else (16, 16), CLASSES)
    options = {"cond": True, "batch_gpu": 4, "label_drop": 0.2, "seed": 7}
    config = resolve(preset, options | OWN[preset], facts)
    net = build_network(config)
    begun = flat(net)
    stepper = Stepper(config, Processes(0, 1, CPU), net, "fp32")
    order = microbatches(COUNT, config.training.seed, 0, config.training.batch, stepper.batch_gpu, 0, 1)
    labels, data = torch.arange(COUNT) % CLASSES, moments() if latent else images()
    batches = feed(SimpleNamespace(labels=labels), order, CPU, resident=data, workers=0)
    losses = []
    for _ in range(STEPS):
        stepper.step(batches)
        losses.append(stepper.meter.read(alone("cpu"))["loss"])
    return losses, [(flat(end) - begun).norm().item() for end in (stepper.net, stepper.ema)]


OWN = {
    "debug": {"dropout": 0.0},
    "latent-debug": {"mirror": True},
    # Muon, branches that begin at 0, weighted noise levels, a rate that falls: what a run has by default.
    "small16": {"batch": 8, "kimg": 0.16, "lr_rampup_kimg": 0.04},
}
GOLDEN = {
    "debug": (
        [
            1.0533427, 1.0021046, 1.0395896, 1.1000227, 1.0903837,
            1.0501618, 1.0593368, 1.0453034, 1.0366936, 1.0950912,
            0.9782551, 1.0149236, 1.0842235, 1.0652750, 1.0013692,
            0.9706378, 1.0322092, 0.9853090, 1.0283845, 0.9851360,
        ],
        [1.757040, 1.685844],
    ),
    "latent-debug": (
        [
            1.0137595, 0.9859940, 0.9749604, 0.8545130, 1.0705613,
            0.9135783, 0.9268521, 0.9708215, 0.9546996, 1.0016693,
            0.8464993, 1.0550232, 1.0111517, 0.9256214, 0.8932794,
            0.9552822, 1.0070172, 1.0245181, 0.9927115, 0.9884744,
        ],
        [1.293087, 0.001447852],
    ),
    "small16": (
        [
            1.1841860, 1.1257529, 1.0034906, 0.9300927, 1.1203039,
            0.8775830, 0.9428148, 1.0155859, 0.8380229, 0.9267445,
            0.9797150, 1.0104595, 0.8384587, 0.8757226, 0.8912444,
            0.9470006, 0.8399810, 0.8768364, 0.8247998, 0.9792269,
        ],
        [5.111790, 5.049912],
    ),
}  # fmt: skip


@pytest.mark.parametrize("preset", GOLDEN)
def test_twenty_steps_have_the_losses_written_down(preset):
    losses, distances = run(preset)
    # Other kernels and numbers of threads are 1e-7 off; a β₂ of 0.998 or an ε of 1e-7 in Adam 1e-5 and 1e-3.
    assert_close(losses, GOLDEN[preset][0], rtol=1e-5, atol=0)
    assert_close(distances, GOLDEN[preset][1], rtol=1e-4, atol=0)


def test_dropout_has_a_stream_of_its_own_at_each_step(monkeypatch):
    config = resolve("debug", {"seed": 7}, DataFacts(3, (16, 16), 0))
    stepper = Stepper(config, Processes(0, 1, CPU), build_network(config), "fp32")
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for seen, m in ((0, 0), (0, 1), (8, 0)):
        stepper.images_seen = seen
        stepper.microbatch_loss(images()[:2], None, m)
    assert seeds == [3409856105490309091, 5123220783580685859, 268756555015336127]


if __name__ == "__main__":
    for name in GOLDEN:
        print(name, run(name))
