"""What a preset or a network file is, as text for a person."""

from pathlib import Path

from diffit.configs.presets import PRESETS
from diffit.configs.resolve import accumulation, resolve
from diffit.configs.sampling import steps_text
from diffit.configs.schema import ADMDiffusion, Config, student_title
from diffit.data.check import few_images
from diffit.data.open import Archive
from diffit.errors import UserError, printable
from diffit.models import build
from diffit.models.cost import Work, count_work, estimate
from diffit.sampling.cost import count_evaluations
from diffit.training.plan import GIB, PROGRAM, SHARE, fit_batch
from diffit.utils.distributed import Processes
from diffit.utils.files import sha256_of
from diffit.utils.precision import resolve_precision
from diffit.utils.progress import minutes_text
from diffit.weights.adapt import init_from
from diffit.weights.file import locate, read_header
from diffit.weights.header import verify

# DiffiT Table 9: the figures that its authors give.
PAPER = {"imagenet256": "the paper says 561 M parameters and 114 G multiply-accumulates, which are the linear layers'"}

WHOLE = {True: "as the file was written", False: "DAMAGED: not as the file was written", None: "none in the file"}


def describe_preset(name: str, num_blocks: tuple[int, ...] | None = None) -> str:
    """A preset, with another number of blocks where ``num_blocks`` says so."""
    return "\n".join(_lines(resolve(name, {"num_blocks": num_blocks})))


def describe_file(path: str | Path) -> str:
    """A network file or Hub id; its tensors are not read, but for the checksums."""
    file = locate(path)
    config, kimg = read_header(file)
    training, data = config.training, config.data
    if kimg is None:
        origin = "not said, as in all files of the official layout; recipe and sampling are the preset's"
    else:
        name = printable(data.path or "data without a name")
        origin = f"{kimg:,g} of {training.expected_kimg(kimg):,g} kimg on {name}, batch {training.batch}"
    lines = [
        f"file        {file} ({file.stat().st_size / 2**20:,.1f} MiB)",
        f"sha256      {sha256_of(file)}",
        f"checksum    {WHOLE[verify(file)]}",
        f"training    {origin}",
    ]
    if data.class_names:
        lines.append(f"classes     {', '.join(data.class_names[:20])}{', …' if len(data.class_names) > 20 else ''}")
    return "\n".join(lines + _lines(config))


def describe(target: str, num_blocks: tuple[int, ...] | None = None) -> str:
    """``target`` is the name of a preset, a file or a Hub id. Raises :class:`UserError`."""
    if target in PRESETS:
        return describe_preset(target, num_blocks)
    if num_blocks:
        raise UserError(
            f"--num-blocks {','.join(map(str, num_blocks))}: {target} is no preset; a file has its own blocks"
        )
    if not Path(target).exists() and "/" not in target and "." not in target:
        raise UserError(f"{target}: neither a preset ({', '.join(PRESETS)}) nor a file here")
    return describe_file(target)


def _lines(config: Config) -> list[str]:
    model, work = config.model, count_work(config)
    channels, height, width = config.image_shape
    lines = [
        f"preset      {config.preset}: {width}×{height}×{channels}, {model.num_classes or 'no'} classes",
        f"family      {model.family}: {_shape_of(config)}",
        f"diffusion   {_diffusion_of(config)}",
        f"parameters  {work.parameters:,} trainable",
        f"forward     {_amount(work.macs)} an image: {work.linear / 1e9:,.4g} G linear, "
        f"{work.attention / 1e9:,.4g} G attention, {work.time / 1e9:,.4g} G time token",
    ]
    if config.distillation is not None:
        lines.append(f"student     {student_title(config)}")
    if config.preset in PAPER:
        lines.append(f"paper       {PAPER[config.preset]}")
    return lines + _sampling_of(config, work)


def _shape_of(config: Config) -> str:
    model = config.model
    if model.family == "latent":
        return (
            f"latents of {model.input_size[1]}×{model.input_size[0]}×{model.in_channels}, "
            f"patches of {model.patch_size}, {model.depth} blocks of width {model.hidden_size}, {model.num_heads} heads"
        )
    stages = ", ".join(f"{s.blocks}×{s.width} ({s.heads} heads, window {s.window or 'global'})" for s in model.stages)
    return f"stages of blocks×width: {stages}"


def _diffusion_of(config: Config) -> str:
    diffusion = config.diffusion
    if isinstance(diffusion, ADMDiffusion):
        return f"{diffusion.schedule} schedule, {diffusion.timesteps} timesteps, predicts {diffusion.prediction}"
    return f"EDM, sigma_data {diffusion.sigma_data:g}, P_mean {diffusion.P_mean:g}, P_std {diffusion.P_std:g}"


def _sampling_of(config: Config, work: Work) -> list[str]:
    """Step and whole run, with the file's guidance where it has one, and without."""
    sampling = config.sampling
    cond, uncond = count_evaluations(config)
    per_step = -(-cond // sampling.steps)  # Heun's last step has one evaluation, the others two
    lines = [f"sampling    {sampling.sampler}, {steps_text(sampling)} steps, guidance {sampling.cfg_scale:g}"]
    if uncond:
        skipped = f" ({cond - uncond} unconditional ones skipped)" if cond > uncond else ""
        lines.append(f"  guided    {_amount(2 * per_step * work.macs)} a step of both halves")
        lines.append(f"            {_amount((cond + uncond) * work.macs)} the run of {cond + uncond} passes{skipped}")
    lines.append(f"  unguided  {_amount(per_step * work.macs)} a step")
    lines.append(f"            {_amount(cond * work.macs)} the run of {cond} passes")
    return lines


def _amount(macs: int) -> str:
    unit, name = (1e12, "T") if macs >= 1e13 else (1e9, "G")
    return f"{macs / unit:,.4g} {name} multiply-accumulates ({2 * macs / unit:,.4g} {name}FLOP)"


def describe_run(config: Config, procs: Processes, archive: Archive | None, planned: int | None = None) -> str:
    """``--dry-run``: what would be trained and what it takes, here or on so many ``planned`` GPUs elsewhere."""
    training, count = config.training, planned or procs.count
    batch_gpu, _ = accumulation(training.batch, training.batch_gpu, count)
    device, precision = procs.device.type, resolve_precision(training.precision, procs.device)
    refusal = None
    if planned is not None:
        device, precision = "cuda", "bf16" if training.precision == "auto" else training.precision
    else:
        try:
            batch_gpu = fit_batch(config, procs)
        except UserError as error:  # here; the machine that is to train may have more
            refusal = str(error)
    _, rounds = accumulation(training.batch, batch_gpu, count)
    cost, work = estimate(config, batch_gpu, precision, device, count), count_work(config)
    channels, height, width = config.image_shape
    # Only the data knows how many classes --cond will have.
    classes = config.model.num_classes or ("no" if not config.data.cond else "the data's")
    data, epochs = "not given", ""
    if archive is not None:
        data = f"{len(archive)} images: {archive.path}"
        epochs = f", {training.steps * training.batch / len(archive):.3g} epochs"
    elif config.data.path:
        data = f"{config.data.path} is not there: size and channels are the preset's"
    length = f"{training.kimg:,g} kimg, {training.steps:,} steps{epochs}"
    if training.clock_minutes is not None:
        length = f"{minutes_text(training.clock_minutes)}; how many images that is, is measured first"
    few = None if archive is None else few_images(len(archive))
    here = [] if few is None else [f"note        {few}"]
    here += [] if refusal is None else [f"warning     not on this machine: {refusal}"]
    if training.init_from is not None:
        here.append(f"weights     {init_from(build(config.model), config, training.init_from)}")
    lines = [
        f"preset      {config.preset}, {width}×{height}×{channels}, {classes} classes",
        f"data        {data}",
        f"parameters  {work.parameters:,}; {_shape_of(config)}",
        f"compute     {work.macs / 1e9:.4g} G multiply-accumulates an image and forward pass",
        f"batch       {training.batch} = {batch_gpu} per GPU × {count} processes × {rounds} accumulated, "
        f"learning rate {training.lr:g}",
        f"duration    {length}",
        f"memory      about {cost.training_bytes / 2**30:.2f} GiB a process: {cost.state_bytes / 2**30:.2f} for "
        f"weights, gradients, moments and average, {cost.activation_bytes / 2**30:.2f} for activations",
        *(_sharing(config, batch_gpu, precision, device, count) if count > 1 else ()),
        f"sampling    {config.sampling.sampler}, {steps_text(config.sampling)} steps, "
        f"guidance {config.sampling.cfg_scale:g}",
        *here,
        "dry run: nothing was written; --json prints the whole configuration",
    ]
    return "\n".join(lines)


def _sharing(config: Config, batch_gpu: int, precision: str, device: str, count: int) -> list[str]:
    """What each of ``count`` processes needs and sends with whole weights and with ``--shard``; which one to use."""
    needs, sent = [], []
    for shard in (False, True):
        training = config.training.model_copy(update={"shard": shard})
        cost = estimate(config.model_copy(update={"training": training}), batch_gpu, precision, device, count)
        needs.append((cost.training_bytes + PROGRAM) / SHARE[device] / GIB)
        sent.append(cost.sent_bytes / 1e9)
    return [
        f"whole       {needs[0]:.1f} GiB free for each process, {sent[0]:.3g} GB sent by each in a step",
        f"--shard     {needs[1]:.1f} GiB free for each process, {sent[1]:.3g} GB sent by each in a step; for less "
        f"memory than {needs[0]:.1f} GiB, else leave it out",
    ]
