"""Watch a sampler at work, and stop it between two steps."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from diffit.diffusion.samplers import Callback


@dataclass(frozen=True)
class Progress:
    """One step; the last one has the ``result``.

    Attributes:
        step: counted from 0, one for each call of the sampler's ``callback``.
        level: sigma, or the timestep on a discrete schedule.
        denoised: what the state is taken to show, ``(B, C, h, w)``; of a latent model latents.
    """

    step: int
    level: float
    denoised: Tensor | None
    result: Tensor | None = None


class _StoppedError(Exception):
    """Raised in the sampler once nobody watches it any more."""


def live(work: Callable[[Callback], Tensor]) -> Iterator[Progress]:
    """``work(callback)`` in a thread: yields what each step passes to ``callback``, at last the result.

    ::

        for progress in live(lambda callback: model.sample([0], callback=callback)):
            show(progress.denoised)

    The sampler waits while a step is looked at. Once the iterator is closed or dropped, the sampler stops at its next
    step; closing does not wait for that. What ``work`` raises is raised here.
    """
    steps: queue.SimpleQueue[Progress | BaseException] = queue.SimpleQueue()
    stopped, seen = threading.Event(), threading.Semaphore(0)
    count = 0

    def callback(i: int, level: Tensor, x: Tensor, denoised: Tensor) -> None:
        nonlocal count
        steps.put(Progress(count, float(level.flatten()[0]), denoised.detach()))
        count += 1
        seen.acquire()
        if stopped.is_set():
            raise _StoppedError

    def run() -> None:
        try:
            result = work(callback)
            steps.put(Progress(count, 0.0, None, result))
        except _StoppedError:
            pass
        except BaseException as error:
            steps.put(error)

    threading.Thread(target=run, name="diffit-live", daemon=True).start()
    try:
        while True:
            progress = steps.get()
            if isinstance(progress, BaseException):
                raise progress
            yield progress
            if progress.result is not None:
                return
            seen.release()
    finally:
        stopped.set()
        seen.release()
