"""TMSA, the paper's attention layer, by itself: in a network of your own, on maps of any size.

    python examples/tmsa_alone.py

One layer learns to move a map by one token and to add its condition: the first needs the relative position bias
(Eq. 6), the second the condition's part of the values (Eq. 5). The same weights then serve a smaller map.
"""

import torch
from torch import Tensor

from diffit.models import TMSA


def example(count: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A map (B, H, W, 8), a condition (B, 8), and the map moved to the right plus the condition."""
    x, cond = torch.randn(count, height, width, 8), torch.randn(count, 8)
    return x, cond, x.roll(1, dims=2) + cond[:, None, None]


def error(layer: TMSA, x: Tensor, cond: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, but for the first column, which has no neighbour to the left."""
    return (layer(x, cond) - target)[:, :, 1:].square().mean()


def main() -> None:
    torch.manual_seed(0)
    layer = TMSA(dim=8, cond_dim=8, num_heads=2, grid_size=(13, 9))  # global; window_size=4 cuts the map into windows
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for step in range(301):
        loss = error(layer, *example(8, 13, 9))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3d}: error {loss.item():.4f} on maps of 13×9")
    with torch.no_grad():
        print(f"with the same weights: error {error(layer, *example(8, 12, 8)).item():.4f} on maps of 12×8")


if __name__ == "__main__":
    main()
