"""How many forward passes a sample takes."""

import torch
from torch import Tensor

from diffit.configs.schema import Config
from diffit.sampling.model import Model


def count_evaluations(config: Config) -> tuple[int, int]:
    """(with, without the class): forward passes per image by the sampling of ``config``.

    The sampler runs on a network that only counts, so that halves that guidance skips are left out as they will be.
    """
    model, calls = config.model, list[bool]()

    def net(x: Tensor, level: Tensor, labels: Tensor | None = None, *rest: object) -> Tensor:
        calls.append(labels is None or int(labels[0]) < model.num_classes)
        return torch.zeros(1, 2 if model.family == "latent" else 1, 1, 1, dtype=x.dtype)

    counting = Model(net, config)  # type: ignore[arg-type]
    counting.sample([0], noise=torch.zeros(1, 1, 1, 1), noise_source=torch.zeros_like)
    return sum(calls), len(calls) - sum(calls)
