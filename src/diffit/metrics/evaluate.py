"""From a network or a folder of images to cards: samples go straight from the sampler to the detectors."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffit.errors import UserError
from diffit.metrics.images import Images, choose, stream
from diffit.metrics.record import describe_network, make_card
from diffit.metrics.suite import Suite
from diffit.sampling.labels import training_labels
from diffit.sampling.model import Model
from diffit.utils.distributed import Processes
from diffit.weights.file import state_hash


def evaluate_network(
    suite: Suite,
    model: Model,
    procs: Processes,
    *,
    first_seed: int = 0,
    real_labels: Tensor | None = None,
    batch: int = 64,
    progress: bool = False,
    **facts: Any,
) -> list[dict[str, Any]]:
    """Cards of as many samples as the metrics of the ``suite`` ask for, of the seeds from ``first_seed`` on.

    ``real_labels`` are the classes of the training images; ``facts`` go into the cards. All processes call this
    together and return the same.
    """
    began = time.monotonic()
    seeds = range(first_seed, first_seed + suite.samples)
    labels, policy = training_labels(model.config, real_labels, seeds)
    samples = model.generate(seeds, labels, procs=procs, batch=batch, progress=progress)
    batches = ((torch.arange(start, start + len(images)), images) for start, images in samples)
    numbers = suite(batches, progress=progress)
    facts |= {"precision": model.precision}
    if "weights_sha256" not in facts:
        facts["weights_sha256"] = state_hash(model.net.state_dict())
    if model.autoencoder is not None:
        facts["vae_sha256"] = model.autoencoder.sha256
    source = [describe_network(model.config, seeds[: metric.samples], policy, **facts) for metric in suite.metrics]
    return _cards(suite, numbers, source, procs, began)


def evaluate_images(
    suite: Suite, images: Images, procs: Processes, *, batch: int = 64, progress: bool = False
) -> list[dict[str, Any]]:
    """The same for images that are there already. UserError if they are fewer than a metric's number says."""
    began = time.monotonic()
    for metric in suite.metrics:
        if metric.samples > len(images):
            raise UserError(
                f"{metric.name(suite.detectors[metric.spec])} is of {metric.samples} images, {images.name} holds "
                f"{len(images)}: the number in a metric's name is the number used; ask for {len(images)} or fewer"
            )
    chosen = choose(len(images), *(metric.samples for metric in suite.metrics))
    numbers = suite(stream(images, chosen, batch, procs, progress=progress), progress=progress)
    fingerprint = images.fingerprint() if procs.is_first else ""
    source: dict[str, Any] = {"images": {"name": images.name, "sha256": fingerprint, "of": len(images)}}
    return _cards(suite, numbers, [source] * len(numbers), procs, began)


def _cards(
    suite: Suite,
    numbers: list[dict[str, float]],
    sources: Sequence[dict[str, Any]],
    procs: Processes,
    began: float,
) -> list[dict[str, Any]]:
    cards: list[dict[str, Any]] = []
    if procs.is_first:
        seconds = time.monotonic() - began
        for metric, values, source in zip(suite.metrics, numbers, sources, strict=True):
            cards.append(make_card(suite, metric, values, source, procs, seconds))
    return procs.broadcast(cards)
