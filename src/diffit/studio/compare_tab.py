"""Compare: two networks, or two settings of one, on the same seeds."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from diffit.diffusion.samplers import Callback
from diffit.errors import UserError
from diffit.explore.pictures import difference, numbers_of_difference
from diffit.sampling.cost import count_evaluations
from diffit.sampling.labels import class_title
from diffit.sampling.model import Model
from diffit.studio.common import DEVICE, checked, grid_picture, let_cancel
from diffit.studio.controls import ask, class_list, network_list, solver_controls
from diffit.studio.request import Request
from diffit.studio.shelf import MAX_IMAGES, Shelf
from diffit.studio.watch import watched

Picture = Image.Image | None
Shown = tuple[Picture, Picture, Picture, list[list[Any]] | None, str]


def compare(shelf: Shelf, label: str, first: Any, count: Any, *sides: Any) -> Iterator[Shown]:
    """Yields (pictures of the first, of the second, of their difference, a table of numbers, status).

    ``sides`` are a network and its solver's settings, twice.
    """
    half = len(sides) // 2
    asked = [ask(shelf, side[0], label, first, count, *side[1:]) for side in (sides[:half], sides[half:])]
    models = [model for _, model in asked]
    require_one_size(*models)
    found, seconds, pictures = list[Tensor](), list[float](), list[Picture]([None, None])
    for which, (request, model) in enumerate(asked):
        began = time.monotonic()
        for images, status in watched(model, partial(sampled, model, request), model.config.sampling.steps):
            pictures[which] = grid_picture(images)
            if status:
                yield pictures[0], pictures[1], None, None, f"{('first', 'second')[which]} network, {status}"
            else:
                found.append(images.cpu())
                seconds.append(time.monotonic() - began)
    classes = [class_of(model, request) for request, model in asked]
    table, gray = [["class", *classes], *table_of(models, seconds, found)], grid_picture(difference(*found))
    yield pictures[0], pictures[1], gray, table, apart(*found)


def require_one_size(first: Model, second: Model) -> None:
    shapes = [model.config.image_shape for model in (first, second)]
    if shapes[0] != shapes[1]:
        texts = ["×".join(map(str, shape)) for shape in shapes]
        raise UserError(
            f"images of {texts[0]} and of {texts[1]} (C×H×W) cannot be compared; choose networks of one size"
        )


def class_of(model: Model, request: Request) -> str:
    """By the model's own names: the number of a class may be another animal in the other network."""
    return "by the seed" if request.label is None else class_title(model.config, int(request.label))


def sampled(model: Model, request: Request, callback: Callback) -> Tensor:
    return model.sample(request.seeds, request.label, callback=callback)


def apart(first: Tensor, second: Tensor) -> str:
    """How far the images of both are from each other, in words."""
    numbers = numbers_of_difference(first, second)
    if not numbers["greatest (levels)"]:
        return "**The same images**, to the last level."
    texts = [f"{name} **{value:.3g}**" for name, value in numbers.items()]
    return f"Gray is where both are equal. Between them: {', '.join(texts)}."


def table_of(models: list[Model], seconds: list[float], images: list[Tensor]) -> list[list[Any]]:
    """Rows (name, first, second)."""
    parameters = [sum(p.numel() for p in model.net.parameters()) / 1e6 for model in models]
    levels = [x.clamp(-1, 1) * 127.5 for x in images]
    return [
        ["parameters (million)", *(round(number, 3) for number in parameters)],
        ["evaluations per image", *(sum(count_evaluations(model.config)) for model in models)],
        ["seconds", *(round(number, 2) for number in seconds)],
        ["mean of the levels 0 to 255", *(round(float(x.mean() + 127.5), 2) for x in levels)],
        ["their standard deviation", *(round(float(x.std()), 2) for x in levels)],
    ]


def build(shelf: Shelf) -> None:
    networks, solvers = [], []
    with gr.Row():
        for title in ("First network", "Second network"):
            with gr.Column(min_width=300):
                networks.append(network_list(shelf, title))
                with gr.Accordion("Solver and guidance", open=False):
                    solvers.append(solver_controls(shelf, networks[-1]))
    with gr.Row():
        label = class_list(shelf, networks[0])
        first = gr.Number(0, label="First seed", precision=0, min_width=110)
        count = gr.Slider(1, MAX_IMAGES, 9, step=1, label="Images", min_width=150)
    with gr.Row():
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
    table = gr.Dataframe(
        headers=["", "first", "second"], interactive=False, elem_id="numbers", wrap=True,
        column_widths=["50%", "25%", "25%"],
    )  # fmt: skip
    inputs = [label, first, count, networks[0], *solvers[0], networks[1], *solvers[1]]
    event = go.click(
        checked(partial(compare, shelf)), inputs, [*pictures, table, status],
        api_name="compare", show_progress="minimal", show_progress_on=status, **DEVICE,
    )  # fmt: skip
    let_cancel(cancel, status, event)
