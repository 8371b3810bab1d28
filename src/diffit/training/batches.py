"""The order of the images, and the microbatches of each process, as functions of (seed, images seen)."""

import copy
import os
import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffit.data.open import Archive
from diffit.errors import UserError
from diffit.training.signals import STOPPING
from diffit.utils.randomness import ORDER, derive_seed


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, ORDER, epoch)).permutation(count)


def image_indices(count: int, seed: int, start: int, length: int) -> Tensor:
    """Indices of the ``start``-th to ``start + length − 1``-th image of an endless shuffled pass, int64.

    Every epoch is a permutation of its own, so that each image is seen once an epoch whatever the batch.
    """
    position = np.arange(start, start + length)
    epochs, offsets = np.divmod(position, count)
    parts = [epoch_order(count, seed, int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
    return torch.from_numpy(np.concatenate(parts))


def microbatches(
    count: int, seed: int, images_seen: int, batch: int, batch_gpu: int, rank: int, processes: int
) -> Iterator[Tensor]:
    """Endless index tensors of one process: microbatch m of a step goes to process m mod ``processes``."""
    while True:
        indices = image_indices(count, seed, images_seen, batch)
        for m in range(rank, batch // batch_gpu, processes):
            yield indices[m * batch_gpu : (m + 1) * batch_gpu]
        images_seen += batch


def _leave_signals_to_the_run(worker: int) -> None:
    """Signals to the run's process group would reach the workers too, whose images it needs to end its step."""
    os.setsid()
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torch ends a worker that hangs


class _Fetch(torch.utils.data.Dataset[Tensor | UserError]):
    """Loads a whole microbatch in one call, so that a worker sends one tensor.

    A :class:`UserError` is sent too: raised in a worker it would come out with that worker's traceback for a message.
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = copy.copy(archive)
        self.archive.labels = None  # which would go to every worker

    def __getitem__(self, indices: list[int]) -> Tensor | UserError:
        try:
            return torch.stack([self.archive[i] for i in indices])
        except UserError as error:
            return UserError(str(error))


def feed(
    archive: Archive,
    order: Iterator[Tensor],
    device: torch.device,
    *,
    resident: Tensor | None,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """``(data, labels (b,) int64 or None)`` on ``device``, for every index tensor of ``order``.

    ``data`` is uint8 images (b, C, H, W) or cached moments (b, 4, C, h, w). ``resident`` holds all of it, on any
    device; without it worker processes read ahead.
    """
    if resident is not None:
        for indices in order:
            images = resident[indices.to(resident.device, non_blocking=True)]
            labels = None if archive.labels is None else archive.labels[indices]
            yield _to(images, device), None if labels is None else _to(labels, device)
        return

    # The loader runs ahead of the step, so the indices are remembered until their images come back, in order.
    sent: list[Tensor] = []

    def remember() -> Iterator[list[int]]:
        for indices in order:
            sent.append(indices)
            # Not the tensor, which a thread of this process would hand over by a socket: it prints a traceback when the
            # worker at the other end dies.
            yield indices.tolist()

    loader = DataLoader(
        _Fetch(archive),
        batch_size=None,
        sampler=remember(),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context="spawn" if workers and device.type == "cuda" else None,
        worker_init_fn=_leave_signals_to_the_run,
    )
    for images in _loaded(loader):
        if isinstance(images, UserError):
            raise images
        indices = sent.pop(0)
        labels = None if archive.labels is None else archive.labels[indices]
        yield _to(images, device), None if labels is None else _to(labels, device)


def _loaded(loader: Any) -> Iterator[Any]:
    """What ``loader`` loads. UserError where one of its workers is gone."""
    # torch's handler would raise wherever the step is when a worker dies, between the weights and their average too.
    before = signal.getsignal(signal.SIGCHLD)
    found = iter(loader)
    signal.signal(signal.SIGCHLD, before)
    try:
        yield from found
    except (RuntimeError, ConnectionError, EOFError) as error:
        # Torch's own word for it, or the end of the pipe that a batch was to come through. What was raised in a worker
        # comes as "Caught … in DataLoader worker".
        if str(error).startswith("Caught") or (isinstance(error, RuntimeError) and "worker" not in str(error)):
            raise
        raise UserError(
            "a process that reads images has died, perhaps for want of memory (fewer --workers take less)"
        ) from None


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
