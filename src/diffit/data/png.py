"""The images of a source as the PNGs of an archive."""

import io
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from PIL import Image

from diffit.data.archive import decoding
from diffit.data.files import BrokenImageError, map_ordered
from diffit.data.pixels import (
    FULL,
    GRAY_MODES,
    Color,
    Values,
    color_name,
    eight_bit,
    gray_values,
    is_sixteen_bit_color,
    sixteen_bit_color,
)
from diffit.data.sources import Source, frame_count
from diffit.errors import UserError

BITS = (8, 10, 12, 14, 16)  # of the scanners and cameras that store their values in 16
LEVEL = 1  # of zlib: a quarter of the default level's time for 6 % more bytes
STRETCH = 0.01  # of a side, which nobody sees
Range = tuple[float, float]


class Encoded(NamedTuple):
    """One image of an archive."""

    png: bytes
    shape: tuple[int, int, int]  # (C, H, W)
    done: set[str]  # what was done to it that a person should know


def value_range_of(asked: str | Range) -> Range | None:
    """(low, high) of ``LOW,HIGH`` or ``full``; None for ``auto``. UserError for anything else."""
    if asked == "auto":
        return None
    if asked == "full":
        return FULL
    try:
        low, high = (float(part) for part in (asked.split(",") if isinstance(asked, str) else asked))
        if low < high:
            return low, high
    except ValueError:
        pass
    raise UserError(f"range {asked!r} is not possible: use auto, full, or LOW,HIGH such as 0,4095")


@dataclass(frozen=True)
class Look:
    """What all images are made to look like."""

    to_size: Callable[[Image.Image], Image.Image]
    stretches: bool
    """Whether that keeps all of an image whatever its proportions."""
    channels: str
    """``gray``, ``rgb``, or ``auto``: gray if every image is."""
    value_range: Range | None
    """Black and white of more than 8 bits; None: the fewest bits that hold all values."""
    background: Color


class PngEncoder:
    """``encoder(i)`` is the i-th image of a source as a PNG, or the error if it is broken, so that threads go on."""

    def __init__(self, raw: Source, indices: Sequence[int], look: Look, workers: int) -> None:
        self.raw, self.indices, self.look, self.workers = raw, indices, look, workers
        self.mode = {"gray": "L", "rgb": "RGB"}.get(look.channels) or _mode_of_all(raw, indices)
        self._found: tuple[Range, str] | None = None
        self._finding = threading.Lock()

    def __call__(self, index: int) -> Encoded | BrokenImageError:
        look = self.look
        try:
            with decoding(self.raw.names[index]):
                image = self.raw.open(index)
                several = frame_count(image) > 1
                values = _values(self.raw, index, image, look.value_range is not None)
                span = FULL if values is None else look.value_range or self._range_of_all()
                image, done = eight_bit(image, self.mode, values=values, value_range=span, background=look.background)
                width, height = image.size
                image = look.to_size(image)
        except BrokenImageError as error:
            return error
        if several and self.raw.frames is None:
            done.add("frames")
        # Of a side of whole pixels half a one is rounded.
        rounding = max(STRETCH, 0.5 / image.width + 0.5 / image.height)
        if look.stretches and abs(image.width * height / (image.height * width) - 1) > rounding:
            done.add("stretched")
        # Pixels only: comments, colour profiles and EXIF of the source must not end up in the archive.
        image.info.clear()
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=LEVEL)
        return Encoded(buffer.getvalue(), (1 if self.mode == "L" else 3, image.height, image.width), done)

    def _range_of_all(self) -> Range:
        """Found when the first image with more than 8 bits turns up: most sources have none."""
        with self._finding:
            if self._found is None:
                peaks = map_ordered(partial(_peak, self.raw), self.indices, self.workers)
                known = [peak for peak in peaks if peak is not None]
                bits = next(bits for bits in BITS if max(known) < 2**bits)
                note = (
                    f"{len(known)} images have 16 bits, and values up to {max(known)}: 0 to {2**bits - 1} became "
                    "0 to 255 (--range full|LOW,HIGH)"
                )
                self._found = (0.0, 2.0**bits - 1), note
            return self._found[0]

    def notes(self, done: Counter[str]) -> list[str]:
        """What a person should know of the images with these marks, one line each."""
        lines = [self._found[1]] if self._found else []
        for mark, text in {
            "profile": "images had the colour profile of another space and were converted to sRGB",
            "transparent": f"images are transparent: laid on {color_name(self.look.background)} (--background COLOUR)",
            "stretched": "images have other proportions than before (--transform center-crop keeps them)",
            "frames": "files hold several images, of which the first was used (--frames all uses every one)",
        }.items():
            if done[mark]:
                lines.append(f"{done[mark]} {text}")
        return lines


def _mode_of_all(raw: Source, indices: Sequence[int]) -> str:
    """Gray if every image is. Reads headers up to the first colour image: soon over, but for gray sets."""
    for index in indices:
        try:
            if raw.open(index).mode not in GRAY_MODES:
                return "RGB"
        except BrokenImageError:
            continue  # met again and reported when its turn comes
    return "L"


def _values(raw: Source, index: int, image: Image.Image, defined: bool) -> Values | None:
    """The values of an image with more than 8 bits, (H, W) or (H, W, C); None of all others."""
    if is_sixteen_bit_color(image):
        return sixteen_bit_color(image, raw.open(index, fresh=True))
    return gray_values(image, defined)


def _peak(raw: Source, index: int) -> int | None:
    """The largest value of an image with more than 8 bits; None of all others, and of broken ones."""
    try:
        with decoding(raw.names[index]):
            values = _values(raw, index, raw.open(index), False)
    except BrokenImageError:
        return None
    if values is None:
        return None
    return int((values[..., :3] if values.ndim == 3 else values).max())
