"""Validated, frozen configuration. Unknown keys and impossible values are refused; nothing here imports torch.

A :class:`Config` is what a preset returns, what a training run writes to ``training_options.json``, and what travels in
the header of a weights file.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffit.errors import UserError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Frozen(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class StageSpec(Frozen):
    """One resolution of the U: ``blocks`` ResBlocks of ``width`` channels, ``window`` None for global attention."""

    blocks: Count
    width: Count
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
    cond_dim: Count = 512
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


class EDMDiffusion(Frozen):
    """Noise distribution and preconditioning of EDM (arXiv 2206.00364, Table 1)."""

    kind: Literal["edm"] = "edm"
    sigma_data: Positive = 0.5
    P_mean: Annotated[float, Field(allow_inf_nan=False)] = -1.2
    P_std: Positive = 1.2


class Sampling(Frozen):
    """What ``diffit sample`` does with the file when nothing else is asked for."""

    sampler: Literal["heun", "euler"] = "heun"
    steps: Count = 18
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0
    S_churn: NonNegative = 0.0
    S_min: NonNegative = 0.0
    S_max: NonNegative = 1e6
    S_noise: Positive = 1.0
    cfg_scale: NonNegative = 1.0

    @model_validator(mode="after")
    def _range(self) -> "Sampling":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} must be below sigma_max {self.sigma_max:g}")
        return self


class Training(Frozen):
    """The recipe. Durations are in thousands of images (kimg)."""

    batch: Count
    """Images a step, over all processes."""
    batch_gpu: Count | None = None
    """Images a forward pass; None fits the whole share of a process in one."""
    kimg: Positive
    lr: Positive
    lr_rampup_kimg: NonNegative = 10_000.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    ema_halflife_kimg: NonNegative = 500.0
    ema_rampup_ratio: NonNegative = 0.05
    """The half-life is at most this share of the images seen."""
    augment: Probability = 0.0
    """Probability of each non-leaking augmentation; 0 switches them off, flips included."""
    mirror: bool = False
    """Flip half of the images left to right, for data that is as good in the mirror."""
    label_drop: Probability = 0.1
    seed: Annotated[int, Field(ge=0)] = 0
    init_from: str | None = None
    """A network file whose weights the run begins with."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on a CUDA device that has it and fp32 elsewhere."""
    grad_ckpt: bool = False
    compile: bool = False
    max_skipped: Count = 20
    """Steps in a row with a non-finite gradient after which the run stops."""
    workers: Annotated[int, Field(ge=0)] = 2
    tick: Positive = 50.0
    """kimg between lines of statistics."""
    snap: Annotated[int, Field(ge=0)] = 50
    """Ticks between snapshots and grids; 0: at the end only."""
    dump: Annotated[int, Field(ge=0)] = 50
    """Ticks between training states; 0: at the end only."""
    metrics: tuple[str, ...] = ()
    metrics_ticks: Annotated[int, Field(ge=0)] = 0
    """Ticks between metrics; 0: at the end only."""

    @property
    def steps(self) -> int:
        """Steps that show ``kimg``, in whole images first: 0.07 · 1000 is a little more than 70 in floating point."""
        return max(math.ceil(round(self.kimg * 1000) / self.batch), 1)


class Data(Frozen):
    """Where the images come from, and what a sampler needs to know of them."""

    path: str | None = None
    val: str | None = None
    """An archive of held-out images, for the held-out loss."""
    cond: bool = False
    class_names: tuple[str, ...] | None = None


class Config(Frozen):
    """Everything that determines a run."""

    preset: str
    model: ImageModel
    diffusion: EDMDiffusion = EDMDiffusion()
    sampling: Sampling = Sampling()
    training: Training
    data: Data = Data()

    @classmethod
    def from_json(cls, text: str, source: str) -> "Config":
        """Parse JSON; a :class:`UserError` names ``source`` and every key or value that does not fit."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """A validation error as one line: each value with its place and what was wrong with it."""
    parts: list[str] = []
    for item in error.errors():
        if item["type"] == "too_short" and parts:  # of what is left when faulty items are taken out
            continue
        place = ".".join(str(key) for key in item["loc"])
        message = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        elif item["type"] not in ("value_error", "missing"):
            message = f"{item['input']!r} {message}"
        parts.append(f"{place}: {message}" if place else message)
    return "; ".join(parts)
