"""The latent model: a flat transformer whose parameters carry the names of NVIDIA's official weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffit.configs.schema import LatentModel
from diffit.models.attention import to_pair
from diffit.models.block import DiffiTBlock, init_linear
from diffit.models.embeddings import LabelEmbedder, PatchEmbedder, TimestepEmbedder, position_embedding


class FinalLayer(nn.Module):
    """Linear(SiLU(LN x)): ``(B, H, W, dim) -> (B, H, W, out)``."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(F.silu(self.norm(x)))
        return out


class LatentDiffiT(nn.Module):
    """``(x: (B, C, h, w), t: (B,) or (1,), y: (B,) int64 or None) -> (B, 2C, h, w)``: ε, then the variance's range.

    ``t`` is the original timestep, 0…999, fractions allowed. Labels are in ``[0, num_classes)``, the null class is
    ``num_classes``; ``num_classes=0`` is an unconditional model and takes ``y=None``. With ``label_drop=0`` there is
    no null class, since nothing would train it. The official model is the default, at 256 pixels; 512 has
    ``input_size=64``.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        label_drop: float = 0.1,
    ) -> None:
        super().__init__()
        height, width = to_pair(input_size)
        self.grid = (height // patch_size, width // patch_size)
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.grad_ckpt = False
        self.x_embedder = PatchEmbedder(in_channels, patch_size, hidden_size)
        self.pos_embed = nn.Buffer(position_embedding(self.grid, hidden_size)[None])
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null=label_drop > 0) if num_classes else None
        self.blocks = nn.ModuleList(
            DiffiTBlock(hidden_size, hidden_size, num_heads, grid_size=self.grid, mlp_ratio=mlp_ratio)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * 2 * in_channels)
        self.init_weights()

    @classmethod
    def from_config(cls, config: LatentModel) -> "LatentDiffiT":
        return cls(**config.model_dump(exclude={"family"}))

    def init_weights(self) -> None:
        """As in the official implementation: Xavier-uniform, the conditioning 0.02, the final layer 0."""
        self.apply(init_linear)
        self.t_embedder.init_weights(std=0.02)
        if self.y_embedder is not None:
            self.y_embedder.init_weights(std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)

    def set_grad_ckpt(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_ckpt = enabled

    def embed(self, t: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Time and class in one vector: ``(B, dim)``, or ``(1, dim)`` for one timestep without classes."""
        if (y is None) != (self.y_embedder is None):
            need = f"y in [0, {self.num_classes}]" if self.num_classes else "y=None"
            raise ValueError(f"this model has {self.num_classes} classes: pass {need}")
        cond: Tensor = self.t_embedder(t, dtype)
        return cond if self.y_embedder is None else cond + self.y_embedder(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        cond = self.embed(t, y, x.dtype)  # (B, D)
        h, w = self.grid
        hidden = self.x_embedder(x) + self.pos_embed.view(1, h, w, -1)  # (B, h, w, D)
        for block in self.blocks:
            if self.grad_ckpt and self.training:
                hidden = checkpoint(block, hidden, cond, use_reentrant=False)
            else:
                hidden = block(hidden, cond)
        return self.unpatchify(self.final_layer(hidden))

    def unpatchify(self, x: Tensor) -> Tensor:
        """``(B, h, w, p·p·c) -> (B, c, h·p, w·p)``, the features of a token in the order (p, p, c)."""
        B, h, w, _ = x.shape
        p = self.patch_size
        return x.view(B, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * p, w * p)
