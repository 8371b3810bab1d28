"""What a run takes on this machine, found out before it begins: the microbatch that fits, and a length by the clock."""

import itertools
import logging
import math
from typing import Any

import torch

from diffit.configs.resolve import accumulation, unasked, with_length
from diffit.configs.schema import MARGIN, Config, Training
from diffit.data.open import Archive
from diffit.errors import UserError
from diffit.models.autoencoder import Autoencoder
from diffit.models.cost import FORWARDS, estimate
from diffit.sampling.cost import count_evaluations
from diffit.training.compiling import decide_compile
from diffit.training.pictures import preview_sampling
from diffit.training.step import Stepper, build_network
from diffit.training.stopwatch import Stopwatch
from diffit.utils.distributed import Processes
from diffit.utils.memory import free_memory
from diffit.utils.precision import check_precision, resolve_precision

logger = logging.getLogger(__name__)

GIB = 2**30
SHARE = {"cpu": 0.8, "cuda": 0.9}  # of the free memory that training may take
PROGRAM = int(0.5 * GIB)  # torch itself
TICK_SECONDS = 3.0  # at least, between lines of statistics where nobody said how many images
MEASURED_SECONDS = 8.0  # of steps, for the rate
GRID_SHARE = 1 / 20  # of the minutes that a grid of samples may take where nobody asked for its size


def plan(
    config: Config,
    archive: Archive,
    procs: Processes,
    autoencoder: Autoencoder | None = None,
    *,
    recorded: Config | None = None,
    progress: tuple[int, float] = (0, 0.0),
) -> Config:
    """``config`` with what this machine allows where it was not asked for: microbatch, length, compilation.

    A run that goes on keeps what it ``recorded``, but for the length where other ``minutes`` are asked for;
    ``progress`` is what it has done, in images and seconds. All processes call this together. Raises
    :class:`UserError` where training does not fit the memory.
    """
    if recorded is not None:
        config = take_over(config, recorded)
    minutes, before = config.training.clock_minutes, recorded.training.minutes if recorded is not None else None
    timed = minutes is not None and minutes != before
    if minutes is not None and timed and recorded is not None and 60 * minutes <= progress[1]:
        raise UserError(
            f"--minutes {minutes:g}: the run has taken {progress[1] / 60:.3g} already, of {before or 0:g}; give more "
            "than it has, or begin a new one with --resume none"
        )
    config = decide_compile(config, procs)
    chosen = config.training.chosen + (("batch_gpu",) if config.training.batch_gpu is None else ())
    batch_gpu = fit_batch(config, procs)
    if recorded is not None and recorded.training.batch_gpu is not None:
        batch_gpu = keep_batch(batch_gpu, recorded.training.batch_gpu, config, procs)
    training = config.training.model_copy(update={"batch_gpu": batch_gpu, "chosen": chosen})
    config = config.model_copy(update={"training": training})
    if timed or (procs.device.type == "cuda" and recorded is None):
        if procs.is_first:
            compiled = "a minute or two, compiling first (--compile=False trains without)"
            logger.info("trying how fast a step is here: %s", compiled if config.training.compile else "some seconds")
        config, rate = measure(config, archive, procs, autoencoder)
        if timed:
            assert training.minutes is not None
            (seen, seconds), batch = progress, training.batch
            kimg = float(f"{(seen + max(rate * (training.minutes * 60 - seconds), 2 * batch)) / 1000:.3g}")
            if recorded is None:  # what follows from the length does so from the one that is to be expected
                config = fit_tick(with_length(config, kimg), rate)
                config = fit_grid(config, FORWARDS * rate / procs.count)
            return config.model_copy(update={"training": config.training.model_copy(update={"kimg": MARGIN * kimg})})
    return config


def fit_grid(config: Config, evaluations: float) -> Config:
    """Fewer images in a grid where nobody said how many and it would take long at so many ``evaluations`` a second."""
    training = config.training
    if "grid" not in training.chosen or training.minutes is None:
        return config
    each = sum(count_evaluations(config.model_copy(update={"sampling": preview_sampling(config.sampling)})))
    affordable = GRID_SHARE * training.minutes * 60 * evaluations / each
    side = max(min(int(math.sqrt(affordable)), max(training.grid)), 2)
    columns, rows = (min(size, side) for size in training.grid)
    return config.model_copy(update={"training": training.model_copy(update={"grid": (columns, rows)})})


def fit_tick(config: Config, rate: float) -> Config:
    """Lines of statistics at least :data:`TICK_SECONDS` apart at ``rate`` images a second where nobody chose a tick.

    Snapshots that are counted in ticks follow.
    """
    training = config.training
    if "tick" not in training.chosen:
        return config
    tick = max(training.tick, float(f"{TICK_SECONDS * rate / 1000:.3g}"))
    return config.model_copy(update={"training": training.model_copy(update={"tick": tick})})


def available_memory(device: torch.device) -> int:
    """Bytes that training may use now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE["cuda"])
    return int(free_memory() * SHARE["cpu"])


def fit_batch(config: Config, procs: Processes) -> int:
    """The microbatch: as asked for, or else the largest that fits.

    Raises :class:`UserError` with what is needed, what is there, and an option that fits.
    """
    training, count = config.training, procs.count
    precision = resolve_precision(training.precision, procs.device)
    # The least of all processes'.
    free = -procs.max(-available_memory(procs.device) // (count if procs.device.type == "cpu" else 1))
    asked = asks_for_batch(training)
    accumulation(training.batch, training.batch_gpu if asked else None, count)  # UserError where they do not divide
    share = training.batch // count
    sizes = _divisors(share, training.batch_gpu or share)

    def need(batch: int) -> int:
        return estimate(config, batch, precision, procs.device.type, count).training_bytes + PROGRAM

    first = need(sizes[0])
    if first <= free:
        return sizes[0]
    fitting = next((size for size in sizes[1:] if need(size) <= free), None)
    if fitting is not None and not asked:
        return fitting
    have = f"needs about {first / GIB:.1f} GiB a process at --batch-gpu {sizes[0]}, {free / GIB:.1f} GiB are free"
    if fitting is not None:
        raise UserError(f"{config.preset} {have}: give --batch-gpu {fitting}, or leave it out")
    raise UserError(
        f"{config.preset} {have}, and one image alone takes {need(1) / GIB:.1f} GiB: give --grad-ckpt, smaller images, "
        "or a smaller network (leave --preset out)"
    )


def asks_for_batch(training: Training) -> bool:
    """Whether the microbatch was given, and not chosen here or by a preset."""
    return training.batch_gpu is not None and "batch_gpu" not in training.chosen


def keep_batch(fitting: int, recorded: int, config: Config, procs: Processes) -> int:
    """The microbatch that a run began with, whose number decides the noise of an image, or what must replace it."""
    share = config.training.batch // procs.count
    if fitting == recorded or asks_for_batch(config.training):
        return fitting
    if share % recorded == 0:
        return recorded  # it fitted before
    logger.warning(
        "microbatches of %d, with which the run began, do not divide among %d processes; with %d the noise and dropout "
        "of each image differ from here on", recorded, procs.count, fitting,
    )  # fmt: skip
    return fitting


def _divisors(share: int, limit: int) -> list[int]:
    """Microbatches that make up a process's ``share`` of the batch, at most ``limit``, the largest first."""
    return [size for size in range(min(limit, share), 0, -1) if share % size == 0]


def measure(
    config: Config, archive: Archive, procs: Processes, autoencoder: Autoencoder | None
) -> tuple[Config, float]:
    """Steps of a network that is thrown away: images a second, and the microbatch halved until a step fits the GPU."""
    while True:
        try:
            return config, _rate(config, archive, procs, autoencoder)
        except torch.OutOfMemoryError:
            if procs.count > 1:  # the others are in the middle of a step: who starts it must give a smaller one
                raise
            torch.cuda.empty_cache()
            size = config.training.batch_gpu or 1
            smaller = _divisors(config.training.batch // procs.count, size - 1)
            if not smaller or "batch_gpu" not in config.training.chosen:
                raise UserError(
                    f"--batch-gpu {size}: a step does not fit the GPU's memory; give a smaller one, --grad-ckpt or "
                    "--precision bf16"
                ) from None
            fitting = next((n for n in smaller if n <= size // 2), smaller[-1])
            training = config.training.model_copy(update={"batch_gpu": fitting})
            config = config.model_copy(update={"training": training})


def _rate(config: Config, archive: Archive, procs: Processes, autoencoder: Autoencoder | None) -> float:
    precision = check_precision(config.training.precision, procs.device)
    stepper = Stepper(config, procs, build_network(config), precision, autoencoder)
    size = stepper.batch_gpu
    data = archive[0].expand(size, *archive[0].shape).to(procs.device)
    labels = None if archive.labels is None else archive.labels[:1].expand(size).to(procs.device)

    def seconds(steps: int) -> float:
        with Stopwatch() as watch:
            for _ in range(steps):
                stepper.step(itertools.repeat((data, labels)))
            float(stepper.meter.last_loss)
            return watch.seconds()

    first = seconds(1)  # pays for caches
    if config.training.minutes is None:
        return 0.0
    if config.training.compile:
        first = seconds(1)  # the one before had to wait for the compiler
    steps = int(procs.broadcast(min(max(round(MEASURED_SECONDS / max(first, 1e-3)), 1), 200)))
    return float(procs.broadcast(steps * config.training.batch / seconds(steps)))


def take_over(config: Config, recorded: Config) -> Config:
    """``config`` for going on with a run: what was not asked for is as the run began with it.

    So is its length in place of ``default_minutes``. Other ``minutes`` are measured again.
    """
    old, new = recorded.training, config.training
    names = unasked(config)
    if "minutes" in names:
        names |= {"kimg"}
    elif new.minutes != old.minutes:
        names -= {"kimg"}
    changes: dict[str, Any] = {name: getattr(old, name) for name in names}
    # Whether somebody asked is the run's to say of what is its own, and the command's of the length that it changes.
    changes["chosen"] = tuple(sorted((set(new.chosen) - names) | (set(old.chosen) & names)))
    return config.model_copy(update={"training": new.model_copy(update=changes)})
