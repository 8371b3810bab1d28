"""Nearest neighbours in tiles, and precision and recall from them (Kynkäänniemi et al. 2019).

No more distances are in memory than one tile has, however many features there are on either side. Features stay where
they are; those of a tile are moved to a device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffit.metrics.detectors import Detector
from diffit.metrics.features import Array, Need, Part, as_pair, pooled

Precision = Literal["float64", "float16"]


class Distances(NamedTuple):
    """``between`` features (a, d) and (b, d) are distances (a, b), or what grows with them, for tiles of ``side``."""

    between: Callable[[Tensor, Tensor], Tensor]
    side: int


def euclidean(u: Tensor, v: Tensor) -> Tensor:
    """In float64, since |u|² + |v|² − 2uv, which makes distances one matrix product, loses half of the digits."""
    return torch.cdist(u.double(), v.double())


def published(u: Tensor, v: Tensor) -> Tensor:
    """Squared, with the rounding of the ADM evaluator (Dhariwal & Nichol 2021), by which published figures were found.

    Features, squares, norms, products and every step of |u|² − 2uv + |v|² are rounded to float16, where sums accumulate
    in float32 as on a GPU. Numbers between 256 and 512 are then multiples of ¼, so that the third decimal of precision
    differs from that of exact distances. A tile in which one entry overflows is computed again in float32.
    """
    tile = _expanded(u.half(), v.half())
    return tile.float() if tile.isfinite().all() else _expanded(u.float(), v.float())


def _expanded(u: Tensor, v: Tensor) -> Tensor:
    dtype = u.dtype
    uu, vv = (x.square().sum(1, dtype=torch.float32).to(dtype) for x in (u, v))
    return (uu[:, None] - 2 * (u.float() @ v.float().T).to(dtype) + vv).clamp(min=0)


DISTANCES: dict[Precision, Distances] = {
    "float64": Distances(euclidean, 2896),  # 64 MiB
    "float16": Distances(published, 10_000),  # the evaluator's: one overflow decides for a tile of that size
}


@dataclass(frozen=True)
class PrecisionRecall(Part[Tensor]):
    """Manifolds of the ``neighbours`` nearest; of at most ``most_real`` real images where that is set."""

    kind = "pr"
    neighbours: int = 3
    precision: Precision = "float64"
    most_real: int | None = None

    @property
    def suffix(self) -> str:
        # A k or _ keeps two numbers apart.
        return f"{'_' * bool(self.samples % 1000)}{self.neighbours}{'_full' * self.full}"

    @property
    def protocol(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours, "distances": self.precision}

    @property
    def need(self) -> Need[Tensor]:
        return pooled(self.samples)

    @property
    def real_need(self) -> Need[Tensor]:
        return super().real_need if self.most_real is None else pooled(self.most_real)

    def fewest(self, dim: int) -> tuple[int, str]:
        return self.neighbours + 1, "to compare with each other"

    def numbers(self, fake: Tensor, real: Tensor, detector: Detector) -> dict[str, float]:
        pair = precision_recall(fake, real, self.neighbours, precision=self.precision, device=detector.device)
        return dict(zip(("precision", "recall"), pair, strict=True))


def nearest(
    x: Tensor,
    y: Tensor,
    k: int = 1,
    *,
    distances: Distances = DISTANCES["float64"],
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Distances and indices ``(len(x), k)`` of the ``k`` nearest of ``y`` to every row of ``x``, nearest first.

    ``device`` (default: that of ``x``) computes.
    """
    values = torch.empty(len(x), k, dtype=torch.float64)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    for rows, columns, tile in _tiles(x, y, distances, device):
        if columns.start == 0:
            best, at = tile.new_empty(len(tile), 0), torch.empty(len(tile), 0, dtype=torch.int64, device=tile.device)
        found, where = tile.topk(min(k, tile.shape[1]), largest=False)
        best, at = torch.cat([best, found], dim=1), torch.cat([at, where + columns.start], dim=1)
        best, order = best.topk(min(k, best.shape[1]), largest=False)
        at = at.gather(1, order)
        if columns.stop == len(y):
            values[rows], indices[rows] = best.double().cpu(), at.cpu()
    return values, indices


def _tiles(
    x: Tensor, y: Tensor, distances: Distances, device: torch.device | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of ``x``, rows of ``y`` and the distances between them, for all of ``y`` before the next of ``x``."""

    def parts(z: Tensor) -> Iterator[slice]:
        return (slice(start, min(start + distances.side, len(z))) for start in range(0, len(z), distances.side))

    for rows in parts(x):
        mine = x[rows].to(device)
        for columns in parts(y):
            yield rows, columns, distances.between(mine, y[columns].to(mine.device))


def radii(x: Tensor, k: int, *, distances: Distances, device: torch.device | None = None) -> Tensor:
    """Distance of every feature to its ``k``-th nearest other one, ``(n,)``: the nearest of all is itself."""
    return nearest(x, x, k + 1, distances=distances, device=device)[0][:, k]


def precision_recall(
    fake: Array, real: Array, k: int = 3, *, precision: Precision = "float64", device: torch.device | None = None
) -> tuple[float, float]:
    """Share of ``fake`` (n, d) on the manifold of ``real`` (m, d), and the other way round.

    The manifold of a set is the union of balls around its features, each as far as the ``k``-th nearest other one.
    ``precision`` "float16" rounds distances as the published evaluator does, see :func:`published`. Raises ValueError
    where the shapes do not fit, a value is not finite, or a set has no ``k`` neighbours.
    """
    x, y = as_pair(fake, real)
    if not 0 < k < min(len(x), len(y)):
        raise ValueError(
            f"k is {k}; expected 1 or more, and fewer than the features: {len(x)} of fake, {len(y)} of real"
        )
    distances = DISTANCES[precision]
    fake_radii, real_radii = (radii(z, k, distances=distances, device=device) for z in (x, y))
    on_real, on_fake = torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(y), dtype=torch.bool)
    for rows, columns, tile in _tiles(y, x, distances, device):
        on_fake[rows] |= (tile <= fake_radii[columns].to(tile.device)).any(dim=1).cpu()
        on_real[columns] |= (tile <= real_radii[rows, None].to(tile.device)).any(dim=0).cpu()
    return float(on_real.double().mean()), float(on_fake.double().mean())
