"""Images side by side in one PNG."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffit.utils.files import whole_file

VISIBLE = 64  # pixels: smaller images are enlarged towards this by a whole factor
GAP, WHITE = 2, 255
LONGEST = 24  # characters of a row's name


def make_grid(images: Tensor, grid: tuple[int, int] | None = None, names: Sequence[str] = ()) -> Image.Image:
    """Tile ``images``, uint8 (N, C, H, W) with C 1 or 3, row by row with gaps; gaps and free cells are white.

    ``grid`` is (columns, rows); None picks a nearly square one. ``names`` are written before the rows. Raises
    ValueError for more images than cells.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or str(images.dtype) != "torch.uint8":
        raise ValueError(f"expected uint8 (N, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    n, c, h, w = images.shape
    columns = math.ceil(math.sqrt(n))
    columns, rows = grid or (columns, math.ceil(n / columns))
    if n > columns * rows:
        raise ValueError(f"{n} images do not fit a grid of {columns}x{rows}")
    scale = max(1, VISIBLE // max(h, w))
    large = images.cpu().numpy().transpose(0, 2, 3, 1).repeat(scale, 1).repeat(scale, 2)
    height, width = h * scale + GAP, w * scale + GAP
    cells = np.full((rows * columns, height, width, c), WHITE, np.uint8)
    cells[:n, :-GAP, :-GAP] = large
    canvas = cells.reshape(rows, columns, height, width, c).swapaxes(1, 2).reshape(rows * height, columns * width, c)
    canvas = canvas[:-GAP, :-GAP]
    picture = Image.fromarray(canvas[..., 0] if c == 1 else canvas)
    return _with_names(picture, names, height) if names else picture


def _with_names(picture: Image.Image, names: Sequence[str], height: int) -> Image.Image:
    """``picture`` with a name to the left of each of its rows, which are ``height`` pixels apart."""
    font = ImageFont.load_default(12)
    names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
    margin = math.ceil(max(font.getlength(name) for name in names)) + 3 * GAP
    wide = Image.new(picture.mode, (picture.width + margin, picture.height), WHITE if picture.mode == "L" else "white")
    wide.paste(picture, (margin, 0))
    pen = ImageDraw.Draw(wide)
    for row, name in enumerate(names):
        pen.text((margin - 2 * GAP, row * height + height // 2), name, fill=0, font=font, anchor="rm")
    return wide


def save_grid(images: Tensor, path: str | Path, grid: tuple[int, int] | None = None, names: Sequence[str] = ()) -> None:
    """Write :func:`make_grid` as a PNG: whole or not at all, so that a viewer never sees half a file."""
    with whole_file(path) as part:
        make_grid(images, grid, names).save(part, "PNG")


def save_gif(frames: Sequence[Image.Image], path: str | Path, seconds: float = 4.0) -> None:
    """An animation of pictures of one size that lasts about ``seconds`` and stays on its last for two, in a loop."""
    each = max(round(1000 * seconds / len(frames)), 40)
    durations = [each] * (len(frames) - 1) + [2000]
    with whole_file(path) as part:
        frames[0].save(part, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


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
