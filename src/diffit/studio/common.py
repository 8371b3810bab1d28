"""What every tab needs: errors in one line, one worker for the device, pictures of samples, bounded uploads."""

import functools
import html
import inspect
import io
import logging
import shutil
import tempfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from diffit.data.archive import open_image
from diffit.data.pixels import eight_bit
from diffit.data.transforms import center_crop
from diffit.errors import UserError, printable
from diffit.utils.images import make_grid, to_uint8

logger = logging.getLogger(__name__)

DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}
"""Events that compute wait in one queue: the device does one thing at a time."""
UPLOAD_BYTES, UPLOAD_PIXELS = 32 << 20, 50_000_000
GRID_SIDE = 512  # pixels that a grid of small images is enlarged towards


@contextmanager
def told() -> Iterator[None]:
    """What a person got wrong, or what is gone, as one line in the page; anything else is logged and said to be."""
    try:
        yield
    except (UserError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        raise message(text) from None
    except gr.Error:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise message("out of memory; ask for fewer images") from None
        logger.exception("the page's server failed")
        raise message(f"the server failed ({type(error).__name__}); its log has the details") from None


def message(text: str) -> gr.Error:
    """One line; the page would render markup in it."""
    return gr.Error(html.escape(printable(text, 600)), title="Not possible", print_exception=False)


def escape(text: str) -> str:
    """What Markdown or a browser would take as markup in a name from a file, as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "&#96;").replace("[", "&#91;")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """An event's function, also a generator, in :func:`told`."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*args: Any) -> Iterator[Any]:
            with told():
                yield from function(*args)

        return generate

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with told():
            return function(*args)

    return call


def grid_picture(images: Tensor, columns: int | None = None) -> Image.Image:
    """``(N, C, H, W)`` in [−1, 1] as one picture; latents that nothing decodes show their first three channels."""
    channels = images.shape[1]
    shown = to_uint8(images[:, :3] if channels >= 3 else images[:, :1]).cpu()
    rows = None if columns is None else -(-len(shown) // columns)
    picture = make_grid(shown, None if columns is None or rows is None else (columns, rows)).convert("RGB")
    factor = max(1, GRID_SIDE // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


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
        while len(self) > 32:
            self.popitem(last=False)


def painted(drawing: dict[str, Any] | None, size: tuple[int, int]) -> Tensor:
    """bool (H, W): where something was drawn. Raises :class:`UserError` where nothing was."""
    height, width = size
    mask = torch.zeros(size, dtype=torch.bool)
    for layer in (drawing or {}).get("layers") or ():
        alpha = Image.fromarray(np.asarray(layer)[..., 3])
        mask |= torch.from_numpy(np.asarray(alpha.resize((width, height), Image.Resampling.BOX)).copy()) > 64
    if not mask.any():
        raise UserError("nothing is painted: draw over what is to be made anew, then press Inpaint")
    return mask


class Scratch:
    """Folders for files to download; only the newest few are kept, and none after the server has ended."""

    def __init__(self, keep: int = 40) -> None:
        self.keep = keep
        self.root = tempfile.TemporaryDirectory(prefix="diffit-studio-")
        self.folders: deque[Path] = deque()

    def folder(self) -> Path:
        while len(self.folders) >= self.keep:
            shutil.rmtree(self.folders.popleft(), ignore_errors=True)
        self.folders.append(Path(tempfile.mkdtemp(dir=self.root.name)))
        return self.folders[-1]


def png_bytes(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
