"""What every tab needs: errors in one line, one worker for the device, pictures of samples, files to download."""

import functools
import html
import inspect
import logging
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from diffit.errors import UserError, printable
from diffit.utils.images import make_grid, to_uint8

logger = logging.getLogger(__name__)

DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}
"""Events that compute wait in one queue: the device does one thing at a time."""
PRIVATE: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
"""Events that only change what is shown: at once, and not for scripts."""
UNFINISHED = "not finished"
GRID_SIDE = 512  # pixels that a grid of small images is enlarged towards


def let_cancel(button: gr.Button, status: gr.Markdown, *events: Any) -> None:
    """``button`` cancels the ``events``; the status then says so, and does as well where one of them failed.

    By an output of the button's own it would say so too early: Gradio drops a click that comes before it has taken back
    the event.
    """
    button.click(None, cancels=list(events), **PRIVATE)
    for event in events:
        event.failure(lambda: UNFINISHED, None, status, **PRIVATE)


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
