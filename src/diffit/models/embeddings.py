"""What goes into the time token: noise level, class label, augmentation."""

import math

import torch
from torch import Tensor, nn


def timestep_features(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of ``t``: ``(B,) -> (B, dim)``, cos first, then sin, frequencies exp(−ln(max_period)·i/(dim/2)).

    At least float32, whatever the dtype of ``t``: bfloat16 cannot tell timestep 999 from 1000.
    """
    half = dim // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(size: tuple[int, int], dim: int) -> Tensor:
    """Sinusoids of a token's place, ``(h·w, dim)`` float32, row-major; computed in float64.

    The first half of the width encodes the column, the second the row; each half is sin, then cos.
    """
    h, w = size
    frequencies = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


class PatchEmbedder(nn.Module):
    """Non-overlapping patches as tokens on a map: ``(B, C, H, W) -> (B, H/p, W/p, dim)``."""

    def __init__(self, channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x.permute(0, 2, 3, 1)


class TimestepEmbedder(nn.Module):
    """Positional features of a noise level or timestep, then an MLP with SiLU: ``(B,) -> (B, dim)``.

    The features are computed in float32 at least and reach the MLP in ``dtype``, that of the network's activations. Its
    own parameters cannot say it: quantised layers have none, and layer-wise casting keeps them in another dtype.
    """

    def __init__(self, dim: int, feature_dim: int = 256) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.mlp = nn.Sequential(nn.Linear(feature_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def init_weights(self, std: float) -> None:
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=std)

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        features = timestep_features(t, self.feature_dim)
        cond: Tensor = self.mlp(features if dtype is None else features.to(dtype))
        return cond


class LabelEmbedder(nn.Module):
    """One vector a class and, with ``null``, one more for the null class: ``(B,) int64 -> (B, dim)``."""

    def __init__(self, num_classes: int, dim: int, *, null: bool = True) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null, dim)

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.embedding_table.weight, std=std)

    def forward(self, labels: Tensor) -> Tensor:
        vectors: Tensor = self.embedding_table(labels)
        return vectors
