"""``diffit distill``."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from diffit.cli import train
from diffit.cli.options import GroupedCommand, Numbers, Options, switch, with_options

OPTIONS: Options = {
    "Teacher and student": [
        click.option("--network", required=True, metavar="FILE|RUN|ID",
                     help="Teacher: a snapshot, a run folder (its newest snapshot), or a Hub id."),
        click.option("--method", type=click.Choice(["progressive", "consistency"]), required=True,
                     help="Halve the teacher's steps again and again, or tune towards one or two evaluations (EDM)."),
        click.option("--steps", type=Numbers(), metavar="N[,N…]",
                     help="Steps of the students.  [default: 8,4,2,1; 2,1 of consistency]"),
        click.option("--cfg-scale", type=float,
                     help="Guidance scale of the teacher, which the student has built in.  [default: the file's]"),
    ],
    "Data and result": [
        click.option("--data", required=True, help="Image archive or latent cache, as the teacher was trained on."),
        click.option("--outdir", type=click.Path(path_type=Path), required=True,
                     help="Folder for the students and the folders of their runs."),
        click.option("--val", help="Archive of held-out images: their loss is reported, metrics compare with them."),
        switch("--mirror", help=f"{train.FLIP}  [default: the teacher's]"),
        click.option("--desc", help="Text to put into the names of the runs' folders.  [default: method and steps]"),
        click.option("--resume", type=click.Choice(["auto", "none"]), default="auto", show_default=True,
                     help="auto: go on with the newest runs in --outdir that have the same options."),
        train.VAE,
    ],
    "Length of all runs together": [
        click.option("--minutes", type=click.FloatRange(min=0.1),
                     help=f"Length by the clock.  [default: {train.MINUTES:g}]"),
        train.HOURS,
        click.option("--kimg", type=float, help="Length in thousands of images."),
        train.DURATION,
        train.EPOCHS,
    ],
    "Recipe": [
        click.option("--batch", type=int, help="Images per step, over all processes.  [default: the teacher's]"),
        click.option("--lr", type=float, help="Learning rate.  [default: half of the teacher's; 1e-3 after Muon]"),
        click.option("--lr-rampup-kimg", type=float, help="Learning rate's linear ramp-up.  [default: 5 % of the run]"),
        click.option("--lr-decay", type=float, metavar="SHARE",
                     help="Share of the run, at its end, in which the rate falls to 0.  [default: the method's]"),
        click.option("--ema", type=float, metavar="MIMG",
                     help="Exponential moving average half-life, in millions of images.  [default: 5 % of the run]"),
        click.option("--dropout", type=float, help="Dropout in the MLPs.  [default: the teacher's]"),
        train.GRAD_CLIP,
        train.ON_SPIKE,
        train.SEED,
    ],
    "Machine": train.OPTIONS["Machine"],
    "What a run prints and writes": train.OPTIONS["What a run prints and writes"],
}  # fmt: skip


@click.command(cls=GroupedCommand, aliases=train.ALIASES)
@with_options(OPTIONS)
def distill(network: str, method: Any, steps: list[int] | None, outdir: Path, resume: str, **options: Any) -> None:
    """Make students that sample in a few steps what their teacher samples in many.

    Writes OUTDIR/student-4.safetensors and the like, which `diffit sample` takes without a flag. Starting the same
    command again resumes it. Under torchrun the same command uses several GPUs.
    """
    given = train.in_our_terms(options)
    planned = train.how_many(given)
    dry_run, as_json = given.pop("dry_run"), given.pop("as_json")
    given["default_minutes"] = train.MINUTES
    # Imported here: `--help` and a mistyped option need not wait for torch.
    from diffit.cli.describe import describe_run
    from diffit.configs.schema import student_title
    from diffit.data.open import facts_of, open_val
    from diffit.training.distill import STEPS, Order, Teacher, check_steps
    from diffit.training.distill import distill as run_distillation
    from diffit.utils.distributed import processes
    from diffit.weights import read_header

    chosen = STEPS[method] if steps is None else tuple(steps)
    check_steps(method, chosen)
    with processes(join=not dry_run) as procs:
        teacher = Teacher.read(network)
        given["cond"] = teacher.config.model.num_classes > 0
        archive = train.open_archive(given, None, dry_run=False)
        facts = facts_of(archive)
        assert archive is not None
        assert facts is not None
        train.count_epochs(given, archive)
        order = Order(network, method, chosen, given)
        config = order.config(teacher, order.runs[0], facts)
        if dry_run:
            if procs.is_first:
                said = config.model_dump_json(indent=2) if as_json else describe_run(config, procs, archive, planned)
                click.echo(said)
            return
        val = None if config.data.val is None else open_val(config.data.val, archive, config)
        autoencoder = train.open_autoencoder(config, [archive, val], procs.device)
        outcome, students = run_distillation(
            order, archive, outdir, procs, resume=resume, val=val, autoencoder=autoencoder
        )
        if outcome.complete and outcome.signal is not None and procs.is_first:
            click.echo("stopped between two students; to go on, run the same command again")
        if outcome.signal is not None:  # in here: the other processes may be gone, and are not waited for
            sys.exit(128 + outcome.signal)
        for path in students if procs.is_first else ():
            command = shlex.join(["diffit", "sample", "--network", str(path), "--outdir", f"samples-{path.stem}"])
            click.echo(f"{path}: {student_title(read_header(path)[0])}; next: {command}")
