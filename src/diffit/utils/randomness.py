"""Randomness as a function of named integers, never of ambient state.

The i-th sample depends on its own seed alone, a training step on (seed, images seen, microbatch): not on batch size,
order or number of processes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Streams keep uses of one seed apart: the class chosen for a sample must not move its noise.
NOISE, LABEL, ORDER, STEP, DROPOUT, INIT, VALIDATION, SUBSET = range(8)


def derive_seed(*keys: int) -> int:
    """A 63-bit seed that is a function of all ``keys``; different keys give unrelated seeds."""
    return int(_sequence(*keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sequence(*keys: int) -> np.random.SeedSequence:
    # NumPy joins the 32-bit words of its keys and pads with zeros; two words a key and their number keep keys apart.
    words = [word for key in keys for word in divmod(key, 2**32)]
    return np.random.SeedSequence([len(keys), *words])


def numpy_generator(*keys: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(_sequence(*keys)))


def make_generator(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(derive_seed(*keys))


class PerSampleNoise:
    """Standard normal noise in which every sample has its own stream: ``noise_source(x) -> like x``.

    The numbers come from the CPU in float32, so that they are the same on every device; and by NumPy,
    because torch's CPU generator keeps 32 bits of its seed: in one run of four, two of 50,000 samples would be alike.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [numpy_generator(seed, NOISE) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        if like.shape[0] != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds for a batch of {like.shape[0]}")
        noise = torch.empty(like.shape, pin_memory=like.is_cuda)
        for row, generator in zip(noise, self.generators, strict=True):
            generator.standard_normal(out=row.numpy(), dtype=np.float32)
        return noise.to(like.device, like.dtype, non_blocking=True)
