"""How much arithmetic a network and a sampling run are, counted on tensors without memory: on any machine, at once."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffit.configs.schema import Config
from diffit.models import build
from diffit.sampling import run_sampler
from diffit.training.estimate import example_inputs

TIME = ("t_embedder", "augment_embedder", "qkv_temb")


@dataclass(frozen=True)
class Work:
    """A network's size, and the multiply-accumulates of one forward pass of one image; twice as many are FLOPs."""

    parameters: int
    """Trainable ones."""
    linear: int
    """Of linear layers and convolutions over tokens or pixels."""
    attention: int
    """Of Q·Kᵀ and of weights times V."""
    time: int
    """Of the time token and its projections in every block, which do not grow with the image."""

    @property
    def macs(self) -> int:
        return self.linear + self.attention + self.time


def count_work(config: Config) -> Work:
    """What the network of ``config`` is; norms, activations and sums are left out, as is the custom."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = build(config.model)
        net(*example_inputs(config, 1))
    counts = counter.get_flop_counts()
    attention = sum(flops for op, flops in counts["Global"].items() if "bmm" in str(op) or "attention" in str(op))
    time = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(TIME))  # by path of the module
    parameters = sum(parameter.numel() for parameter in net.parameters())
    linear = counter.get_total_flops() - attention - time
    return Work(parameters, linear // 2, attention // 2, time // 2)


def count_evaluations(config: Config) -> tuple[int, int]:
    """(with, without the class): forward passes an image by the default sampling of ``config``.

    The sampler runs on a network that only counts, so that halves that guidance skips are left out as they will be.
    """
    model = config.model
    calls: list[bool] = []

    def net(x: Tensor, level: Tensor, labels: Tensor | None = None, *rest: object) -> Tensor:
        calls.append(labels is None or int(labels[0]) < model.num_classes)
        return torch.zeros(1, 2 if model.family == "latent" else 1, 1, 1, dtype=x.dtype)

    labels = torch.zeros(1, dtype=torch.int64) if model.num_classes else None
    noise = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    run_sampler(net, config, labels, noise, config.sampling, torch.zeros_like)
    return sum(calls), len(calls) - sum(calls)


def steps_of(config: Config) -> int:
    """Steps of the default sampling."""
    return int(str(config.sampling.steps).removeprefix("ddim"))
