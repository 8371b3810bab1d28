"""Explore: between two samples, variations of an image, and what could be in a part of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from diffit.diffusion.samplers import Callback
from diffit.errors import UserError
from diffit.explore.edit import inpaint, noise_levels, vary
from diffit.explore.interpolate import interpolate
from diffit.explore.pictures import picture
from diffit.sampling.model import Model
from diffit.studio.common import DEVICE, PRIVATE, Scratch, checked, grid_picture, let_cancel
from diffit.studio.controls import class_list, network_list, prepared, steps_field
from diffit.studio.request import class_of, real, seed_of, whole
from diffit.studio.shelf import Shelf
from diffit.studio.uploads import canvas, fit_image, painted, read_upload, upload_button
from diffit.studio.watch import watched
from diffit.utils.images import save_gif, to_float, to_uint8

SIDE = 512  # pixels that an image is enlarged to, for looking at it and for drawing on it
MAX_FRAMES, MAX_RESAMPLES, MAX_EDITS = 32, 20, 16
READY = "vary it, or paint over a part of it and press Inpaint"

Between = tuple[Image.Image | None, Tensor | None, str | None, str]


def frames_between(
    shelf: Shelf, scratch: Scratch, network: str, ends: Sequence[tuple[Any, str]], frames: Any, steps: Any
) -> Iterator[Between]:
    """Yields (picture of all frames, the frames, an animation of them, status).

    ``ends`` are (seed, class) twice; the frames are uint8 ``(frames, C, H, W)``.
    """
    model, count = prepared(shelf, network, frames, steps), whole(frames, "frames")
    labels = [class_of(label, model.config) for _, label in ends]
    if (labels[0] is None) != (labels[1] is None):
        raise UserError("classes: choose one for both ends, or leave both to the seeds")
    first, second = (seed_of(seed) for seed, _ in ends)

    def work(callback: Callback) -> Tensor:
        return interpolate(model, (first, second), None if None in labels else labels, count, callback=callback)

    for images, status in watched(model, work, model.config.sampling.steps):
        if status:
            yield grid_picture(images), None, None, status
        else:
            pictures = [picture(image, SIDE) for image in images.cpu()]
            path = scratch.folder() / "interpolation.gif"
            save_gif([*pictures, *pictures[-2:0:-1]], path)
            frames = to_uint8(images).cpu()
            yield grid_picture(images), frames, str(path), f"**{count} frames**: move the slider to go through them"


def frame_at(frames: Tensor | None, percent: float) -> Image.Image | None:
    if frames is None:
        return None
    return picture(to_float(frames[round(float(percent) / 100 * (len(frames) - 1))]), SIDE)


@dataclass(frozen=True)
class Edit:
    """An image, and who makes others of it: ``source`` ``(1, C, H, W)``, a seed of the noise for each of them."""

    model: Model
    source: Tensor
    seeds: range
    label: int | None


def edit_of(shelf: Shelf, image: Tensor | None, network: str, label: str, first: Any, count: Any) -> Edit:
    """What the controls ask for, checked. Raises :class:`UserError`."""
    if image is None:
        raise UserError("no image: upload one, or take a sample of a seed")
    model, seed, number = prepared(shelf, network, count), seed_of(first), whole(count, "images")
    return Edit(model, image, range(seed, seed + number), class_of(label, model.config))


def variations(edit: Edit, level: Any) -> Iterator[tuple[Image.Image, str]]:
    """Yields (picture of the variations, status)."""
    sigma = real(level, "noise level")

    def work(callback: Callback) -> Tensor:
        return vary(edit.model, edit.source, sigma, edit.seeds, edit.label, callback=callback)

    for images, status in watched(edit.model, work, int((noise_levels(edit.model) < sigma).sum())):
        yield grid_picture(images), status or f"**{len(edit.seeds)} variations** from noise level {sigma:g} on"


def paintings(edit: Edit, drawing: dict[str, Any] | None, resamples: Any) -> Iterator[tuple[Image.Image, str]]:
    """Yields (picture of what could be there, status)."""
    again, mask = whole(resamples, "resamples"), painted(drawing, (edit.source.shape[-2], edit.source.shape[-1]))
    if not 1 <= again <= MAX_RESAMPLES:
        raise UserError(f"resamples {again}: use 1 to {MAX_RESAMPLES}")

    def work(callback: Callback) -> Tensor:
        return inpaint(edit.model, edit.source, mask, edit.seeds, edit.label, resamples=again, callback=callback)

    calls = (edit.model.config.sampling.steps - 1) * again + 1  # the last step is taken once
    for images, status in watched(edit.model, work, calls):
        done = f"**{int(mask.sum())} of {mask.numel()} pixels are new**, the others as they were"
        yield grid_picture(images), status or done


def take_upload(shelf: Shelf, network: str, path: str | None) -> tuple[Tensor, Image.Image, str]:
    """An upload at the model's size: for the model, to paint on, status."""
    image = fit_image(read_upload(path), prepared(shelf, network, 1).config.image_shape)
    return image, picture(image[0], SIDE), f"**Your image**, cropped and scaled to {_size(image)} pixels: {READY}"


def take_sample(shelf: Shelf, network: str, label: str, seed: Any) -> tuple[Tensor, Image.Image, str]:
    """The sample of a seed likewise."""
    model, number = prepared(shelf, network, 1), seed_of(seed)
    image = model.sample([number], class_of(label, model.config)).clamp(-1, 1).cpu()
    return image, picture(image[0], SIDE), f"**The sample of seed {number}**, {_size(image)} pixels: {READY}"


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}×{image.shape[-2]}"


def build(shelf: Shelf, scratch: Scratch) -> None:
    network = network_list(shelf)
    with gr.Tabs():
        with gr.Tab("Interpolate", id="between"):
            _build_between(shelf, scratch, network)
        with gr.Tab("Vary and inpaint", id="edit"):
            _build_edit(shelf, network)


def _build_between(shelf: Shelf, scratch: Scratch, network: gr.Dropdown) -> None:
    pictures: gr.State = gr.State(None, time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            ends: list[Any] = []
            for name, seed in (("From", 0), ("To", 1)):
                with gr.Row():
                    ends.append(gr.Number(seed, label=f"{name} seed", precision=0, min_width=110))
                    ends.append(class_list(shelf, network, f"{name} class"))
            with gr.Row():
                frames = gr.Slider(2, MAX_FRAMES, 16, step=1, label="Frames", min_width=150)
                steps = steps_field(shelf, network)
            with gr.Row():
                go = gr.Button("Interpolate", variant="primary", elem_id="interpolate", min_width=110)
                cancel = gr.Button("Cancel", min_width=110)
        with gr.Column(scale=3, min_width=300):
            status = gr.Markdown("", elem_id="between-status")
            frame = gr.Image(label="Frame", format="png", interactive=False, elem_id="frame", buttons=["download"])
            position = gr.Slider(0, 100, 0, step=1, label="Position between the two, in percent", elem_id="position")
            strip = gr.Image(label="All frames", format="png", interactive=False, buttons=["download", "fullscreen"])
            animation = gr.File(label="Animation", visible="hidden", interactive=False)

    def run(network: str, *values: Any) -> Iterator[Any]:
        a, class_a, b, class_b, count, number = values
        for everything, found, path, text in frames_between(
            shelf, scratch, network, ((a, class_a), (b, class_b)), count, number
        ):
            yield everything, found, gr.update(value=path, visible=bool(path) or "hidden"), text, frame_at(found, 0), 0

    event = go.click(
        checked(run), [network, *ends, frames, steps], [strip, pictures, animation, status, frame, position],
        api_name="interpolate", show_progress="minimal", show_progress_on=status, **DEVICE,
    )  # fmt: skip
    let_cancel(cancel, status, event)
    position.input(frame_at, [pictures, position], frame, **PRIVATE)


def _build_edit(shelf: Shelf, network: gr.Dropdown) -> None:
    image: gr.State = gr.State(None, time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                seed = gr.Number(0, label="Seed of a sample", precision=0, min_width=110)
                label = class_list(shelf, network)
            with gr.Row():
                take = gr.Button("Take this sample", elem_id="take", min_width=110)
                upload = upload_button("Upload an image", elem_id="upload", min_width=110)
            drawing = canvas(
                label="Paint over what is to be new", elem_id="canvas", sources=(), transforms=(), format="png",
                brush=gr.Brush(colors=["#ff4d6d"], default_color="#ff4d6d", default_size=48, color_mode="fixed"),
                layers=False, canvas_size=(SIDE, SIDE), height=420, buttons=[],
            )  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                first = gr.Number(0, label="First seed of the noise", precision=0, min_width=110)
                count = gr.Slider(1, MAX_EDITS, 4, step=1, label="Images", min_width=150)
            with gr.Row():
                level = gr.Slider(0.05, 10, 1, step=0.05, label="Noise level (Vary)", min_width=150)
                again = gr.Slider(1, MAX_RESAMPLES, 5, step=1, label="Resamples (Inpaint)", min_width=150)
            with gr.Row():
                change = gr.Button("Vary", variant="primary", elem_id="vary", min_width=90)
                paint = gr.Button("Inpaint", variant="primary", elem_id="inpaint", min_width=90)
                cancel = gr.Button("Cancel", min_width=90)
            status = gr.Markdown("Take a sample or upload an image first.", elem_id="edit-status")
            result = gr.Image(
                label="Result", format="png", interactive=False, elem_id="edited", buttons=["download", "fullscreen"]
            )

    def vary_it(level: Any, *asked: Any) -> Iterator[Any]:
        yield from variations(edit_of(shelf, *asked), level)

    def paint_it(drawing: Any, resamples: Any, *asked: Any) -> Iterator[Any]:
        yield from paintings(edit_of(shelf, *asked), drawing, resamples)

    asked, shown = [image, network, label, first, count], [result, status]
    how: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": status} | DEVICE
    start = [image, drawing, status]
    upload.upload(checked(partial(take_upload, shelf)), [network, upload], start, api_name="upload", **how)
    take.click(checked(partial(take_sample, shelf)), [network, label, seed], start, api_name="take", **how)
    varied = change.click(checked(vary_it), [level, *asked], shown, api_name="vary", **how)
    inpainted = paint.click(checked(paint_it), [drawing, again, *asked], shown, api_name="inpaint", **how)
    let_cancel(cancel, status, varied, inpainted)
