"""A loss of your own, and the shortest loop that trains with it; `diffit sample` reads the file.

python examples/own_loss.py --data datasets/mine.zip --dest own-loss.safetensors
"""

from pathlib import Path

import click
import torch
from torch import Tensor

from diffit import ImageArchive, save_network
from diffit.cli import run
from diffit.configs.resolve import resolve
from diffit.data.open import facts_of
from diffit.diffusion import EDMLoss, edm
from diffit.models import build
from diffit.utils.images import to_float


class PseudoHuberLoss(EDMLoss):
    """EDM's noise, and √(d² + c²) − c with d the root mean square error of an image: outliers count less than in d²."""

    def __call__(self, net, images, labels=None, augment_labels=None, *, generator=None, level=None) -> Tensor:
        """``(B, C, H, W)`` in [−1, 1] -> one loss per image ``(B,)``, as every loss of the library."""
        sigma = self.draw_level(images, generator) if level is None else level
        noise = torch.randn(images.shape, generator=generator)
        denoised = edm.denoiser(net, labels, augment_labels)(images + noise * sigma.view(-1, 1, 1, 1), sigma)
        error = (denoised - images).square().flatten(1).mean(dim=1)
        weight = (sigma**2 + 0.5**2).sqrt() / (sigma * 0.5)  # makes the error of a new network the same at every sigma
        return weight * ((error + 0.03**2).sqrt() - 0.03)


@click.command()
@click.option("--data", required=True, help="Image archive.")
@click.option("--preset", default="debug", show_default=True, help="Its network is trained, on the CPU.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--dest", type=click.Path(path_type=Path), default="own-loss.safetensors", show_default=True)
def main(data: str, preset: str, steps: int, dest: Path) -> None:
    """Train on random batches of 16 and write the network."""
    archive = ImageArchive(data, cond=True)
    config = resolve(preset, {"data": data, "cond": archive.labels is not None}, facts_of(archive))
    generator = torch.Generator().manual_seed(0)
    net, loss, images = build(config.model), PseudoHuberLoss(), to_float(archive.load_all())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    recent: list[float] = []
    for step in range(1, steps + 1):
        batch = torch.randint(len(images), (16,), generator=generator)
        labels = None if archive.labels is None else archive.labels[batch]
        value = loss(net, images[batch], labels, generator=generator).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        recent = [*recent[-49:], value.item()]
        if step % 50 == 0:
            click.echo(f"step {step:4d}  loss {sum(recent) / len(recent):.3f}")
    save_network(dest, net.state_dict(), config, kimg=steps * 16 / 1000)
    click.echo(f"wrote {dest}; next: diffit sample --network {dest} --outdir samples")


if __name__ == "__main__":
    run(main)
