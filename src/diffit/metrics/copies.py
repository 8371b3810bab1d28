"""Samples next to the training images nearest to them in feature space, and how near real images lie."""

import html
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffit.errors import UserError
from diffit.metrics.detectors import Detector
from diffit.metrics.features import gather, pooled
from diffit.metrics.images import Batches, Images, by_size, choose, stream
from diffit.metrics.precision_recall import nearest
from diffit.utils.distributed import Processes
from diffit.utils.files import whole_file
from diffit.utils.html import Plot, details, page, picture, plots
from diffit.utils.images import make_grid

QUANTILE = 0.01  # of real images lie as close to a training image as a near-copy does
ROUNDING = 1e-5  # of the median distance: the same image in another batch is that far from itself
SHOWN, NEIGHBOURS = 32, 3
REAL = 10_000  # real images whose distances give the yardstick


@dataclass
class Copies:
    """``pictures``: the closest samples first, each a list of images (C, H, W), the sample and its neighbours."""

    facts: dict[str, Any]
    pictures: list[list[Tensor]]
    distances: Tensor
    """(shown, NEIGHBOURS) of the pictures."""
    nearest: tuple[Tensor, Tensor]
    """Distances to the nearest training image: of the samples, and of the real images that are the yardstick."""
    threshold: float
    """A near-copy is as close as this."""

    def verdict(self) -> str:
        """What the numbers say, in a sentence."""
        share, usual, count = (self.facts[name] for name in ("near_copies", "near_copies_among_real", "samples"))
        error = math.sqrt(usual * (1 - usual) / count)
        found = f"{share:.2%} of {count:,} samples are near-copies of training images; of real images {usual:.2%} are"
        if share > usual + 2 * error:
            return f"The network repeats training images: {found}."
        said = f"No sign of copying: {found}, and {2 * error:.2%} more could be chance."
        if (unlike := self.facts["farther_than_real"]) > 0.5:
            said += (
                f" Nor of likeness: {unlike:.0%} are farther from every training image than {1 - QUANTILE:.0%} of real "
                "images, as those of a network that has learnt little."
            )
        return said


def some_of(images: Images, count: int) -> list[Tensor]:
    """``count`` of the ``images`` at random, or all: uint8 (C, H, W)."""
    return list(images.rows(sorted(choose(len(images), count).tolist())))


def find_copies(
    samples: list[Tensor],
    training: Images,
    detector: Detector,
    procs: Processes,
    *,
    heldout: Images | None = None,
    batch: int = 64,
) -> Copies:
    """Near-copies among ``samples``, by the yardstick of ``heldout`` images or of training images among themselves."""
    for other in (samples[0].shape, heldout.shape if heldout is not None else training.shape):
        if tuple(other) != training.shape and not detector.any_size:
            raise UserError(
                f"{training.name}: images of {training.shape}, what they are compared with of {tuple(other)} (C, H, W)"
            )
    real = features(stream(training, torch.arange(len(training)), batch, procs, progress=True), detector, procs)
    parts = torch.arange(len(samples)).split(batch)
    batches = (group for i in parts for group in by_size(i, [samples[j] for j in i.tolist()]))
    generated = features(batches, detector, procs)
    if heldout is None:
        if len(real) < 2:
            raise UserError(f"{training.name}: one image; without --heldout at least two are needed")
        chosen = choose(len(real), min(REAL, len(real)))
        yardstick = nearest(real[chosen], real, 2, device=procs.device)[0][:, 1]  # the nearest is the image itself
    else:
        chosen = choose(len(heldout), min(REAL, len(heldout)))
        unseen = features(stream(heldout, chosen, batch, procs), detector, procs)
        yardstick = nearest(unseen, real, device=procs.device)[0][:, 0]
    distances, indices = nearest(generated, real, min(NEIGHBOURS, len(real)), device=procs.device)
    # Duplicates among the real images have distance 0 but for rounding, and so have exact copies.
    threshold = yardstick.quantile(QUANTILE).clamp(min=ROUNDING * float(yardstick.median()))
    order = distances[:, 0].argsort()[:SHOWN]
    wanted = sorted(set(indices[order].flatten().tolist()))
    pictures = dict(zip(wanted, training.rows(wanted), strict=True))
    facts = {
        "samples": len(samples),
        "training_images": len(real),
        "detector": {"name": detector.name, "sha256": detector.key},
        "yardstick": "training images among themselves" if heldout is None else f"held-out images of {heldout.name}",
        "near_copies": float((distances[:, 0] <= threshold).double().mean()),
        "near_copies_among_real": float((yardstick <= threshold).double().mean()),
        "closer_than_the_median_real": float((distances[:, 0] < yardstick.median()).double().mean()),
        "farther_than_real": float((distances[:, 0] > yardstick.quantile(1 - QUANTILE)).double().mean()),
        "median_distance": float(distances[:, 0].median()),
        "median_distance_of_real": float(yardstick.median()),
    }
    shown = [[samples[i], *(pictures[j] for j in indices[i].tolist())] for i in order.tolist()]
    return Copies(facts, shown, distances[order], (distances[:, 0], yardstick), float(threshold))


def features(batches: Batches, detector: Detector, procs: Processes) -> Tensor:
    """(N, d) of all images of a stream, in the order of their positions."""
    need = pooled(None)
    found: Tensor = gather({detector: [need]}, batches, procs)[detector][need]
    return found


def write_copies(dest: Path, copies: Copies) -> None:
    """A page with the verdict, how near samples and real images lie, and the samples closest to training images."""
    table = []
    for images, distances in zip(copies.pictures, copies.distances.tolist(), strict=True):
        cells = []
        for image, text in zip(images, ["sample", *(f"training, {d:.4g} away" for d in distances)], strict=True):
            data = io.BytesIO()
            make_grid(image[None]).save(data, "PNG")
            cells.append(f"<td>{picture(data.getvalue(), text)}</td>")
        table.append(f"<tr>{''.join(cells)}</tr>")
    body = [
        f"<p><strong>{html.escape(copies.verdict())}</strong></p>",
        *plots([_histogram(copies)]),
        details("Numbers", f"<pre>{html.escape(json.dumps(copies.facts, indent=2))}</pre>"),
        "<h2>The samples nearest to training images</h2>",
        f"<table>{''.join(table)}</table>",
    ]
    with whole_file(dest) as part:
        part.write_text(page("Near-copies", body))


def _histogram(copies: Copies) -> Plot:
    samples, real = (distances.double().cpu().numpy() for distances in copies.nearest)
    edges = np.linspace(0, max(samples.max(), real.max()) or 1, 61)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    traces = [
        {"type": "bar", "name": name, "x": middles, "opacity": 0.6,
         "y": (100 * np.histogram(distances, edges)[0] / len(distances)).tolist()}
        for name, distances in (("samples", samples), (copies.facts["yardstick"], real))
    ]  # fmt: skip
    near = {"x0": copies.threshold, "x1": copies.threshold, "y0": 0, "y1": 1, "yref": "paper", "type": "line"}
    label = {"text": "near-copies are left of this", "textposition": "end", "textangle": 0, "xanchor": "left"}
    how = {"barmode": "overlay", "bargap": 0, "shapes": [near | {"line": {"dash": "dot"}, "label": label}]}
    title = "Distance to the nearest training image, in feature space"
    return Plot(title, traces, x="distance", y="% of images", layout=how)
