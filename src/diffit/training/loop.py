"""A training run from start-up line to the last snapshot. To resume, run the same command again."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from diffit.configs.schema import Config, Sampling, Training
from diffit.errors import UserError
from diffit.metrics.record import format_numbers
from diffit.models import DiffiT
from diffit.models.autoencoder import Autoencoder
from diffit.models.cost import estimate
from diffit.sampling.generate import draw
from diffit.training.batches import Archive, feed, fits, image_indices, microbatches
from diffit.training.checkpoint import PREFIX, load_optimizer_tensors, load_state, save_state, states
from diffit.training.console import Display, duration
from diffit.training.evaluator import Evaluator
from diffit.training.report import write_report
from diffit.training.run_dir import Records, create_run, find_resumable, locate_state, read_options, write_options
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import Processes
from diffit.utils.images import save_grid, to_uint8
from diffit.utils.precision import autocast, check_precision
from diffit.utils.randomness import SUBSET, VALIDATION, make_generator
from diffit.weights.file import load_into, read_network_file, save_network

GRID = (8, 8)
KEEP_STATES = 2
VALIDATION_IMAGES = 1024
WATCHING_STEPS = 25


@dataclass(frozen=True)
class Outcome:
    """Where a run ended."""

    run_dir: Path
    images_seen: int
    interrupted: bool
    snapshot: Path | None


def train(
    config: Config,
    archive: Archive,
    outdir: Path,
    procs: Processes,
    *,
    resume: str = "auto",
    desc: str | None = None,
    grid: tuple[int, int] = GRID,
    val: Archive | None = None,
    autoencoder: Autoencoder | None = None,
) -> Outcome:
    """Train on ``archive`` in a run folder below ``outdir``; a latent model needs its ``autoencoder``.

    ``resume`` is ``auto`` (the newest state of the newest run in ``outdir`` whose options match), ``none``, or the
    path of a state or a run. All processes call this together; the first one writes. Raises :class:`UserError`
    before any work where something does not fit.
    """
    precision = check_precision(config.training.precision, procs.device)
    state = procs.broadcast(find_state(config, outdir, resume) if procs.is_first else None)
    with torch.random.fork_rng(devices=[procs.device] if procs.device.type == "cuda" else []):
        net = build_network(config)
        if config.training.init_from and state is None:
            load_into(net, read_network_file(config.training.init_from)[0], config.training.init_from)
        stepper = Stepper(config, procs, net, precision, autoencoder)
        if state is not None:
            restore(stepper, state)
        total = config.training.steps * config.training.batch
        evaluator = Evaluator(config, archive, procs, autoencoder, batch=stepper.batch_gpu, precision=precision)
        finished = state is not None and stepper.images_seen >= total
        if state is not None and finished and not evaluator.pending(state.parent, stepper.images_seen):
            return Outcome(state.parent, stepper.images_seen, False, None)
        # Before there is a run folder, because this finds faulty images.
        resident, loading = load_resident(archive, procs, config.training.workers)
        run_dir = None
        if procs.is_first:  # a new run also for a state that was copied away from its own
            lonely = state is None or read_options(state.parent) is None
            run_dir = create_run(outdir, config, procs.count, desc) if lonely else state.parent
        run_dir = procs.broadcast(run_dir)
        run = Run(stepper, archive, run_dir, total, grid, val, evaluator)
        return run.go(resident, loading, resumed=state is not None)


def find_state(config: Config, outdir: Path, resume: str) -> Path | None:
    if resume == "none":
        return None
    return find_resumable(outdir, config) if resume == "auto" else locate_state(Path(resume))


def restore(stepper: Stepper, folder: Path) -> None:
    """Take up a training state exactly: weights, average, moments, loss scaler and place in the data."""
    tensors, facts = load_state(folder)
    load_into(stepper.net, tensors["model"], folder)
    load_into(stepper.ema, tensors["ema"], folder)
    load_optimizer_tensors(stepper.optimizer, stepper.net, tensors["optimizer"])
    if facts["scaler"]:
        stepper.scaler.load_state_dict(facts["scaler"])
    stepper.images_seen = facts["images_seen"]


def load_resident(archive: Archive, procs: Processes, workers: int) -> tuple[Tensor | None, str]:
    """All images as one tensor, on the device or in memory, where they fit; None where they must be streamed.

    And what to say of it.
    """
    need = len(archive) * archive[0].nbytes
    on_device = procs.device.type == "cuda" and fits(need, torch.cuda.mem_get_info(procs.device)[0])
    if not on_device and not fits(need, psutil.virtual_memory().available, procs.count):
        return None, f"streamed by {workers} workers: {need / 2**30:.1f} GiB do not fit"
    began = time.monotonic()
    images = archive.load_all()
    place = "on the device" if on_device else "in memory"
    said = f"{need / 2**20:.0f} MiB {place}, decoded in {duration(time.monotonic() - began)}"
    return images.to(procs.device) if on_device else images, said


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is filled by the first Ctrl-C or SIGTERM; a second one interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """The steps of one run between start-up and end, with what it writes on the way."""

    def __init__(
        self,
        stepper: Stepper,
        archive: Archive,
        run_dir: Path,
        total: int,
        grid: tuple[int, int],
        val: Archive | None,
        evaluator: Evaluator,
    ) -> None:
        self.evaluator = evaluator
        self.stepper, self.archive, self.run_dir, self.total = stepper, archive, run_dir, total
        self.config, self.procs = stepper.config, stepper.procs
        self.grid, self.val = grid, val
        self.records = Records(run_dir, stepper.images_seen) if self.procs.is_first else None
        self.display = Display(self.records, total, stepper.images_seen)
        self.snapshot = max(run_dir.glob("network-snapshot-*.safetensors"), default=None)

    def go(self, resident: Tensor | None, loading: str, *, resumed: bool) -> Outcome:
        training, stepper = self.config.training, self.stepper
        if self.procs.is_first:
            write_options(self.run_dir, self.config)
        self.announce(resumed)
        self.display.say(f"loading   {loading}")
        order = microbatches(
            len(self.archive), training.seed, stepper.images_seen, training.batch, stepper.batch_gpu,
            self.procs.rank, self.procs.count,
        )  # fmt: skip
        images = feed(self.archive, order, self.procs.device, resident=resident, workers=training.workers)
        if not resumed and self.procs.is_first:
            self.save_reals()
            self.save_fakes("fakes_init.png", stepper.ema)

        done, stop = stepper.images_seen >= self.total, False
        with self.display, stop_signals() as received:
            if resumed and (done or self.crossed(training.metrics_ticks)):
                self.evaluate()  # unless that was done before the run was stopped
            began, seen = time.monotonic(), stepper.images_seen
            while not (done or stop):
                stepper.step(images)
                self.display.measured(stepper.images_seen, stepper.meter.last_loss)
                done, stop = stepper.images_seen >= self.total, self.must_stop(received)
                end = done or stop
                if end or self.crossed(1):
                    self.write_stats(stepper.images_seen - seen, time.monotonic() - began)
                    due = done or self.crossed(training.metrics_ticks)
                    # The state first: who asked the run to stop may not wait for grids, nor who kills it for metrics.
                    if end or due or self.crossed(training.dump):
                        self.save_state()
                    if end or self.crossed(training.snap):
                        self.save_snapshot()
                    if due and not stop:
                        self.evaluate()
                    began, seen = time.monotonic(), stepper.images_seen
        return self.finish(stop and not done)

    def crossed(self, ticks: int) -> bool:
        """Whether the last step crossed a multiple of so many ticks: a function of the images seen, as resume needs."""
        if not ticks:
            return False
        period = ticks * self.config.training.tick * 1000
        seen, batch = self.stepper.images_seen, self.config.training.batch
        return int(seen / period) > int((seen - batch) / period)

    def announce(self, resumed: bool) -> None:
        """The start-up lines: what is about to happen, and what it takes."""
        training, stepper, procs = self.config.training, self.stepper, self.procs
        cost = estimate(self.config, stepper.batch_gpu, stepper.precision)
        images = self.total - stepper.images_seen
        channels, height, width = self.config.image_shape
        classes = f"{self.config.model.num_classes} classes" if self.config.model.num_classes else "unconditional"
        resumed_at = f", resumed at {stepper.images_seen / 1000:g} kimg" if resumed else ""
        gib = 2**30
        for line in (
            f"run       {self.run_dir}{resumed_at}",
            f"data      {len(self.archive)} images of {width}×{height}×{channels}, {classes}: {self.archive.path}",
            f"model     {self.config.preset}: {cost.parameters:,} parameters, {cost.macs / 1e9:.3g} G "
            f"multiply-accumulates an image, {stepper.precision} on {procs.device.type}",
            f"batch     {training.batch} = {stepper.batch_gpu} per GPU × {procs.count} processes "
            f"× {stepper.rounds} accumulated",
            f"duration  {images:,} images, {images // training.batch:,} steps, "
            f"{images / len(self.archive):.3g} epochs; the time that takes is said after the first steps",
            f"memory    about {cost.training_bytes / gib:.2f} GiB a process, "
            f"{cost.activation_bytes / gib:.2f} of it for activations",
        ):
            self.display.say(line)

    def must_stop(self, received: list[int]) -> bool:
        """Whether to end here: on request, or because gradients stay non-finite. The same answer on all processes."""
        stepper, limit = self.stepper, self.config.training.max_skipped
        steps = stepper.images_seen // self.config.training.batch
        if steps % limit == 0 and int(stepper.meter.skipped_in_a_row) >= limit:
            self.save_state()
            self.procs.barrier()  # a launcher ends all processes with the first: the state must be on disk by then
            raise UserError(
                f"{limit} steps in a row had a non-finite gradient and were skipped; the last good weights are "
                f"saved in {self.run_dir}. Remedies: a lower --lr, --precision bf16 or fp32, a look at the data with "
                f"`diffit data check`; then go on with --resume {self.run_dir}"
            )
        # With several processes asking costs a collective, so they ask every tenth step.
        if self.procs.count > 1 and steps % 10:
            return False
        return self.procs.any(bool(received))

    def write_stats(self, images: int, seconds: float) -> None:
        stepper = self.stepper
        scalars: dict[str, Any] = {
            "kimg": stepper.images_seen / 1000,
            "steps": stepper.images_seen // self.config.training.batch,
        }
        scalars |= stepper.meter.read(self.procs.count)
        scalars |= {"lr": stepper.optimizer.param_groups[0]["lr"], "img_per_sec": images / seconds, "sec": seconds}
        scalars["memory_gib"] = peak_memory(self.procs.device) / 2**30
        if self.val is not None:
            scalars["val_loss"] = self.validate(self.val)
        if self.records is None:
            return
        self.records.stats(stepper.images_seen, scalars)
        names = {
            "loss": ".4f",
            "val_loss": ".4f",
            "grad_norm": ".3g",
            "lr": ".2g",
            "img_per_sec": ".1f",
            "memory_gib": ".2f",
        }
        shown = "   ".join(f"{name} {scalars[name]:{form}}" for name, form in names.items() if name in scalars)
        skipped = f"   skipped {scalars['skipped_steps']}" if scalars["skipped_steps"] else ""
        self.display.say(f"{scalars['kimg']:.2f} kimg   {shown}{skipped}")

    @torch.no_grad()
    def validate(self, archive: Archive) -> float:
        """Loss of the averaged weights on held-out images, with the same noise every time, over all processes."""
        stepper, device = self.stepper, self.procs.device
        count = min(len(archive), VALIDATION_IMAGES)
        chosen = image_indices(len(archive), self.config.training.seed, 0, count)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        starts = range(0, count, stepper.batch_gpu)
        for start in starts[self.procs.rank :: self.procs.count]:
            indices = chosen[start : start + stepper.batch_gpu]
            data = torch.stack([archive[i] for i in indices.tolist()]).to(device)
            labels = archive.labels[indices].to(device) if archive.labels is not None else None
            generator = make_generator(self.config.training.seed, VALIDATION, start, device=device)
            images = stepper.clean(data, generator, mirror=False)
            with autocast(device, stepper.precision):
                loss = stepper.loss(stepper.ema, images, labels, generator=generator)
            sums += torch.stack([loss.double().sum(), torch.tensor(len(indices), device=device)])
        if self.procs.count > 1:
            dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def save_reals(self) -> None:
        count = min(self.grid[0] * self.grid[1], len(self.archive))
        indices = torch.randperm(len(self.archive), generator=make_generator(self.config.training.seed, SUBSET))[:count]
        reals = torch.stack([self.archive[i] for i in sorted(indices.tolist())])
        if reals.ndim == 5:  # cached latents: as the autoencoder shows them
            assert self.stepper.autoencoder is not None
            reals = to_uint8(
                self.stepper.autoencoder.decode(reals[:, 0].float() * self.stepper.autoencoder.scale)
            ).cpu()
        save_grid(reals, self.run_dir / "reals.png", self.grid)

    def save_fakes(self, name: str, net: DiffiT) -> None:
        """A grid whose image at each place keeps its seed and class through the run."""
        stepper, seeds = self.stepper, range(self.grid[0] * self.grid[1])
        classes = self.config.model.num_classes
        labels = torch.arange(len(seeds)) % classes if classes else None
        net.eval()
        sampling = watching(self.config.sampling)
        images = [
            to_uint8(draw(net, self.config, seeds[part], None if labels is None else labels[part], sampling=sampling,
                          autoencoder=stepper.autoencoder, precision=stepper.precision), sampling.rounding).cpu()
            for part in (slice(i, i + stepper.batch_gpu) for i in range(0, len(seeds), stepper.batch_gpu))
        ]  # fmt: skip
        net.train(net is stepper.net)
        save_grid(torch.cat(images), self.run_dir / name, self.grid)

    def save_snapshot(self) -> None:
        """The averaged weights and a grid of them, and while the average is young a grid of the raw weights."""
        if not self.procs.is_first:
            return
        stepper, training = self.stepper, self.config.training
        kimg = stepper.images_seen // 1000
        self.snapshot = self.run_dir / f"network-snapshot-{kimg:06d}.safetensors"
        save_network(self.snapshot, stepper.ema.state_dict(), self.config, kimg=stepper.images_seen / 1000)
        self.save_fakes(f"fakes{kimg:06d}.png", stepper.ema)
        if is_young(training, stepper.images_seen):
            self.save_fakes(f"fakes{kimg:06d}-raw.png", stepper.net)

    def evaluate(self) -> None:
        """Metrics of the averaged weights, by all processes, where there is no record of them yet."""
        stepper = self.stepper
        if self.evaluator.pending(self.run_dir, stepper.images_seen):
            for card in self.evaluator(stepper.ema, stepper.images_seen, self.records):
                numbers = format_numbers(card["results"])
                self.display.say(f"{card['kimg']:.2f} kimg   {card['metric']}: {numbers}   in {card['seconds']} s")
            if self.procs.is_first:
                write_report(self.run_dir)

    def save_state(self) -> None:
        if not self.procs.is_first:
            return
        stepper = self.stepper
        facts = {
            "images_seen": stepper.images_seen,
            "scaler": stepper.scaler.state_dict(),
            "config": self.config.model_dump(mode="json"),
        }
        folder = self.run_dir / f"{PREFIX}{stepper.images_seen // 1000:06d}"
        save_state(folder, stepper.net, stepper.ema, stepper.optimizer, facts)
        for old in states(self.run_dir)[:-KEEP_STATES]:
            for item in old.iterdir():
                item.unlink()
            old.rmdir()

    def finish(self, interrupted: bool) -> Outcome:
        self.procs.barrier()
        if self.records is not None:
            write_report(self.run_dir)
            at = f"{self.stepper.images_seen / 1000:g} kimg"
            if interrupted:
                self.display.say(f"stopped at {at}, everything saved; to go on, run the same command again")
            else:
                self.display.say(
                    f"done at {at}; next: diffit sample --network {self.snapshot} --outdir samples --seeds 0-63"
                )
            self.records.close()
        return Outcome(self.run_dir, self.stepper.images_seen, interrupted, self.snapshot)


def watching(sampling: Sampling) -> Sampling:
    """Settings for a run's grids: hundreds of ancestral steps a grid could take longer than what lies between two."""
    if sampling.sampler != "ddpm":
        return sampling
    steps = min(sampling.steps, WATCHING_STEPS) if isinstance(sampling.steps, int) else sampling.steps
    return sampling.model_copy(update={"sampler": "dpm++", "steps": steps})


def is_young(training: Training, images_seen: int) -> bool:
    """Whether the average still forgets its beginning: its half-life ramps up, or a twentieth of it is left."""
    if training.ema_decay is not None:
        return training.ema_decay ** (images_seen / training.batch) > 0.05
    return images_seen * training.ema_rampup_ratio < training.ema_halflife_kimg * 1000


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
