"""Kernel Inception distance (Bińkowski et al. 2018): the squared MMD with the kernel (x·y/d + 1)³, without bias."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffit.metrics.detectors import Detector
from diffit.metrics.features import Array, Need, Part, as_pair, pooled
from diffit.utils.randomness import SUBSET, make_generator

BLOCK = 1000  # images of each kind in a block, as in the paper


@dataclass(frozen=True)
class KID(Part[Tensor]):
    """Mean over random blocks, and the standard error of that mean where there are several."""

    kind = "kid"

    @property
    def need(self) -> Need[Tensor]:
        return pooled(self.samples)

    def fewest(self, dim: int) -> tuple[int, str]:
        return 2, "to compare with each other"

    def numbers(self, fake: Tensor, real: Tensor, detector: Detector) -> dict[str, float]:
        value, error = kid(fake, real, device=detector.device)
        name = "kid" if detector.official else "kd"
        return {name: value} if math.isnan(error) else {name: value, f"{name}_error": error}


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate from ``x`` (m, d) and ``y`` (n, d): pairs of an image with itself are left out."""
    x, y = x.double(), y.double()
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    m, n = len(x), len(y)
    return (xx.sum() - xx.trace()) / (m * (m - 1)) + (yy.sum() - yy.trace()) / (n * (n - 1)) - 2 * xy.mean()


def choose_blocks(images: int, block: int, blocks: int, generator: torch.Generator) -> Tensor:
    """Indices (blocks, block) of ``images``, none twice in a block: rounds of random permutations, of each as many
    whole blocks as it has. A permutation repeated would put the same images side by side again.
    """
    per = images // block
    rounds = [
        torch.randperm(images, generator=generator)[: per * block].view(per, block) for _ in range(-(-blocks // per))
    ]
    return torch.cat(rounds)[:blocks]


def kid(
    fake: Array, real: Array, *, block: int = BLOCK, seed: int = 0, device: torch.device | None = None
) -> tuple[float, float]:
    """Mean over random blocks, and the standard error of that mean (nan for a single block).

    ``fake`` (n, d) and ``real`` (m, d) are features, of which a block at a time goes to the ``device`` (default:
    theirs). The larger set gives as many disjoint blocks as it holds; the smaller one is used again, in another order,
    until it has as many. This takes time in proportion to the images, not to their square.

    Blocks of sets of one size share no image, and their spread says how well the mean is known. Blocks that share
    images of the smaller set do not vary by what that set happens to hold: the error is then that of these very
    images, and too small for new ones.

    Raises ValueError where the shapes do not fit, a value is not finite, or a block has fewer than two images.
    """
    fake, real = as_pair(fake, real)
    block = min(block, len(fake), len(real))
    if block < 2:
        raise ValueError(f"blocks of {block} image: fake has {len(fake)}, real {len(real)}; two or more are needed")
    blocks = max(len(fake), len(real)) // block
    generator = make_generator(seed, SUBSET)
    chosen = [choose_blocks(len(x), block, blocks, generator) for x in (fake, real)]
    pairs = zip(*chosen, strict=True)
    values = torch.stack([squared_mmd(fake[i].to(device), real[j].to(device)) for i, j in pairs])
    return float(values.mean()), float(values.std() / math.sqrt(blocks)) if blocks > 1 else math.nan
