"""Our small network against a U-Net at equal multiply-accumulates and equal seconds of one core.

    python -m experiments.unet --data train16.zip --val test16.zip --detector small.safetensors

The U-Net is diffusers' ``UNet2DModel``, as wide as makes its multiply-accumulates as many; both go through the same
loss, steps, average and samplers. Ours has the recipe of its preset, ``paper`` is the same network with that of
``--recipe paper``. The U-Net has ours but for what ``--unet-lr`` and the like say.
A command that is started again goes on where it was, and two at a time share the work by their ``--seed``.
"""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffit.configs.resolve import resolve
from diffit.configs.schema import Config, ImageModel
from diffit.data.archive import ImageArchive
from diffit.data.open import facts_of
from diffit.training.step import build_network
from diffit.utils.precision import channels_last
from experiments.learning import HeldOut, Results, begin, distance, learn, recipe_of, setting, spread

SIDES = ("ours", "paper", "unet")
PAPER = {"recipe": "paper", "lr": 2e-3, "batch": 16}  # as small presets had it
SHARES = [number / 12 for number in range(1, 13)]  # of a run, after which it is judged


class UNet(nn.Module):
    """diffusers' U-Net with our networks' arguments; attention at the lowest resolution."""

    def __init__(self, model: ImageModel, width: int, layers: int = 1, init: str = "fan_in") -> None:
        from diffusers import UNet2DModel

        super().__init__()
        levels = len(model.stages)
        net = UNet2DModel(
            sample_size=model.image_size, in_channels=model.channels, out_channels=model.channels,
            layers_per_block=layers,
            block_out_channels=tuple(width * 2**min(level, 1) for level in range(levels)),
            norm_num_groups=max(n for n in range(1, max(width // 4, 1) + 1) if width % n == 0),
            attention_head_dim=None,  # one head, as EDM's
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            num_class_embeds=model.num_classes + 1 if model.num_classes else None,
        )  # fmt: skip
        # By our names first, so that Muon leaves alone what it leaves alone of ours.
        self.tokenizer, self.head, self.t_embedder = net.conv_in, net.conv_out, net.time_embedding
        self.net, self.num_classes = net, model.num_classes
        if init == "fan_in":
            self.init_weights()
        nn.init.zeros_(self.head.weight)  # as ours and EDM's begin

    def init_weights(self) -> None:
        """As our networks': weights by their inputs alone, and residual branches that begin at 0, as EDM's do too."""
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith((".conv2", ".to_out.0")):
                    nn.init.zeros_(module.weight)

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


def unet_like(config: Config, seed: int, layers: int = 1, init: str = "fan_in") -> UNet:
    """Of the even width whose multiply-accumulates are nearest to those of our network."""
    model: Any = config.model
    wanted = products(build_network(config), model)
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            about = round(16 * (wanted / products(UNet(model, 32, layers), model)) ** 0.5)  # of 2 channels each
            widths = {n: products(UNet(model, n, layers), model) for n in range(2 * about - 4, 2 * about + 5, 2)}
        width = min(widths, key=lambda width: abs(widths[width] - wanted))
        torch.manual_seed(seed)
        return channels_last(UNet(model, width, layers, init))


@click.command()
@click.option("--data", required=True, help="Images to learn from.")
@click.option("--val", required=True, type=click.Path(path_type=Path), help="Others, for the loss and the distance.")
@click.option("--detector", default="pixels", show_default=True, help="Whose features the distance is of.")
@click.option("--minutes", "lengths", type=float, multiple=True, default=[10.0, 30.0], show_default=True,
              help="Of one core, for each; a run of its own for each length.")  # fmt: skip
@click.option("--seed", "seeds", type=int, multiple=True, default=[0, 1, 2], show_default=True)
@click.option("--side", "sides", type=click.Choice(SIDES), multiple=True, default=SIDES)
@click.option("--preset", help="Of our network.  [default: the small one for the images]")
@click.option("--unet-lr", type=float, default=3e-3, show_default=True)
@click.option("--unet-batch", type=int, default=32, show_default=True)
@click.option("--unet-optimizer", type=click.Choice(["adam", "muon"]), default="muon", show_default=True)
@click.option("--unet-layers", type=int, default=1, show_default=True, help="Blocks a resolution.")
@click.option("--unet-init", type=click.Choice(["own", "fan_in"]), default="fan_in", show_default=True,
              help="diffusers' own, or branches that begin at 0.")  # fmt: skip
@click.option("--dest", type=click.Path(path_type=Path), default="unet.jsonl", show_default=True)
def main(
    data: str, val: Path, detector: str, lengths: list[float], seeds: list[int], sides: list[str], preset: str,
    unet_lr: float, unet_batch: int, unet_optimizer: str, unet_layers: int, unet_init: str, dest: Path,
) -> None:  # fmt: skip
    """Train both for the same seconds, and print the table of what is in the file."""
    torch.set_num_threads(1)
    archive, others = ImageArchive(data), ImageArchive(val)
    common = setting(archive, others, detector, preset=preset)
    other = {"lr": unet_lr, "batch": unet_batch, "optimizer": unet_optimizer, "layers": unet_layers, "init": unet_init}
    recipes: dict[str, dict[str, Any]] = {"ours": {}, "paper": PAPER, "unet": other}

    def config_of(side: str, minutes: float, seed: int = 0) -> Config:
        options = {name: value for name, value in recipes[side].items() if name not in ("layers", "init")}
        return resolve(preset, {"data": data, "minutes": minutes, "seed": seed, **options}, facts_of(archive))

    def key_of(side: str, minutes: float) -> dict[str, Any]:
        training = recipe_of(config_of(side, minutes))
        return {"name": side, "minutes": minutes, "recipe": recipes[side], "training": training, **common}

    for minutes, seed, side in itertools.product(lengths, seeds, sides):
        key, config = key_of(side, minutes) | {"seed": seed}, config_of(side, minutes, seed)
        if any(Results(dest).find(**key)):
            continue
        assert isinstance(config.model, ImageModel)
        net: Any = unet_like(config, seed, unet_layers, unet_init) if side == "unet" else build_network(config)
        facts = {"parameters": sum(p.numel() for p in net.parameters()), "products": products(net, config.model)}
        stepper = begin(config, net)
        points = list(learn(stepper, archive, HeldOut(config, others), SHARES, 60 * minutes))
        far = distance(stepper, val, detector)
        Results(dest).add(points, **key, **facts, distance=far)
        click.echo(
            f"{side} seed {seed}  {minutes:g} minutes  {points[-1].images} images  loss {points[-1].loss:.4f}  "
            f"distance {far:.4g}"
        )
    done = [record for job in itertools.product(SIDES, lengths) for record in Results(dest).find(**key_of(*job))]
    click.echo("\n" + table(done, sorted(lengths)))


def table(records: list[dict[str, Any]], lengths: list[float]) -> str:
    """The last column: ours has the loss of the other side after this share of its images, and of its seconds."""
    lines = [
        "| minutes | | multiply-accumulates | parameters | images | held-out loss | distance | ours has it after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = {(record["minutes"], record["seed"]): record["points"] for record in records if record["name"] == "ours"}
    for minutes, side in itertools.product(lengths, SIDES):
        if its := [record for record in records if (record["minutes"], record["name"]) == (minutes, side)]:
            last = {record["seed"]: record["points"][-1] for record in its}
            shares = [
                [
                    place(ours[minutes, seed], point["loss"], unit) / point[unit]
                    for seed, point in last.items()
                    if (minutes, seed) in ours
                ]
                for unit in ("images", "seconds")
            ]
            lines.append(
                f"| {minutes:g} | {side} | {its[0]['products']:,} | {its[0]['parameters']:,} | "
                f"{statistics.fmean(point['images'] for point in last.values()):,.0f} | "
                f"{spread([point['loss'] for point in last.values()])} | "
                f"{spread([record['distance'] for record in its])} | "
                f"{f'{spread(shares[0])} of the images, {spread(shares[1])} of the seconds' if shares[0] else ''} |"
            )
    return "\n".join(lines)


def place(points: list[dict[str, Any]], loss: float, unit: str) -> float:
    """Images or seconds after which a curve reaches ``loss``, linear between its points; infinity if it does not."""
    for before, after in itertools.pairwise([{"loss": 1.0, unit: 0}, *points]):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return float(before[unit] + share * (after[unit] - before[unit]))
    return math.inf


if __name__ == "__main__":
    main()
