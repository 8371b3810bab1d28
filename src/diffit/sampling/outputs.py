"""Where samples go: numbered PNG files, or one array, written as they arrive and by any number of processes."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffit.configs.sampling import Sampling
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.utils.distributed import Processes, require_shared
from diffit.utils.files import disk_errors, sweep, whole_file
from diffit.utils.images import to_pil
from diffit.utils.locks import exclusive

RECORD = "samples.json"


@dataclass
class Job:
    """What is sampled, and with what: equal records mean equal images."""

    seeds: Sequence[int]
    labels: Tensor | None
    net: torch.nn.Module
    config: Config
    origin: dict[str, Any]
    """What else decides about the images: the network's name, the precision, the VAE's hash."""

    def record(self, **layout: Any) -> dict[str, Any]:
        order = json.dumps([list(self.seeds), None if self.labels is None else self.labels.tolist()])
        facts = self.origin | {
            "fingerprint": fingerprint(self.net),
            "preset": self.config.preset,
            "sampling": self.config.sampling.model_dump(mode="json"),
            "images": len(self.seeds),
            "seeds_and_labels": hashlib.sha256(order.encode()).hexdigest(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts | layout))  # as it will be read: tuples are lists
        return plain


def fingerprint(net: torch.nn.Module) -> str:
    """A digest of the beginning of every tensor: enough to tell trained networks apart, and read in no time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        head = tensor.detach().flatten()[:256].float().cpu().numpy()
        digest.update(name.encode() + head.tobytes())
    return digest.hexdigest()


class Output(Protocol):
    """Takes the images of a job in any order; what an interrupted one has finished is ``done`` the next time.

    The other methods are called in the context of ``begin``, which keeps other commands out of ``outdir``.
    """

    outdir: Path

    def begin(self, job: Job, procs: Processes) -> AbstractContextManager[None]: ...
    def done(self, part: slice) -> bool: ...
    def write(self, start: int, images: Tensor) -> None: ...
    def read(self, count: int) -> Tensor: ...
    def finish(self, class_names: Sequence[str] | None) -> Path: ...


def continues(outdir: Path, record: dict[str, Any]) -> bool:
    """Whether ``outdir`` holds samples of the same ``record``; UserError where it holds others.

    Samples are never deleted, and never mixed with those of other settings.
    """
    path = outdir / RECORD
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        held = next((p.name for pattern in ("[0-9]" * 6 + ".png", "samples_*.npz") for p in outdir.glob(pattern)), None)
        if held is not None:
            raise UserError(f"{outdir}: holds {held}, and no {RECORD} says of what; give another --outdir")
        return False
    # By the fingerprint, not by how the network was spelled; older records lack settings that have come since.
    before = {"sampling": {}} | before | {"network": None}
    now = record | {"network": None}
    before["sampling"] = Sampling().model_dump(mode="json") | before["sampling"]
    if before == now:
        return True
    changed = sorted(key for key in now if before.get(key) != now[key])
    changed = [{"seeds_and_labels": "seeds or classes", "fingerprint": "network"}.get(key, key) for key in changed]
    raise UserError(
        f"{outdir}: holds samples of other settings ({', '.join(dict.fromkeys(changed))}); give another --outdir, or "
        "remove that folder"
    )


@contextmanager
def own_folder(outdir: Path, procs: Processes) -> Iterator[None]:
    """Make ``outdir`` and keep other commands out of it; what a dead one left half written is removed.

    The processes of a job are one command: the first holds the lock, and the others must not write before it does.
    """
    with ExitStack() as held:
        with procs.together():
            if procs.is_first:
                with disk_errors(outdir):
                    outdir.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive(outdir, "use another --outdir"))
                for folder in (outdir, *outdir.glob("[0-9]" * 6)):  # of --subdirs
                    sweep(folder)
        require_shared(outdir, procs)
        yield


def write_record(outdir: Path, record: dict[str, Any]) -> None:
    with whole_file(outdir / RECORD) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


class PngFolder:
    """``000017.png`` for seed 17, or ``000000/000017.png`` with ``subdirs``, a thousand a folder.

    With labels the folder gets a ``dataset.json``, so that it is itself an archive that ``diffit data check`` reads.
    """

    def __init__(self, outdir: str | Path, *, subdirs: bool = False) -> None:
        self.outdir, self.subdirs = Path(outdir), subdirs
        self.seeds: Sequence[int] = ()
        self.labels: Tensor | None = None

    @contextmanager
    def begin(self, job: Job, procs: Processes) -> Iterator[None]:
        self.seeds, self.labels = job.seeds, job.labels
        with own_folder(self.outdir, procs):
            with procs.together():
                if procs.is_first:
                    record = job.record(format="png", subdirs=self.subdirs)
                    if not continues(self.outdir, record):
                        write_record(self.outdir, record)
            yield

    def name(self, seed: int) -> str:
        return f"{seed - seed % 1000:06d}/{seed:06d}.png" if self.subdirs else f"{seed:06d}.png"

    def done(self, part: slice) -> bool:
        """Whether the images of these positions are there."""
        return all(is_whole_png(self.outdir / self.name(seed)) for seed in self.seeds[part])

    def write(self, start: int, images: Tensor) -> None:
        """``images`` uint8 (b, C, H, W) of the seeds from position ``start`` on."""
        for seed, image in zip(self.seeds[start : start + len(images)], images, strict=True):
            # Waiting for the disk per image is most of the time; what a power cut leaves half is seen by `done`.
            with whole_file(self.outdir / self.name(seed), sync=False) as part:
                to_pil(image).save(part, "PNG", compress_level=1)

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


def is_whole_png(path: Path) -> bool:
    """Whether a file ends as every whole PNG does."""
    try:
        with path.open("rb") as file:
            file.seek(-12, os.SEEK_END)
            return file.read() == b"\0\0\0\0IEND\xaeB`\x82"
    except OSError:
        return False


class NpzFile:
    """ADM's sample batch: ``arr_0`` uint8 (N, H, W, C) and, for conditional models, ``arr_1`` int64 (N,).

    The rows are filled in a plain array on disk that all processes write to, and packed at the end: memory stays flat.
    A second array marks the rows that are there, so that an interrupted run is continued. They are written as bytes at
    a place, not into mapped memory: of a page that two nodes share there, the later one's copy would win.
    """

    def __init__(self, outdir: str | Path) -> None:
        self.outdir = Path(outdir)
        self.labels: Tensor | None = None
        self.complete = False

    @contextmanager
    def begin(self, job: Job, procs: Processes) -> Iterator[None]:
        channels, height, width = job.config.image_shape
        self.shape = (len(job.seeds), height, width, channels)
        self.labels = job.labels
        self.path = self.outdir / f"samples_{'x'.join(map(str, self.shape))}.npz"
        self.rows = self.outdir / f".{self.path.name}.rows"
        self.marks = self.outdir / f".{self.path.name}.marks"
        with own_folder(self.outdir, procs):
            with procs.together():
                if procs.is_first:
                    self.resume(job.record(format="npz"))
            self.complete = bool(procs.broadcast(self.complete))
            if not self.complete:
                self.array = np.load(self.rows, mmap_mode="r")
                self.finished = np.load(self.marks, mmap_mode="r")
            yield

    def resume(self, record: dict[str, Any]) -> None:
        """Find what an interrupted run left of the same, or begin."""
        with disk_errors(self.path):
            same = continues(self.outdir, record)
            self.complete = same and self.path.is_file()
            if not self.complete and not (same and self.rows.exists() and self.marks.exists()):
                self.allocate()
                write_record(self.outdir, record)

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
        _put(self.rows, self.array, start, images.permute(0, 2, 3, 1).contiguous().numpy())
        _put(self.marks, self.finished, start, np.ones(len(images), np.bool_))

    def read(self, count: int) -> Tensor:
        array = np.load(self.path)["arr_0"] if self.complete else self.array
        return torch.from_numpy(np.array(array[:count])).permute(0, 3, 1, 2)

    def finish(self, class_names: Sequence[str] | None) -> Path:
        if self.complete:
            return self.path
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


def _put(path: Path, array: np.memmap[Any, Any], start: int, values: npt.NDArray[Any]) -> None:
    """Write ``values`` into the file of ``array`` from row ``start`` on; they are on disk before this returns."""
    with path.open("r+b") as file:
        file.seek(array.offset + start * values[0].nbytes)
        file.write(values.data)
        file.flush()
        os.fsync(file.fileno())


class SamplingBar:
    """Progress over the steps of all batches, on a terminal; a bar that is still while a batch runs looks stuck."""

    def __init__(self, images: int, steps: int, processes: int, *, visible: bool) -> None:
        self.images, self.steps, self.processes = images, steps, processes
        self.total_done = 0
        console = Console(stderr=True)
        columns = (
            TextColumn("sampling"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = Progress(*columns, console=console, disable=not (visible and console.is_terminal), transient=True)
        self.task = self.bar.add_task("sampling", total=max(images * steps, 1), note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def step(self, i: int, level: Tensor, x: Tensor) -> Tensor:
        """The ``after_step`` of a sampler."""
        self._show(self.total_done + len(x) * (i + 1) * self.processes, f"step {i + 1} of {self.steps}")
        return x

    def finish(self, images: int) -> None:
        """A batch is done."""
        self.total_done += images * self.steps * self.processes
        self._show(self.total_done, "")

    def _show(self, done: int, note: str) -> None:
        shown = min(int(done / self.steps), self.images)
        self.bar.update(self.task, completed=done, note=f"{shown}/{self.images} images   {note}")
