"""The demo's network distilled both ways, and what its students are worth next to it.

    python examples/digits.py --outdir runs/demo
    python examples/few_steps.py --outdir runs/demo

Judged as the demo judges: samples of the same seeds against the half of the digits that nothing was trained on.
"""

import json
import time
from pathlib import Path

import click
import torch
from digits import FIRST_SEED, draw, judge, write_archives
from torch import Tensor

from diffit.cli import run
from diffit.data.archive import ImageArchive
from diffit.sampling import load
from diffit.sampling.cost import count_evaluations
from diffit.training.distill import STEPS, Method, Order, distill
from diffit.utils.distributed import alone
from diffit.utils.images import save_grid
from diffit.weights import newest_snapshot, read_header

CLASSES = 10
NAMES = ("class_agreement", "frechet_pixels", "near_copies")


def evaluations(network: Path) -> int:
    """Forward passes per image, of both halves where it is guided."""
    config, _ = read_header(network)
    return sum(count_evaluations(config))


def same_seeds(network: Path) -> Tensor:
    """One digit of each class, uint8 (10, 1, H, W)."""
    model = load(network)
    seeds = range(FIRST_SEED, FIRST_SEED + CLASSES)
    return torch.cat([images for _, images in model.generate(seeds, torch.arange(CLASSES))])


@click.command()
@click.option("--outdir", type=click.Path(path_type=Path), default="runs/demo", show_default=True)
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Length of each distillation.")
@click.option("--kimg", type=float, help="Length of each distillation in thousands of images, in place of --minutes.")
@click.option("--method", "methods", type=click.Choice(list(STEPS)), multiple=True, default=list(STEPS))
def main(outdir: Path, minutes: float, kimg: float | None, methods: tuple[Method, ...]) -> None:
    """Make the students, judge them, and write few-steps.json and few-steps.png."""
    train_zip, heldout_zip = write_archives(outdir / "data")
    real, heldout = (ImageArchive(path, cond=True) for path in (train_zip, heldout_zip))
    teacher = newest_snapshot(sorted(outdir.glob("00000-*"))[0])
    assert teacher is not None
    networks, seconds = {"teacher": teacher}, {"teacher": 0.0}
    for method in methods:
        began = time.monotonic()
        length = {"minutes": minutes} if kimg is None else {"kimg": kimg}
        order = Order(teacher, method, STEPS[method], {"data": str(train_zip.resolve())} | length)
        outcome, students = distill(order, real, outdir / method, alone())
        if outcome.signal is not None:
            raise SystemExit(130)
        networks |= {f"{method} {student.stem.removeprefix('student-')}": student for student in students}
        seconds |= dict.fromkeys([name for name in networks if name.startswith(method)], time.monotonic() - began)

    table, rows = {}, []
    for name, network in networks.items():
        found = judge(*draw(network), real, heldout)
        table[name] = {"evaluations": evaluations(network), "seconds": round(seconds[name], 1)}
        table[name] |= {key: found[key] for key in NAMES}
        table[name]["times_the_teachers"] = found["frechet_pixels"] / table["teacher"]["frechet_pixels"]
        rows.append(same_seeds(network))
        click.echo(f"{name:16} " + "  ".join(f"{key} {value:.4g}" for key, value in table[name].items()))
    (outdir / "few-steps.json").write_text(json.dumps(table, indent=2) + "\n")
    framed = torch.nn.functional.pad(torch.cat(rows), (1, 1, 1, 1), value=80)
    save_grid(framed, outdir / "few-steps.png", (CLASSES, len(rows)), list(networks))


if __name__ == "__main__":
    run(main)
