"""The paper's ablations at a size for minutes: ``python -m experiments.ablations --data TRAIN.zip --val HELDOUT.zip``.

    diffit data convert --source cifar10.zip --dest train16.zip --resolution 16x16
    python -m experiments.ablations --data train16.zip --val test16.zip --kimg 16 --detector small.safetensors

Equal parameters within 2 %, equal images, the recipe of the small presets but for the learning rate, which stays: each
point of a curve is then what a run of that length gives. A command that is started again goes on where it was; two at a
time share the work by their ``--seed``.
"""

import statistics
from pathlib import Path
from typing import Any

import click
import torch

from diffit.configs.resolve import resolve
from diffit.configs.schema import ImageModel
from diffit.data.archive import ImageArchive
from diffit.data.open import facts_of
from experiments.learning import HeldOut, Results, begin, distance, learn, recipe_of, setting, spread
from experiments.variants import VARIANTS, make

NAMES = list(VARIANTS)
SHARES = 0.2, 0.4, 0.6, 0.8, 1.0  # of a run, after which it is judged
MLP_RATIO = 4.0  # the paper's; variants with more parameters elsewhere have narrower ones


@click.command()
@click.option("--data", required=True, help="Images to learn from.")
@click.option("--val", required=True, type=click.Path(path_type=Path), help="Others, for the loss and the distance.")
@click.option("--detector", default="pixels", show_default=True, help="Whose features the distance is of.")
@click.option("--name", "names", type=click.Choice(NAMES), multiple=True, default=NAMES, help="[default: all]")
@click.option("--seed", "seeds", type=int, multiple=True, default=[0, 1, 2], show_default=True)
@click.option("--kimg", type=float, default=16.0, show_default=True)
@click.option("--preset", help="Of our own network.  [default: the small one for the images]")
@click.option("--dest", type=click.Path(path_type=Path), default="ablations.jsonl", show_default=True)
def main(
    data: str, val: Path, detector: str, names: list[str], seeds: list[int], kimg: float, preset: str, dest: Path
) -> None:
    """Train what is not in the file yet, and print the table of all that is."""
    torch.set_num_threads(1)
    archive, others = ImageArchive(data), ImageArchive(val)
    options = {"data": data, "kimg": kimg, "lr_decay": 0.0}
    recipe = recipe_of(resolve(preset, options, facts_of(archive)))
    common = setting(archive, others, detector, kimg=kimg, preset=preset, training=recipe)
    for seed in seeds:
        for name in names:
            key = {"name": name, "seed": seed, **common}
            if any(Results(dest).find(**key)):
                continue
            config = resolve(preset, options | {"seed": seed}, facts_of(archive))
            assert isinstance(config.model, ImageModel)
            model = config.model.model_copy(update={"mlp_ratio": MLP_RATIO})
            net = make(name, model, config.training.init, seed)
            parameters = sum(p.numel() for p in net.parameters())
            stepper = begin(config, net)
            points = list(learn(stepper, archive, HeldOut(config, others), SHARES))
            found = {"parameters": parameters, "distance": distance(stepper, val, detector)}
            Results(dest).add(points, **key, **found)
            click.echo(f"{name:14} seed {seed}  loss {points[-1].loss:.4f}  distance {found['distance']:.4g}")
    click.echo("\n" + table(list(Results(dest).find(**common))))


def table(records: list[dict[str, Any]]) -> str:
    """Mean and range over seeds, and in how many of the seeds it is better than ours."""
    lines = [
        "| variant | of | held-out loss | of ours | better than ours | distance | s |",
        "|---|---|---|---|---|---|---|",
    ]
    own = {record["seed"]: record["points"][-1]["loss"] for record in records if record["name"] == "tmsa"}
    for name in NAMES:
        its = [record for record in records if record["name"] == name]
        if not its:
            continue
        ratios = [r["points"][-1]["loss"] / own[r["seed"]] for r in its if r["seed"] in own]
        losses, distances = [r["points"][-1]["loss"] for r in its], [r["distance"] for r in its]
        seconds = statistics.fmean(record["points"][-1]["seconds"] for record in its)
        ratio = f"{statistics.fmean(ratios):.3f}" if ratios else ""
        lines.append(
            f"| {name} | {VARIANTS[name].place} | {spread(losses)} | {ratio} | "
            f"{sum(r < 1 for r in ratios)} of {len(ratios)} | {spread(distances)} | {seconds:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
