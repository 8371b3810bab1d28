"""Time-dependent multi-head self-attention (TMSA) over windows or over the whole map.

Everything here keeps tokens in their place on the map, ``(B, H, W, D)``, so that no caller has to remember a height.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN's attention is left out: with torch 2.11 on Hopper it returns NaN gradients for a bias at lengths ≡ 64 mod 128.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

MAX_WINDOWS = 65_535
"""In one call on CUDA: with more, the memory-efficient kernel's backward pass cannot give the bias its gradient."""


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def window_partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Split a map into non-overlapping windows, padding with zeros below and to the right where it does not divide.

    ``(B, H, W, D) -> (B, windows, h·w, D)``, windows and the tokens in them in row-major order.
    """
    B, H, W, D = x.shape
    h, w = window
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
    rows, cols = x.shape[1] // h, x.shape[2] // w
    return x.reshape(B, rows, h, cols, w, D).transpose(2, 3).reshape(B, rows * cols, h * w, D)


def window_unpartition(windows: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Join windows into the map that they were split from: ``(B, windows, h·w, D) -> (B, H, W, D)``."""
    B, _, _, D = windows.shape
    (h, w), (H, W) = window, size
    rows, cols = -(-H // h), -(-W // w)
    x = windows.reshape(B, rows, cols, h, w, D).transpose(2, 3).reshape(B, rows * h, cols * w, D)
    return x[:, :H, :W]


def relative_position_bias(table: Tensor, table_window: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """B of Eq. 6: ``B[head, i, j] = table[(Δy + h − 1)(2w − 1) + (Δx + w − 1), head]`` with Δ = i − j.

    ``table`` is ``((2h−1)(2w−1), heads)`` for windows of ``table_window = (h, w)``; ``window`` may be smaller, which
    uses the rows of the offsets that occur. Returns ``(heads, N, N)`` with N the number of tokens in ``window``.
    """
    (th, tw), (h, w) = table_window, window
    offsets = table.view(2 * th - 1, 2 * tw - 1, -1)[th - h : th + h - 1, tw - w : tw + w - 1]
    offsets = offsets.permute(2, 0, 1).contiguous()  # heads first: the views below then read along memory
    # Sliding views stand in for an index of N² entries: [head, yi, xi, a, b] is the offset row (yi + a, xi + b),
    # and a = h − 1 − yj makes that yi − yj + h − 1.
    return offsets.unfold(1, h, 1).unfold(2, w, 1).flip(-2, -1).reshape(-1, h * w, h * w)


def relative_position_index(window: tuple[int, int]) -> Tensor:
    """The row of the table for every pair of tokens, int64 ``(N, N)``; the official weights store it in each layer."""
    return torch.cat(list(_index_rows(window)))


def is_relative_position_index(index: Tensor, window: tuple[int, int]) -> bool:
    """Whether ``index`` is the one that a map of ``window`` tokens implies; compared in parts, to hold little."""
    count, rows = window[0] * window[1], _index_rows(window)
    if index.shape != (count, count):
        return False
    return all(torch.equal(part, row) for part, row in zip(index.cpu().split(window[1]), rows, strict=True))


def _index_rows(window: tuple[int, int]) -> Iterator[Tensor]:
    """The index for one row of queries after the other, each ``(w, N)``."""
    h, w = window
    y, x = (grid.flatten() for grid in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    columns = torch.arange(w)[:, None] - x + w - 1
    for row in range(h):
        yield (row - y + h - 1) * (2 * w - 1) + columns


def _drop_index(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Accept the official weights' index buffer: it must be the one that this layer implies, and is not kept."""
    index = state.pop(prefix + "relative_position_index", None)
    if index is not None and not is_relative_position_index(index, module.window):
        rest[-1].append(f"{prefix}relative_position_index is not that of a {module.window} window")


def padding_bias(window: tuple[int, int], size: tuple[int, int], device: torch.device) -> Tensor:
    """−inf where a window's token lies beyond the map, else 0: ``(windows, 1, 1, N)``, to add to attention logits."""
    inside = window_partition(torch.ones(1, *size, 1, device=device), window)[0, :, :, 0]
    return torch.zeros_like(inside).masked_fill(inside == 0, -math.inf)[:, None, None]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Eq. 6 as it is written: softmax(Q Kᵀ/√d + B) V, on ``(…, heads, N, d)`` with ``bias`` ``(heads, N, N)``."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
    return logits.softmax(dim=-1).to(v.dtype) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same as :func:`plain_attention` in one kernel, where the device has one that takes a bias."""
    bias = bias.to(q.dtype)[None]  # a float32 bias next to a bfloat16 q is misread by some kernels
    attention = partial(in_parts, partial(F.scaled_dot_product_attention, attn_mask=bias), limit=MAX_WINDOWS)
    if not q.is_cuda:
        return attention(q, k, v)
    with sdpa_kernel(BACKENDS):
        return attention(q, k, v)


def in_parts(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, limit: int) -> Tensor:
    """``attention(q, k, v)`` for at most ``limit`` entries of the first dimension at a time."""
    if torch.compiler.is_exporting() or q.shape[0] <= limit:  # an exported graph is for any batch
        return attention(q, k, v)
    parts = zip(q.split(limit), k.split(limit), v.split(limit), strict=True)
    return torch.cat([attention(*part) for part in parts])


class TMSA(nn.Module):
    """Self-attention whose queries, keys and values each depend on the token and on the time token (Eq. 3–6).

    ``(x: (B, H, W, dim), cond: (B, cond_dim)) -> (B, H, W, dim)``

    ``grid_size`` is the usual size of the map, one number or (H, W). With ``window_size=None`` every token attends
    to the whole map, which may be any up to ``grid_size``. With a window, maps of any size are split into windows;
    a window larger than the map is clamped to it. Parameter names are those of the official weights.
    """

    def __init__(
        self,
        dim: int,
        cond_dim: int,
        num_heads: int,
        *,
        grid_size: int | tuple[int, int],
        window_size: int | tuple[int, int] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        grid = to_pair(grid_size)
        window = grid if window_size is None else to_pair(window_size)
        self.window = (min(window[0], grid[0]), min(window[1], grid[1]))
        self.is_global = window_size is None
        self.num_heads = num_heads
        self.attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
        self.attention = fused_attention if fused else plain_attention

        offsets = (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
        self.qkv_temb = nn.Linear(cond_dim, 3 * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_load_state_dict_pre_hook(_drop_index)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        B, H, W, D = x.shape
        if self.is_global and (self.window[0] < H or self.window[1] < W):
            raise ValueError(f"a map of {H}×{W} tokens exceeds the {self.window[0]}×{self.window[1]} of the bias table")
        window = (min(self.window[0], H), min(self.window[1], W))

        qkv = self.qkv(x) + self.qkv_temb(cond)[:, None, None]  # (B, H, W, 3D), Eq. 3–5
        qkv = window_partition(qkv, window)  # (B, windows, N, 3D)
        windows, N = qkv.shape[1:3]
        q, k, v = qkv.reshape(B * windows, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B·windows, heads, N, d)

        bias = relative_position_bias(self.relative_position_bias_table, self.window, window)  # (heads, N, N)
        if H % window[0] or W % window[1]:
            # Windows differ in what they must not see, so each becomes a group of heads with a bias of its own.
            bias = (bias + padding_bias(window, (H, W), x.device)).flatten(0, 1)  # (windows·heads, N, N)
            q, k, v = (part.reshape(B, windows * self.num_heads, N, -1) for part in (q, k, v))
        out = self.attention(q, k, v, bias)

        out = out.reshape(B, windows, self.num_heads, N, -1).transpose(2, 3)
        if torch.compiler.is_exporting():  # else a view of the kernel's strides is recorded, which other kernels lack
            out = out.clone(memory_format=torch.contiguous_format)
        tokens: Tensor = self.proj(window_unpartition(out.reshape(B, windows, N, D), window, (H, W)))
        return tokens
