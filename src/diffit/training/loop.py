"""A training run from start-up line to the last snapshot. To resume, run the same command again."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil
import torch
from torch import Tensor

from diffit.configs.schema import Config
from diffit.data.open import Archive
from diffit.errors import UserError
from diffit.models.autoencoder import Autoencoder
from diffit.training.batches import feed, fits, microbatches
from diffit.training.checkpoint import PREFIX, prune_states, read_progress
from diffit.training.console import Console, duration
from diffit.training.evaluator import Evaluator
from diffit.training.pictures import save_fakes, save_reals
from diffit.training.plan import plan
from diffit.training.report import write_report
from diffit.training.run_dir import (
    RunLog,
    create_run,
    find_state,
    kimg_number,
    prune_snapshots,
    read_options,
    retire_later,
    write_options,
)
from diffit.training.step import Stepper, build_network
from diffit.training.validation import validate
from diffit.utils.distributed import Processes, alone
from diffit.utils.precision import check_precision
from diffit.weights import newest_snapshot, save_network
from diffit.weights.adapt import init_from

logger = logging.getLogger(__name__)


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
    outdir: str | Path,
    procs: Processes | None = None,
    *,
    resume: str = "auto",
    val: Archive | None = None,
    autoencoder: Autoencoder | None = None,
) -> Outcome:
    """Train on ``archive`` in a run folder below ``outdir``; a latent model needs its ``autoencoder``.

    ``resume`` is ``auto`` (the newest state of the newest run in ``outdir`` whose options match), ``none``, or the
    path of a state or a run. ``val`` holds images whose loss is reported. All processes call this together; the first
    one writes. Raises :class:`UserError` before any work where something does not fit.
    """
    began, procs = time.monotonic(), procs or alone()
    precision = check_precision(config.training.precision, procs.device)
    state = procs.broadcast(find_state(config, Path(outdir), resume) if procs.is_first else None)
    with torch.random.fork_rng(devices=[procs.device] if procs.device.type == "cuda" else []):
        recorded = progress = None
        if state is not None:
            known = (read_options(state.parent), read_progress(state)) if procs.is_first else None
            recorded, progress = procs.broadcast(known)
        config = plan(config, archive, procs, autoencoder, recorded=recorded, progress=progress or (0, 0.0))
        training, net = config.training, build_network(config)
        begun = init_from(net, config, training.init_from) if training.init_from and state is None else None
        stepper = Stepper(config, procs, net, precision, autoencoder)
        if state is not None:
            stepper.restore(state)
        evaluator = Evaluator(config, archive, procs, autoencoder, batch=stepper.batch_gpu, precision=precision)
        total = training.steps * training.batch
        if state is not None and stepper.images_seen >= total and is_complete(state.parent, stepper, evaluator):
            return Outcome(state.parent, stepper.images_seen, False, None)
        # Before there is a run folder, because this finds faulty images.
        resident, loading = load_resident(archive, procs, training.workers)
        run_dir = procs.broadcast(open_run(Path(outdir), config, procs, state) if procs.is_first else None)
        log = RunLog(run_dir, stepper.images_seen) if procs.is_first else None
        with Console(log, stepper, total) as console:
            console.announce(run_dir, archive, loading, resumed=state is not None)
            if begun is not None:
                console.say(f"weights   {begun}")
            order = microbatches(
                len(archive), training.seed, stepper.images_seen, training.batch, stepper.batch_gpu,
                procs.rank, procs.count,
            )  # fmt: skip
            images = feed(archive, order, procs.device, resident=resident, workers=training.workers)
            run = Run(stepper, run_dir, console, evaluator, val, log, began - stepper.seconds)
            if state is None and procs.is_first:
                run.first_grids(archive)
            interrupted = run.steps(images, total, resumed=state is not None)
            return run.finish(interrupted)


def open_run(outdir: Path, config: Config, procs: Processes, state: Path | None) -> Path:
    """The folder of the run: that of the ``state``, or a new one, as for a state that was copied away from its own."""
    if state is None or read_options(state.parent) is None:
        run_dir = create_run(outdir, config, procs.count)
    else:
        run_dir = state.parent
        for path in retire_later(state):
            logger.warning("%s: later than what the run goes on from; it is %s now", run_dir, path.name)
    write_options(run_dir, config)
    return run_dir


def is_complete(run_dir: Path, stepper: Stepper, evaluator: Evaluator) -> bool:
    """Whether a run that has seen all its images has its snapshot and its metrics too. All processes ask together."""
    snapshot = run_dir / f"network-snapshot-{kimg_number(stepper.config, stepper.images_seen)}.safetensors"
    return bool(stepper.procs.broadcast(snapshot.exists())) and not evaluator.pending(run_dir, stepper.images_seen)


@dataclass
class Run:
    """The steps between start-up and end, with what is written on the way."""

    stepper: Stepper
    run_dir: Path
    console: Console
    evaluator: Evaluator
    val: Archive | None
    log: RunLog | None
    """None on all but the first process, which write nothing."""
    began: float
    """When the run began by the monotonic clock, less the time between its parts."""
    grid_seconds: float = 5.0
    """That a grid of samples takes, measured by the latest."""
    saved: dict[str, float] = field(default_factory=dict)
    """When the last state (dump) and snapshot (snap) were written."""

    def first_grids(self, archive: Archive) -> None:
        """``reals.png`` and ``fakes_init.png``."""
        self.console.say("grids     of training images and of the untrained network, for comparison")
        save_reals(self.stepper, archive, self.run_dir / "reals.png")
        began = time.monotonic()
        save_fakes(self.stepper, self.stepper.ema, self.run_dir / "fakes_init.png")
        self.grid_seconds = time.monotonic() - began

    def steps(self, images: Iterator[tuple[Tensor, Tensor | None]], total: int, *, resumed: bool) -> bool:
        """Train until ``total`` images are seen or the time is up; whether the run was asked to stop before."""
        training, stepper = self.stepper.config.training, self.stepper
        done, stop = stepper.images_seen >= total, False
        with stop_signals() as received:
            if done and not self.snapshot_path.exists():
                self.save_snapshot()  # it was stopped between the last state and this
            if resumed and (done or self.crossed(training.metrics_ticks)):
                self.evaluate()  # unless that was done before the run was stopped
            began, seen = time.monotonic(), stepper.images_seen
            self.saved = {"dump": began, "snap": began}
            while not (done or stop):
                stepper.step(images)
                stepper.seconds = time.monotonic() - self.began
                self.console.measured(stepper.images_seen, stepper.meter.last_loss)
                stop, time_is_up = self.must_stop(received)
                done = stepper.images_seen >= total or time_is_up
                end = done or stop
                if time_is_up:
                    self.end_here()
                if not end and self.overdue("dump"):
                    self.save_state()
                if not end and self.overdue("snap"):
                    self.save_snapshot()
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
        return stop and not done

    def crossed(self, ticks: int) -> bool:
        """Whether the last step crossed a multiple of so many ticks: a function of the images seen, as resume needs."""
        if not ticks:
            return False
        training, seen = self.stepper.config.training, self.stepper.images_seen
        period = ticks * training.tick * 1000
        return int(seen / period) > int((seen - training.batch) / period)

    def overdue(self, what: str) -> bool:
        """Whether the first process, which alone saves, has not saved a state (dump) or snapshot (snap) for long."""
        training = self.stepper.config.training
        period = 60 * (training.dump_minutes if what == "dump" else training.snap_minutes)
        if what == "snap" and period:  # other processes wait for its grid, which may take a fiftieth of the time
            period = max(period, 50 * self.grid_seconds)
        return self.log is not None and 0 < period < time.monotonic() - self.saved[what]

    def end_here(self) -> None:
        """The time is up: what was trained is the whole length, for whoever runs the same command again."""
        stepper = self.stepper
        training = stepper.config.training.model_copy(update={"kimg": stepper.images_seen / 1000})
        stepper.config = stepper.config.model_copy(update={"training": training})
        if self.log is not None:
            write_options(self.run_dir, stepper.config)

    def must_stop(self, received: list[int]) -> tuple[bool, bool]:
        """Whether to end here on request, and whether the time is up: the same answer on all processes.

        Raises :class:`UserError` where gradients stay non-finite.
        """
        stepper, limit, procs = self.stepper, self.stepper.config.training.max_skipped, self.stepper.procs
        steps = stepper.images_seen // stepper.config.training.batch
        if steps % limit == 0 and int(stepper.meter.skipped_in_a_row) >= limit:
            self.save_state()
            procs.barrier()  # a launcher ends all processes with the first: the state must be on disk by then
            raise UserError(
                f"{limit} steps in a row had a non-finite gradient and were skipped; the last good weights are "
                f"saved in {self.run_dir}. Remedies: a lower --lr, --precision bf16 or fp32, a look at the data with "
                f"`diffit data check`; then go on with --resume {self.run_dir}"
            )
        # With several processes asking costs a collective, so they ask every tenth step.
        if procs.count > 1 and steps % 10:
            return False, False
        answer = procs.max(2 if received else int(self.time_is_up()))
        return answer == 2, answer == 1

    def time_is_up(self) -> bool:
        """Whether the minutes that are left are what the last grids and snapshot take, as the first process sees it."""
        minutes = self.stepper.config.training.minutes
        if self.log is None or minutes is None or "kimg" not in self.stepper.config.training.chosen:
            return False
        grids = 2 if self.stepper.ema_warming_up else 1
        return self.stepper.seconds + grids * self.grid_seconds + 2 >= minutes * 60

    def write_stats(self, images: int, seconds: float) -> None:
        """One line of statistics, of the ``images`` and ``seconds`` since the last."""
        stepper, batch = self.stepper, self.stepper.config.training.batch
        scalars = {"kimg": stepper.images_seen / 1000, "steps": stepper.images_seen // batch}
        scalars |= stepper.meter.read(stepper.procs.count)
        scalars |= {"lr": stepper.optimizer.param_groups[0]["lr"], "img_per_sec": images / seconds, "sec": seconds}
        scalars["memory_gib"] = peak_memory(stepper.procs.device) / 2**30
        if self.val is not None:
            scalars["val_loss"] = validate(stepper, self.val)
        if self.log is not None:
            self.log.stats(stepper.images_seen, scalars)
            self.console.tick(scalars)

    def save_state(self) -> None:
        if self.log is not None:
            self.stepper.save(self.run_dir / f"{PREFIX}{kimg_number(self.stepper.config, self.stepper.images_seen)}")
            prune_states(self.run_dir)
            self.saved["dump"] = time.monotonic()

    @property
    def snapshot_path(self) -> Path:
        number = kimg_number(self.stepper.config, self.stepper.images_seen)
        return self.run_dir / f"network-snapshot-{number}.safetensors"

    def save_snapshot(self) -> None:
        """The averaged weights and a grid of them, and while the average is warming up a grid of the raw weights."""
        if self.log is None:
            return
        stepper, path = self.stepper, self.snapshot_path
        number = path.stem.removeprefix("network-snapshot-")
        self.console.say(f"{stepper.images_seen / 1000:.2f} kimg   saving {path.name}, then a grid of its samples")
        save_network(path, stepper.ema.state_dict(), stepper.config, kimg=stepper.images_seen / 1000)
        grid = self.run_dir / f"fakes{number}.png"
        began = time.monotonic()
        save_fakes(stepper, stepper.ema, grid)
        self.grid_seconds = time.monotonic() - began
        self.log.picture("fakes", grid, stepper.images_seen)
        if stepper.ema_warming_up:
            save_fakes(stepper, stepper.net, self.run_dir / f"fakes{number}-raw.png")
        prune_snapshots(self.run_dir, stepper.config.training.keep)
        self.saved["snap"] = time.monotonic()

    def evaluate(self) -> None:
        """Metrics of the averaged weights, by all processes, where there is no record of them yet."""
        stepper = self.stepper
        if self.evaluator.pending(self.run_dir, stepper.images_seen):
            for record in self.evaluator(stepper.ema, stepper.images_seen, self.log):
                self.console.metric(record)
            if self.log is not None:
                write_report(self.run_dir)

    def finish(self, interrupted: bool) -> Outcome:
        self.stepper.procs.barrier()
        snapshot = newest_snapshot(self.run_dir)
        if self.log is not None:
            write_report(self.run_dir)
            self.console.finish(interrupted, snapshot)
            self.log.close()
        return Outcome(self.run_dir, self.stepper.images_seen, interrupted, snapshot)


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
    """A list that is filled by the first Ctrl-C or SIGTERM, which is acknowledged; a second one interrupts at once."""
    received: list[int] = []
    first = os.environ.get("RANK", "0") == "0"

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if first:  # not by a logger or console, which may be at work right now
            os.write(2, b"\nstopping after this step, and saving; once more leaves at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
