"""Maps of numbers as pictures: heat, heat over an image, the windows that attention is split into."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffit.utils.images import to_pil, to_uint8

SIDE = 256  # pixels that a map or a small image is enlarged to

# Dark to bright with growing lightness, so that the order survives in print and for the colour-blind.
HEAT = np.array([(0, 0, 8), (60, 15, 110), (140, 40, 125), (220, 70, 100), (250, 145, 90), (252, 250, 190)])


def heat(values: Tensor, low: float | None = None, high: float | None = None, side: int = SIDE) -> Image.Image:
    """``(h, w)`` in colours, dark at ``low`` (default: the least) to bright at ``high`` (the greatest), enlarged."""
    array = values.double().numpy()
    low, high = (array.min() if low is None else low), (array.max() if high is None else high)
    share = np.clip((array - low) / max(high - low, 1e-12), 0, 1) * (len(HEAT) - 1)
    pixels = np.stack([np.interp(share, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)], axis=-1)
    return enlarge(Image.fromarray(pixels.round().astype(np.uint8)), side)


def enlarge(image: Image.Image, side: int = SIDE) -> Image.Image:
    """By a whole factor towards ``side`` pixels, each pixel a square."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def picture(image: Tensor, side: int = SIDE) -> Image.Image:
    """``(C, H, W)`` in [−1, 1] as RGB, enlarged; of more than three channels (latents) the first three."""
    return enlarge(to_pil(to_uint8(image[:3] if image.shape[0] >= 3 else image[:1])).convert("RGB"), side)


def overlay(image: Tensor, weights: Tensor, place: tuple[float, float], side: int = SIDE) -> Image.Image:
    """Attention ``weights`` ``(h, w)`` of the token at ``place`` (shares, down and across) over the image it is of."""
    below = picture(image, side)
    colours = heat(weights, low=0.0, side=1).resize(below.size, Image.Resampling.NEAREST)
    mixed = Image.blend(below.convert("L").convert("RGB"), colours, 0.65)
    h, w = weights.shape
    row, column = int(place[0] * h), int(place[1] * w)
    box = (column * mixed.width // w, row * mixed.height // h)
    end = ((column + 1) * mixed.width // w - 1, (row + 1) * mixed.height // h - 1)
    ImageDraw.Draw(mixed).rectangle((*box, *end), outline=(0, 255, 120), width=2)
    return mixed


def window_grid(image: Image.Image, map_size: tuple[int, int], window: tuple[int, int]) -> Image.Image:
    """The borders of windows of ``window`` tokens on a map of ``map_size`` (H, W) drawn over the image of the map."""
    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    for row in range(window[0], map_size[0], window[0]):
        y = row * drawn.height // map_size[0]
        pen.line((0, y, drawn.width, y), fill=(0, 200, 255), width=1)
    for column in range(window[1], map_size[1], window[1]):
        x = column * drawn.width // map_size[1]
        pen.line((x, 0, x, drawn.height), fill=(0, 200, 255), width=1)
    return drawn


def difference(first: Tensor, second: Tensor) -> Tensor:
    """Where two images of [−1, 1] differ: ``(…, C, H, W)`` in [−1, 1], gray where they are equal."""
    return ((second - first) / 2).clamp(-1, 1)


def numbers_of_difference(first: Tensor, second: Tensor) -> dict[str, float]:
    """Mean and greatest absolute difference in levels of 255, and the peak signal-to-noise ratio in dB."""
    a, b = (to_uint8(images).double() for images in (first, second))
    error = (a - b).abs()
    mean_square = float(error.square().mean())
    return {
        "mean |difference| (levels)": float(error.mean()),
        "greatest (levels)": float(error.max()),
        "PSNR (dB)": 10 * float(torch.log10(torch.tensor(255.0**2 / mean_square))) if mean_square else float("inf"),
    }
