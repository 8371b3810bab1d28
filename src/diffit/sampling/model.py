"""From a network and seeds to images. The image of a seed depends on nothing else."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffit.configs.sampling import DISCRETE
from diffit.configs.schema import ADMDiffusion, Config, EDMDiffusion, require_null_class
from diffit.diffusion import adm, edm
from diffit.diffusion.adm import Schedule, schedule_of
from diffit.diffusion.guidance import Denoiser, Scale, guided, power_cosine, within
from diffit.diffusion.samplers import AfterStep, Callback, NoiseSource, ddim, ddpm, keep
from diffit.errors import UserError
from diffit.models import DiffiT
from diffit.models.autoencoder import Autoencoder, autoencoder_of
from diffit.models.block import Mlp, has_fused_gelu
from diffit.models.latent import LatentDiffiT
from diffit.sampling.labels import Labels, choose_labels, class_names, class_title
from diffit.sampling.levels import noise_levels, solver_of
from diffit.sampling.outputs import Job, Output, SamplingBar, fingerprint
from diffit.sampling.settings import with_sampling
from diffit.utils.distributed import Processes, pick_device
from diffit.utils.images import WHITE, make_grid, save_gif, save_grid, to_uint8
from diffit.utils.precision import DTYPES, autocast, channels_last, check_precision
from diffit.utils.randomness import PerSampleNoise
from diffit.weights import load_network

CLASS_GRID_LIMIT = 4096  # images in one picture
TRAJECTORY_COLUMNS = 4


@dataclass(frozen=True)
class Model:
    """A network with all that sampling from it needs.

    Attributes:
        net: either family, on the device that is to compute; :meth:`evaluate` calls it in its precision.
        config: its configuration; ``config.sampling`` is how it is sampled.
        autoencoder: decodes a latent model's samples; without it they stay latents. None for an image-space model.
        precision: of the network's arithmetic: fp32, bf16 or fp16.
        guide: see :meth:`guided_by`.
    """

    net: DiffiT
    config: Config
    autoencoder: Autoencoder | None = None
    precision: str = "fp32"
    guide: "Model | None" = None

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def with_sampling(self, **changes: Any) -> "Model":
        """The same model sampled in another way; see :func:`diffit.sampling.settings.with_sampling`."""
        return replace(self, config=with_sampling(self.config, has_guide=self.guide is not None, **changes))

    def guided_by(self, guide: "Model") -> "Model":
        """Autoguidance (arXiv 2406.02507): away from what ``guide`` says, a smaller or earlier network for the same.

        In place of the unconditional half, with the scale and the interval of the settings. A guide of an unconditional
        model is that half as a network of its own. Raises :class:`UserError` where the two do not fit together.
        """
        ours, theirs = self.config, guide.config
        if ours.distillation is not None or theirs.distillation is not None:
            raise UserError("autoguidance is between two models that were not distilled: a student makes its own steps")
        facts = {
            "samples": (ours.model.sample_shape, theirs.model.sample_shape),
            "noise levels": (_levels(ours.diffusion), _levels(theirs.diffusion)),
            "latents": tuple(None if c.autoencoder is None else c.autoencoder.scale for c in (ours, theirs)),
            "classes": (ours.model.num_classes, theirs.model.num_classes or ours.model.num_classes),
        }
        for what, (own, other) in facts.items():
            if own != other:
                raise UserError(f"the guide has other {what} than the network: {other}, not {own}; use another guide")
        return replace(self, guide=guide)

    def evaluate(self, x: Tensor, level: Tensor, *labels: Tensor | None) -> Tensor:
        """What the network says, in :attr:`precision`: for ``edm.denoiser(model.evaluate, labels)`` and its like."""
        with autocast(x.device, self.precision):
            out: Tensor = self.net(x, level, *labels)
        return out

    def denoiser(self, labels: Tensor | None = None) -> Denoiser:
        """``denoise(x, sigma) -> x0``, guided as the settings say, for classes ``labels`` ``(B,)`` on the device."""
        diffusion = self.config.diffusion
        if diffusion.kind == "edm":
            return self._guided(labels)
        schedule = schedule_of(diffusion)
        return adm.denoiser(self._guided(labels, schedule), schedule, clip=diffusion.clip)

    def _unguided(self, labels: Tensor | None, schedule: Schedule | None) -> Denoiser:
        """Of EDM's levels the denoiser, on a ``schedule`` the predictor of ε and perhaps variances."""
        diffusion = self.config.diffusion
        if diffusion.kind == "edm":
            return edm.denoiser(self.evaluate, labels, sigma_data=diffusion.sigma_data)
        return adm.predictor(self.evaluate, labels, v_on=schedule if diffusion.prediction == "v" else None)

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int] | None = None,
        labels: Labels = None,
        *,
        noise: Tensor | None = None,
        noise_source: NoiseSource | None = None,
        callback: Callback | None = None,
        after_step: AfterStep = keep,
        **settings: Any,
    ) -> Tensor:
        """One sample per seed, ``(len(seeds), C, H, W)`` float32 on the device; images are nominally in [−1, 1].

        Args:
            seeds: all go through the network together; :meth:`generate` takes any number.
            labels: classes as in :data:`~diffit.sampling.labels.Labels`; None is one drawn by each seed.
            noise: standard normal, ``(B, C, h, w)``, in place of that of the seeds; ``seeds`` is then 0 to B − 1.
            noise_source: of the noise in every step, in place of that of the seeds.
            settings: fields of :class:`~diffit.configs.schema.Sampling`: ``steps=8, guidance=2, sampler="dpm++"``.
        """
        if settings:
            self = self.with_sampling(**settings)
        seeds = range(len(noise) if noise is not None else 0) if seeds is None else seeds
        device = self.device if noise is None else noise.device
        shape = (len(seeds), *self.config.model.sample_shape)
        classes = choose_labels(self.config, seeds, labels)
        drawn = PerSampleNoise(seeds)
        # The solver's own arithmetic in float64 costs nothing next to the network's, and keeps rounding out of images.
        if noise is None:
            noise = drawn(torch.empty(shape, dtype=torch.float64, device=device))
        if seeds:
            solver = self._solver(None if classes is None else classes.to(device))
            hooks = {"noise_source": noise_source or drawn, "callback": callback, "after_step": after_step}
            noise = solver(noise.double(), **hooks)
        return noise.float() if self.autoencoder is None else self.autoencoder.decode(noise.float())

    def trajectory(self, seeds: Sequence[int], labels: Labels = None, **settings: Any) -> list[tuple[Tensor, Tensor]]:
        """State and denoised estimate at every step, each ``(B, C, H, W)`` float32 on the CPU; the last is the sample.

        The states are scaled to the deviation of the data, whatever the noise level. Of a latent model both are what
        the autoencoder decodes.
        """
        steps = list[tuple[Tensor, Tensor]]()
        deviation = 0.5 if self.config.autoencoder is None else 1.0  # latents are scaled to 1

        def shown(x: Tensor) -> Tensor:
            return (x.float() if self.autoencoder is None else self.autoencoder.decode(x.float())).cpu()

        def keep_step(i: int, level: Tensor, x: Tensor, denoised: Tensor) -> None:
            spread = x.float().flatten(1).std(1).clamp(min=deviation).view(-1, 1, 1, 1)
            steps.append((shown(x.float() * (deviation / spread)), shown(denoised)))

        final = self.sample(seeds, labels, callback=keep_step, **settings).cpu()
        return [*steps, (final, final)]

    def save_trajectory(self, path: Path, seeds: Sequence[int], labels: Labels = None, *, batch: int = 64) -> Path:
        """:meth:`trajectory` as an animation: the states to the left, what they are taken to show to the right."""
        classes = choose_labels(self.config, seeds, labels)
        parts = [slice(start, start + batch) for start in range(0, len(seeds), batch)]
        tracks = [self.trajectory(seeds[part], None if classes is None else classes[part]) for part in parts]
        columns = min(len(seeds), TRAJECTORY_COLUMNS)
        rows = math.ceil(len(seeds) / columns)
        frames = []
        for step in zip(*tracks, strict=True):
            halves = []
            for images in zip(*step, strict=True):
                cells = to_uint8(torch.cat(images), self.config.sampling.rounding)
                free = cells.new_full((rows * columns - len(cells), *cells.shape[1:]), WHITE)
                halves.append(torch.cat([cells, free]).unflatten(0, (rows, columns)))
            frames.append(make_grid(torch.cat(halves, dim=1).flatten(0, 1), (2 * columns, rows)))
        save_gif(frames, path)
        return path

    def generate(
        self,
        seeds: Sequence[int],
        labels: Labels = None,
        *,
        procs: Processes | None = None,
        batch: int = 64,
        progress: bool = False,
        done: Callable[[slice], bool] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields ``(start, images)``: uint8 (b, C, H, W) on the CPU for the seeds from position ``start`` on.

        With ``procs``, batch j is sampled by process j mod their number; no process holds more than one batch. Batches
        of which ``done`` says so are left out. Raises :class:`UserError` where a sample is not finite.
        """
        rank, count = (procs.rank, procs.count) if procs else (0, 1)
        classes = choose_labels(self.config, seeds, labels)
        with SamplingBar(len(seeds), self.config.sampling.steps, count, visible=progress and rank == 0) as bar:
            for start in range(0, len(seeds), batch)[rank::count]:
                part = slice(start, start + batch)
                if done is None or not done(part):
                    own = None if classes is None else classes[part]
                    images = self.sample(seeds[part], own, after_step=bar.step)
                    if not images.isfinite().all():  # uint8 would show them as black or white, a metric as a number
                        raise UserError(
                            f"the samples of seeds {seeds[part][0]} to {seeds[part][-1]} are not finite: the weights "
                            "are damaged, or the precision too low; use --precision fp32, and in training "
                            "--metrics none to go on without"
                        )
                    yield start, to_uint8(images, self.config.sampling.rounding).cpu()
                bar.finish(len(seeds[part]))

    def save(
        self,
        output: Output,
        seeds: Sequence[int],
        labels: Labels = None,
        *,
        procs: Processes | None = None,
        batch: int = 64,
        grid: tuple[int, int] | None = None,
        source: str = "",
    ) -> Path:
        """One image per seed into ``output``; ``grid`` (columns, rows) adds a picture of the first. Returns the path.

        All processes call this together. The same call goes on where an interrupted one stopped; ``source`` is what the
        record next to the samples calls the network.
        """
        if grid is not None and grid[0] * grid[1] > len(seeds):
            raise UserError(f"--grid {grid[0]}x{grid[1]} needs {grid[0] * grid[1]} images, there are {len(seeds)}")
        procs = procs or Processes(0, 1, self.device)
        weights = [fingerprint(model.net) for model in (self, self.guide) if model is not None]
        if procs.count > 1:  # a run that trains writes newer ones
            procs.require_same(weights, source, "weights", "name one file")
        classes = choose_labels(self.config, seeds, labels)
        vae = None if self.autoencoder is None else self.autoencoder.sha256
        origin = {"network": source, "precision": self.precision, "vae": vae}
        if self.guide is not None:
            origin["guide"] = weights[1]
        job = Job(seeds, classes, self.net, self.config, origin)
        with output.begin(job, procs):
            parts = self.generate(seeds, classes, procs=procs, batch=batch, progress=True, done=output.done)
            for start, images in parts:
                output.write(start, images)
            procs.barrier()
            if not procs.is_first:
                return output.outdir
            if grid is not None:
                save_grid(output.read(grid[0] * grid[1]), beside(output.outdir, "grid"), grid)
            return output.finish((self.config.model.num_classes and class_names(self.config)) or None)

    def save_class_grid(
        self, outdir: Path, seeds: Sequence[int], classes: Sequence[int], *, procs: Processes, batch: int = 64
    ) -> Path:
        """A picture next to ``outdir``: a row per class, a column per seed, by the first process. Returns its path."""
        count = len(classes) * len(seeds)
        if not self.config.model.num_classes:
            raise UserError("--class-grid: the model has no classes; use --grid")
        if count > CLASS_GRID_LIMIT:
            raise UserError(
                f"--class-grid: {len(classes)} classes × {len(seeds)} seeds are {count} images, more than "
                f"{CLASS_GRID_LIMIT} in one picture; give fewer --seeds, or some --class"
            )
        path = beside(outdir, "class-grid")
        if procs.is_first:
            labels = torch.tensor(list(classes)).repeat_interleave(len(seeds))
            parts = self.generate(list(seeds) * len(classes), labels, batch=batch, progress=True)
            names = [class_title(self.config, label) for label in classes]
            save_grid(torch.cat([images for _, images in parts]), path, (len(seeds), len(classes)), names)
        procs.barrier()
        return path

    def _solver(self, labels: Tensor | None) -> Callable[..., Tensor]:
        """The sampler of the settings as a function of noise and hooks, for classes ``(B,)`` on the device."""
        diffusion, sampling = self.config.diffusion, self.config.sampling
        if isinstance(diffusion, ADMDiffusion) and sampling.sampler in DISCRETE:
            schedule = schedule_of(diffusion)
            predict = self._guided(labels, schedule)
            respaced = schedule.respace(sampling.steps, sampling.spacing)
            extra = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
            solver: Callable[..., Tensor] = ddim if sampling.sampler == "ddim" else ddpm
            return partial(solver, predict, schedule=respaced, clip=diffusion.clip, **extra)
        return partial(solver_of(sampling), self.denoiser(labels), sigmas=noise_levels(self.config))

    def _guided(self, labels: Tensor | None, schedule: Schedule | None = None) -> Denoiser:
        """:meth:`_unguided`, guided as the settings say; on a ``schedule`` variances stay conditional."""
        sampling, model = self.config.sampling, self.config.model
        evaluate = self._unguided(labels, schedule)
        if sampling.cfg_scale == 1 or (labels is None and self.guide is None):
            return evaluate
        scale: float | Scale = sampling.cfg_scale
        if sampling.cfg_power is not None:
            timesteps = 1000 if schedule is None else len(schedule)
            scale = power_cosine(sampling.cfg_scale, sampling.cfg_power, timesteps=timesteps)
        if sampling.cfg_interval is not None:
            scale = within(scale, *sampling.cfg_interval, None if schedule is None else schedule.sigma_of)
        channels = min(sampling.cfg_channels or model.sample_shape[0], model.sample_shape[0])
        return guided(evaluate, self._worse(labels, schedule), scale, channels, tolerance=sampling.cfg_skip)

    def _worse(self, labels: Tensor | None, schedule: Schedule | None) -> Denoiser:
        """What guidance leads away from: the guide, or the network without the class."""
        if self.guide is None:
            assert labels is not None
            require_null_class(self.config)
            return self._unguided(torch.full_like(labels, self.config.model.num_classes), schedule)
        return self.guide._unguided(labels if self.guide.config.model.num_classes else None, schedule)


def _levels(diffusion: EDMDiffusion | ADMDiffusion) -> tuple[str | int, ...]:
    """What must be alike for two networks to mean the same by a level."""
    return ("edm",) if diffusion.kind == "edm" else ("adm", diffusion.schedule, diffusion.timesteps)


def beside(outdir: Path, name: str, suffix: str = ".png") -> Path:
    """A picture's place next to the folder of samples: in it, other programs would take it for one of them."""
    folder = outdir.resolve()
    return folder.with_name(f"{folder.name}-{name}{suffix}")


def prepare(net: DiffiT, precision: str = "fp32") -> DiffiT:
    """Arrange a network for sampling in ``precision``, in place; it cannot be trained afterwards.

    Autocast would convert the matrices again in every evaluation, so they are kept in the dtype that they are used in;
    what is added up between them stays float32.
    """
    net.eval().requires_grad_(False)
    if precision in DTYPES:
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(DTYPES[precision])
            elif isinstance(module, Mlp):
                module.fuses_gelu = precision == "bf16" and has_fused_gelu()
    return net if isinstance(net, LatentDiffiT) else channels_last(net)


def load(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    precision: str = "auto",
    vae: str | None = None,
    verify: bool = True,
) -> Model:
    """The model of a network file, a run folder (its newest snapshot), or a Hub id, ready to be sampled.

    ``device`` defaults to a GPU where there is one. ``precision`` auto is bf16 on a GPU that has it, else fp32. ``vae``
    is a folder or Hub id in place of the autoencoder that a latent model names. ``verify`` compares the file with its
    checksum, where it has one. Raises :class:`UserError`.
    """
    device = pick_device() if device is None else torch.device(device)
    precision = check_precision(precision, device)
    net, config = load_network(source, device, verify=verify)
    autoencoder = autoencoder_of(config, vae, device=device)
    return Model(prepare(net, precision), config, autoencoder, precision)


def sample(
    net: DiffiT,
    config: Config,
    seeds: Sequence[int] | None = None,
    labels: Labels = None,
    *,
    precision: str = "fp32",
    **how: Any,
) -> Tensor:
    """:meth:`Model.sample` of a bare network; of a latent model latents. ``how`` goes to that method."""
    return Model(net, config, None, precision).sample(seeds, labels, **how)
