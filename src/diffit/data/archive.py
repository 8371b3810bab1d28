"""Image archives: a folder, a zip or a folder of zips with images and an optional ``dataset.json``.

That is the StyleGAN/EDM layout, see :mod:`diffit.data.labels`. What :mod:`diffit.data.convert` writes also has the sums
of its files, see :mod:`diffit.data.sums`.
"""

import io
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from diffit.data.bounds import lift_pillows_limit, require_size
from diffit.data.files import BrokenImageError, convert_command, map_ordered, subset
from diffit.data.formats import FORMATS
from diffit.data.index import Index, open_index
from diffit.data.labels import META, require_classes
from diffit.data.names import name_some
from diffit.data.pixels import is_sixteen_bit_color, orientation
from diffit.errors import UserError

logger = logging.getLogger(__name__)


class UnfitImageError(UserError):
    """One image that is not as those of an archive must be; the others may be."""


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Whatever is raised over an image that cannot be used, as a BrokenImageError that names ``name``."""
    try:
        yield
    except BrokenImageError:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImageError(f"'{name}' is not an image of a known format") from error
    except Exception as error:  # Pillow's decoders raise a dozen different kinds
        raise BrokenImageError(f"'{name}' cannot be used ({str(error) or type(error).__name__})") from error


def open_image(data: bytes, name: str, *, header_only: bool = False) -> Image.Image:
    """Decode one encoded image of any of ``FORMATS`` without converting its mode.

    Raises BrokenImageError, naming ``name``, for anything undecodable and for images above :func:`max_pixels`.
    """
    with decoding(name):
        lift_pillows_limit()
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        require_size(*image.size)
        if not header_only:
            image.load()
        return image


def open_plain(data: bytes, name: str) -> tuple[Image.Image, str | None]:
    """The decoded image, and what keeps it from being read as it is, or None. Raises BrokenImageError."""
    image = open_image(data, name, header_only=True)
    deep = is_sixteen_bit_color(image)
    with decoding(name):
        image.load()
    if deep:
        return image, "has 16 bits a channel"
    if image.mode not in ("L", "RGB"):
        return image, f"has Pillow mode {image.mode}"
    return image, "is stored rotated (EXIF)" if orientation(image) != 1 else None


class ImageArchive(torch.utils.data.Dataset[torch.Tensor]):
    """Images of one size from a folder or zips, as uint8 tensors of shape (C, H, W); C is 1 (gray) or 3 (RGB).

    Args:
        path: folder, zip or folder of zips of PNG, JPEG or WebP files, or the URL of zips; without ``dataset.json`` it
            is unlabelled.
        cond: load the labels; it is a UserError if a file has none.
        max_images: keep a seeded random subset of this many images, in the archive's order.
        skip_broken: an image that cannot be read is a warning, and the next one of its label takes its place.

    Attributes:
        location: the whole path, or the URL.
        name: the folder's or zip's name without ``.zip``.
        image_shape: (C, H, W) of the first image; every other image must have the same.
        has_labels: every image has a label, whether or not ``cond`` asked for them.
        num_classes: 0 without labels; counted over the whole archive, so that a subset does not change it.
        labels: int64 (N,), or None without ``cond``.

    Raises UserError, naming the file and the remedy, for anything that a user can get wrong or that is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        cond: bool = False,
        max_images: int | None = None,
        seed: int = 0,
        skip_broken: bool = False,
    ) -> None:
        self._index = index = open_index(path)
        self.path, self.class_names = index.path, index.class_names
        self.location = str(self.path.resolve()) if index.mirror is None else index.mirror.url
        self.name = Path(self.location).stem if index.zips == [self.path] else Path(self.location).name
        self.has_labels = index.labels is not None and bool((index.labels >= 0).all())
        if cond:
            require_labels(index)
        self.num_classes = max(index.top + 1, len(index.class_names or ())) if self.has_labels else 0
        if cond:
            require_classes(self.path, self.num_classes, len(index), self.class_names)
        self._rows = subset(len(index), max_images, seed)
        self.labels: torch.Tensor | None = None
        if cond and index.labels is not None:
            self.labels = torch.from_numpy(index.labels[np.asarray(self._rows)])
        self.skip_broken, self._broken = skip_broken, set[int]()
        channels, height, width = (self._or_next(0, self.decode) if skip_broken else self.decode(0)).shape
        self.image_shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def file_names(self) -> list[str]:
        """Of the images, made on every call."""
        return self._index.names(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._or_next(index, self._fitting) if self.skip_broken else self._fitting(index)

    def _or_next(self, index: int, read: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The image or, where that cannot be read, the next one with its label."""
        labels, rows = self._index.labels, self._rows
        for other in chain(range(index, len(self)), range(index)):
            if labels is not None and labels[rows[other]] != labels[rows[index]]:
                continue
            try:
                return read(other)
            except (BrokenImageError, UnfitImageError) as error:  # and not what is wrong with all of them
                if other not in self._broken:
                    self._broken.add(other)
                    logger.warning("%s; left out, the %d. so far", error, len(self._broken))
        raise UserError(f"{self.path}: no image can be read in place of '{self._index.name(rows[index])}'")

    def _fitting(self, index: int) -> torch.Tensor:
        pixels = self.decode(index)
        if tuple(pixels.shape) != self.image_shape:
            remedy = convert_command(self.path, "--resolution", "WxH")
            name, first = self._index.names([self._rows[index], self._rows[0]])
            raise UnfitImageError(
                f"{self.path}: '{name}' is {describe_shape(tuple(pixels.shape))} but '{first}' is "
                f"{describe_shape(self.image_shape)}: `{remedy}` makes them equal"
            )
        return pixels

    def decode(self, index: int) -> torch.Tensor:
        """The image at its own size, where ``archive[index]`` insists on that of the first."""
        row = self._rows[index]
        name = self._index.name(row)
        image, fault = open_plain(self._index.read(row), f"{self.path}: {name}")
        if fault:
            raise UnfitImageError(
                f"{self.path}: '{name}' {fault}, and only upright 8-bit gray or RGB images are read: "
                f"`{convert_command(self.path)}` makes them so"
            )
        return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the names, sizes and CRC-32s of the images, and the labels where ``cond`` loaded them.

        No image is read for it: the CRC-32s are those of a zip's directory or of ``dataset.sfv``, and of a folder
        without one only names and sizes count. A folder and zips that ``convert`` wrote of the same have the same.
        """
        return self._hash(self._index.checksums(self._rows))

    def hash_files(self, workers: int = 0) -> str:
        """The same, but the CRC-32s that are recorded nowhere are those of the files, which are read for it."""
        return (
            self.content_hash if self._index.has_sums else self._hash(map_ordered(self._read_sum, self._rows, workers))
        )

    def _read_sum(self, row: int) -> tuple[int, int]:
        data = self._index.read(row)
        return len(data), zlib.crc32(data)

    def _hash(self, sums: Iterable[tuple[int, int | None]]) -> str:
        return self._index.digest(self._rows, sums, None if self.labels is None else self.labels.numpy())

    def load_all(self, workers: int = 0) -> torch.Tensor:
        """Every image, uint8 (N, C, H, W), decoded on ``workers`` threads (0: as many as are worth it)."""
        return self.load(range(len(self)), workers)

    def load(self, indices: range, workers: int = 0) -> torch.Tensor:
        """As :meth:`load_all` those of the ``indices``."""
        _, height, width = self.image_shape
        workers = workers or (1 if height * width < 64 * 64 else 0)
        images = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8)
        for i, image in enumerate(map_ordered(self.__getitem__, indices, workers)):
            images[i] = image
        return images


def describe_shape(shape: tuple[int, ...]) -> str:
    """(C, H, W) as ``WxH gray`` or ``WxH RGB``: the order of ``--resolution``."""
    channels, height, width = shape
    return f"{width}x{height} {'gray' if channels == 1 else 'RGB'}"


def require_labels(index: Index) -> None:
    """UserError when labels are absent, or missing for some images."""
    if index.labels is None:
        raise UserError(
            f"{index.path} has no labels: drop --cond, "
            f"or make them from class folders with `{convert_command(index.path, '--cond')}`"
        )
    if len(missing := np.flatnonzero(index.labels < 0)):
        raise UserError(
            f"{index.path}: {len(missing)} of {len(index)} images have no label ({name_some(index.names(missing))}): "
            f"add them to {META} or remove the files, or drop --cond"
        )
