"""Compare: two networks, or two settings of one, on the same seeds."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from diffit.diffusion.samplers import Callback
from diffit.errors import UserError
from diffit.explore.live import live
from diffit.explore.pictures import difference, numbers_of_difference
from diffit.sampling.cost import count_evaluations
from diffit.sampling.model import Model
from diffit.studio.common import DEVICE, checked, grid_picture
from diffit.studio.controls import ask, chooser, solver_controls
from diffit.studio.explore_tab import PRIVATE
from diffit.studio.request import Request
from diffit.studio.sample_tab import decoded
from diffit.studio.shelf import Shelf

Shown = tuple[Image.Image | None, Image.Image | None, Image.Image | None, list[list[Any]] | None, str]


def compare(shelf: Shelf, label: str, first: Any, count: Any, *sides: Any) -> Iterator[Shown]:
    """Yields (pictures of the first, of the second, of their difference, a table of numbers, status).

    ``sides`` are a network and its solver's settings, twice.
    """
    half = len(sides) // 2
    asked = [ask(shelf, side[0], label, first, count, side[1:]) for side in (sides[:half], sides[half:])]
    shapes = [model.config.image_shape for _, model in asked]
    if shapes[0] != shapes[1]:
        texts = ["×".join(map(str, shape)) for shape in shapes]
        raise UserError(
            f"images of {texts[0]} and of {texts[1]} (C×H×W) cannot be compared; choose networks of one size"
        )
    found, seconds = list[Tensor](), list[float]()
    pictures: list[Image.Image | None] = [None, None]
    for which, (request, model) in enumerate(asked):
        began = time.monotonic()
        for progress in live(partial(sampled, model, request)):
            if progress.result is not None:
                found.append(progress.result.cpu())
                seconds.append(time.monotonic() - began)
                pictures[which] = grid_picture(found[-1])
            elif model.autoencoder is None:
                pictures[which] = grid_picture(decoded(model, progress.denoised))
                yield (
                    pictures[0],
                    pictures[1],
                    None,
                    None,
                    f"{'first' if which == 0 else 'second'}, step {progress.step + 1}",
                )
    gray = difference(found[0], found[1])
    table = table_of([model for _, model in asked], seconds, found)
    yield pictures[0], pictures[1], grid_picture(gray), table, "in the difference gray is equal"


def sampled(model: Model, request: Request, callback: Callback) -> Tensor:
    return model.sample(request.seeds, request.label, callback=callback)


def table_of(models: list[Model], seconds: list[float], images: list[Tensor]) -> list[list[Any]]:
    """Rows (name, first, second)."""
    rows: list[list[Any]] = []
    evaluations = [sum(count_evaluations(model.config)) for model in models]
    parameters = [sum(p.numel() for p in model.net.parameters()) / 1e6 for model in models]
    rows.append(["parameters (M)", *(round(number, 3) for number in parameters)])
    rows.append(["evaluations per image", *evaluations])
    rows.append(["seconds", *(round(number, 2) for number in seconds)])
    rows.append(["mean level", *(round(float((x.clamp(-1, 1).mean() + 1) * 127.5), 2) for x in images)])
    rows.append(["standard deviation", *(round(float(x.clamp(-1, 1).std() * 127.5), 2) for x in images)])
    for name, value in numbers_of_difference(*images).items():
        rows.append([name, round(value, 3) if torch.isfinite(torch.tensor(value)) else "identical", ""])
    return rows


def build(shelf: Shelf) -> None:
    with gr.Row():
        sides, labels = [], []
        for title in ("First network", "Second network"):
            with gr.Column(min_width=300):
                choice = chooser(shelf, title)
                choice.label.visible = title.startswith("First")
                with gr.Accordion("Solver and guidance", open=False):
                    solver = solver_controls(shelf, choice.network)
                sides += [choice.network, *solver]
                labels.append(choice.label)
    with gr.Row(equal_height=True):
        first = gr.Number(0, label="First seed", precision=0, min_width=110)
        count = gr.Slider(1, 64, 9, step=1, label="Images", min_width=150)
        go = gr.Button("Compare", variant="primary", elem_id="compare", min_width=110)
        cancel = gr.Button("Cancel", min_width=110)
    status = gr.Markdown("", elem_id="compare-status")
    with gr.Row():
        pictures = [
            gr.Image(
                label=name, format="png", interactive=False, elem_id=name.lower(), min_width=200, buttons=["download"]
            )
            for name in ("First", "Second", "Difference")
        ]
    table = gr.Dataframe(headers=["number", "first", "second"], interactive=False, elem_id="numbers", wrap=True)
    event = go.click(
        checked(lambda *values: (yield from compare(shelf, *values))), [labels[0], first, count, *sides],
        [*pictures, table, status], api_name="compare", show_progress="minimal", show_progress_on=status, **DEVICE,
    )  # fmt: skip
    cancel.click(lambda: "cancelled", None, status, cancels=[event], **PRIVATE)
