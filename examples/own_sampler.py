"""A sampler of your own: a function of a denoiser, noise and noise levels, with a trained network under it.

python examples/own_sampler.py --network runs/mine/00000-… --dest own-sampler.png
"""

from itertools import pairwise
from pathlib import Path

import click
import torch
from torch import Tensor

from diffit import UserError, load
from diffit.cli import run
from diffit.diffusion import edm_sigmas
from diffit.diffusion.guidance import Denoiser
from diffit.sampling import choose_labels
from diffit.utils.images import save_grid, to_uint8
from diffit.utils.randomness import PerSampleNoise


def midpoint(denoise: Denoiser, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The midpoint method on dx/dσ = (x − D(x; σ))/σ: second order, like Heun, with two evaluations a step."""
    x = noise * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        step = sigma_next - sigma
        middle = sigma + step / 2
        halfway = x + (x - denoise(x, sigma)) / sigma * (step / 2)
        x = x + (halfway - denoise(halfway, middle)) / middle * step
    return x


@click.command()
@click.option("--network", required=True, help="File or run folder of an image-space model.")
@click.option("--dest", type=click.Path(path_type=Path), default="own-sampler.png", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=18, show_default=True)
def main(network: str, dest: Path, steps: int) -> None:
    """Sample 16 images with the midpoint method."""
    model, seeds = load(network), range(16)
    if model.config.diffusion.kind != "edm":
        raise UserError(f"{network}: a {model.config.preset} has a discrete schedule; name an image-space model")
    noise = PerSampleNoise(seeds)(torch.empty(16, *model.config.model.sample_shape, dtype=torch.float64))
    labels = choose_labels(model.config, seeds)
    denoise = model.denoiser(None if labels is None else labels.to(model.device))
    images = midpoint(denoise, noise.to(model.device), edm_sigmas(steps))
    save_grid(to_uint8(images.float()).cpu(), dest, (4, 4))
    click.echo(f"wrote {dest}")


if __name__ == "__main__":
    run(main)
