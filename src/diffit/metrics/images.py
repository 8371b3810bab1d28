"""Images on disk as a stream of batches, none of which is kept: archives, folders of any sizes, ADM sample batches."""

import zipfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from diffit.data.archive import ImageArchive
from diffit.data.bounds import VARIABLE, max_pixels
from diffit.data.files import READ_ERRORS, map_ordered
from diffit.errors import UserError
from diffit.utils.distributed import Processes
from diffit.utils.files import sha256_of
from diffit.utils.progress import progress as bar
from diffit.utils.randomness import SUBSET, make_generator

Batches = Iterator[tuple[Tensor, Tensor]]
"""``(positions (b,) int64, images (b, C, H, W) uint8)``: which of the images these are, and they themselves."""


class Images(Protocol):
    """``rows`` yields uint8 (C, H, W) for ascending indices; ``shape`` is that of the first image."""

    name: str
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...
    def fingerprint(self) -> str: ...
    def rows(self, indices: Sequence[int]) -> Iterator[Tensor]: ...


class ArchiveImages:
    """The images of an archive, or of a folder in which each may have a size of its own."""

    def __init__(self, archive: ImageArchive) -> None:
        self.archive, self.name, self.shape = archive, archive.path.name, archive.image_shape

    def __len__(self) -> int:
        return len(self.archive)

    def fingerprint(self) -> str:
        return self.archive.hash_files()

    def rows(self, indices: Sequence[int]) -> Iterator[Tensor]:
        _, height, width = self.shape
        return map_ordered(self.archive.decode, indices, workers=1 if height * width < 64 * 64 else 0)


class NpzImages:
    """``arr_0`` uint8 (N, H, W, C) of an npz file, read row by row: the array may be larger than the memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        with self._open() as file:
            self.count, height, width, channels = self._header(file)
        self.shape = (channels, height, width)
        if height * width > max_pixels():
            raise UserError(f"{path}: images of {width}x{height} pixels, more than {VARIABLE} allows")

    def _open(self) -> IO[bytes]:
        try:
            return zipfile.ZipFile(self.path).open("arr_0.npy")
        except KeyError:
            raise UserError(f"{self.path}: no arr_0 in it, and with it no images") from None
        except READ_ERRORS as error:
            raise UserError(f"{self.path}: not an npz file, or cut short ({error})") from None

    def _header(self, file: IO[bytes]) -> tuple[int, int, int, int]:
        """Read as far as the pixels. An array of objects ends here: its pickle is never opened."""
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except READ_ERRORS as error:
            raise UserError(f"{self.path}: arr_0 cannot be read ({error})") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran or min(shape) < 1:
            raise UserError(
                f"{self.path}: arr_0 is {dtype} {shape}; images are uint8 (N, H, W, 1 or 3), values 0 to 255"
            )
        return shape

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        return sha256_of(self.path)

    def rows(self, indices: Sequence[int]) -> Iterator[Tensor]:
        channels, height, width = self.shape
        size, at = channels * height * width, 0
        with self._open() as file:
            self._header(file)
            for index in indices:
                try:
                    while at < index:
                        file.read(size)
                        at += 1
                    data = file.read(size)
                except READ_ERRORS as error:
                    raise UserError(f"{self.path}: arr_0 is damaged ({error})") from None
                if len(data) < size:
                    raise UserError(f"{self.path}: arr_0 is cut short at image {index} of {self.count}")
                at += 1
                yield torch.from_numpy(np.frombuffer(data, np.uint8).reshape(height, width, channels).copy()).movedim(
                    2, 0
                )


def open_images(path: Path) -> ArchiveImages | NpzImages:
    return NpzImages(path) if path.suffix == ".npz" and path.is_file() else ArchiveImages(ImageArchive(path))


def load_batch(archive: ImageArchive, indices: Tensor) -> Tensor:
    """uint8 (b, C, H, W)."""
    return torch.stack([archive[i] for i in indices.tolist()])


def choose(total: int, count: int, seed: int = 0) -> Tensor:
    """Indices of ``count`` of ``total`` images at random, or of all where they are fewer. The first n are the
    choice of n alone: archives are sorted by class, and what depends on order, as the splits of the Inception score
    do, must not depend on what else is asked.
    """
    return torch.randperm(total, generator=make_generator(seed, SUBSET))[:count]


def by_size(positions: Tensor, images: Sequence[Tensor]) -> Batches:
    """Images (C, H, W) as one batch for each size among them."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(tuple(image.shape), []).append(i)
    for members in sizes.values():
        yield positions[members], torch.stack([images[i] for i in members])


def stream(images: Images, chosen: Tensor, batch: int, procs: Processes, *, progress: bool = False) -> Batches:
    """The ``chosen`` images, read in the order of the file; batch j by process j mod their number.

    Position p is the p-th of the ``chosen``. Images of several sizes come in one batch for each size.
    """
    order = chosen.argsort()
    mine = list(order.split(batch))[procs.rank :: procs.count]
    rows = images.rows(chosen[torch.cat(mine)].tolist() if mine else [])
    with bar(images.name, quiet=not progress or not procs.is_first) as show:
        for done, positions in enumerate(mine, start=1):
            yield from by_size(positions, list(islice(rows, len(positions))))
            show(done, len(mine))
