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

SHORT = 16
"""Tokens of a window up to which a GPU learns faster by the formula than by a kernel, which works on tiles of 64."""

POSES = torch.__version__ < "2.12"
"""Whether torch.compile may say that it exports, as PyTorch 2.11's does; an export with ``strict=True`` is not told
from it."""


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def split_heads(x: Tensor, window: tuple[int, int], parts: int, heads: int) -> Tensor:
    """Split a map into windows and heads: ``(B, H, W, parts·heads·d) -> (parts, B·windows, heads, h·w, d)``.

    It is one copy, and of one window that is the whole map a view. Windows do not overlap; zeros pad the map below and
    to the right where it does not divide. Windows, and the tokens in them, are in row-major order.
    """
    B, H, W, _ = x.shape
    h, w = window
    if H % h or W % w:  # else it would be a copy
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
    x = x.reshape(B, x.shape[1] // h, h, x.shape[2] // w, w, parts, heads, -1)
    return x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(parts, -1, heads, h * w, x.shape[-1])


def join_heads(x: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The map that a part of :func:`split_heads` is of: ``(B·windows, heads, h·w, d) -> (B, H, W, heads·d)``."""
    (h, w), (H, W) = window, size
    rows, cols = -(-H // h), -(-W // w)
    x = x.reshape(-1, rows, cols, x.shape[1], h, w, x.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(x.shape[0], rows * h, cols * w, -1)[:, :H, :W]


def relative_position_bias(table: Tensor, table_window: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """B of Eq. 6: ``B[head, i, j] = table[(Δy + h − 1)(2w − 1) + (Δx + w − 1), head]`` with Δ = i − j.

    ``table`` is ``((2h−1)(2w−1), heads)`` for windows of ``table_window = (h, w)``; ``window`` may be smaller, which
    uses the rows of the offsets that occur. Returns ``(heads, N, N)`` with N the number of tokens in ``window``.
    """
    (th, tw), (h, w) = table_window, window
    offsets = table.view(2 * th - 1, 2 * tw - 1, -1)[th - h : th + h - 1, tw - w : tw + w - 1]
    # Along x as a sliding view, with Δy falling: rows[head, xi, Δy, xj]. Of the queries in a row yi of the window the
    # offsets to all keys then lie side by side, and are copied whole where an index would have N² entries.
    rows = offsets.permute(2, 0, 1).flip(1).unfold(2, w, 1).flip(-1).transpose(1, 2).flatten(2)
    return torch.stack(rows.unfold(2, h * w, w).unbind(2)[::-1], dim=1).flatten(1, 2)


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
    inside = split_heads(torch.ones(1, *size, 1, device=device), window, 1, 1)[0, :, 0, :, 0]
    return torch.zeros_like(inside).masked_fill(inside == 0, -math.inf)[:, None, None]


def is_exporting() -> bool:
    """Whether torch.export traces this, for any batch and device."""
    return torch.compiler.is_exporting() and not (POSES and torch.compiler.is_dynamo_compiling())


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Eq. 6 as it is written: softmax(Q Kᵀ/√d + B) V, on ``(…, heads, N, d)`` with ``bias`` ``(heads, N, N)``."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
    return logits.softmax(dim=-1).to(v.dtype) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same as :func:`plain_attention` in one kernel, where the device has one that takes a bias and is faster."""
    learns = torch.is_grad_enabled() and bias.requires_grad and not is_exporting()
    # Not in float16, where products could overflow before they are scaled.
    if learns and q.is_cuda and q.dtype != torch.float16 and q.shape[-2] <= SHORT:
        return plain_attention(q, k, v, bias)
    if learns and q.device.type == "cpu":
        # No kernel of a CPU's gives the bias its gradient, and without one PyTorch takes longer than the formula.
        with torch.autocast("cpu", enabled=False):
            return plain_attention(q.to(bias.dtype), k.to(bias.dtype), v.to(bias.dtype), bias).to(q.dtype)
    return kernel_attention(q, k, v, bias)


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same by PyTorch's choice among its kernels."""
    bias = bias.to(q.dtype)[None]  # a float32 bias next to a bfloat16 q is misread by some kernels
    attention = partial(in_parts, partial(F.scaled_dot_product_attention, attn_mask=bias), limit=MAX_WINDOWS)
    if not q.is_cuda:
        return attention(q, k, v)
    with sdpa_kernel(BACKENDS):
        return attention(q, k, v)


def in_parts(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, limit: int) -> Tensor:
    """``attention(q, k, v)`` for at most ``limit`` entries of the first dimension at a time."""
    if is_exporting() or q.shape[0] <= limit:  # an exported graph is for any batch
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
        B, H, W, _ = x.shape
        if self.is_global and (self.window[0] < H or self.window[1] < W):
            raise ValueError(f"a map of {H}×{W} tokens exceeds the {self.window[0]}×{self.window[1]} of the bias table")
        window = (min(self.window[0], H), min(self.window[1], W))

        qkv = self.qkv(x) + self.qkv_temb(cond)[:, None, None]  # (B, H, W, 3D), Eq. 3–5
        q, k, v = split_heads(qkv, window, 3, self.num_heads)  # (B·windows, heads, N, d)
        windows, N = -(-H // window[0]) * -(-W // window[1]), q.shape[2]

        table: Tensor = self.relative_position_bias_table
        if not (torch.is_grad_enabled() and table.requires_grad):
            table = table.to(q.dtype)  # before it is copied; gradients of many places are added up in float32
        bias = relative_position_bias(table, self.window, window)  # (heads, N, N)
        if H % window[0] or W % window[1]:
            # Windows differ in what they must not see, so each becomes a group of heads with a bias of its own.
            bias = (bias + padding_bias(window, (H, W), x.device)).flatten(0, 1)  # (windows·heads, N, N)
            q, k, v = (part.reshape(B, windows * self.num_heads, N, -1) for part in (q, k, v))
        out = self.attention(q, k, v, bias)

        if is_exporting():  # else a view of the kernel's strides is recorded, which other kernels lack
            out = out.clone(memory_format=torch.contiguous_format)
        tokens: Tensor = self.proj(join_heads(out.reshape(B * windows, self.num_heads, N, -1), window, (H, W)))
        return tokens
