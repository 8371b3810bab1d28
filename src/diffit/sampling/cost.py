"""What a sample takes: forward passes, and memory."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffit.configs.schema import Config
from diffit.models import build
from diffit.models.cost import example_inputs
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


class _Live(TorchDispatchMode):
    """The bytes of the tensors that are alive, and the most that they have been at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


def sampling_bytes(config: Config, images: int, vae: Any = None) -> int:
    """What sampling so many ``images`` together takes besides the weights, in float32; counted without memory.

    That is the most that a forward pass holds at a time, the solver's states in float64, and what the decoder of a
    latent model, the ``AutoencoderKL`` ``vae``, holds for the images that it decodes together: about four maps of its
    second width at full size.
    """
    with torch.device("meta"), torch.no_grad():
        net = build(config.model).eval()
        inputs = example_inputs(config.model, 1)
        with _Live() as live:
            net(*inputs)
    state = 8 * math.prod(config.model.sample_shape)
    decoder = 0
    if vae is not None:
        widths = vae.config.block_out_channels
        decoder = 4 * 4 * widths[min(1, len(widths) - 1)] * math.prod(config.image_shape[1:]) * min(images, 16)
    return int(max(images * (live.peak + 6 * state), images * 6 * state + decoder))
