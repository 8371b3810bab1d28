"""Where samples go: numbered PNG files, or one array, written as they arrive and by any number of processes."""

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffit.files import disk_errors, whole_file
from diffit.training.distributed import Processes


class PngFolder:
    """``000017.png`` for seed 17, or ``000000/000017.png`` with ``subdirs``, a thousand a folder.

    With labels the folder gets a ``dataset.json``, so that it is itself an archive that ``diffit data check`` reads.
    """

    def __init__(self, outdir: Path, seeds: Sequence[int], labels: Tensor | None, *, subdirs: bool = False) -> None:
        self.outdir, self.seeds, self.labels, self.subdirs = outdir, seeds, labels, subdirs

    def prepare(self, procs: Processes) -> None:
        with disk_errors(self.outdir):
            self.outdir.mkdir(parents=True, exist_ok=True)

    def name(self, seed: int) -> str:
        return f"{seed - seed % 1000:06d}/{seed:06d}.png" if self.subdirs else f"{seed:06d}.png"

    def write(self, start: int, images: Tensor) -> None:
        """``images`` uint8 (b, C, H, W) of the seeds from position ``start`` on."""
        for seed, image in zip(self.seeds[start : start + len(images)], images, strict=True):
            with whole_file(self.outdir / self.name(seed)) as part:
                to_pil(image).save(part, "PNG")

    def read(self, count: int) -> Tensor:
        """The first images again, from disk: other processes may have written them."""
        images = [np.array(Image.open(self.outdir / self.name(seed))) for seed in self.seeds[:count]]
        stack = torch.from_numpy(np.stack(images))
        return stack[:, None] if stack.ndim == 3 else stack.permute(0, 3, 1, 2)

    def finish(self, class_names: Sequence[str] | None) -> Path:
        if self.labels is not None:
            labels = [[self.name(seed), label] for seed, label in zip(self.seeds, self.labels.tolist(), strict=True)]
            with whole_file(self.outdir / "dataset.json") as part:
                part.write_text(json.dumps({"labels": labels, "class_names": class_names}))
        return self.outdir


class NpzFile:
    """ADM's sample batch: ``arr_0`` uint8 (N, H, W, C) and, for conditional models, ``arr_1`` int64 (N,).

    The rows are filled in a plain array on disk that all processes map, and packed at the end: memory stays flat.
    That array has no name while it is filled, so that nothing is left of it however the processes end.
    """

    def __init__(
        self, outdir: Path, seeds: Sequence[int], labels: Tensor | None, *, shape: tuple[int, int, int]
    ) -> None:
        channels, height, width = shape
        self.shape = (len(seeds), height, width, channels)
        self.labels = labels
        self.path = outdir / f"samples_{'x'.join(map(str, self.shape))}.npz"
        self.rows = outdir / f".{self.path.name}.rows"

    def prepare(self, procs: Processes) -> None:
        if procs.is_first:
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self.allocate()
                except BaseException:
                    self.rows.unlink(missing_ok=True)
                    raise
        procs.barrier()
        self.array = np.lib.format.open_memmap(self.rows, "r+")
        self.file = self.rows.open("rb")
        procs.barrier()
        if procs.is_first:
            self.rows.unlink()

    def allocate(self) -> None:
        np.lib.format.open_memmap(self.rows, "w+", np.uint8, self.shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS; a sparse file meets a full disk as a crash (SIGBUS)
            with self.rows.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.rows.stat().st_size)

    def write(self, start: int, images: Tensor) -> None:
        self.array[start : start + len(images)] = images.permute(0, 2, 3, 1).numpy()

    def read(self, count: int) -> Tensor:
        return torch.from_numpy(np.array(self.array[:count])).permute(0, 3, 1, 2)

    def finish(self, class_names: Sequence[str] | None) -> Path:
        self.array.flush()
        with whole_file(self.path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                shutil.copyfileobj(self.file, file)
            if self.labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, self.labels.numpy())
        self.file.close()
        return self.path


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (C, H, W) with C = 1 or 3."""
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
