"""The images of a source as the PNGs of an archive."""

import io
import threading
from collections import Counter
from collections.abc import Callable, Sequence
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


class PngEncoder:
    """Encodes images alike. ``channels`` is gray, rgb or auto; ``value_range`` None finds one that fits all."""

    def __init__(
        self,
        to_size: Callable[[Image.Image], Image.Image],
        channels: str,
        value_range: Range | None,
        background: Color,
    ) -> None:
        self.to_size, self.channels, self.asked, self.background = to_size, channels, value_range, background
        self._found: tuple[Range, str] | None = None
        self._finding = threading.Lock()

    def of(self, raw: Source, indices: Sequence[int], workers: int) -> Callable[[int], Encoded | BrokenImageError]:
        """What encodes the i-th image of ``raw``: a broken one comes back as its error, so that threads go on."""
        mode = {"gray": "L", "rgb": "RGB"}.get(self.channels) or _mode_of_all(raw, indices)
        return partial(self._encode, raw, mode, partial(self._range, raw, indices, workers))

    def _encode(
        self, raw: Source, mode: str, range_of_all: Callable[[], Range], index: int
    ) -> Encoded | BrokenImageError:
        name = raw.names[index]
        try:
            with decoding(name):
                image = raw.open(index)
                several = frame_count(image) > 1
                values = _values(raw, index, image, self.asked is not None)
                value_range = FULL if values is None else range_of_all()
                image, done = eight_bit(image, mode, values=values, value_range=value_range, background=self.background)
                image = self.to_size(image)
        except BrokenImageError as error:
            return error
        if several and raw.frames is None:
            done.add("frames")
        # Pixels only: comments, colour profiles and EXIF of the source must not end up in the archive.
        image.info.clear()
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=LEVEL)
        return Encoded(buffer.getvalue(), (1 if mode == "L" else 3, image.height, image.width), done)

    def _range(self, raw: Source, indices: Sequence[int], workers: int) -> Range:
        """Found when the first image with more than 8 bits turns up: most sources have none."""
        if self.asked is not None:
            return self.asked
        with self._finding:
            if self._found is None:
                peaks = [peak for peak in map_ordered(partial(_peak, raw), indices, workers) if peak is not None]
                bits = next(bits for bits in BITS if max(peaks) < 2**bits)
                self._found = (
                    (0.0, 2.0**bits - 1),
                    (
                        f"{len(peaks)} images have 16 bits, and values up to {max(peaks)}: 0 to {2**bits - 1} became "
                        f"0 to 255 (--range full|LOW,HIGH)"
                    ),
                )
            return self._found[0]

    def notes(self, done: Counter[str]) -> list[str]:
        """What a person should know of the images with these marks, one line each."""
        lines = [self._found[1]] if self._found else []
        for mark, text in {
            "profile": "images had the colour profile of another space and were converted to sRGB",
            "transparent": f"images are transparent: laid on {color_name(self.background)} (--background COLOUR)",
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
