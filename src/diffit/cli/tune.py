"""``diffit tune-schedule``."""

import shlex
from pathlib import Path
from typing import Any, get_args

import click

from diffit.cli.options import Numbers, with_options
from diffit.configs.sampling import ODESampler
from diffit.errors import UserError

OPTIONS = [
    click.option("--network", required=True, metavar="FILE|RUN|ID",
                 help="Snapshot, run folder (its newest snapshot), NVIDIA's official weights, or a Hub id."),
    click.option("--steps", type=Numbers(), required=True, metavar="LIST",
                 help="Numbers of steps to fit noise levels for: 8, or 4,8,12."),
    click.option("--sampler", type=click.Choice(get_args(ODESampler)), default="unipc", show_default=True,
                 help="Solver that makes the steps."),
    click.option("--cfg-scale", type=float, help="Guidance scale to fit at.  [default: the file's]"),
    click.option("--seeds", type=Numbers(), default="0-255", show_default=True, metavar="LIST",
                 help="Samples to fit to; a quarter of them checks the fit."),
    click.option("--dest", type=click.Path(path_type=Path), help="File to write.  [default: --network's own]"),
    click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images sampled together."),
]  # fmt: skip


@click.command("tune-schedule")
@with_options({"Options": OPTIONS})
def tune_schedule(
    network: str, steps: list[int], sampler: str, cfg_scale: float | None, seeds: list[int], **options: Any
) -> None:
    """Fit the noise levels of few steps to a network, and keep them in its file.

    `diffit sample --steps 8` then uses those for 8 steps, and the solver that they were fitted for. Samples of the
    fitted steps are as close as possible to the network's own of many steps.
    """
    from diffit.sampling.tune import tune_file
    from diffit.utils.distributed import processes
    from diffit.utils.progress import progress

    if not steps or 0 in steps:
        raise UserError("--steps: a fit needs 1 step or more; write 8, or 4,8,12")
    with processes() as procs:
        if procs.count > 1:
            raise UserError("tune-schedule runs in one process; start it without torchrun")
        settings = [{"sampler": sampler, "steps": count, "cfg_scale": cfg_scale} for count in steps]
        with progress("fitting") as show:
            path, fits = tune_file(network, settings, seeds, device=procs.device, show=show, **options)
    for fit in fits:
        by = ", ".join(f"{name} {value:.3g}" for name, value in fit.distances.items())
        click.echo(
            f"{fit.levels.sampler}, {len(fit.levels.sigmas)} steps: mean squared distance to {fit.fine_steps} steps of "
            f"heun, by levels: {by}" + ("" if fit.is_better else "; not kept, use more --seeds")
        )
    kept = max(len(fit.levels.sigmas) for fit in fits if fit.is_better)
    click.echo(f"wrote {path}; next: diffit sample --network {shlex.quote(str(path))} --steps {kept} --outdir samples")
