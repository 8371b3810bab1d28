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
    drop = min(max(round(p * steps), 1), steps - 1)  # neither end would fit into 16 bits below
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    first_kept = drop - steps // 2
    # −1 where a value is dropped, else 0; comparisons and masks are several times slower.
    dropped = draws.view(torch.int16)[: x.numel()].view(x.shape).clamp_(first_kept - 1, first_kept).sub_(first_kept)
    x.data.add_(dropped, alpha=FAR)  # not autograd's to know: GELU's slope is what the gradient has to go by
    return steps / (steps - drop)


@cache
def has_fused_gelu() -> bool:
    """Whether this CPU has bfloat16's product and GELU in one kernel, the one that PyTorch's own compiler uses."""
    x, weight = torch.ones(1, 16, dtype=torch.bfloat16), torch.full((2, 16), 0.1, dtype=torch.bfloat16)
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.allclose(
            linear_gelu(x, weight, None), F.gelu(F.linear(x, weight), approximate="tanh"), rtol=1e-2
        )
    except (AttributeError, RuntimeError, TypeError):  # another build of PyTorch
        return False


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU of a linear layer, in a seventh less time than one after the other; without a gradient."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
    return out


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, dropout, linear: ``(…, dim) -> (…, dim)``."""

    fuses_gelu = False
    """Whether it may be sampled by :func:`linear_gelu`: see :func:`diffit.sampling.model.prepare`."""
    keeps_mask = False
    """Whether dropout draws a mask on a CPU too, as it does elsewhere."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        by_hand = x.device.type == "cpu" and not torch.compiler.is_compiling()
        # A layer that another has taken the place of (quantised, adapted) is called as it is.
        if by_hand and self.fuses_gelu and not torch.is_grad_enabled() and type(self.fc1) is nn.Linear:
            hidden = linear_gelu(x.to(self.fc1.weight.dtype), self.fc1.weight, self.fc1.bias)
        elif by_hand and self.training and self.dropout and not self.keeps_mask and type(self.fc2) is nn.Linear:
            x = self.fc1(x)
            scale = drop_before_gelu(x, self.dropout)
            return F.linear(F.gelu(x, approximate="tanh"), self.fc2.weight * scale, self.fc2.bias)
        else:
            hidden = F.dropout(F.gelu(self.fc1(x), approximate="tanh"), self.dropout, self.training)
        out: Tensor = self.fc2(hidden)
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
