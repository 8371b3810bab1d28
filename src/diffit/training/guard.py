"""Which steps are taken: none whose gradient is not finite, or far larger than those before it."""

import math
from typing import Any

import torch
from torch import Tensor

WINDOW, ENOUGH = 64, 16
SPIKE = 30.0  # times the median of the last WINDOW norms, once ENOUGH of them are known


class Guard:
    """Decides on the device, so that nothing waits for it. Its memory goes into the training state."""

    def __init__(self, device: torch.device, *, spikes: bool) -> None:
        self.spikes = spikes
        self.norms = torch.full((WINDOW,), math.nan, device=device)
        self.place = 0

    def skips(self, norm: Tensor) -> Tensor:
        """Whether to leave out the step whose gradient has this ``norm``, (); only norms of steps taken count later."""
        skip = ~norm.isfinite()
        if self.spikes:
            known = self.norms.isfinite().sum() >= ENOUGH
            skip = skip | (known & (norm > SPIKE * self.norms.nanmedian()))
        self.norms[self.place] = torch.where(skip, self.norms[self.place], norm)
        self.place = (self.place + 1) % WINDOW
        return skip

    def state_dict(self) -> dict[str, Any]:
        norms = [None if math.isnan(norm) else norm for norm in self.norms.tolist()]  # strict JSON has no NaN
        return {"norms": norms, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms.copy_(torch.tensor([math.nan if norm is None else norm for norm in state["norms"]]))
        self.place = state["place"]
