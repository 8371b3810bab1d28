"""Images side by side in one PNG."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffit.utils.files import whole_file

VISIBLE = 64  # pixels: smaller images are enlarged towards this by a whole factor


def make_grid(images: Tensor, grid: tuple[int, int] | None = None) -> Image.Image:
    """Tile ``images``, uint8 (N, C, H, W) with C 1 or 3, row by row; free cells are black.

    ``grid`` is (columns, rows); None picks a nearly square one. Raises ValueError for more images than cells.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or str(images.dtype) != "torch.uint8":
        raise ValueError(f"expected uint8 (N, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    n, c, h, w = images.shape
    columns = math.ceil(math.sqrt(n))
    columns, rows = grid or (columns, math.ceil(n / columns))
    if n > columns * rows:
        raise ValueError(f"{n} images do not fit a grid of {columns}x{rows}")
    cells = np.zeros((rows * columns, c, h, w), np.uint8)
    cells[:n] = images.cpu().numpy()
    canvas = cells.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    picture = Image.fromarray(canvas[..., 0] if c == 1 else canvas)
    scale = max(1, VISIBLE // max(h, w))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_grid(images: Tensor, path: str | Path, grid: tuple[int, int] | None = None) -> None:
    """Write :func:`make_grid` as a PNG: whole or not at all, so that a viewer never sees half a file."""
    with whole_file(path) as part:
        make_grid(images, grid).save(part, "PNG")


def to_uint8(images: Tensor, rounding: str = "round") -> Tensor:
    """[−1, 1] to levels 0…255: the nearest, or with ``truncate`` the next below (official implementation)."""
    levels = (images.float() + 1) * 127.5
    return (levels.round() if rounding == "round" else levels).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Levels 0…255 to float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (C, H, W) with C = 1 or 3."""
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
