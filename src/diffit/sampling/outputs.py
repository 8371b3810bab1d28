"""Where samples go: numbered PNG files, or one array, written as they arrive and by any number of processes."""

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffit.configs.schema import Config
from diffit.utils.distributed import Processes
from diffit.utils.files import disk_errors, whole_file
from diffit.utils.images import to_pil


class Record:
    """``samples.json``: what the images in a folder were drawn with. Equal records mean equal images."""

    def __init__(
        self, outdir: Path, source: str, net: torch.nn.Module, config: Config, precision: str, vae: str | None = None
    ) -> None:
        self.path = outdir / "samples.json"
        self.facts: dict[str, Any] = {
            "network": source,
            "fingerprint": fingerprint(net),
            "preset": config.preset,
            "sampling": config.sampling.model_dump(mode="json"),
            "precision": precision,
            "vae": vae,
        }

    def begin(self, seeds: Sequence[int], labels: Tensor | None, **layout: Any) -> bool:
        """Whether an interrupted run with the same settings is to be continued; else the record is written anew."""
        order = json.dumps([list(seeds), None if labels is None else labels.tolist()])
        self.facts |= {"images": len(seeds), "seeds_and_labels": hashlib.sha256(order.encode()).hexdigest(), **layout}
        try:
            before, now = json.loads(self.path.read_text()), json.loads(json.dumps(self.facts))
            if before | {"network": None} == now | {"network": None}:  # by its fingerprint, not by how it was spelled
                return True
        except (OSError, ValueError, TypeError):
            pass
        self.path.unlink(missing_ok=True)
        return False

    def write(self) -> None:
        with whole_file(self.path) as part:
            part.write_text(json.dumps(self.facts, indent=2) + "\n")


def fingerprint(net: torch.nn.Module) -> str:
    """A digest of the beginning of every tensor: enough to tell trained networks apart, and read in no time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        head = tensor.detach().flatten()[:256].float().cpu().numpy()
        digest.update(name.encode() + head.tobytes())
    return digest.hexdigest()


class PngFolder:
    """``000017.png`` for seed 17, or ``000000/000017.png`` with ``subdirs``, a thousand a folder.

    With labels the folder gets a ``dataset.json``, so that it is itself an archive that ``diffit data check`` reads.
    """

    def __init__(
        self, outdir: Path, seeds: Sequence[int], labels: Tensor | None, record: Record, *, subdirs: bool = False
    ) -> None:
        self.outdir, self.seeds, self.labels, self.record, self.subdirs = outdir, seeds, labels, record, subdirs

    def prepare(self, procs: Processes) -> None:
        if procs.is_first:
            with disk_errors(self.outdir):
                self.outdir.mkdir(parents=True, exist_ok=True)
                if not self.record.begin(self.seeds, self.labels, format="png", subdirs=self.subdirs):
                    # Images of other settings must neither be taken for finished nor lie among the new ones.
                    for pattern in ("[0-9]" * 6 + ".png", "[0-9]" * 6 + "/" + "[0-9]" * 6 + ".png"):
                        for old in self.outdir.glob(pattern):
                            old.unlink()
                    self.record.write()
        procs.barrier()

    def name(self, seed: int) -> str:
        return f"{seed - seed % 1000:06d}/{seed:06d}.png" if self.subdirs else f"{seed:06d}.png"

    def done(self, part: slice) -> bool:
        """Whether the images of these positions are there."""
        return all((self.outdir / self.name(seed)).exists() for seed in self.seeds[part])

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

    The rows are filled in a plain array on disk that all processes map, and packed at the end: memory stays flat. A
    second array marks the rows that are there, so that an interrupted run is continued.
    """

    def __init__(
        self,
        outdir: Path,
        seeds: Sequence[int],
        labels: Tensor | None,
        record: Record,
        *,
        shape: tuple[int, int, int],
    ) -> None:
        channels, height, width = shape
        self.shape = (len(seeds), height, width, channels)
        self.seeds, self.labels, self.record = seeds, labels, record
        self.path = outdir / f"samples_{'x'.join(map(str, self.shape))}.npz"
        self.rows = outdir / f".{self.path.name}.rows"
        self.marks = outdir / f".{self.path.name}.marks"
        self.complete = False

    def prepare(self, procs: Processes) -> None:
        if procs.is_first:
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                same = self.record.begin(self.seeds, self.labels, format="npz")
                self.complete = same and self.path.is_file()
                if not self.complete and not (same and self.rows.exists() and self.marks.exists()):
                    self.path.unlink(missing_ok=True)  # of other settings
                    self.allocate()
                    self.record.write()
        self.complete = procs.broadcast(self.complete)
        if self.complete:
            return
        self.array = np.lib.format.open_memmap(self.rows, "r+")
        self.finished = np.lib.format.open_memmap(self.marks, "r+")

    def allocate(self) -> None:
        self.marks.unlink(missing_ok=True)
        try:
            for path, dtype, shape in ((self.rows, np.uint8, self.shape), (self.marks, np.bool_, self.shape[:1])):
                np.lib.format.open_memmap(path, "w+", dtype, shape)
                if hasattr(os, "posix_fallocate"):  # not on macOS; a sparse file meets a full disk as a crash (SIGBUS)
                    with path.open("r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except BaseException:
            self.discard()
            raise

    def done(self, part: slice) -> bool:
        """Whether the rows of these positions are there."""
        return self.complete or bool(self.finished[part].all())

    def write(self, start: int, images: Tensor) -> None:
        rows = slice(start, start + len(images))
        self.array[rows] = images.permute(0, 2, 3, 1).numpy()
        self.array.flush()  # before the mark says so
        self.finished[rows] = True

    def read(self, count: int) -> Tensor:
        array = np.load(self.path)["arr_0"] if self.complete else self.array
        return torch.from_numpy(np.array(array[:count])).permute(0, 3, 1, 2)

    def finish(self, class_names: Sequence[str] | None) -> Path:
        if self.complete:
            return self.path
        self.array.flush()
        with whole_file(self.path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            archive.write(self.rows, "arr_0.npy")
            if self.labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, self.labels.numpy())
        self.discard()
        return self.path

    def discard(self) -> None:
        for path in (self.rows, self.marks):
            path.unlink(missing_ok=True)
