"""Images that a person uploads or draws on: bounded, decoded by the package's own reader, at the size of a model."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import numpy.typing as npt
import torch
from gradio.blocks import Block
from PIL import Image
from torch import Tensor

from diffit.data.archive import open_image
from diffit.data.pixels import eight_bit
from diffit.data.transforms import center_crop
from diffit.errors import UserError
from diffit.studio.common import message, told

UPLOAD_BYTES, UPLOAD_PIXELS = 32 << 20, 50_000_000
DRAWINGS = 32  # that were sent and not used yet


def read_upload(path: str | Path | None) -> Image.Image:
    """An uploaded image as upright RGB, by the package's own reader. Raises :class:`UserError`."""
    if path is None:
        raise UserError("no image: upload one first, or sample one")
    path = Path(path)
    if path.stat().st_size > UPLOAD_BYTES:
        raise UserError(f"{path.name}: larger than {UPLOAD_BYTES >> 20} MiB; upload a smaller file")
    return decode(path.read_bytes(), path.name)


def decode(data: bytes, name: str) -> Image.Image:
    """One encoded image as upright RGB, its pixels bounded before they are read."""
    if len(data) > UPLOAD_BYTES:
        raise UserError(f"{name}: larger than {UPLOAD_BYTES >> 20} MiB; use a smaller one")
    header = open_image(data, name, header_only=True)
    if header.width * header.height > UPLOAD_PIXELS:
        raise UserError(f"{name}: {header.width}×{header.height} pixels; upload at most {UPLOAD_PIXELS:,}")
    image, _ = eight_bit(open_image(data, name), "RGB")
    return image


def fit_image(image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """``(1, C, H, W)`` float32 in [−1, 1] of a model's size, centre-cropped to its shape."""
    channels, height, width = shape
    image = center_crop(image.convert("L" if channels == 1 else "RGB"), (width, height))
    array = np.asarray(image).reshape(height, width, -1)
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


_keep_file = Block.async_move_resource_to_block_cache


async def _keep_local_file(self: Any, path: Any) -> Any:
    if str(path).strip().lower().startswith(("http:", "https:")):
        raise message("an address is no file: upload the image itself")
    return await _keep_file(self, path)


# For every component: Gradio would fetch an address that a visitor sends in the place of a file, as any input.
Block.async_move_resource_to_block_cache = _keep_local_file


def upload_button(title: str, **how: Any) -> gr.UploadButton:
    return gr.UploadButton(title, file_count="single", type="filepath", **how)


def canvas(**how: Any) -> gr.ImageEditor:
    """An image to draw on. What comes back is decoded by :func:`decode`, and of unsent drawings few are kept.

    The methods are set on the component: a class of our own would make Gradio write a stub file next to its source.
    """
    made = gr.ImageEditor(type="numpy", **how)
    made.convert_and_format_image = _read_drawing
    made.blob_storage = _Few()
    return made


def _read_drawing(file: Any, flatten_on_white: bool = False) -> npt.NDArray[np.uint8] | None:
    if file is None:
        return None
    data = bytes(file) if isinstance(file, bytes | bytearray | memoryview) else Path(file.path).read_bytes()
    with told():
        decode(data, "the drawing")
        return np.asarray(open_image(data, "the drawing").convert("RGBA"))


class _Few(OrderedDict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > DRAWINGS:
            self.popitem(last=False)


def painted(drawing: dict[str, Any] | None, size: tuple[int, int]) -> Tensor:
    """bool (H, W): where something was drawn. Raises :class:`UserError` where nothing was."""
    height, width = size
    mask = torch.zeros(size, dtype=torch.bool)
    for layer in (drawing or {}).get("layers") or ():
        alpha = Image.fromarray(np.asarray(layer)[..., 3])
        mask |= torch.from_numpy(np.asarray(alpha.resize((width, height), Image.Resampling.BOX)).copy()) > 64
    if not mask.any():
        raise UserError("nothing is painted: paint over what is to be new, then press Inpaint")
    return mask
