"""A model at work, as the page shows it: a picture now and then, at last the result."""

import math
import time
from collections.abc import Callable, Iterator

from torch import Tensor

from diffit.diffusion.samplers import Callback
from diffit.explore.live import live
from diffit.sampling.model import Model

EVERY, DECODED_EVERY = 0.15, 1.0  # seconds between two pictures; the second where a decoder makes each of them


def watched(model: Model, work: Callable[[Callback], Tensor], steps: int) -> Iterator[tuple[Tensor, str]]:
    """``work(callback)``, of so many ``steps``: yields (images in [−1, 1], how far it is), at last the result and "".

    Where the iterator is closed, as Gradio does for a request that is cancelled or left, the work stops at its next
    step.
    """
    shown, every = -math.inf, EVERY if model.autoencoder is None else DECODED_EVERY
    for progress in live(work):
        if progress.result is not None:
            yield progress.result, ""
        elif progress.denoised is not None and progress.step + 1 < steps and time.monotonic() - shown >= every:
            # Not the last step, which may be the result: Gradio would write its file anew while a browser reads it.
            x = progress.denoised.float()
            yield (
                x if model.autoencoder is None else model.autoencoder.decode(x),
                f"step {progress.step + 1} of {steps}",
            )
            shown = time.monotonic()
