"""Fused against plain attention: ``python -m benchmarks.attention``.

Forward and backward on a GPU; forward alone on a CPU, where the formula is what trains the bias.

With arguments, ``path window map_side``: runs one and prints its peak memory beyond that of its inputs.
"""

import sys
from collections.abc import Callable

import torch

from benchmarks.measure import DEVICE, in_turns, peak_mib, peak_of, reset_peak
from diffit.models.attention import TMSA

WIDTH, COND, HEADS, BATCH = 256, 512, 4, 16


def make(fused: bool, window: int, side: int) -> Callable[[], None]:
    torch.manual_seed(0)
    layer = TMSA(WIDTH, COND, HEADS, grid_size=side, window_size=window, fused=fused).to(DEVICE)
    x = torch.randn(BATCH, side, side, WIDTH, device=DEVICE, requires_grad=True)
    cond = torch.randn(BATCH, COND, device=DEVICE)

    def run() -> None:
        if DEVICE.type == "cuda":
            layer(x, cond).square().mean().backward()
        else:
            with torch.no_grad():
                layer(x, cond)

    return run


def main() -> None:
    for window, side in ((4, 32), (8, 64), (32, 32)):
        plain, fused = in_turns(make(False, window, side), make(True, window, side))
        memory = {path: peak_of("benchmarks.attention", path, window, side) for path in ("plain", "fused")}
        name = f"window {window}" if window < side else f"global, {side * side} tokens"
        print(
            f"TMSA, {name}, {side}×{side} map, batch {BATCH}: fused takes {fused / plain:.2f} of plain's time "
            f"({fused * 1e3:.0f} ms : {plain * 1e3:.0f} ms), {memory['fused'] / memory['plain']:.2f} of its memory "
            f"({memory['fused']:.0f} MiB : {memory['plain']:.0f} MiB)",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run = make(sys.argv[1] == "fused", int(sys.argv[2]), int(sys.argv[3]))
        reset_peak()
        before = peak_mib()
        run()
        print(peak_mib() - before)
    else:
        main()
