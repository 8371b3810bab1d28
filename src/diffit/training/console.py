"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere, both into log.txt."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from diffit.training.run_dir import Records


def duration(seconds: float) -> str:
    """Two units are enough: ``3 h 20 min``."""
    seconds = round(seconds)
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part_size} {part}"
    return f"{seconds} s"


class Display:
    """Progress in images. ``records`` is None on all but the first process, which stay silent."""

    def __init__(self, records: Records | None, total_images: int, images_seen: int) -> None:
        self.records = records
        self.console = Console(quiet=records is None, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal
        self.interval = 1.0 if self.live else 15.0
        self.total = total_images
        self.first = images_seen
        self.steps = 0
        self.began = self.updated = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.fields[kimg]} kimg"), BarColumn(), TextColumn("{task.fields[note]}"),
            console=self.console, disable=not self.live, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task("train", total=total_images, completed=images_seen, kimg="0", note="first step …")

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
        if self.records is not None:
            self.records.log(text)

    def measured(self, images_seen: int, loss: Tensor) -> None:
        """Called after every step. Reads ``loss`` only when it is time to show something: a GPU is made to wait."""
        now = time.monotonic()
        self.steps += 1
        if self.records is None:
            return
        if self.steps in (1, 4):  # the first step pays for compilation and caches
            float(loss)
            now = time.monotonic()
        if self.steps == 1:
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
