"""Between two samples: their noise on the sphere, their classes in the space of embeddings."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from diffit.diffusion.samplers import Callback
from diffit.errors import UserError
from diffit.sampling.labels import Labels, choose_labels
from diffit.sampling.model import Model
from diffit.utils.randomness import PerSampleNoise


def slerp(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation (arXiv 1609.04468): ``first`` at ``share`` 0, ``second`` at 1, both to the bit.

    ``first`` and ``second`` are like one sample, ``share`` is ``(F,)``; returns ``(F, *sample)``. Normal noise keeps
    its norm on the way, which a straight line between two samples does not.
    """
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0, eps=1e-30)
    angle = cosine.clamp(-1, 1).acos()
    share = share.to(first).view(-1, *[1] * first.ndim)
    if angle.sin() < 1e-6:  # the same noise twice, or a sample that is its own opposite: no arc to go along
        return torch.lerp(first, second, share)
    return ((1 - share) * angle).sin() / angle.sin() * first + (share * angle).sin() / angle.sin() * second


class _NoiseBetween:
    """The noise of two seeds and what lies between them, in every step: ``noise_source(x) -> like x``."""

    def __init__(self, seeds: Sequence[int], share: Tensor) -> None:
        self.ends = PerSampleNoise(seeds)
        self.share = share

    def __call__(self, like: Tensor) -> Tensor:
        first, second = self.ends(like.new_empty(2, *like.shape[1:]))
        return slerp(first, second, self.share)


@contextmanager
def _classes_between(model: Model, ends: Tensor | None, share: Tensor) -> Iterator[None]:
    """The label embeddings of the network and of its guide answer the first class with what lies between the two."""
    models = [each for each in (model, model.guide) if each is not None]
    embedders = [each.net.y_embedder for each in models if each.net.y_embedder is not None]
    with ExitStack() as hooked:
        if ends is not None and ends[0] != ends[1]:
            for embedder in embedders:
                first, second = embedder.embedding_table(ends.to(model.device))
                mixed = torch.lerp(first, second, share.to(first)[:, None])
                handle = embedder.register_forward_hook(_answer(mixed, null=model.config.model.num_classes))
                hooked.callback(handle.remove)
        yield


def _answer(mixed: Tensor, null: int) -> Callable[..., Tensor | None]:
    """A hook that puts ``mixed`` in the place of every class but the ``null`` class, in the thread that makes it."""
    owner = threading.get_ident()

    def answer(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if threading.get_ident() != owner:  # another thread samples from the same network
            return None
        return torch.where((inputs[0] == null)[:, None], output, mixed.to(output.dtype))

    return answer


@torch.no_grad()
def interpolate(
    model: Model,
    seeds: tuple[int, int],
    labels: Labels = None,
    frames: int = 9,
    *,
    callback: Callback | None = None,
    **settings: Any,
) -> Tensor:
    """From the sample of one seed and class to that of another: ``(frames, C, H, W)`` as :meth:`Model.sample` has them.

    The first and the last frame are the plain samples. ``labels`` is one class for both or one for each; None is
    that which each seed draws. Noise, that of every step included, is interpolated by :func:`slerp`, the classes'
    embeddings along a line. All frames go through the network together.
    """
    if frames < 2:
        raise UserError(f"frames {frames}: between two samples there are at least 2; use 9")
    if settings:
        model = model.with_sampling(**settings)
    share = torch.linspace(0, 1, frames, dtype=torch.float64)
    ends = choose_labels(model.config, seeds, labels)
    between = _NoiseBetween(seeds, share)
    noise = between(torch.empty(frames, *model.config.model.sample_shape, dtype=torch.float64, device=model.device))
    # The null class stands for no guidance wherever it is met, so an interpolation that ends in it goes by the other.
    classes = None if ends is None else ends.min().expand(frames)
    with _classes_between(model, ends, share):
        return model.sample(range(frames), classes, noise=noise, noise_source=between, callback=callback)


def sample_grid(model: Model, seeds: Sequence[int], classes: Sequence[int | str], **settings: Any) -> Tensor:
    """A row per class, a column per seed: ``(classes, seeds, C, H, W)``. A column shares its noise."""
    labels = [label for label in classes for _ in seeds]
    images = model.sample(list(seeds) * len(classes), labels, **settings)
    return images.view(len(classes), len(seeds), *images.shape[1:])
