"""Image archives: a folder or zip of images with an optional ``dataset.json``, in the StyleGAN/EDM layout.

``dataset.json`` is ``{"labels": [["00000/img00000000.png", 6], ...] or null, "class_names": [...]}``. What
:mod:`diffit.data.convert` writes also has the sums of its files, see :mod:`diffit.data.sums`.
"""

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from diffit.data.bounds import lift_pillows_limit, require_size
from diffit.data.files import BrokenImageError, FileTree, convert_command, map_ordered, name_some, safe_name, subset
from diffit.data.formats import FORMATS, IMAGE_SUFFIXES, unread
from diffit.data.pixels import is_sixteen_bit_color, orientation
from diffit.errors import UserError, printable

META = "dataset.json"
MAX_CLASSES = 1_000_000
META_BYTES = 4 << 20, 1 << 10  # of dataset.json: in all, and for each image


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


def read_labels(files: FileTree, images: int | None = None) -> tuple[dict[str, int] | None, list[str] | None]:
    """(label of every listed file or None, class names or None) from ``dataset.json``. UserError if malformed.

    ``images`` is how many it may list, None for those of ``files``.
    """
    if META not in files.names:
        return None, None
    where = f"{files.path}: {META}"
    limit = META_BYTES[0] + META_BYTES[1] * (len(files.images) if images is None else images)
    try:
        meta = json.loads(files.read(META, limit))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): write it again with `diffit data convert`") from error
    if not isinstance(meta, dict):
        raise UserError(f'{where} must be an object like {{"labels": [["a.png", 0]]}}, not a {type(meta).__name__}')
    class_names = meta.get("class_names")
    if class_names is not None:
        if not (isinstance(class_names, list) and all(isinstance(c, str) for c in class_names)):
            raise UserError(f"{where}: class_names must be a list of strings")
        class_names = [printable(name) for name in class_names]
    entries = meta.get("labels")
    if isinstance(entries, dict):
        entries = list(entries.items())
    if not entries:
        return None, class_names
    if not isinstance(entries, list):
        raise UserError(f"{where}: labels must be null or a list of [file name, class number] pairs")
    table: dict[str, int] = {}
    for entry in entries:
        if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f"{where}: {entry!r} is not a [file name, class number] pair")
        name, label = entry
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise UserError(f"{where}: the label of '{name}' is {label!r}; labels are class numbers 0, 1, 2, ...")
        table[safe_name(name, where)] = label
    return table, class_names


class ImageArchive(torch.utils.data.Dataset[torch.Tensor]):
    """Images of one size from a folder or zip, as uint8 tensors of shape (C, H, W); C is 1 (gray) or 3 (RGB).

    Args:
        path: folder or zip of PNG, JPEG or WebP files; without ``dataset.json`` it is unlabelled.
        cond: load the labels; it is a UserError if a file has none.
        max_images: keep a seeded random subset of this many images, in the archive's order.

    Attributes:
        name: the folder's or zip's name without ``.zip``.
        image_shape: (C, H, W) of the first image; every other image must have the same.
        has_labels: every image has a label, whether or not ``cond`` asked for them.
        num_classes: 0 without labels; counted over the whole archive, so that a subset does not change it.
        labels: int64 (N,), or None without ``cond``.

    Raises UserError, naming the file and the remedy, for anything that a user can get wrong or that is damaged.
    """

    def __init__(self, path: str | Path, *, cond: bool = False, max_images: int | None = None, seed: int = 0) -> None:
        self._files = FileTree(path)
        self.path = self._files.path
        self.name = self.path.resolve().stem if self._files.is_zip else self.path.resolve().name
        names = require_images(self._files)
        for problem in self._files.altered(META):
            raise UserError(problem)
        table, self.class_names = read_labels(self._files)
        self.has_labels = table is not None and all(name in table for name in names)
        if cond:
            require_labels(self.path, names, table)
        self.num_classes = 0
        if table is not None and self.has_labels:
            self.num_classes = count_classes([table[name] for name in names], self.class_names)
        if cond:
            require_classes(self.path, self.num_classes, len(names), self.class_names)
        self.file_names = [names[i] for i in subset(len(names), max_images, seed)]
        self.labels: torch.Tensor | None = None
        if cond and table is not None:
            self.labels = torch.tensor([table[name] for name in self.file_names], dtype=torch.int64)
        channels, height, width = self._decode(self.file_names[0]).shape
        self.image_shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> torch.Tensor:
        name = self.file_names[index]
        pixels = self._decode(name)
        if tuple(pixels.shape) != self.image_shape:
            remedy = convert_command(self.path, "--resolution", "WxH")
            raise UserError(
                f"{self.path}: '{name}' is {describe_shape(tuple(pixels.shape))} but '{self.file_names[0]}' is "
                f"{describe_shape(self.image_shape)}: `{remedy}` makes them equal"
            )
        return pixels

    def decode(self, index: int) -> torch.Tensor:
        """The image at its own size, where ``archive[index]`` insists on that of the first."""
        return self._decode(self.file_names[index])

    def _decode(self, name: str) -> torch.Tensor:
        image, fault = open_plain(self._files.read(name), f"{self.path}: {name}")
        if fault:
            raise UserError(
                f"{self.path}: '{name}' {fault}, and only upright 8-bit gray or RGB images are read: "
                f"`{convert_command(self.path)}` makes them so"
            )
        return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the names, sizes and CRC-32s of the images, and the labels where ``cond`` loaded them.

        No image is read for it: the CRC-32s are those of a zip's directory or of ``dataset.sfv``, and of a folder
        without one only names and sizes count. A folder and a zip that ``convert`` wrote of the same have the same.
        """
        return self._hash(map(partial(self._files.checksum, read=False), self.file_names))

    def hash_files(self, workers: int = 0) -> str:
        """The same, but the CRC-32s that are recorded nowhere are those of the files, which are read for it."""
        return self._hash(map_ordered(self._files.checksum, self.file_names, 1 if self._files.is_zip else workers))

    def _hash(self, sums: Iterable[tuple[int, int | None]]) -> str:
        labels = [None] * len(self) if self.labels is None else self.labels.tolist()
        digest = hashlib.sha256()
        for row in zip(self.file_names, sums, labels, strict=True):
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def load_all(self, workers: int = 0) -> torch.Tensor:
        """Every image, uint8 (N, C, H, W), decoded on ``workers`` threads (0: as many as are worth it)."""
        _, height, width = self.image_shape
        workers = workers or (1 if height * width < 64 * 64 else 0)
        images = torch.empty((len(self), *self.image_shape), dtype=torch.uint8)
        for i, image in enumerate(map_ordered(self.__getitem__, range(len(self)), workers)):
            images[i] = image
        return images


def describe_shape(shape: tuple[int, ...]) -> str:
    """(C, H, W) as ``WxH gray`` or ``WxH RGB``: the order of ``--resolution``."""
    channels, height, width = shape
    return f"{width}x{height} {'gray' if channels == 1 else 'RGB'}"


def require_images(files: FileTree) -> list[str]:
    """The image names; UserError when there are none."""
    if files.images:
        return files.images
    if known := unread(files.names):
        raise UserError(f"{files.path} holds no image that can be read: {'; '.join(known)}")
    found = f"found {name_some(files.names)}" if files.names else "it is empty"
    raise UserError(f"{files.path} holds no images ({' '.join(IMAGE_SUFFIXES)}): {found}; check the path")


def require_labels(path: Path, names: Sequence[str], labels: dict[str, int] | None) -> None:
    """UserError when labels are absent, or missing for some of ``names``."""
    if labels is None:
        raise UserError(
            f"{path} has no labels: drop --cond, "
            f"or make them from class folders with `{convert_command(path, '--cond')}`"
        )
    if missing := [name for name in names if name not in labels]:
        raise UserError(
            f"{path}: {len(missing)} of {len(names)} images have no label ({name_some(missing)}): "
            f"add them to {META} or remove the files, or drop --cond"
        )


def count_classes(labels: Collection[int], class_names: Sequence[str] | None) -> int:
    """The largest label + 1, or the number of names where that is larger."""
    return max(max(labels) + 1, len(class_names or ()))


def require_classes(path: Path, num_classes: int, num_images: int, class_names: Sequence[str] | None) -> None:
    """UserError for labels such as 2,000,000,000: a model has a row of weights for every class below the largest."""
    most = max(1000, 100 * num_images, len(class_names or ()))
    if num_classes > min(most, MAX_CLASSES):
        raise UserError(
            f"{path}: its labels go up to {num_classes - 1}, too far for {num_images} images: "
            f"`{convert_command(path, '--cond')}` numbers the classes 0, 1, 2, ..."
        )
