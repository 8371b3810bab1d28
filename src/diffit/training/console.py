"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere, both into log.txt."""

import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from diffit.configs.schema import MARGIN, student_title
from diffit.data.open import Archive
from diffit.metrics.record import format_numbers
from diffit.metrics.suite import parse_metrics
from diffit.models.cost import FORWARDS, count_work, estimate
from diffit.sampling.cost import count_evaluations
from diffit.training.evaluator import sampled_for_metrics
from diffit.training.run_dir import RunLog
from diffit.training.step import Stepper
from diffit.training.usual import usual_loss
from diffit.utils.progress import duration, minutes_text

GIB = 2**30
MANY_EPOCHS, FEW_IMAGES = 100, 20_000


class _Terminal(rich.console.Console):
    """One that may go away, with the window or the program at the other end of a pipe: the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Console:
    """Progress in images. ``log`` is None on all but the first process, which stay silent."""

    def __init__(self, log: RunLog | None, stepper: Stepper, total_images: int, resume: str = "auto") -> None:
        self.log, self.stepper, self.total, self.resume = log, stepper, total_images, resume
        self.expected = max(stepper.end, stepper.images_seen)  # as it begins; later the stepper knows better
        self.console = _Terminal(quiet=log is None, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal
        self.interval = 1.0 if self.live else 60.0
        self.first, self.steps = stepper.images_seen, 0
        self.saved = "everything saved"
        self.began = self.updated = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.fields[kimg]} kimg"), BarColumn(), TextColumn("{task.fields[note]}"),
            console=self.console, disable=not self.live, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task("train", total=self.expected, completed=self.first, kimg="0", note="first step …")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self.bar.stop()

    def say(self, text: str) -> None:
        if self.log is not None:
            self.log.line(text)
        with suppress(OSError):
            self.console.print(text, markup=False)

    def announce(self, run_dir: Path, archive: Archive, loading: str, *, resumed: bool) -> None:
        """The start-up lines: what is about to happen, and what it takes."""
        stepper, config, procs = self.stepper, self.stepper.config, self.stepper.procs
        training, (channels, height, width) = config.training, config.image_shape
        cost = estimate(config, stepper.batch_gpu, stepper.precision, procs.device.type, procs.count)
        images = self.expected - stepper.images_seen
        classes = f"{config.model.num_classes} classes" if config.model.num_classes else "unconditional"
        minutes = training.clock_minutes
        length = "" if minutes is None else f"{minutes_text(minutes)} in all, with grids: about "
        resumed_at = f", resumed at {stepper.images_seen / 1000:g} kimg" if resumed else ""
        student = config.distillation
        for line in (
            f"run       {run_dir}{resumed_at}",
            f"data      {len(archive)} images of {width}×{height}×{channels}, {classes}: {archive.path}",
            f"model     {config.preset}: {cost.parameters / 1e6:.3g} M parameters, "
            f"{count_work(config).macs / 1e9:.3g} G multiply-accumulates, {stepper.precision} on {procs.device.type}",
            *([] if student is None else [f"student   {student_title(config)}"]),
            f"batch     {training.batch} = {stepper.batch_gpu} per GPU × {procs.count} processes "
            f"× {stepper.rounds} accumulated",
            f"duration  {length}{images:,} {'more ' if resumed else ''}images, {images // training.batch:,} steps, "
            f"{images / len(archive):.3g} epochs",
            f"memory    about {cost.training_bytes / GIB:.2f} GiB a process, "
            f"{cost.activation_bytes / GIB:.2f} of it for activations",
            f"loading   {loading}",
            *self._warnings(archive),
        ):
            self.say(line)

    def _warnings(self, archive: Archive) -> Iterator[str]:
        """What a person should know before waiting."""
        config = self.stepper.config
        training = config.training
        epochs = self.expected / len(archive)
        if epochs > MANY_EPOCHS and len(archive) < FEW_IMAGES:
            yield (
                f"note      {len(archive)} images will be seen {epochs:.0f} times each: samples will come to repeat "
                "them (`diffit metrics copies` tells); more images or --mirror help"
            )
        if training.metrics and training.metrics_budget is not None:
            yield f"metrics   at most {100 * training.metrics_budget:.3g} % of the time, but for the first and the last"
        elif training.metrics and training.metrics_ticks:
            samples = max(metric.samples for metric in parse_metrics(training.metrics))
            passes = sum(count_evaluations(sampled_for_metrics(config)))
            share = samples * passes / (FORWARDS * 1000 * training.tick * training.metrics_ticks)
            yield (
                f"metrics   {samples:,} samples of {passes} passes every {training.metrics_ticks} ticks: about "
                f"{share:.0%} of the training between them"
                + ("; --metrics-steps or a larger --metrics-ticks make it less" if share > 0.2 else "")
            )

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
            left = duration(self._seconds_left(images_seen, rate))
            self.say(f"time      about {left} at {rate:.1f} img/s, measured over three steps")
            meaning = "1.0 is nothing learnt yet; " if self.stepper.config.distillation is None else ""
            self.say(f"loss      {meaning}in brackets from low to high noise")
        elif now - self.updated >= self.interval:
            self.updated = now
            self.show(images_seen, float(loss), now)

    def show(self, images_seen: int, loss: float, now: float) -> None:
        rate = (images_seen - self.first) / (now - self.began)
        left = duration(self._seconds_left(images_seen, rate))
        pace = f"{rate:.1f} img/s   {left} left"
        end = max(self.stepper.end, images_seen)
        length = f"{end / 1000:g}"
        if self.stepper.config.training.clock_minutes is not None:  # an estimate, made anew every second
            length = f"{float(f'{end / 1000:.3g}'):g}"
        if self.live:
            kimg, note = f"{images_seen / 1000:.1f}/{length}", f"loss {loss:.4f}   {pace}"
            self.bar.update(self.task, completed=images_seen, total=end, kimg=kimg, note=note)
        else:  # the loss, a mean over many steps, is in the lines of ticks
            self.say(f"{images_seen / 1000:.2f} of {length} kimg   {pace}")

    def _seconds_left(self, images_seen: int, rate: float) -> float:
        """Until the last image, or until the clock ends the run."""
        minutes, left = self.stepper.config.training.clock_minutes, (self.total - images_seen) / rate
        if minutes is not None:
            left = min(left, max(minutes * 60 - self.stepper.seconds, 0))
        return left

    def tick(self, scalars: dict[str, Any]) -> None:
        """The line fits 80 columns; the rest is in the statistics."""
        by_noise = " ".join(f"{value:.2f}" for name, value in scalars.items() if name.startswith("loss_"))
        parts = [f"{scalars['kimg']:.2f} kimg", f"loss {scalars['loss']:.4f} ({by_noise})"]
        usual = usual_loss(self.stepper.config, scalars["kimg"], self.stepper.end / 1000)
        parts += [f"usual {usual:.2f}"] if usual is not None else []
        parts += [f"val {scalars['val_loss']:.4f}"] if "val_loss" in scalars else []
        parts += [f"{scalars['img_per_sec']:.1f} img/s"]
        parts += [f"skipped {scalars['skipped_steps']}"] if scalars["skipped_steps"] else []
        self.say("   ".join(parts))

    def metric(self, record: dict[str, Any]) -> None:
        numbers = format_numbers(record["results"])
        self.say(f"{record['kimg']:.2f} kimg   {record['metric']}: {numbers}   in {record['seconds']} s")

    def finish(self, interrupted: bool, snapshot: Path | None) -> None:
        with suppress(OSError):
            self.bar.stop()
        at = f"{self.stepper.images_seen / 1000:g} kimg"
        if interrupted:
            without = "" if self.resume == "auto" else f" without --resume {self.resume}"
            self.say(f"stopped at {at}, {self.saved}; to go on, run the same command again{without}")
            if snapshot is not None:
                self.say(f"what it has learnt so far: {sample_command(snapshot)}")
        else:
            self._tell_if_short()
            self.say(f"done at {at}; next: {sample_command(snapshot)}")
            if snapshot is not None:
                for best in sorted(snapshot.parent.glob("network-best-*.safetensors")):
                    self.say(f"best by {best.stem.removeprefix('network-best-')}: {sample_command(best)}")

    def _tell_if_short(self) -> None:
        """Where a run by the clock ended long before its minutes or its expected length: its pictures are no sign of
        what the network can do."""
        training, minutes = self.stepper.config.training, self.stepper.config.training.clock_minutes
        made, planned = (images // training.batch for images in (self.stepper.images_seen, self.expected))
        if minutes is None:
            return
        if self.stepper.seconds < 0.8 * 60 * minutes and self.stepper.images_seen >= self.total:
            self.say(
                f"note      {made} steps, after {duration(self.stepper.seconds)} of {minutes_text(minutes)}: the "
                f"machine was more than {MARGIN:g} times as fast as measured; more --minutes go on"
            )
        elif made < planned / 2:
            self.say(
                f"note      {made} of {planned} steps in {minutes_text(minutes)}: the machine was "
                "slower than measured, or grids took the time (a smaller --grid takes less); more --minutes go on"
            )


def sample_command(network: Path | None) -> str:
    folder = "samples" if network is None else f"samples-{network.stem.removeprefix('network-')}"
    return shlex.join(
        ["diffit", "sample", "--network", str(network), "--outdir", folder, "--seeds", "0-63", "--grid", "8x8"]
    )
