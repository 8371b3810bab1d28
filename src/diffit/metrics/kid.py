"""Kernel Inception distance (Bińkowski et al. 2018): the squared MMD with the kernel (x·y/d + 1)³, without bias."""

import math

import torch
from torch import Tensor

from diffit.randomness import SUBSET, make_generator

BLOCK = 1000  # images of each kind a block, as in the paper


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate from ``x`` (m, d) and ``y`` (n, d): pairs of an image with itself are left out."""
    x, y = x.double(), y.double()
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    m, n = len(x), len(y)
    return (xx.sum() - xx.trace()) / (m * (m - 1)) + (yy.sum() - yy.trace()) / (n * (n - 1)) - 2 * xy.mean()


def kid(fake: Tensor, real: Tensor, *, block: int = BLOCK, seed: int = 0) -> tuple[float, float]:
    """Mean over disjoint random blocks, and the standard error of that mean (nan for a single block).

    ``fake`` (n, d) and ``real`` (m, d) are features. Blocks that share no image are independent, so their spread says
    how well the mean is known; and they take time in proportion to the images, not to their square.
    """
    block = min(block, len(fake), len(real))
    blocks = min(len(fake), len(real)) // block
    generator = make_generator(seed, SUBSET)
    chosen = [torch.randperm(len(x), generator=generator)[: blocks * block].view(blocks, block) for x in (fake, real)]
    values = torch.stack([squared_mmd(fake[i], real[j]) for i, j in zip(*chosen, strict=True)])
    return float(values.mean()), float(values.std() / math.sqrt(blocks)) if blocks > 1 else math.nan
