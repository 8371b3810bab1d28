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


class TimestepEmbedder(nn.Module):
    """Positional features of a noise level or timestep, then an MLP with SiLU: ``(B,) -> (B, dim)``."""

    def __init__(self, dim: int, feature_dim: int = 256) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.mlp = nn.Sequential(nn.Linear(feature_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.feature_dim)
        return self.mlp(features.to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """One vector a class, and one more for the null class ``num_classes``: ``(B,) int64 -> (B, dim)``."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.embedding_table.weight, std=std)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)
