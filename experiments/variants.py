"""Networks that differ from ours in one thing each: the rows of the paper's ablations (arXiv 2312.02139).

Each is made from the network of a configuration by exchanging parts of it. None is an option of the program.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit.configs.schema import ImageModel
from diffit.models import build
from diffit.models.attention import (
    TMSA,
    join_heads,
    plain_attention,
    relative_position_bias,
    split_heads,
)
from diffit.models.block import DiffiTBlock, Mlp
from diffit.models.cost import count_parameters
from diffit.models.embeddings import TimestepEmbedder
from diffit.models.image import DiffiTResBlock, ImageDiffiT

TOLERANCE = 0.02  # of the parameters


class Attention(TMSA):
    """TMSA by its parts, which others exchange; maps must divide into windows."""

    def __init__(self, like: TMSA) -> None:
        grid, cond_dim = like.window, like.qkv_temb.in_features
        window = None if like.is_global else like.window
        super().__init__(like.qkv.in_features, cond_dim, like.num_heads, grid_size=grid, window_size=window)

    def project(self, x: Tensor, cond: Tensor) -> Tensor:
        """Queries, keys and values ``(B, H, W, 3D)``."""
        out: Tensor = self.qkv(x) + self.qkv_temb(cond)[:, None, None]
        return out

    def bias(self, cond: Tensor, window: tuple[int, int]) -> Tensor:
        """``(heads, N, N)``, or one of each image ``(B, 1, heads, N, N)``."""
        return relative_position_bias(self.relative_position_bias_table, self.window, window)

    def more(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        """Other tokens next to those of the windows, ``(B, windows, heads, N, d)``, at their end."""
        return q, k, v, bias

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        window = (min(self.window[0], H), min(self.window[1], W))
        parts = split_heads(self.project(x, cond), window, 3, self.num_heads)
        q, k, v = parts.unflatten(1, (B, -1))  # (B, windows, heads, N, d)
        out = plain_attention(*self.more(q, k, v, self.bias(cond, window), cond))[..., : q.shape[-2], :]
        tokens: Tensor = self.proj(join_heads(out.flatten(0, 1), window, (H, W)))
        return tokens


class WithoutTime(Attention):
    def __init__(self, like: TMSA) -> None:
        super().__init__(like)
        del self.qkv_temb

    def project(self, x: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.qkv(x)
        return out


class TimeInBias(WithoutTime):
    """The time token moves the relative position bias alone (Table 6)."""

    def __init__(self, like: TMSA) -> None:
        super().__init__(like)
        self.table_temb = nn.Linear(like.qkv_temb.in_features, like.relative_position_bias_table.numel())

    def bias(self, cond: Tensor, window: tuple[int, int]) -> Tensor:
        tables = self.relative_position_bias_table + self.table_temb(cond).view(
            len(cond), *self.relative_position_bias_table.shape
        )
        return torch.stack([relative_position_bias(table, self.window, window) for table in tables])[:, None]


class TimeToken(WithoutTime):
    """The time token is one more token of each window, which all others attend to (Table 7)."""

    def __init__(self, like: TMSA) -> None:
        super().__init__(like)
        self.token = nn.Linear(like.qkv_temb.in_features, like.qkv.in_features)

    def more(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        B, windows, heads, _, d = q.shape
        qkv = self.qkv(self.token(cond)).view(B, 1, 1, 3, heads, d).expand(-1, windows, -1, -1, -1, -1)
        time = qkv.permute(3, 0, 1, 4, 2, 5)
        q, k, v = (torch.cat([part, other], dim=-2) for part, other in zip((q, k, v), time, strict=True))
        return q, k, v, F.pad(bias, (0, 1, 0, 1))


class WithoutBias(Attention):
    def __init__(self, like: TMSA) -> None:
        super().__init__(like)
        del self.relative_position_bias_table

    def bias(self, cond: Tensor, window: tuple[int, int]) -> Tensor:
        return torch.zeros((), device=cond.device)


class TimedMlp(Mlp):
    """The time token is added where the hidden layer is (Table 6)."""

    def __init__(self, like: Mlp, cond_dim: int) -> None:
        super().__init__(like.fc1.in_features, like.fc1.out_features, like.dropout)
        self.temb = nn.Linear(cond_dim, like.fc1.out_features)


class TimeInMlp(DiffiTBlock):
    mlp: TimedMlp

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cond)
        hidden = self.mlp.fc1(self.norm2(x)) + self.mlp.temb(cond)[:, None, None]
        out: Tensor = x + self.mlp.fc2(F.gelu(hidden, approximate="tanh"))
        return out


class AdaLN(DiffiTBlock):
    """DiT's block (arXiv 2212.09748): shift, scale and gate of each branch from the time token, gates at 0 first."""

    modulation: nn.Linear

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        parts = self.modulation(F.silu(cond))[:, None, None].chunk(6, dim=-1)
        x = x + parts[2] * self.attn(self.norm1(x) * (1 + parts[1]) + parts[0], cond)
        out: Tensor = x + parts[5] * self.mlp(self.norm2(x) * (1 + parts[4]) + parts[3])
        return out


class PlainBlock(DiffiTResBlock):
    """The transformer block alone: no convolution before it, and no skip round both."""

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.block(x.permute(0, 2, 3, 1), cond).permute(0, 3, 1, 2)
        return out


def token_width(embedder: TimestepEmbedder) -> int:
    last = embedder.mlp[-1]
    assert isinstance(last, nn.Linear)
    return last.out_features


class Fourier(TimestepEmbedder):
    """Random Fourier features of the noise level in place of positional ones (Table 8; the scale is that of NCSN++)."""

    frequencies: Tensor

    def __init__(self, like: TimestepEmbedder) -> None:
        super().__init__(token_width(like), like.feature_dim)
        self.register_buffer("frequencies", torch.randn(like.feature_dim // 2) * 16)

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        angles = 2 * torch.pi * t.float()[:, None] * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        cond: Tensor = self.mlp(features if dtype is None else features.to(dtype))
        return cond


def res_blocks(net: ImageDiffiT) -> list[DiffiTResBlock]:
    return [module for module in net.modules() if isinstance(module, DiffiTResBlock)]


def with_attention(kind: Callable[[TMSA], Attention]) -> Callable[[ImageDiffiT], None]:
    def change(net: ImageDiffiT) -> None:
        for res_block in res_blocks(net):
            res_block.block.attn = kind(res_block.block.attn)

    return change


def with_block(kind: type[DiffiTBlock], adapt: Callable[[Any, int], None]) -> Callable[[ImageDiffiT], None]:
    """Attention without time, and blocks of another kind; ``adapt`` gives one what it needs for a token as wide."""

    def change(net: ImageDiffiT) -> None:
        with_attention(WithoutTime)(net)
        for res_block in res_blocks(net):
            adapt(res_block.block, token_width(net.t_embedder))
            res_block.block.__class__ = kind

    return change


def timed_mlp(block: TimeInMlp, cond_dim: int) -> None:
    block.mlp = TimedMlp(block.mlp, cond_dim)


def modulated(block: AdaLN, cond_dim: int) -> None:
    block.modulation = nn.Linear(cond_dim, 6 * block.mlp.fc1.in_features)


def plain_block(net: ImageDiffiT) -> None:
    for res_block in res_blocks(net):
        del res_block.norm, res_block.conv
        res_block.__class__ = PlainBlock


def fourier(net: ImageDiffiT) -> None:
    net.t_embedder = Fourier(net.t_embedder)


def nothing(net: ImageDiffiT) -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """``window`` is that of all stages but the deepest, 0 for their own and None for the whole map; ``place`` is where
    the paper has what it is a row of.
    """

    place: str
    change: Callable[[ImageDiffiT], None] = nothing
    window: int | None = 0


VARIANTS = {
    "tmsa": Variant(""),
    "time in bias": Variant("Table 6", with_attention(TimeInBias)),
    "time in MLP": Variant("Table 6", with_block(TimeInMlp, timed_mlp)),
    "time token": Variant("Table 7", with_attention(TimeToken)),
    "Fourier": Variant("Table 8", fourier),
    "window 2": Variant("Fig. 8", window=2),
    "window 8": Variant("Fig. 8", window=8),
    "global": Variant("Fig. 8", window=None),
    "adaLN": Variant("Fig. 7b", with_block(AdaLN, modulated)),
    "no bias": Variant("§3.2", with_attention(WithoutBias)),
    "plain block": Variant("§3.2", plain_block),
}


def make(name: str, model: ImageModel, init: str, seed: int) -> ImageDiffiT:
    """The network of ``model`` with one thing changed, and MLPs as wide as makes its parameters as many."""
    variant, wanted = VARIANTS[name], count_parameters(model)
    last = len(model.stages) - 1
    stages = tuple(
        stage if level == last or variant.window == 0 else stage.model_copy(update={"window": variant.window})
        for level, stage in enumerate(model.stages)
    )

    def at(ratio: float) -> ImageDiffiT:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net: Any = build(model.model_copy(update={"stages": stages, "mlp_ratio": ratio}))
            variant.change(net)
            net.init_weights(init)
            for module in net.modules():  # as DiT begins: blocks that do nothing
                if isinstance(module, AdaLN):
                    nn.init.zeros_(module.modulation.weight)
                    nn.init.xavier_uniform_(module.attn.proj.weight)
                    nn.init.xavier_uniform_(module.mlp.fc2.weight)
        return net

    low, high = 0.1, 20.0
    for _ in range(20):  # more hidden units, more parameters
        middle = (low + high) / 2
        few = sum(p.numel() for p in at(middle).parameters()) < wanted
        low, high = (middle, high) if few else (low, middle)
    net = at(high)
    found = sum(p.numel() for p in net.parameters())
    assert abs(found / wanted - 1) < TOLERANCE, f"{name}: {found} parameters, {wanted} wanted"
    return net
