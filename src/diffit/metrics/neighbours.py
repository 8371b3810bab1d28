"""Nearest neighbours in tiles, and precision and recall from them (Kynkäänniemi et al. 2019).

No tile holds more than ``TILE`` distances, however many features there are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 2**23  # distances at a time: 64 MiB


def _tiles(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``x`` and their distances ``(rows, len(y))`` to all of ``y``.

    In float64: |x|² + |y|² − 2xy, which makes them one matrix product, loses half of the digits of small distances.
    """
    y = y.double()
    rows = max(TILE // len(y), 1)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        yield part, torch.cdist(x[part].double(), y)


def nearest(x: Tensor, y: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Distances and indices ``(len(x), k)`` of the ``k`` nearest of ``y`` to every row of ``x``, nearest first."""
    distances = torch.empty(len(x), k, dtype=torch.float64)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    for rows, tile in _tiles(x, y):
        distances[rows], indices[rows] = (part.cpu() for part in tile.topk(k, largest=False))
    return distances, indices


def radii(x: Tensor, k: int) -> Tensor:
    """Distance of every feature to its ``k``-th nearest other one, ``(n,)``."""
    radius = torch.empty(len(x), dtype=torch.float64)
    for rows, tile in _tiles(x, x):
        own = torch.arange(rows.start, rows.start + len(tile), device=tile.device)
        tile[torch.arange(len(tile), device=tile.device), own] = torch.inf
        radius[rows] = tile.kthvalue(k).values.cpu()
    return radius


def covered(x: Tensor, centres: Tensor, radius: Tensor) -> float:
    """Share of ``x`` that lies within the radius of at least one of the ``centres``."""
    radius = radius.to(x.device)
    return sum(int((tile <= radius).any(dim=1).sum()) for _, tile in _tiles(x, centres)) / len(x)


def precision_recall(fake: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of ``fake`` (n, d) on the manifold of ``real`` (m, d), and the other way round."""
    return covered(fake, real, radii(real, k)), covered(real, fake, radii(fake, k))
