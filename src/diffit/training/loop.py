"""A training run from start-up line to the last snapshot. To resume, run the same command again."""

import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from diffit.configs.schema import Config
from diffit.data.open import Archive
from diffit.models.autoencoder import Autoencoder
from diffit.training.batches import feed, microbatches
from diffit.training.checkpoint import read_progress
from diffit.training.console import Console
from diffit.training.evaluator import Evaluator
from diffit.training.plan import plan
from diffit.training.resident import load_resident
from diffit.training.run import Outcome, Run, Stopped, is_complete
from diffit.training.run_dir import (
    RunLog,
    create_run,
    find_state,
    hold,
    read_options,
    refuse_later_elsewhere,
    retire_later,
    write_options,
)
from diffit.training.signals import StopSignals
from diffit.training.step import Stepper, build_network
from diffit.training.stopwatch import Stopwatch
from diffit.training.tracking import require_tracker
from diffit.training.validation import Validation
from diffit.utils.distributed import Processes, alone
from diffit.utils.precision import check_precision
from diffit.weights.adapt import init_from

logger = logging.getLogger(__name__)


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
    procs = (procs or alone()).impatient(config.training.timeout_minutes)
    precision = check_precision(config.training.precision, procs.device)
    require_tracker(config.training.track)
    procs.require_same(config.data.content, archive.path, "images", "copy the archive again")
    with (
        Stopwatch() as watch,
        ExitStack() as held,
        torch.random.fork_rng(devices=[procs.device] if procs.device.type == "cuda" else []),
    ):
        with procs.together():
            state = find_state(config, Path(outdir), resume, held) if procs.is_first else None
        state = procs.broadcast(state)
        if resume == "auto":
            refuse_later_elsewhere(config, Path(outdir), state, procs)
        recorded = progress = None
        if state is not None:
            known = (read_options(state.parent), read_progress(state)) if procs.is_first else None
            recorded, progress = procs.broadcast(known)
        config = plan(config, archive, procs, autoencoder, recorded=recorded, progress=progress or (0, 0.0))
        training, net = config.training, build_network(config)
        source = config.distillation.teacher if config.distillation else training.init_from
        begun = init_from(net, config, source) if source and state is None else None
        stepper = Stepper(config, procs, net, precision, autoencoder)
        if state is not None:
            stepper.restore(state)
            watch.began -= stepper.seconds
        evaluator = Evaluator(config, archive, procs, autoencoder, batch=stepper.batch_gpu, precision=precision)
        total = training.steps * training.batch
        if state is not None and stepper.images_seen >= total and is_complete(state.parent, stepper, evaluator):
            return Outcome(state.parent, stepper.images_seen, None)
        # Before there is a run folder, because this finds faulty images.
        resident, loading = load_resident(archive, procs, training.workers)
        with procs.together():
            opened = open_run(Path(outdir), config, procs, state, held) if procs.is_first else None
        run_dir: Path = procs.broadcast(opened)
        log = RunLog(run_dir, config, stepper.images_seen) if procs.is_first else None
        with StopSignals() as signals, Console(log, stepper, total, resume) as console:
            console.announce(run_dir, archive, loading, resumed=state is not None)
            if training.compile:
                console.say("compiling the network in the first step; the steps after it are faster for it")
            if begun is not None:
                console.say(f"weights   {begun}")
            order = microbatches(
                len(archive), training.seed, stepper.images_seen, training.batch, stepper.batch_gpu,
                procs.rank, procs.count,
            )  # fmt: skip
            images = feed(archive, order, procs.device, resident=resident, workers=training.workers)
            held_out = None if val is None else Validation(stepper, val)
            run = Run(stepper, run_dir, console, evaluator, held_out, log, signals, watch)
            held.callback(run.writer.close)  # before the folder is another's
            if state is None:
                run.first_grids(archive)
            try:
                complete, signal = run.steps(images, total, resumed=state is not None)
            except Stopped:
                complete, signal = False, signals.number
            return run.finish(complete, signal)


def open_run(outdir: Path, config: Config, procs: Processes, state: Path | None, held: ExitStack) -> Path:
    """The folder of the run: that of the ``state``, or a new one, as for a state that was copied away from its own."""
    if state is None or read_options(state.parent) is None:
        run_dir = create_run(outdir, config, procs.count)
        hold(run_dir, held)
    else:
        run_dir = state.parent
        for path in retire_later(state):
            logger.warning("%s: later than what the run goes on from; it is %s now", run_dir, path.name)
    write_options(run_dir, config)
    return run_dir
