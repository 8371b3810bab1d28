"""Look inside: where a place of the image attends, by block, head and noise level; biases; what the time token does."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image
from torch import Tensor

from diffit.errors import UserError
from diffit.explore.attention import (
    Place,
    State,
    attention_layers,
    attention_maps,
    bias_maps,
    denoising_states,
    time_norms,
)
from diffit.explore.pictures import heat, overlay, picture, window_grid
from diffit.sampling.model import Model
from diffit.studio.common import DEVICE, PRIVATE, checked
from diffit.studio.controls import chooser, prepared, steps_field
from diffit.studio.request import class_of, seed_of, whole
from diffit.studio.shelf import Shelf

SIDE = 384  # pixels that the image to click is enlarged to
SMALL = 192
MIDDLE = (0.5, 0.5)
PARTS = ("queries", "keys", "values")


@dataclass(frozen=True)
class Looked:
    """A sample with the states that led to it."""

    network: str
    version: tuple[str, float]
    seed: int
    label: int | None
    states: list[State]
    sample: Tensor

    @property
    def steps(self) -> int:
        return len(self.states)


def look(shelf: Shelf, network: str, label: str, seed: Any, steps: Any) -> Looked:
    """Sample, and keep the state of every step."""
    version = shelf.version(network)
    model = prepared(shelf, network, 1, steps)
    number, chosen = seed_of(seed), class_of(label, model.config)
    states = denoising_states(model, [number], chosen)
    images = model.sample([number], chosen).cpu()
    return Looked(network, version, number, chosen, states, images[0])


def model_of(shelf: Shelf, looked: Looked) -> Model:
    """The network that the sample is of. UserError where the name means another one by now, as in a run that trains."""
    return shelf.model(looked.network, version=looked.version)


def windows(shelf: Shelf, looked: Looked, block: str, visible: bool) -> Image.Image:
    """The sample, with the windows of ``block`` drawn over it."""
    image = picture(looked.sample, SIDE)
    if not visible:
        return image
    size, window = map_of(model_of(shelf, looked), block)
    return window_grid(image, size, window)


def map_of(model: Model, block: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(tokens of the map, of a window) of a block: of the image family a stage halves the map."""
    layer = layer_of(model, block)
    if layer.is_global:
        return layer.window, layer.window
    stages = len(model.config.model.stages)  # type: ignore[union-attr]
    room, stage = block.split(".")[:2]
    level = int(stage) if room == "encoder" else stages - 2 - int(stage)
    _, height, width = model.config.model.sample_shape
    return (-(-height // 2**level), -(-width // 2**level)), layer.window


def layer_of(model: Model, block: str) -> Any:
    layer = attention_layers(model.net).get(block)
    if layer is None:
        raise UserError(f"block {block}: not of this network; choose one of the list")
    return layer


def attention(
    shelf: Shelf, looked: Looked, block: str, step: Any, place: Place
) -> tuple[list[tuple[Image.Image, str]], list[tuple[Image.Image, str]]]:
    """Pictures with captions: each head at one step; the mean of the heads over the denoising process."""
    model = model_of(shelf, looked)
    layer_of(model, block)
    at = whole(step, "step") - 1
    if not 0 <= at < looked.steps:
        raise UserError(f"step {at + 1}: sampling had steps 1 to {looked.steps}")
    some = sorted({round(i * (looked.steps - 1) / 6) for i in range(7)} | {at})
    labels = None if looked.label is None else [looked.label]
    found = attention_maps(
        model, [looked.seed], labels, places=[place], blocks=[block], steps=some, states=looked.states
    )
    maps = found.maps[block][:, 0, 0]  # (S, heads, h, w)
    now = some.index(at)
    heads = [(overlay(looked.sample, weights, place, SMALL), f"head {head}") for head, weights in enumerate(maps[now])]
    process = [
        (overlay(found.denoised[i, 0], maps[i].mean(0), place, SMALL), f"step {some[i] + 1}, σ {sigma:.2g}")
        for i, sigma in enumerate(found.sigmas)
    ]
    return heads, process


def biases(shelf: Shelf, looked: Looked, block: str) -> list[tuple[Image.Image, str]]:
    """B of each head; all on one scale."""
    maps = bias_maps(layer_of(model_of(shelf, looked), block))
    low, high = float(maps.min()), float(maps.max())
    return [(heat(values, low, high, SMALL), f"head {head}") for head, values in enumerate(maps)]


def norms(shelf: Shelf, looked: Looked, block: str) -> pd.DataFrame:
    """Mean over heads of how far the time token moves queries, keys and values, over the noise levels of the steps."""
    sigmas = [sigma for sigma, _ in looked.states]
    found = time_norms(model_of(shelf, looked), sigmas, looked.label)[block].mean(-1)  # (S, 3)
    rows = [
        (math.log(sigma), part, float(found[i, j])) for i, sigma in enumerate(sigmas) for j, part in enumerate(PARTS)
    ]
    return pd.DataFrame(rows, columns=["ln sigma", "of", "norm"])


def start(shelf: Shelf, network: str, label: str, seed: Any, steps: Any) -> list[Any]:
    """A sample to look into, and what the controls show for it: its blocks, its steps, the middle of the image."""
    found = look(shelf, network, label, seed, steps)
    names = list(attention_layers(shelf.model(network).net))
    chosen = gr.update(choices=names, value=names[len(names) // 2])
    return [found, chosen, gr.update(maximum=found.steps, value=(found.steps + 1) // 2), MIDDLE]


def show(shelf: Shelf, looked: Looked | None, block: str, step: Any, place: Place, lines: bool) -> list[Any]:
    """Everything that is shown of a place, in the order of the components."""
    if looked is None:
        raise UserError("nothing to look into yet: press Sample and look first")
    heads, process = attention(shelf, looked, block, step, place)
    where = f"The query is **{place[0]:.0%} down, {place[1]:.0%} across** (green); bright is where it attends."
    image = windows(shelf, looked, block, lines)
    return [image, where, heads, process, biases(shelf, looked, block), norms(shelf, looked, block)]


def clicked(looked: Looked | None, event: gr.SelectData) -> Place:
    """The place of a click on the image."""
    if looked is None:
        return MIDDLE
    width, height = picture(looked.sample, SIDE).size
    x, y = event.index
    return min(y / height, 0.999), min(x / width, 0.999)


def build(shelf: Shelf) -> None:
    looked: gr.State = gr.State(None, time_to_live=3600)
    place = gr.State(MIDDLE)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            choice = chooser(shelf)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, min_width=110)
                steps = steps_field(shelf, choice.network)
            go = gr.Button("Sample and look", variant="primary", elem_id="look")
            gr.Markdown("**Click a place** of the image to see where it attends.")
            image = gr.Image(
                show_label=False, format="png", interactive=False, elem_id="clicked", buttons=["fullscreen"]
            )
            lines = gr.Checkbox(True, label="Draw the windows of the block")
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                block = gr.Dropdown([], label="Block", elem_id="block", min_width=150)
                step = gr.Slider(1, 18, 9, step=1, label="Step, from the noisiest on", min_width=150)
            where = gr.Markdown("", elem_id="where")
            heads = _gallery("Heads at this step", "heads")
            process = _gallery("Mean of the heads over the denoising process", "process")
            bias = _gallery("Relative position bias B per head, the query in the middle", "bias")
            gr.Markdown("**How far the time token moves queries, keys and values**")
            curves = gr.LinePlot(
                x="ln sigma", y="norm", color="of", color_title=" ", height=300, elem_id="norms", show_label=False
            )

    shown, inputs = [image, where, heads, process, bias, curves], [looked, block, step, place, lines]
    progress: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": where} | DEVICE
    how, again = progress | {"api_visibility": "private"}, checked(partial(show, shelf))
    event = go.click(
        checked(partial(start, shelf)), [choice.network, choice.label, seed, steps], [looked, block, step, place],
        api_name="look", **progress,
    )  # fmt: skip
    event.success(again, inputs, shown, **how)
    image.select(clicked, looked, place, **PRIVATE).success(again, inputs, shown, **how)
    for change in (block.input, step.release, lines.input):
        change(again, inputs, shown, **how)


def _gallery(label: str, name: str) -> gr.Gallery:
    gr.Markdown(f"**{label}**")
    return gr.Gallery(
        show_label=False, elem_id=name, elem_classes="gallery", columns=4, height="auto", object_fit="contain",
        interactive=False, format="png", buttons=["fullscreen"],
    )  # fmt: skip
