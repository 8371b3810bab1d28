"""Augmentation that does not leak into what the model generates (Karras et al., arXiv 2206.00364, Appendix F.2).

Every transform is told to the network in its label; the label of an untouched image is 0, and that is what a sampler
asks for. The labels are sampled first and :func:`transform` sees nothing else, so that they tell all there is to know.

| label | transform | random |
|---|---|---|
| 0 | flip left and right | with probability ½, always |
| 1 | flip up and down | with probability ½ |
| 2 | scale by 2^(0.2·n) | n |
| 3, 4 | rotate by φ, from x to y: cos φ − 1, sin φ | φ uniform on the circle |
| 5, 6 | scale by 2^(0.2·n) along an axis at θ/2, by 2^(−0.2·n) across: n·cos θ, n·sin θ | n; θ uniform or 0 |
| 7, 8 | translate by n_x·W/8 right, n_y·H/8 down | n_x, n_y |

They are applied in this order, each but the first with the augmentation probability. n is standard normal, and θ is 0
with probability ½.
θ is *twice* the angle of the axis because (n, θ) and (−n, θ + 180°), which have one label, are then one stretch;
with the axis at θ itself they would be opposite ones, and the label would not tell which.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit.configs.schema import AUGMENT_LABELS

SYM6 = torch.tensor([
    0.0154041093270274, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.7876411410301941, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
], dtype=torch.float64)  # fmt: skip
"""Low-pass filter of the least asymmetric orthogonal wavelet with 6 vanishing moments (Daubechies 1992, §8)."""

TAPS = len(SYM6)
DELAY = 5
"""Sample m of a doubled axis lies at pixel (m − DELAY) / 2.

sym6 is not quite symmetric: it delays the smooth parts of an image by 5.10 samples and the finest by 4.83. On CIFAR-10
(as JPEG) rotated and moved at random, 5 is nearest to a quintic spline: rms 0.020, against 0.028 with 5.10 and 0.091
with the 5.5 of a symmetric filter.
"""


class Augment:
    """``(images, generator) -> (augmented images, labels)``; see the module for what is done and the labels' meaning.

    ``images`` are floating point ``(B, C, H, W)`` in [−1, 1], H and W ≥ 2; the result has their shape and dtype and
    may leave the range slightly where the filter rings. Labels are float32 ``(B, 9)``. Images whose labels 2 to 8
    are 0 are returned (or mirrored) bit for bit. ``generator`` is on the CPU or on the images' device.
    Its state advances by an amount that depends on B alone, and nothing waits for the device.
    """

    label_dim = AUGMENT_LABELS

    def __init__(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"the augmentation probability must be in [0, 1], not {probability}")
        self.probability = probability

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = self.sample_labels(len(images), generator).to(images.device, non_blocking=True)
        apply = transform if self.probability > 0 else mirror  # the same picture, without the cost of resampling
        return apply(images, labels), labels

    def sample_labels(self, batch: int, generator: torch.Generator) -> Tensor:
        """Labels ``(batch, 9)``, float32, on the generator's device."""
        uniform = torch.rand(batch, 10, generator=generator, device=generator.device)
        n, n_stretch, n_x, n_y = torch.randn(batch, 4, generator=generator, device=generator.device).unbind(1)
        flip, scale, rotate, stretch, move = (uniform[:, :5] < self.probability).float().unbind(1)
        x_coin, y_coin, axis_coin = (uniform[:, 5:8] < 0.5).float().unbind(1)
        phi, theta = (2 * math.pi * uniform[:, 8:]).unbind(1)
        theta = theta * axis_coin
        return torch.stack(
            [
                x_coin,
                flip * y_coin,
                scale * n,
                rotate * (phi.cos() - 1),
                rotate * phi.sin(),
                stretch * n_stretch * theta.cos(),
                stretch * n_stretch * theta.sin(),
                move * n_x,
                move * n_y,
            ],
            dim=1,
        )


def transform(images: Tensor, labels: Tensor) -> Tensor:
    """The picture that ``labels`` ``(B, 9)`` describe, like ``images`` ``(B, C, H, W)``."""
    images = mirror(images, labels)
    # Resampling all and choosing after is cheaper than to wait until the device knows which images need it.
    still = (labels[:, 2:] == 0).all(dim=1)[:, None, None, None]
    return torch.where(still, images, warp(images.float(), labels).to(images.dtype))


def mirror(images: Tensor, labels: Tensor) -> Tensor:
    """Labels 0 and 1: exact, so kept out of the resampling."""
    x_flip, y_flip = (labels[:, :2, None, None, None] > 0.5).unbind(1)
    images = torch.where(x_flip, images.flip(-1), images)
    return torch.where(y_flip, images.flip(-2), images)


def warp(images: Tensor, labels: Tensor) -> Tensor:
    """Labels 2 to 8 in one resampling, at twice the resolution.

    Beyond its border the image goes on as its mirror image, about the centres of the border pixels. This continuation
    is periodic, so one period of it holds all that a transform can reach, and coordinates wrap. Padding would need a
    width that depends on the labels.
    """
    height, width = images.shape[-2:]
    (up_y, down_y), (up_x, down_x) = (
        [matrix.to(images.device, images.dtype, non_blocking=True) for matrix in filters(size)]
        for size in (height, width)
    )
    y, x = (
        (torch.arange(down.shape[1], device=images.device) - DELAY) / 2 - (len(down) - 1) / 2
        for down in (down_y, down_x)
    )
    source = inverse_map(torch.complex(*torch.meshgrid(x, y, indexing="xy")), labels, height, width)
    grid = torch.stack([wrap(source.real, width), wrap(source.imag, height)], dim=-1)
    doubled = up_y @ images @ up_x.T
    return down_y @ F.grid_sample(doubled, grid, align_corners=True) @ down_x.T


def inverse_map(z: Tensor, labels: Tensor, height: int, width: int) -> Tensor:
    """Where the picture at ``z`` comes from, ``(B, *z.shape)``; points are x + iy, in pixels from the centre.

    With w = n·exp(iθ) and κ = 0.2·ln 2, the stretch is exp(κQ) for the symmetric Q: z -> w·z̄, whose eigenvalues are
    n along θ/2 and −n across; its inverse is cosh(κn) − sinh(κn)·Q/n.
    """
    n, cos_minus_1, sin, w_x, w_y, n_x, n_y = labels[:, 2:, None, None].unbind(1)
    w = torch.complex(w_x, w_y)
    angle = 0.2 * math.log(2) * w.abs()
    z = z - torch.complex(n_x * width / 8, n_y * height / 8)
    z = angle.cosh() * z - angle.sinh() * w.sgn() * z.conj()
    return torch.exp2(-0.2 * n) * torch.complex(1 + cos_minus_1, -sin) * z


def wrap(position: Tensor, size: int) -> Tensor:
    """Pixels from the centre -> grid_sample's [−1, 1] over the doubled period of :func:`filters`."""
    period = 4 * (size - 1)
    return (2 * position + size - 1 + DELAY).remainder(period) / period * 2 - 1


@functools.cache
def filters(size: int) -> tuple[Tensor, Tensor]:
    """For one axis, on the CPU: ``up (4(size − 1) + 1, size)`` and ``down (size, 2(size − 1) + 12)``.

    ``up`` doubles the resolution of one period of the mirrored axis, with the first sample once more at the end.
    ``down`` is the adjoint of doubling without mirrors and, SYM6 being orthonormal, its inverse:
    an image that is not moved comes back as it was.
    """

    def doubling(samples: int, pixels: Tensor) -> Tensor:  # f[n − 2k]
        tap = torch.arange(samples)[:, None] - 2 * pixels
        return torch.where((tap >= 0) & (tap < TAPS), SYM6[tap.clamp(0, TAPS - 1)], 0.0)

    last = size - 1
    pixels = torch.arange(-TAPS // 2, 2 * last + 1)
    mirrored = last - (pixels.remainder(2 * last) - last).abs()
    up = doubling(4 * last + 1, pixels) @ F.one_hot(mirrored, size).double()
    down = doubling(2 * last + TAPS, torch.arange(size)).T
    return math.sqrt(2) * up, down / math.sqrt(2)


def flip_half(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability ½; ``(B, C, H, W)``."""
    chosen = torch.rand(len(images), device=images.device, generator=generator) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(3), images)
