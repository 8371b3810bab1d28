"""The transformer block that both families are made of, and the initialisation of their linear layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit.models.attention import TMSA


def dropped_linear(x: Tensor, layer: nn.Linear, p: float) -> Tensor:
    """``layer(F.dropout(x, p))``, whose mask takes a CPU longer to draw than the layer takes to compute.

    There one draw is for four values, ``p`` a multiple of 1/65,536, and the weights are scaled in place of the values.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or type(layer) is not nn.Linear:
        return layer(F.dropout(x, p))
    steps = 2**16
    drop = min(round(p * steps), steps - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= drop - steps // 2
    return F.linear(torch.where(keep, x, 0.0), layer.weight * (steps / (steps - drop)), layer.bias)


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, dropout, linear: ``(…, dim) -> (…, dim)``."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x), approximate="tanh")
        if self.training and self.dropout:
            return dropped_linear(x, self.fc2, self.dropout)
        out: Tensor = self.fc2(x)
        return out


class DiffiTBlock(nn.Module):
    """x̂ = TMSA(LN x, x_t) + x, then MLP(LN x̂) + x̂ (Eq. 7–8): ``((B, H, W, dim), (B, cond_dim)) -> (B, H, W, dim)``.

    The norms have no parameters: scale and shift are the next linear layer's business, as in the official weights.
    """

    def __init__(
        self,
        dim: int,
        cond_dim: int,
        num_heads: int,
        *,
        grid_size: int | tuple[int, int],
        window_size: int | tuple[int, int] | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = TMSA(dim, cond_dim, num_heads, grid_size=grid_size, window_size=window_size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), dropout)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cond)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


@torch.no_grad()
def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, for linear layers and convolutions; use with ``Module.apply``."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
