"""Validated, frozen configuration. Unknown keys and impossible values are refused; nothing here imports torch.

A :class:`Config` is what a preset returns, what a training run writes to ``training_options.json``, and what travels in
the header of a weights file.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from diffit.configs.fields import Blocks, Count, Frozen, NonNegative, Positive, Probability, Share, Size, Steps
from diffit.configs.sampling import CONTINUOUS, DISCRETE, Sampler, Sampling, check_steps
from diffit.errors import UserError


class StageSpec(Frozen):
    """One resolution of the U: ``blocks`` ResBlocks of ``width`` channels, ``window`` None for global attention."""

    blocks: Blocks
    width: Size
    heads: Count
    window: Count | None

    @model_validator(mode="after")
    def _heads_divide(self) -> "StageSpec":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        return self


class ImageModel(Frozen):
    """Arguments of :class:`diffit.models.image.ImageDiffiT`."""

    family: Literal["image"] = "image"
    image_size: tuple[Count, Count]
    """Height and width in pixels."""
    channels: Count = 3
    stages: Annotated[tuple[StageSpec, ...], Field(min_length=1)]
    """Encoder stages from full resolution to the bottleneck; the decoder mirrors all but the last."""
    cond_dim: Size = 512
    mlp_ratio: Positive = 4.0
    num_classes: Annotated[int, Field(ge=0)] = 0
    """0 is an unconditional model."""
    augment_dim: Annotated[int, Field(ge=0)] = 0
    """Width of the augmentation label; 0 when trained without augmentation."""
    dropout: Share = 0.0

    @model_validator(mode="after")
    def _deep_enough(self) -> "ImageModel":
        if min(self.image_size) < 2 ** (len(self.stages) - 1):
            raise ValueError(
                f"{len(self.stages)} stages halve {self.image_size[0]}x{self.image_size[1]} pixels to nothing; "
                "use fewer stages"
            )
        return self

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.channels, *self.image_size


class LatentModel(Frozen):
    """Arguments of :class:`diffit.models.latent.LatentDiffiT`."""

    family: Literal["latent"] = "latent"
    input_size: tuple[Count, Count] = (32, 32)
    """Height and width of the latents."""
    patch_size: Count = 2
    in_channels: Count = 4
    hidden_size: Size = 1152
    depth: Blocks = 28
    num_heads: Count = 16
    mlp_ratio: Positive = 4.0
    num_classes: Annotated[int, Field(ge=0)] = 1000
    """0 is an unconditional model."""

    @model_validator(mode="after")
    def _divides(self) -> "LatentModel":
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads and by 4")
        if any(side % self.patch_size for side in self.input_size):
            raise ValueError(
                f"latents of {self.input_size[0]}x{self.input_size[1]} do not divide into patches of {self.patch_size}"
            )
        return self

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.in_channels, *self.input_size


class AutoencoderSpec(Frozen):
    """The VAE whose latents a latent model samples."""

    vae: str = "stabilityai/sd-vae-ft-ema"
    """A local folder or a Hub id, in diffusers' ``AutoencoderKL`` layout."""
    scale: Positive = 0.18215
    """Latents are multiplied by this, which brings their standard deviation near 1."""
    factor: Count = 8
    """Pixels a latent, along each side."""


class EDMDiffusion(Frozen):
    """Noise distribution and preconditioning of EDM (arXiv 2206.00364, Table 1)."""

    kind: Literal["edm"] = "edm"
    sigma_data: Positive = 0.5
    P_mean: Annotated[float, Field(allow_inf_nan=False)] = -1.2
    P_std: Positive = 1.2


Prediction = Literal["epsilon", "v"]


class ADMDiffusion(Frozen):
    """Discrete noise schedule (arXiv 2102.09672)."""

    kind: Literal["adm"] = "adm"
    schedule: Literal["linear", "cosine"] = "linear"
    timesteps: Steps = 1000
    prediction: Prediction = "epsilon"
    """What the network predicts: the noise ε, or v = √ᾱ·ε − √(1 − ᾱ)·x₀ (arXiv 2202.00512, Appendix D).

    From ε alone x₀ is (x − √(1 − ᾱ)·ε)/√ᾱ, an error 80 times as large as that of ε at σ = 80, where a student of
    few steps begins; from v it is one of the size of v's.
    """
    clip: bool = False
    """Clamp the predicted clean image to [−1, 1] while sampling: for pixels, not for latents."""


MARGIN = 4.0
"""On the length by the clock, which ends the run: a machine may be rid of other work after it was measured."""

FOLLOWING = ("lr_rampup_kimg", "ema_halflife_kimg", "tick", "ema_decay")
"""Fields of the training that follow from a length which is not the preset's."""

AUGMENT_LABELS = 9
"""What :mod:`diffit.data.augment` tells the network of its transforms."""


class Training(Frozen):
    """The recipe. Durations are in thousands of images (kimg)."""

    batch: Size
    """Images a step, over all processes."""
    batch_gpu: Count | None = None
    """Images a forward pass; None fits the whole share of a process in one."""
    kimg: Positive
    """The length; of a run by the clock that is not over, :data:`MARGIN` times what is expected."""
    minutes: Positive | None = None
    """The length by the clock, from which kimg was measured; None where kimg was asked for."""
    lr: Positive
    conv_lr: Positive = 1.0
    """The learning rate of convolutions, in multiples of lr."""
    lr_rampup_kimg: NonNegative = 10_000.0
    lr_decay: Probability = 0.0
    """Share of the run, its last, over which the learning rate falls to 0 linearly."""
    weighting: Literal["uncertainty"] | None = None
    """Of noise levels, besides what the loss has: each by 1 / its mean loss (EDM2's)."""
    optimizer: Literal["adam", "radam", "muon"] = "adam"
    """muon: weights between hidden layers by Muon, all others by Adam."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    ema_halflife_kimg: NonNegative = 500.0
    ema_rampup_ratio: NonNegative = 0.05
    """The half-life is at most this share of the images seen."""
    ema_decay: Share | None = None
    """Share of the average that stays after each step, whatever the batch; replaces the half-life."""
    augment: Probability = 0.0
    """Probability of each non-leaking augmentation; 0 switches them off, flips included."""
    mirror: bool = False
    """Flip half of the images left to right, for data that is as good in the mirror."""
    label_drop: Probability = 0.1
    seed: Annotated[int, Field(ge=0)] = 0
    init: Literal["xavier", "fan_in"] = "xavier"
    """How an image-space network's weights begin."""
    init_from: str | None = None
    """A network file whose weights the run begins with."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on a CUDA device that has it and fp32 elsewhere."""
    grad_ckpt: bool = False
    shard: bool = False
    """Whether each process keeps a part of weights, average and moments, and not all."""
    compile: bool | None = None
    """None: on a GPU in a run that is long enough, by :mod:`diffit.training.compiling`."""
    grad_clip: Positive | None = None
    """Norm that a gradient is scaled down to."""
    on_spike: Literal["skip", "rollback", "ignore"] = "skip"
    """What to do with a gradient far larger than those before it; one that is not finite is always skipped."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with an image that cannot be read; where it is skipped, the next one of its class stands for it."""
    max_skipped: Count = 20
    """Skipped steps in a row after which the run stops, or goes back to its newest state (rollback)."""
    timeout_minutes: Positive = 10.0
    """Within which, where a process hangs in a step, the others have saved and gone."""
    workers: Annotated[int, Field(ge=0, le=1000)] = 2
    tick: Positive = 50.0
    """kimg between lines of statistics."""
    snap: Annotated[int, Field(ge=0)] = 50
    """Ticks between snapshots and grids; 0: not by ticks."""
    snap_minutes: NonNegative = 10.0
    """Minutes after which a snapshot and a grid are due whatever the tick; 0: not by time."""
    dump: Annotated[int, Field(ge=0)] = 50
    """Ticks between training states; 0: not by ticks."""
    dump_minutes: NonNegative = 10.0
    """Minutes after which a training state is due whatever the tick; 0: not by time."""
    keep: Annotated[int, Field(ge=0)] = 10
    """Newest snapshots that are kept, next to the best ones; 0 keeps all."""
    grid: tuple[Count, Count] = (8, 8)
    """Columns and rows of the grids of samples."""
    desc: str | None = None
    """Text in the name of the run's folder."""
    metrics: tuple[str, ...] = ()
    metrics_ref: str | None = None
    """Images or statistics to compare with; None is the training data."""
    allow_scripts: bool = False
    """Whether a metric's detector may be TorchScript, a program that can do what its user can."""
    metrics_ticks: Annotated[int, Field(ge=0)] = 0
    """Ticks between metrics; 0: at the end only."""
    metrics_budget: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the time that metrics on the way may take: those that are due before it allows are left out."""
    metrics_sampler: Sampler | None = None
    metrics_steps: Steps | None = None
    """How the samples for metrics are made; None is as the model samples by default."""
    track: Literal["wandb", "trackio"] | None = None
    """A package that numbers and grids go to, next to TensorBoard's events."""
    chosen: tuple[str, ...] = FOLLOWING
    """Fields that nobody asked for: they follow from the length, the data or the machine, and a resumed run keeps those
    that it began with."""

    @field_validator("desc")
    @classmethod
    def _part_of_a_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.+=,-]+", value):
            raise ValueError(f"{value!r} becomes part of a folder's name; use letters, digits and . _ + = , -")
        return value

    @model_validator(mode="after")
    def _whole_graph(self) -> "Training":
        if self.metrics_budget is not None and not self.metrics:
            raise ValueError("--metrics-budget without --metrics: name some, such as fid10k_full, or leave it out")
        if self.shard and self.compile:
            raise ValueError("--shard gathers weights in the middle of what --compile makes one graph; use one of them")
        return self

    @property
    def clock_minutes(self) -> float | None:
        """Minutes after which the clock ends the run; None where its length is in images."""
        return self.minutes if "kimg" in self.chosen else None

    @property
    def margin(self) -> float:
        """How many times the expected length ``kimg`` is."""
        return 1.0 if self.clock_minutes is None else MARGIN

    def expected_kimg(self, seen: float) -> float:
        """The length that is to be expected of a run that has ``seen`` so many kimg, or its length when it is over."""
        return max(self.kimg / self.margin, seen)

    @property
    def steps(self) -> int:
        """Steps that show ``kimg``, in whole images first: 0.07 · 1000 is a little more than 70 in floating point."""
        return max(math.ceil(round(self.kimg * 1000) / self.batch), 1)


class Data(Frozen):
    """Where the images come from, and what a sampler needs to know of them."""

    path: str | None = None
    content: str | None = None
    """A hash of what the archive holds: it may move, and another one may take its place."""
    val: str | None = None
    """An archive of held-out images, for the held-out loss."""
    cond: bool = False
    class_names: tuple[str, ...] | None = None
    empty_classes: tuple[int, ...] = ()
    """Numbered, but without an image: nothing trains them, so they are not sampled."""


class Distillation(Frozen):
    """What a student, sampled in few steps, is made from."""

    method: Literal["progressive", "consistency"]
    teacher: str
    """Its network file; in the header of a student's file the name alone."""
    teacher_sha256: str
    """Over the names and values of the teacher's weights: the same in any file that holds them."""
    cfg_scale: NonNegative = 1.0
    """Guidance scale of the first teacher; the student has it built in, and needs no unconditional half."""
    teacher_sampling: Sampling | None = None
    """How the teacher of progressive distillation is sampled: two of its steps become one of the student's."""

    @model_validator(mode="after")
    def _halves(self) -> "Distillation":
        if (self.teacher_sampling is None) != (self.method == "consistency"):
            raise ValueError("progressive distillation, and it alone, samples its teacher")
        return self


class Config(Frozen):
    """Everything that determines a run."""

    preset: str
    model: Annotated[ImageModel | LatentModel, Field(discriminator="family")]
    autoencoder: AutoencoderSpec | None = None
    """Only latent models have one."""
    diffusion: Annotated[EDMDiffusion | ADMDiffusion, Field(discriminator="kind")] = EDMDiffusion()
    sampling: Sampling = Sampling()
    training: Training
    data: Data = Data()
    distillation: Distillation | None = None
    """None of a model that was trained without a teacher."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        if (self.autoencoder is not None) != (self.model.family == "latent"):
            raise ValueError("a latent model needs an autoencoder, and only a latent model")
        if self.model.family == "latent" and self.diffusion.kind != "adm":
            raise ValueError("a latent model has a discrete schedule: diffusion must be of kind adm")
        if self.model.family == "latent" and self.training.augment:
            raise ValueError("latents cannot be augmented: use --augment 0, and --mirror for mirror images")
        if self.diffusion.kind == "edm" and self.sampling.sampler in DISCRETE:
            raise ValueError(
                f"sampler {self.sampling.sampler} needs a discrete schedule, this model has EDM's: "
                f"use {', '.join(CONTINUOUS[:-1])} or {CONTINUOUS[-1]}"
            )
        if self.diffusion.kind == "edm" and self.sampling.spacing == "leading":
            raise ValueError(
                f"steps ddim{self.sampling.steps} needs a discrete schedule, this model has EDM's: give a number"
            )
        if self.diffusion.kind == "edm" and self.sampling.cfg_power is not None:
            raise ValueError("the power-cosine scale is a function of timesteps, which this model (EDM) has none of")
        if self.diffusion.kind == "adm":
            check_steps(self.sampling, self.diffusion.timesteps)
        self._check_student()
        return self

    def _check_student(self) -> None:
        """ValueError where a model is sampled as only a student can be, or a student as it was not taught to be."""
        spec, sampling = self.distillation, self.sampling
        if spec is not None and spec.teacher_sampling is not None:
            solver = "euler" if self.diffusion.kind == "edm" else "ddim"
            taught = (solver, spec.teacher_sampling.steps // 2, "trailing")
            same = all(
                getattr(sampling, name) == getattr(spec.teacher_sampling, name)
                for name in ("sigma_min", "sigma_max", "rho")
            )
            other = not same or sampling.eta or sampling.levels == "lambda"
            if (sampling.sampler, sampling.steps, sampling.spacing) != taught or other:
                raise ValueError(
                    f"a student that was taught {taught[1]} steps of {solver}: leave sampler, steps and noise levels "
                    "as they are, or sample its teacher"
                )
        elif spec is not None and sampling.sampler != "consistency":
            raise ValueError(f"sampler {sampling.sampler}: a student of consistency tuning has its own; leave it out")
        elif spec is None and sampling.sampler == "consistency":
            raise ValueError("sampler consistency: only for a student of consistency tuning; use another")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures, which for a latent model are the decoder's."""
        if self.autoencoder is None:
            return self.model.sample_shape
        _, height, width = self.model.sample_shape
        return 3, height * self.autoencoder.factor, width * self.autoencoder.factor

    @classmethod
    def from_json(cls, text: str, source: str) -> "Config":
        """Parse JSON; a :class:`UserError` names ``source`` and every key or value that does not fit."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error)}") from None


def require_null_class(config: Config) -> None:
    """Raises :class:`UserError` where a model of classes is to be guided by its null class, which was never trained."""
    scale = config.sampling.cfg_scale
    if scale != 1 and config.model.num_classes and config.training.label_drop == 0:
        raise UserError(
            f"guidance (cfg_scale {scale:g}) needs the null class, which label_drop 0 never trains: use cfg_scale 1, "
            "or sample with a guide network"
        )


def student_title(config: Config) -> str:
    """What a student is, in a line."""
    student, sampling = config.distillation, config.sampling
    assert student is not None
    guided = f", guided at {student.cfg_scale:g}" if student.cfg_scale != 1 else ""
    return (
        f"{student.method}, {sampling.steps} step{'s' * (sampling.steps > 1)} of {sampling.sampler}, from "
        f"{Path(student.teacher).name} ({student.teacher_sha256[:12]}){guided}"
    )


KINDS = ("image", "latent", "edm", "adm")


def explain(error: ValidationError) -> str:
    """A validation error as one line: each value with its place and what was wrong with it."""
    parts: list[str] = []
    for item in error.errors():
        if item["type"] == "too_short" and parts:  # of what is left when faulty items are taken out
            continue
        # Pydantic puts the kind of a model or diffusion into the place; the user's JSON has no such level.
        place = ".".join(str(key) for i, key in enumerate(item["loc"]) if not (i == 1 and key in KINDS))
        message = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        elif item["type"] == "union_tag_invalid":
            place += "." + item["ctx"]["discriminator"].strip("'")
            message = f"{item['ctx']['tag']!r} should be one of {item['ctx']['expected_tags']}"
        elif item["type"] not in ("value_error", "missing"):
            message = f"{item['input']!r} {message}"
        parts.append(f"{place}: {message}" if place else message)
    return "; ".join(parts)
