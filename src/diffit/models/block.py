"""The transformer block that both families are made of, and the initialisation of their linear layers."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit.models.attention import TMSA

FAR = 10_000  # from any network's values; that far below 0 the tanh in GELU is exactly −1: its value and slope are 0


def drop_before_gelu(x: Tensor, p: float) -> float:
    """Make GELU and its gradient 0 at a share ``p`` of the values of ``x``, in place; returns 1/(1 − p), to scale by.

    For a CPU, where a mask takes longer to draw and to apply than a layer to compute: one draw is for four values,
    ``p`` a multiple of 1/65,536, and the gradient needs no mask.
    """
    steps = 2**16
    drop = min(max(round(p * steps), 1), steps - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    first_kept = drop - steps // 2
    # −1 where a value is dropped, else 0; comparisons and masks are several times slower.
    dropped = draws.view(torch.int16)[: x.numel()].view(x.shape).clamp_(first_kept - 1, first_kept).sub_(first_kept)
    x.data.add_(dropped, alpha=FAR)  # not autograd's to know: GELU's slope is what the gradient has to go by
    return steps / (steps - drop)


@cache
def has_fused_gelu() -> bool:
    """Whether this CPU multiplies bfloat16 by oneDNN, with the operator that PyTorch's own compiler uses."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.ops.mkldnn._linear_pointwise)
    except (AttributeError, RuntimeError):  # another build of PyTorch
        return False


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """``F.gelu(layer(x), approximate="tanh")``, on a CPU that samples in bfloat16 as one kernel: a sixth faster."""
    if (
        x.device.type == "cpu"
        and type(layer) is nn.Linear  # not a quantised one
        and layer.weight.dtype == torch.bfloat16
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        and has_fused_gelu()
    ):
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(torch.bfloat16), layer.weight, layer.bias, "gelu", [], "tanh"
        )
        return fused
    return F.gelu(layer(x), approximate="tanh")


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, dropout, linear: ``(…, dim) -> (…, dim)``."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        if p and x.device.type == "cpu" and not torch.compiler.is_compiling() and type(self.fc2) is nn.Linear:
            x = self.fc1(x)
            scale = drop_before_gelu(x, p)
            return F.linear(F.gelu(x, approximate="tanh"), self.fc2.weight * scale, self.fc2.bias)
        out: Tensor = self.fc2(F.dropout(linear_gelu(x, self.fc1), p, self.training))
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
