"""The steps of a run between start-up and end, with what is saved, shown and judged on the way."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from diffit.data.open import Archive
from diffit.errors import UserError
from diffit.models import DiffiT
from diffit.training.checkpoint import PREFIX, StateWriter, read_progress, states, verify_state
from diffit.training.console import Console
from diffit.training.evaluator import Evaluator
from diffit.training.pictures import save_fakes, save_progress, save_reals
from diffit.training.report import write_report
from diffit.training.run_dir import RunLog, kimg_number, prune_snapshots, write_options
from diffit.training.signals import StopSignals
from diffit.training.step import Stepper
from diffit.training.stopwatch import Stopwatch
from diffit.training.validation import Validation
from diffit.utils.distributed import Processes, is_lost_connection
from diffit.weights import newest_snapshot, save_network


@dataclass(frozen=True)
class Outcome:
    """Where a run ended."""

    run_dir: Path
    images_seen: int
    snapshot: Path | None
    complete: bool = True
    """With all its images, pictures and metrics."""
    signal: int | None = None
    """That asked it to stop, if only at its end."""


class Stopped(Exception):
    """In the middle of metrics, which the next start makes."""


ASK_EVERY_MS = 1000
MOST_ROLLBACKS = 3


@dataclass(frozen=True)
class Due:
    """What all processes have agreed to do after a step."""

    stop: bool = False
    time_is_up: bool = False
    state: bool = False
    snapshot: bool = False


@dataclass
class Pace:
    """Images a second over a whole run with all that it does between steps.

    Attributes:
        images: that were seen before this part of the run.
        seconds: that they took.
        first: when the first step of this part, which pays for compilation, was over, and at how many images.
    """

    images: int
    seconds: float
    first: tuple[float, int] | None = None

    def rate(self, seen: int, seconds: float) -> float | None:
        """At so many ``seconds`` of the run; None when it is asked for the first time."""
        if self.first is None:
            self.first = seconds, seen
            return None
        return (self.images + seen - self.first[1]) / (self.seconds + seconds - self.first[0])


@dataclass
class Run:
    """The steps between start-up and end, with what is written on the way."""

    stepper: Stepper
    run_dir: Path
    console: Console
    evaluator: Evaluator
    val: Validation | None
    log: RunLog | None
    """None on all but the first process, which write nothing."""
    signals: StopSignals
    watch: Stopwatch
    grid_seconds: float = 5.0
    """That a grid of samples takes, measured by the latest."""
    saved: dict[str, float] = field(default_factory=dict)
    """When the last state and snapshot were written."""
    asked: tuple[float, int] = (0.0, 0)
    """When the processes last agreed, and at how many images."""
    pace: Pace = field(init=False)
    steps_between: int = 1
    """Steps from one agreement to the next, about a second of them where asking waits for others or for a GPU."""
    rollbacks: int = 0
    writer: StateWriter = field(default_factory=StateWriter)

    def __post_init__(self) -> None:
        self.pace = Pace(self.stepper.images_seen, self.stepper.seconds)

    def first_grids(self, archive: Archive) -> None:
        """``reals.png`` and ``fakes_init.png``."""
        ema = self.stepper.whole(self.stepper.ema)
        if self.log is not None:
            columns, rows = self.stepper.config.training.grid
            self.console.say(
                f"grids     {columns}x{rows} training images and samples before the first step, to compare"
            )
            self.signals.unless_in_haste(lambda: save_reals(self.stepper, archive, self.run_dir / "reals.png"))
            began = self.watch.seconds()
            fakes = self.run_dir / "fakes_init.png"
            self.signals.unless_in_haste(lambda: save_fakes(self.stepper, ema, fakes))
            self.grid_seconds = self.watch.seconds() - began
        self.stepper.procs.wait_for_first()

    def steps(
        self, images: Iterator[tuple[Tensor, Tensor | None]], total: int, *, resumed: bool
    ) -> tuple[bool, int | None]:
        """Train until ``total`` images are seen or the time is up; whether the run is complete, and the signal
        that asked to stop; the same on all processes.
        """
        training, stepper = self.stepper.config.training, self.stepper
        done, due = stepper.images_seen >= total, Due()
        if done and not has_pictures(self.run_dir, stepper):
            self.save_snapshot()  # it was stopped between the last state and this
        if resumed and (done or (training.metrics_budget is None and self.crossed(training.metrics_ticks))):
            self.evaluate()  # unless that was done before the run was stopped
        began, seen = time.monotonic(), stepper.images_seen
        self.saved, self.asked = {"state": began, "snapshot": began}, (began, seen)
        while not (done or due.stop):
            self.step(images)
            due = self.agree()
            done = stepper.images_seen >= total or due.time_is_up
            end = done or due.stop
            if due.time_is_up:
                self.end_here()
            if due.state and not end:
                self.save_state()
            if due.snapshot and not end:
                self.save_snapshot()
            if end or self.crossed(1):
                with self.saved_on_failure():
                    scalars = self.scalars(stepper.images_seen - seen, time.monotonic() - began)
                    judge = done or (self.crossed(training.metrics_ticks) and self.affords_metrics())
                # The state first: who asked the run to stop may not wait for grids, nor who kills it for metrics.
                if end or judge or self.crossed(training.dump):
                    self.save_state(wait=end)
                self.write_stats(scalars, held_out=not due.stop)
                if end or self.crossed(training.snap):
                    self.save_snapshot()
                if judge and not due.stop:
                    self.evaluate()
                began, seen = time.monotonic(), stepper.images_seen
        # A signal may have come after the last agreement, and have cut a grid short.
        number = stepper.procs.max(self.signals.number or 0) or None
        self.signals.number = self.signals.number or number
        return number is None or (done and is_complete(self.run_dir, stepper, self.evaluator)), number

    def step(self, images: Iterator[tuple[Tensor, Tensor | None]]) -> None:
        self.writer.check()
        with self.saved_on_failure():
            self.stepper.step(images)
        if self.log is not None:
            self.writer.reserve(self.stepper.net, self.stepper.ema, self.stepper.optimizer)
        self.stepper.seconds = self.watch.seconds()
        self.console.measured(self.stepper.images_seen, self.stepper.meter.last_loss)

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Where the block fails, the state is saved: until the optimiser moves, weights are those of the last step.

        Raises :class:`UserError` where data cannot be read or another process is gone, :class:`Stopped` where that
        is because this run was asked to stop.
        """
        stepper = self.stepper
        try:
            yield
        except Exception as error:
            why = explain(error, stepper.procs)
            self.writer.settle()  # what it raises is not what ends the run, and there may be room again
            saved = f"everything up to {stepper.images_seen / 1000:g} kimg is saved"
            if stepper.empty is None:
                self.write_state(wait=True)
            if stepper.empty is not None or self.log is None:  # this one has a part alone, or writes nothing
                saved = self.console.saved = "what the newest state has is saved"
            if why is None:
                raise
            if self.signals.requested:  # by a signal that reached the others, or a loader process, too
                raise Stopped from None
            raise UserError(f"{why}; {saved} in {self.run_dir}, and goes on from there once that is mended") from None

    def crossed(self, ticks: int) -> bool:
        """Whether the last step crossed a multiple of so many ticks: a function of the images seen, as resume needs."""
        if not ticks:
            return False
        training, seen = self.stepper.config.training, self.stepper.images_seen
        period = ticks * training.tick * 1000
        return int(seen / period) > int((seen - training.batch) / period)

    def overdue(self, what: str) -> bool:
        """Whether the first process, which alone saves, has not saved a state or snapshot for long."""
        training = self.stepper.config.training
        period = 60 * (training.dump_minutes if what == "state" else training.snap_minutes)
        if what == "snapshot" and period:  # other processes wait for its grid, which may take a fiftieth of the time
            period = max(period, 50 * self.grid_seconds)
        return self.log is not None and 0 < period < time.monotonic() - self.saved[what]

    def end_here(self) -> None:
        """The time is up: what was trained is the whole length, for whoever runs the same command again."""
        stepper = self.stepper
        training = stepper.config.training.model_copy(update={"kimg": stepper.images_seen / 1000})
        stepper.config = stepper.config.model_copy(update={"training": training})
        if self.log is not None:
            write_options(self.run_dir, stepper.config)

    def agree(self) -> Due:
        """What is due now: the same answer on all processes. Nothing is, between the steps at which they ask.

        Raises :class:`UserError` where steps stay without effect.
        """
        stepper, procs = self.stepper, self.stepper.procs
        batch = stepper.config.training.batch
        steps = (stepper.images_seen - self.asked[1]) // batch
        if steps < self.steps_between:
            return Due()
        if int(stepper.meter.skipped_in_a_row) >= stepper.config.training.max_skipped:
            self.go_back_or_give_up()
        now = time.monotonic()
        milliseconds = int(1000 * (now - self.asked[0]) / steps)
        self.asked = (now, stepper.images_seen)
        number = (self.signals.number or 0) if self.signals.requested else 0
        flags = (number, self.seconds_left() <= 0, self.overdue("state"), self.overdue("snapshot"))
        with self.saved_on_failure():
            *agreed, end, milliseconds = procs.maxima([*map(int, flags), self.expected_end(), milliseconds])
        stepper.end = end
        self.signals.number = self.signals.number or agreed[0] or None  # of whichever process it reached
        if procs.count > 1 or procs.device.type == "cuda":
            self.steps_between = min(max(ASK_EVERY_MS // max(milliseconds, 1), 1), stepper.config.training.max_skipped)
        return Due(*map(bool, agreed))

    def go_back_or_give_up(self) -> None:
        """After so many steps in a row without effect."""
        stepper, training = self.stepper, self.stepper.config.training
        begun = stepper.images_seen - int(stepper.meter.skipped_in_a_row) * training.batch
        self.writer.wait()
        found = whole_state(self.run_dir, begun) if self.log is not None else None
        state = stepper.procs.broadcast(found)
        if training.on_spike == "rollback" and state is not None and self.rollbacks < MOST_ROLLBACKS:
            self.rollbacks += 1
            seen, seconds = stepper.images_seen, stepper.seconds
            stepper.restore(state)
            stepper.images_seen, stepper.seconds = seen, seconds  # on behind the images that did it
            stepper.meter.skipped_in_a_row.zero_()
            self.console.say(f"{seen / 1000:.2f} kimg   {training.max_skipped} steps skipped: back to {state.name}")
            return
        self.save_state(wait=True)  # a launcher ends all processes with the first: the state must be on disk by then
        raise UserError(
            f"{training.max_skipped} steps in a row were skipped, for a gradient that was not finite or far larger "
            f"than before; the last good weights are saved in {self.run_dir}. Remedies: a lower --lr, --precision "
            "bf16 or fp32, a look at the data with `diffit data check`, --on-spike ignore; then go on with "
            f"--resume {self.run_dir}"
        )

    def seconds_left(self) -> float:
        """For steps, before the last grids and snapshot take what is left of the minutes, as the first process sees it.

        Infinite where there is no such limit, and on the other processes.
        """
        minutes = self.stepper.config.training.clock_minutes
        if self.log is None or minutes is None:
            return math.inf
        grids = 2 if self.stepper.ema_warming_up else 1
        return minutes * 60 - self.stepper.seconds - grids * self.grid_seconds - 2

    def expected_end(self) -> int:
        """Images that will be seen at the end of the run: 0 on all but the first process, whose clock it is."""
        if self.log is None:
            return 0
        stepper, left = self.stepper, self.seconds_left()
        planned = stepper.config.training.steps * stepper.config.training.batch
        if left == math.inf:
            return planned
        rate = self.pace.rate(stepper.images_seen, stepper.seconds)
        return stepper.end if rate is None else min(planned, stepper.images_seen + max(int(rate * left), 0))

    def scalars(self, images: int, seconds: float) -> dict[str, Any]:
        """Statistics of the ``images`` and ``seconds`` since the last. All processes call this together."""
        stepper, batch = self.stepper, self.stepper.config.training.batch
        scalars: dict[str, Any] = {"kimg": stepper.images_seen / 1000, "steps": stepper.images_seen // batch}
        scalars |= stepper.meter.read(stepper.procs)
        scalars |= {"lr": stepper.optimizer.param_groups[-1]["lr"], "img_per_sec": images / seconds, "sec": seconds}
        scalars["memory_gib"] = peak_memory(stepper.procs.device) / 2**30
        return scalars

    def write_stats(self, scalars: dict[str, Any], *, held_out: bool) -> None:
        """One line of statistics, with the held-out loss where there are such images and time for them."""
        if self.val is not None and held_out:
            with self.saved_on_failure():
                scalars["val_loss"] = self.val()
        if self.log is not None:
            self.log.stats(self.stepper.images_seen, scalars)
            self.console.tick(scalars)

    def save_state(self, *, wait: bool = False) -> None:
        """By the first process; the others wait for it, here and not in a step, where waiting has a limit.

        It is being written while the run goes on, unless that is to ``wait``.
        """
        self.write_state(wait=wait)
        self.stepper.procs.wait_for_first()

    def write_state(self, *, wait: bool) -> None:
        if self.stepper.empty is not None:  # weights are gathered as in a step, where waiting has a limit
            self.writer.wait()
            self.stepper.procs.wait_for_first()
        if self.log is not None:
            number = kimg_number(self.stepper.config, self.stepper.images_seen)
            self.stepper.save(self.run_dir / f"{PREFIX}{number}", self.writer.save)
            self.saved["state"] = time.monotonic()
            if wait:
                self.writer.wait()
        else:
            self.stepper.lend()

    def save_snapshot(self) -> None:
        """The averaged weights and their grids, by the first process, for which the others wait.

        While the average is warming up there is a grid of the raw weights, too.
        """
        stepper, (path, grid) = self.stepper, pictures_of(self.run_dir, self.stepper)
        shown = {grid: stepper.whole(stepper.ema)}
        if stepper.ema_warming_up:
            shown[grid.with_stem(f"{grid.stem}-raw")] = stepper.whole(stepper.net)
        if self.log is not None:
            self.console.say(f"{stepper.images_seen / 1000:.2f} kimg   saving {path.name}, then a grid of its samples")
            save_network(path, shown[grid].state_dict(), stepper.config, kimg=stepper.images_seen / 1000)
            self.signals.unless_in_haste(lambda: self.save_grids(shown))
            prune_snapshots(self.run_dir, stepper.config.training.keep)
            self.saved["snapshot"] = time.monotonic()
        stepper.procs.wait_for_first()

    def save_grids(self, shown: dict[Path, DiffiT]) -> None:
        """The grid of each network; the first is the average's."""
        assert self.log is not None
        for number, (grid, net) in enumerate(shown.items()):
            began = self.watch.seconds()
            save_fakes(self.stepper, net, grid)
            if not number:
                self.grid_seconds = self.watch.seconds() - began
                self.log.picture("fakes", grid, self.stepper.images_seen)

    def evaluate(self) -> None:
        """Metrics of the averaged weights, by all processes, where there is no record of them yet."""
        if self.evaluator.pending(self.run_dir, self.stepper.images_seen):
            self.signals.unless_in_haste(self.judge)
            if self.signals.in_haste:
                raise Stopped

    def affords_metrics(self) -> bool:
        """Whether there are metrics, and such as take as long as the last are within their share of the time since."""
        training, (ended, took) = self.stepper.config.training, self.stepper.judged
        if training.metrics_budget is None:
            return bool(training.metrics)
        since = self.watch.seconds() - ended
        affords = training.metrics_budget * since >= (1 - training.metrics_budget) * took
        return bool(self.stepper.procs.maxima([self.log is not None and affords])[0])

    def judge(self) -> None:
        began = self.watch.seconds()
        try:
            ema = self.stepper.whole(self.stepper.ema)
            for record in self.evaluator(ema, self.stepper.images_seen, self.log):
                self.console.metric(record)
        except RuntimeError as error:
            if not (self.signals.in_haste and is_lost_connection(error)):
                raise
        if self.log is not None:
            write_report(self.run_dir)
        ended = self.watch.seconds()
        self.stepper.judged = ended, ended - began

    def finish(self, complete: bool, signal: int | None) -> Outcome:
        self.writer.wait()
        if not self.signals.in_haste:
            self.stepper.procs.barrier()
        snapshot = newest_snapshot(self.run_dir)
        if self.log is not None:
            if not self.signals.in_haste:
                save_progress(self.run_dir)
            write_report(self.run_dir)
            self.console.finish(not complete, snapshot)
            self.log.close()
        if signal is None:  # one may have come since
            signal = self.stepper.procs.max(self.signals.number or 0) or None
        return Outcome(self.run_dir, self.stepper.images_seen, snapshot, complete, signal)


def whole_state(run_dir: Path, images_seen: int) -> Path | None:
    """The newest undamaged state of a run that is older than ``images_seen``: later ones have the same weights."""
    for state in reversed(states(run_dir)):
        if read_progress(state)[0] < images_seen:
            with suppress(UserError):
                verify_state(state)
                return state
    return None


def explain(error: Exception, procs: Processes) -> str | None:
    """What a failed step means, in words for the one who started it; None for what nobody foresaw."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "a step did not fit the GPU's memory (--grad-ckpt makes it smaller)"
    if procs.count > 1 and is_lost_connection(error):
        return procs.missing() or "the connection to another process is gone"
    return None


def pictures_of(run_dir: Path, stepper: Stepper) -> tuple[Path, Path]:
    """The snapshot of this moment, and the grid of its samples."""
    number = kimg_number(stepper.config, stepper.images_seen)
    return run_dir / f"network-snapshot-{number}.safetensors", run_dir / f"fakes{number}.png"


def has_pictures(run_dir: Path, stepper: Stepper) -> bool:
    """Whether both of :func:`pictures_of` are there. All processes ask together."""
    return bool(stepper.procs.broadcast(all(path.exists() for path in pictures_of(run_dir, stepper))))


def is_complete(run_dir: Path, stepper: Stepper, evaluator: Evaluator) -> bool:
    """Whether a run that has seen all its images has its snapshot, its grid and its metrics too."""
    return has_pictures(run_dir, stepper) and not evaluator.pending(run_dir, stepper.images_seen)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
