"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere, both into log.txt."""

import shlex
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from diffit.data.open import Archive
from diffit.metrics.record import format_numbers
from diffit.models.cost import count_work, estimate
from diffit.training.run_dir import RunLog
from diffit.training.step import Stepper

GIB = 2**30
COLUMNS = {"loss": ".4f", "val_loss": ".4f", "grad_norm": ".3g", "lr": ".2g", "img_per_sec": ".1f", "memory_gib": ".2f"}


def duration(seconds: float) -> str:
    """Two units are enough: ``3 h 20 min``."""
    seconds = round(seconds)
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part_size} {part}"
    return f"{seconds} s"


class Console:
    """Progress in images. ``log`` is None on all but the first process, which stay silent."""

    def __init__(self, log: RunLog | None, stepper: Stepper, total_images: int) -> None:
        self.log, self.stepper, self.total = log, stepper, total_images
        self.console = rich.console.Console(quiet=log is None, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal
        self.interval = 1.0 if self.live else 15.0
        self.first, self.steps = stepper.images_seen, 0
        self.began = self.updated = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.fields[kimg]} kimg"), BarColumn(), TextColumn("{task.fields[note]}"),
            console=self.console, disable=not self.live, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task("train", total=total_images, completed=self.first, kimg="0", note="first step …")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
        if self.log is not None:
            self.log.line(text)

    def announce(self, run_dir: Path, archive: Archive, loading: str, *, resumed: bool) -> None:
        """The start-up lines: what is about to happen, and what it takes."""
        stepper, config, procs = self.stepper, self.stepper.config, self.stepper.procs
        training, (channels, height, width) = config.training, config.image_shape
        cost = estimate(config, stepper.batch_gpu, stepper.precision, procs.device.type)
        images = self.total - stepper.images_seen
        classes = f"{config.model.num_classes} classes" if config.model.num_classes else "unconditional"
        resumed_at = f", resumed at {stepper.images_seen / 1000:g} kimg" if resumed else ""
        for line in (
            f"run       {run_dir}{resumed_at}",
            f"data      {len(archive)} images of {width}×{height}×{channels}, {classes}: {archive.path}",
            f"model     {config.preset}: {cost.parameters:,} parameters, {count_work(config).macs / 1e9:.3g} G "
            f"multiply-accumulates an image, {stepper.precision} on {procs.device.type}",
            f"batch     {training.batch} = {stepper.batch_gpu} per GPU × {procs.count} processes "
            f"× {stepper.rounds} accumulated",
            f"duration  {images:,} images, {images // training.batch:,} steps, "
            f"{images / len(archive):.3g} epochs; the time that takes is said after the first steps",
            f"memory    about {cost.training_bytes / GIB:.2f} GiB a process, "
            f"{cost.activation_bytes / GIB:.2f} of it for activations",
            f"loading   {loading}",
        ):
            self.say(line)

    def measured(self, images_seen: int, loss: Tensor) -> None:
        """Called after every step. Reads ``loss`` only when it is time to show something: a GPU is made to wait."""
        now = time.monotonic()
        self.steps += 1
        if self.log is None:
            return
        if self.steps in (1, 4):  # the first step pays for compilation and caches
            float(loss)
            now = time.monotonic()
        if self.steps == 1:
            self.bar.start()
            self.began, self.first = now, images_seen
        elif self.steps == 4:
            rate = (images_seen - self.first) / (now - self.began)
            left = duration((self.total - images_seen) / rate)
            self.say(f"time      about {left} at {rate:.1f} img/s, measured over three steps")
        elif now - self.updated >= self.interval:
            self.updated = now
            self.show(images_seen, float(loss), now)

    def show(self, images_seen: int, loss: float, now: float) -> None:
        rate = (images_seen - self.first) / (now - self.began)
        note = f"loss {loss:.4f}   {rate:.1f} img/s   {duration((self.total - images_seen) / rate)} left"
        if self.live:
            kimg = f"{images_seen / 1000:.1f}/{self.total / 1000:g}"
            self.bar.update(self.task, completed=images_seen, kimg=kimg, note=note)
        else:
            self.say(f"{images_seen / 1000:.2f} kimg   {note}")

    def tick(self, scalars: dict[str, Any]) -> None:
        shown = "   ".join(f"{name} {scalars[name]:{form}}" for name, form in COLUMNS.items() if name in scalars)
        skipped = f"   skipped {scalars['skipped_steps']}" if scalars["skipped_steps"] else ""
        self.say(f"{scalars['kimg']:.2f} kimg   {shown}{skipped}")

    def metric(self, record: dict[str, Any]) -> None:
        numbers = format_numbers(record["results"])
        self.say(f"{record['kimg']:.2f} kimg   {record['metric']}: {numbers}   in {record['seconds']} s")

    def finish(self, interrupted: bool, snapshot: Path | None) -> None:
        self.bar.stop()
        at = f"{self.stepper.images_seen / 1000:g} kimg"
        if interrupted:
            self.say(f"stopped at {at}, everything saved; to go on, run the same command again")
        else:
            command = shlex.join(
                ["diffit", "sample", "--network", str(snapshot), "--outdir", "samples", "--seeds", "0-63"]
            )
            self.say(f"done at {at}; next: {command}")
