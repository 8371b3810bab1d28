"""Nearest neighbours in tiles, and precision and recall from them (Kynkäänniemi et al. 2019).

No tile holds more than ``TILE`` distances, however many features there are on either side. Features stay where they
are; those of a tile are moved to a device and made float64, since |x|² + |y|² − 2xy, which makes distances one matrix
product, loses half of the digits of small ones.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 2**23  # distances at a time: 64 MiB


def _parts(x: Tensor) -> Iterator[slice]:
    """Rows of ``x``, as many a time as a tile is wide."""
    side = math.isqrt(TILE)
    return (slice(start, min(start + side, len(x))) for start in range(0, len(x), side))


def _load(x: Tensor, rows: slice, device: torch.device | None) -> Tensor:
    return x[rows].to(device, torch.float64)


def nearest(
    x: Tensor, y: Tensor, k: int = 1, *, device: torch.device | None = None, others: bool = False
) -> tuple[Tensor, Tensor]:
    """Distances and indices ``(len(x), k)`` of the ``k`` nearest of ``y`` to every row of ``x``, nearest first.

    With ``others``, ``x`` is ``y`` and no row is its own neighbour. ``device`` (default: that of ``x``) computes.
    """
    distances = torch.empty(len(x), k, dtype=torch.float64)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    for rows in _parts(x):
        mine = _load(x, rows, device)
        best, at = mine.new_empty(len(mine), 0), torch.empty(len(mine), 0, dtype=torch.int64, device=mine.device)
        for columns in _parts(y):
            tile = torch.cdist(mine, _load(y, columns, mine.device))
            if others and rows == columns:
                tile.fill_diagonal_(torch.inf)
            values, found = tile.topk(min(k, tile.shape[1]), largest=False)
            best, at = torch.cat([best, values], dim=1), torch.cat([at, found + columns.start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), largest=False)
            at = at.gather(1, order)
        distances[rows], indices[rows] = best.cpu(), at.cpu()
    return distances, indices


def radii(x: Tensor, k: int, *, device: torch.device | None = None) -> Tensor:
    """Distance of every feature to its ``k``-th nearest other one, ``(n,)``."""
    return nearest(x, x, k, device=device, others=True)[0][:, -1]


def covered(x: Tensor, centres: Tensor, radius: Tensor, *, device: torch.device | None = None) -> float:
    """Share of ``x`` that lies within the radius of at least one of the ``centres``."""
    count = 0
    for rows in _parts(x):
        mine = _load(x, rows, device)
        inside = torch.zeros(len(mine), dtype=torch.bool, device=mine.device)
        for columns in _parts(centres):
            tile = torch.cdist(mine, _load(centres, columns, mine.device))
            inside |= (tile <= radius[columns].to(tile.device)).any(dim=1)
        count += int(inside.sum())
    return count / len(x)


def precision_recall(
    fake: Tensor, real: Tensor, k: int = 3, *, device: torch.device | None = None
) -> tuple[float, float]:
    """Share of ``fake`` (n, d) on the manifold of ``real`` (m, d), and the other way round."""
    precision = covered(fake, real, radii(real, k, device=device), device=device)
    return precision, covered(real, fake, radii(fake, k, device=device), device=device)
