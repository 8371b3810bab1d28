"""The image-space model: a U of DiffiT ResBlocks (arXiv 2312.02139, §3.2 and §H.1)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffit.configs.schema import ImageModel, StageSpec
from diffit.models.block import DiffiTBlock, init_linear
from diffit.models.embeddings import LabelEmbedder, TimestepEmbedder


class GroupNorm(nn.GroupNorm):
    """At most 32 groups of at least four channels, as many as divide the width."""

    def __init__(self, channels: int) -> None:
        super().__init__(next(n for n in range(min(32, max(channels // 4, 1)), 0, -1) if channels % n == 0), channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            x = x.to(self.weight.dtype)  # as autocast has it on CUDA by itself; a CPU's in bfloat16 is slow
        return super().forward(x)


class DiffiTResBlock(nn.Module):
    """x̂ = Conv3×3(Swish(GN x)); x = DiffiT-Block(x̂, x_t) + x (Eq. 9–10), on ``(B, C, H, W)``."""

    def __init__(self, spec: StageSpec, cond_dim: int, *, grid_size: tuple[int, int], **block: float) -> None:
        super().__init__()
        self.norm = GroupNorm(spec.width)
        self.conv = nn.Conv2d(spec.width, spec.width, 3, padding=1)
        self.block = DiffiTBlock(
            spec.width, cond_dim, spec.heads, grid_size=grid_size, window_size=spec.window, **block
        )

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        hidden = self.conv(F.silu(self.norm(x))).permute(0, 2, 3, 1)  # (B, H, W, C)
        out: Tensor = x + self.block(hidden, cond).permute(0, 3, 1, 2)
        return out


class Stage(nn.ModuleList):
    """The ResBlocks of one resolution: ``((B, C, H, W), (B, cond_dim)) -> (B, C, H, W)``."""

    grad_ckpt = False

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, cond, use_reentrant=False) if self.grad_ckpt and self.training else block(x, cond)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour to the skip's size and a convolution, then joined with the skip: ``-> (B, C, H, W)``."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, padding=1)
        self.merge = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        # The skip's own size, not a factor of two: a map of odd size was rounded up on the way down.
        x = self.conv(F.interpolate(x, size=skip.shape[-2:], mode="nearest"))
        out: Tensor = self.merge(torch.cat([x, skip], dim=1))
        return out


class ImageDiffiT(nn.Module):
    """``(x: (B, C, H, W), c_noise: (B,), class_labels: (B,) int64 or None, augment_labels: (B, A) or None) -> like x``

    ``stages`` are those of the encoder, the bottleneck last; the decoder mirrors the others, with one skip connection
    a resolution. Labels are in ``[0, num_classes)``, the null class is ``num_classes``; ``num_classes=0`` is an
    unconditional model. Without ``augment_labels`` the images count as un-augmented. H and W may differ from
    ``image_size`` unless a stage attends globally.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec],
        *,
        image_size: tuple[int, int],
        channels: int = 3,
        cond_dim: int = 512,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        augment_dim: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.t_embedder = TimestepEmbedder(cond_dim)
        self.y_embedder = LabelEmbedder(num_classes, cond_dim) if num_classes else None
        self.augment_embedder = nn.Linear(augment_dim, cond_dim, bias=False) if augment_dim else None

        def stage(level: int) -> Stage:
            size = (-(-image_size[0] // 2**level), -(-image_size[1] // 2**level))
            spec = stages[level]
            return Stage(
                DiffiTResBlock(spec, cond_dim, grid_size=size, mlp_ratio=mlp_ratio, dropout=dropout)
                for _ in range(spec.blocks)
            )

        widths = [spec.width for spec in stages]
        deeper = list(pairwise(widths))
        self.tokenizer = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(stage(level) for level in range(len(stages)))
        self.down = nn.ModuleList(nn.Conv2d(w, w_next, 3, stride=2, padding=1) for w, w_next in deeper)
        self.up = nn.ModuleList(Upsample(w_next, w) for w, w_next in reversed(deeper))
        self.decoder = nn.ModuleList(stage(level) for level in reversed(range(len(stages) - 1)))
        self.head_norm = GroupNorm(widths[0])
        self.head = nn.Conv2d(widths[0], channels, 3, padding=1)
        self.init_weights()

    @classmethod
    def from_config(cls, config: ImageModel) -> "ImageDiffiT":
        arguments = {name: getattr(config, name) for name in type(config).model_fields if name != "family"}
        return cls(**arguments)

    def init_weights(self, scheme: str = "xavier") -> None:
        """``xavier`` for every layer; or ``fan_in``: convolutions by their inputs alone (He et al. 2015, gain 1), and
        branches of attention and MLP that begin at 0. It leaves the loss's first plateau earlier.
        """
        self.apply(init_linear)
        if scheme == "fan_in":
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                elif isinstance(module, DiffiTBlock):
                    nn.init.zeros_(module.attn.proj.weight)
                    nn.init.zeros_(module.mlp.fc2.weight)
        if self.y_embedder is not None:
            # As large as the noise level's part of the token; at 0.02 a class is heeded only much later.
            self.y_embedder.init_weights(std=1.0)
        nn.init.zeros_(self.head.weight)  # F = 0 at the start: the denoiser begins at c_skip·x

    def set_grad_ckpt(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_ckpt = enabled

    def embed(
        self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The time token: noise level, class and augmentation in one vector, ``(B, cond_dim)``."""
        cond: Tensor = self.t_embedder(c_noise, dtype)
        if (class_labels is None) != (self.y_embedder is None):
            need = f"class_labels in [0, {self.num_classes}]" if self.num_classes else "class_labels=None"
            raise ValueError(f"this model has {self.num_classes} classes: pass {need}")
        if self.y_embedder is not None:
            cond = cond + self.y_embedder(class_labels)
        if augment_labels is not None:
            if self.augment_embedder is None:
                raise ValueError("this model has augment_dim=0: pass augment_labels=None")
            cond = cond + self.augment_embedder(augment_labels)
        return cond

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        cond = self.embed(c_noise, class_labels, augment_labels, x.dtype)
        x = self.encoder[0](self.tokenizer(x), cond)
        skips = []
        for down, stage in zip(self.down, self.encoder[1:], strict=True):
            skips.append(x)
            x = stage(down(x), cond)
        for up, stage in zip(self.up, self.decoder, strict=True):
            x = stage(up(x, skips.pop()), cond)
        out: Tensor = self.head(F.silu(self.head_norm(x)))
        return out
