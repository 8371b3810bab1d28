"""Explore: between two samples, variations of an image, and what could be in a part of it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from diffit.diffusion.samplers import Callback
from diffit.errors import UserError
from diffit.explore.edit import inpaint, vary
from diffit.explore.interpolate import interpolate
from diffit.explore.live import live
from diffit.explore.pictures import picture
from diffit.sampling.model import Model
from diffit.studio.common import DEVICE, Scratch, canvas, checked, fit_image, grid_picture, painted, read_upload
from diffit.studio.controls import chooser
from diffit.studio.request import class_of, seed_of, whole
from diffit.studio.sample_tab import decoded
from diffit.studio.shelf import Shelf
from diffit.utils.images import save_gif

CANVAS = 512  # pixels that an image is enlarged to for drawing on it
MAX_RESAMPLES = 20
PRIVATE: dict[str, Any] = {"queue": False, "api_visibility": "private"}


def frames_between(
    shelf: Shelf, scratch: Scratch, network: str, a: Any, b: Any, class_a: str, class_b: str, frames: Any, steps: Any
) -> Iterator[tuple[Image.Image | None, list[Image.Image] | None, str | None, str]]:
    """Yields (picture of all frames, the frames, an animation of them, status)."""
    model, count = prepared(shelf, network, frames, steps), whole(frames, "frames")
    labels = _pair(class_of(class_a, model.config), class_of(class_b, model.config))
    seeds = seed_of(a), seed_of(b)

    def work(callback: Callback) -> Tensor:
        return interpolate(model, seeds, labels, count, callback=callback)

    for images, status in watched(model, work, model.config.sampling.steps):
        if status:
            yield grid_picture(images), None, None, status
        else:
            pictures = [picture(image, CANVAS) for image in images.cpu()]
            path = scratch.folder() / "interpolation.gif"
            save_gif([*pictures, *pictures[-2:0:-1]], path)
            yield grid_picture(images), pictures, str(path), f"{count} frames: move the slider"


def _pair(first: int | None, second: int | None) -> Any:
    if (first is None) != (second is None):
        raise UserError("classes: choose one for both ends, or leave both to the seeds")
    return None if first is None else (first, second)


def variations(
    shelf: Shelf, network: str, label: str, image: Tensor | None, level: Any, first: Any, count: Any
) -> Iterator[tuple[Image.Image, str]]:
    """Yields (picture of the variations, status)."""
    model = prepared(shelf, network, count)
    source, seed = loaded(image), seed_of(first)
    seeds, chosen = range(seed, seed + whole(count, "variations")), class_of(label, model.config)

    def work(callback: Callback) -> Tensor:
        return vary(model, source, float(level), seeds, chosen, callback=callback)

    for images, status in watched(model, work):
        yield grid_picture(images), status or f"{len(seeds)} variations at noise level {float(level):g}"


def paintings(
    shelf: Shelf, network: str, label: str, image: Tensor | None, drawing: Any, resamples: Any, first: Any, count: Any
) -> Iterator[tuple[Image.Image, str]]:
    """Yields (picture of what could be there, status)."""
    model = prepared(shelf, network, count)
    source, seed, again = loaded(image), seed_of(first), whole(resamples, "resamples")
    if not 1 <= again <= MAX_RESAMPLES:
        raise UserError(f"resamples {again}: use 1 to {MAX_RESAMPLES}")
    mask = painted(drawing, (source.shape[-2], source.shape[-1]))
    seeds, chosen = range(seed, seed + whole(count, "images")), class_of(label, model.config)

    def work(callback: Callback) -> Tensor:
        return inpaint(model, source, mask, seeds, chosen, resamples=again, callback=callback)

    for images, status in watched(model, work, model.config.sampling.steps * again):
        done = f"{int(mask.sum())} of {mask.numel()} pixels are new, the others as they were"
        yield grid_picture(images), status or done


def prepared(shelf: Shelf, network: str, count: Any, steps: Any = None) -> Model:
    """The model, after the size of the request was checked."""
    model = shelf.model(network)
    if steps is not None:
        number = whole(steps, "steps")
        shelf.check_size(model, 1, number)
        model = model.with_sampling(steps=number) if number != model.config.sampling.steps else model
    shelf.check_size(model, whole(count, "images"), model.config.sampling.steps)
    return model


def watched(model: Model, work: Callable[[Callback], Tensor], steps: int | None = None) -> Iterator[tuple[Tensor, str]]:
    """Yields (images in [−1, 1], status) now and then, at last the result with an empty status."""
    for progress in live(work):
        if progress.result is not None:
            yield progress.result, ""
        elif model.autoencoder is None or progress.step % 5 == 0:
            of = f" of {steps}" if steps else ""
            yield decoded(model, progress.denoised), f"step {progress.step + 1}{of}, noise level {progress.level:.3g}"


def loaded(image: Tensor | None) -> Tensor:
    if image is None:
        raise UserError("no image: upload one, or take a sample of a seed")
    return image


def take_upload(shelf: Shelf, network: str, path: str | None) -> tuple[Tensor, Image.Image, Image.Image]:
    """An upload at the model's size: for the model, to look at, to draw on."""
    image = fit_image(read_upload(path), shelf.model(network).config.image_shape)
    return shown(image)


def take_sample(shelf: Shelf, network: str, label: str, seed: Any) -> tuple[Tensor, Image.Image, Image.Image]:
    """The sample of a seed likewise."""
    model = prepared(shelf, network, 1)
    return shown(model.sample([seed_of(seed)], class_of(label, model.config)).clamp(-1, 1).cpu())


def shown(image: Tensor) -> tuple[Tensor, Image.Image, Image.Image]:
    large = picture(image[0], CANVAS)
    return image, large, large


def build(shelf: Shelf, scratch: Scratch) -> None:
    choice = chooser(shelf)
    with gr.Tabs():
        with gr.Tab("Between two samples", id="between"):
            _build_between(shelf, scratch, choice.network)
        with gr.Tab("Variations and inpainting", id="edit"):
            _build_edit(shelf, choice.network, choice.label)


def _build_between(shelf: Shelf, scratch: Scratch, network: gr.Dropdown) -> None:
    pictures = gr.State([], time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                a = gr.Number(0, label="From seed", precision=0, min_width=90)
                b = gr.Number(1, label="to seed", precision=0, min_width=90)
            with gr.Row():
                class_a = gr.Textbox("", label="From class", info="name or number; empty: the seed's", min_width=110)
                class_b = gr.Textbox("", label="to class", info="name or number; empty: the seed's", min_width=110)
            with gr.Row():
                frames = gr.Slider(2, 32, 16, step=1, label="Frames", min_width=110)
                steps = gr.Number(None, label="Steps", info="empty: the file's", precision=0, min_width=90)
            with gr.Row():
                go = gr.Button("Interpolate", variant="primary", elem_id="interpolate")
                cancel = gr.Button("Cancel")
        with gr.Column(scale=3, min_width=300):
            frame = gr.Image(label="Frame", format="png", interactive=False, elem_id="frame", buttons=["download"])
            position = gr.Slider(0, 100, 0, step=1, label="Position between the two, in percent", elem_id="position")
            status = gr.Markdown("")
            strip = gr.Image(label="All frames", format="png", interactive=False, buttons=["download", "fullscreen"])
            animation = gr.File(label="Animation", visible="hidden", interactive=False)

    def run(*values: Any) -> Iterator[Any]:
        for everything, found, path, text in frames_between(shelf, scratch, *values):
            first = found[0] if found else None
            yield everything, found or [], gr.update(value=path, visible=bool(path) or "hidden"), text, first, 0

    event = go.click(
        checked(run), [network, a, b, class_a, class_b, frames, steps],
        [strip, pictures, animation, status, frame, position],
        api_name="interpolate", show_progress="minimal", show_progress_on=status, **DEVICE,
    )  # fmt: skip
    cancel.click(lambda: "cancelled", None, status, cancels=[event], **PRIVATE)
    position.input(_frame_at, [pictures, position], frame, show_progress="hidden", **PRIVATE)


def _frame_at(frames: list[Image.Image], percent: float) -> Image.Image | None:
    return frames[round(float(percent) / 100 * (len(frames) - 1))] if frames else None


def _build_edit(shelf: Shelf, network: gr.Dropdown, label: gr.Dropdown) -> None:
    image: gr.State = gr.State(None, time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row(equal_height=True):
                seed = gr.Number(0, label="Seed of a sample", precision=0, min_width=110)
                take = gr.Button("Take this sample", elem_id="take", min_width=110)
            upload = gr.UploadButton("Upload an image", file_count="single", type="filepath", elem_id="upload")
            gr.Markdown(
                "What is uploaded is cropped and scaled to the model's size. Draw over what is to be made anew."
            )
            drawing = canvas(
                label="Image and mask", elem_id="canvas", sources=(), transforms=(), format="png",
                brush=gr.Brush(colors=["#ff4d6d"], default_color="#ff4d6d", default_size=48, color_mode="fixed"),
                layers=False, canvas_size=(CANVAS, CANVAS), height=420, buttons=[],
            )  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                first = gr.Number(0, label="First seed of the noise", precision=0, min_width=110)
                count = gr.Slider(1, 16, 4, step=1, label="Images", min_width=110)
            with gr.Row(equal_height=True):
                level = gr.Slider(
                    0.05, 10, 1, step=0.05, label="Noise level sigma", info="1 is as strong as the image", min_width=150
                )
                change = gr.Button("Vary", variant="primary", elem_id="vary", min_width=110)
            with gr.Row(equal_height=True):
                again = gr.Slider(
                    1, MAX_RESAMPLES, 5, step=1, label="Resamples", info="more: both parts agree better", min_width=150
                )
                paint = gr.Button("Inpaint", variant="primary", elem_id="inpaint", min_width=110)
            cancel = gr.Button("Cancel")
            status = gr.Markdown("", elem_id="edit-status")
            result = gr.Image(
                label="Result", format="png", interactive=False, elem_id="edited", buttons=["download", "fullscreen"]
            )
    taken = [image, drawing]
    shown_on: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": status} | DEVICE
    upload.upload(
        checked(lambda *values: take_upload(shelf, *values)[:2]), [network, upload], taken, api_name="upload", **DEVICE
    )
    take.click(
        checked(lambda *values: take_sample(shelf, *values)[:2]),
        [network, label, seed],
        taken,
        api_name="take",
        **DEVICE,
    )
    varied = change.click(
        checked(partial(variations, shelf)), [network, label, image, level, first, count], [result, status],
        api_name="vary", **shown_on,
    )  # fmt: skip
    inpainted = paint.click(
        checked(partial(paintings, shelf)), [network, label, image, drawing, again, first, count], [result, status],
        api_name="inpaint", **shown_on,
    )  # fmt: skip
    cancel.click(lambda: "cancelled", None, status, cancels=[varied, inpainted], **PRIVATE)
