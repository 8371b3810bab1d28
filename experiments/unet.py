"""Our small network against a U-Net at equal multiply-accumulates and equal seconds of one core.

    python -m experiments.unet --data train16.zip --val test16.zip --minutes 10 --detector small.safetensors

The U-Net is diffusers' ``UNet2DModel``, as wide as makes its multiply-accumulates as many; both go through the same
loss, steps, average and samplers. Ours has the recipe of its preset, the U-Net ``--unet-lr`` and ``--unet-batch``. A
command that is started again goes on where it was, and two at a time share the work by their ``--seed``.
"""

import statistics
from pathlib import Path
from typing import Any

import click
import torch
from benchmarks.measure import machine
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffit.configs.resolve import resolve
from diffit.configs.schema import Config, ImageModel
from diffit.data.archive import ImageArchive
from diffit.data.open import facts_of
from diffit.training.step import build_network
from experiments.learning import HeldOut, Results, distance, learn, spread

SIDES = ("ours", "unet")


class UNet(nn.Module):
    """diffusers' U-Net with our networks' arguments; attention at the lowest resolution, two blocks a resolution."""

    def __init__(self, model: ImageModel, width: int) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        levels = len(model.stages)
        self.net = UNet2DModel(
            sample_size=model.image_size, in_channels=model.channels, out_channels=model.channels, layers_per_block=2,
            block_out_channels=tuple(width * 2**min(level, 1) for level in range(levels)), norm_num_groups=8,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            num_class_embeds=model.num_classes + 1 if model.num_classes else None,
        )  # fmt: skip
        self.num_classes = model.num_classes
        nn.init.zeros_(self.net.conv_out.weight)  # as ours and EDM's begin

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        # Its sinusoids are made for timesteps up to 1,000; c_noise is ln σ/4, between −2 and 1.1.
        out: Tensor = self.net(x, (c_noise + 2) * 300, class_labels=labels).sample
        return out

    def set_grad_ckpt(self, enabled: bool) -> None:
        assert not enabled


def products(net: nn.Module, model: ImageModel) -> int:
    """Multiply-accumulates of one image, those of attention by its two products."""
    labels = torch.zeros(1, dtype=torch.int64) if model.num_classes else None
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(1, *model.sample_shape), torch.zeros(1), labels)
    return counter.get_total_flops() // 2


def unet_like(config: Config, seed: int) -> UNet:
    """Of the width, a multiple of 8, whose multiply-accumulates are nearest to those of our network."""
    model: Any = config.model
    wanted = products(build_network(config), model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return min((UNet(model, 8 * n) for n in range(1, 17)), key=lambda net: abs(products(net, model) - wanted))


@click.command()
@click.option("--data", required=True, help="Images to learn from.")
@click.option("--val", required=True, type=click.Path(path_type=Path), help="Others, for the loss and the distance.")
@click.option("--detector", default="pixels", show_default=True, help="Whose features the distance is of.")
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Of one core, for each.")
@click.option("--seed", "seeds", type=int, multiple=True, default=[0, 1, 2], show_default=True)
@click.option("--side", "sides", type=click.Choice(SIDES), multiple=True, default=SIDES)
@click.option("--preset", help="Of our network.  [default: the small one for the images]")
@click.option("--unet-lr", type=float, default=1e-3, show_default=True)
@click.option("--unet-batch", type=int, default=16, show_default=True)
@click.option("--dest", type=click.Path(path_type=Path), default="unet.jsonl", show_default=True)
def main(
    data: str, val: Path, detector: str, minutes: float, seeds: list[int], sides: list[str], preset: str,
    unet_lr: float, unet_batch: int, dest: Path,
) -> None:  # fmt: skip
    """Train both for the same seconds, and print the table of what is in the file."""
    torch.set_num_threads(1)
    archive, others = ImageArchive(data), ImageArchive(val)
    setting = {"minutes": minutes, "preset": preset, "data": archive.content_hash, "val": others.content_hash}
    setting |= {"detector": detector, "machine": machine()}
    recipes: dict[str, dict[str, Any]] = {"ours": {}, "unet": {"lr": unet_lr, "batch": unet_batch, "conv_lr": 1.0}}
    for seed in seeds:
        for side in sides:
            key = {"name": side, "seed": seed, "recipe": recipes[side], **setting}
            if any(Results(dest).find(**key)):
                continue
            options = {"data": data, "minutes": minutes, "seed": seed} | recipes[side]
            config = resolve(preset, options, facts_of(archive))
            net: Any = build_network(config) if side == "ours" else unet_like(config, seed)
            found = {"parameters": sum(p.numel() for p in net.parameters()), "products": products(net, config.model)}
            stepper, points = learn(net, config, archive, HeldOut(config, others), seconds=60 * minutes)
            found["distance"] = distance(stepper, config, val, detector)
            Results(dest).add(points, **key, **found)
            last = points[-1]
            click.echo(
                f"{side} seed {seed}  {last.images} images  loss {last.loss:.4f}  distance {found['distance']:.4g}"
            )
    click.echo(
        "\n| | multiply-accumulates | parameters | images | held-out loss | distance |\n|---|---|---|---|---|---|"
    )
    for side, recipe in recipes.items():
        if records := list(Results(dest).find(name=side, recipe=recipe, **setting)):
            last, distances = [record["points"][-1] for record in records], [record["distance"] for record in records]
            images = statistics.fmean(point["images"] for point in last)
            click.echo(
                f"| {side} | {records[0]['products']:,} | {records[0]['parameters']:,} | {images:,.0f} | "
                f"{spread([point['loss'] for point in last])} | {spread(distances)} |"
            )


if __name__ == "__main__":
    main()
