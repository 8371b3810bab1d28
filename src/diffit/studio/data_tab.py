"""Data: what is in the archive, and the training images nearest to a sample."""

import threading
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from diffit.data.archive import describe_shape
from diffit.data.check import CheckReport, check
from diffit.errors import UserError, printable
from diffit.explore.neighbours import TrainingImages
from diffit.explore.pictures import picture
from diffit.studio.common import DEVICE, checked, escape, grid_picture
from diffit.studio.controls import chooser, prepared
from diffit.studio.request import class_of, seed_of
from diffit.studio.shelf import Shelf
from diffit.utils.images import to_float, to_uint8

DETECTORS = ["pixels", "inception"]


_reading = threading.Lock()  # an archive is read once, however many wait for what is in it


@lru_cache(maxsize=2)
def _report(path: Path, modified: float) -> CheckReport:
    return check(path)


@lru_cache(maxsize=2)
def _training(path: Path, modified: float, detector: str) -> TrainingImages:
    return TrainingImages(path, detector)


def archive_of(shelf: Shelf) -> tuple[Path, float]:
    if shelf.data is None:
        raise UserError("no archive: start the page with --data ARCHIVE")
    try:
        return shelf.data, shelf.data.stat().st_mtime
    except OSError:
        raise UserError(f"{shelf.data.name}: the archive is gone; start the page with another --data") from None


def describe(shelf: Shelf) -> tuple[str, list[list[Any]], Image.Image | None]:
    """What was found, a row for each class, and some of the images."""
    with _reading:
        report = _report(*archive_of(shelf))
    sizes = ", ".join(f"{number:,} of {describe_shape(shape)}" for shape, number in report.shapes.most_common(5))
    channels = ("gray",) if len(report.mean) == 1 else ("red", "green", "blue")
    values = ", ".join(
        f"{name} {mean:.1f} ± {std:.1f}" for name, mean, std in zip(channels, report.mean, report.std, strict=False)
    )
    lines = [
        f"**{printable(report.path.name)}**: {report.count:,} images, {report.num_bytes / 2**20:,.1f} MiB",
        f"sizes: {sizes}",
        f"channels (mean ± standard deviation of 0 to 255): {values}",
        f"exact duplicates: {report.duplicates:,}",
        f"labelled: {report.labelled:,}, {report.num_classes} classes",
        *(f"problem: {text}" for text in report.problems),
        *(f"warning: {text}" for text in report.warnings),
    ]
    names = report.class_names or []
    classes = [
        [label, printable(names[label]) if label < len(names) else "", number]
        for label, number in sorted(report.class_counts.items())
    ]
    images = None if report.samples is None else grid_picture(to_float(report.samples[:64]))
    return "\n".join(f"- {escape(line)}" for line in lines), classes, images


def neighbours(shelf: Shelf, network: str, label: str, seed: Any, detector: str) -> list[tuple[Image.Image, str]]:
    """The sample of a seed and the training images nearest to it, with their distances."""
    if detector not in DETECTORS:
        raise UserError(f"detector {detector}: use one of {', '.join(DETECTORS)}")
    model = prepared(shelf, network, 1)
    sample = to_uint8(model.sample([seed_of(seed)], class_of(label, model.config))).cpu()
    found = _training(*archive_of(shelf), detector).nearest(sample, k=5)
    images = [(_large(sample[0]), "the sample")]
    return images + [
        (_large(image), f"{distance:.3g} away")
        for image, distance in zip(found.images[0], found.distances[0].tolist(), strict=True)
    ]


def _large(image: Tensor) -> Image.Image:
    return picture(to_float(image), 192)


def build(tab: gr.Tab, shelf: Shelf) -> None:
    if shelf.data is None:
        gr.Markdown("Start the page with `--data ARCHIVE` to look at the images that a model learns from.")
        return
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            text = gr.Markdown("Reading every image once …", elem_id="data")
            classes = gr.Dataframe(headers=["class", "name", "images"], interactive=False, max_height=300, wrap=True)
        with gr.Column(scale=3, min_width=300):
            images = gr.Image(
                label="Some of the images", format="png", interactive=False, elem_id="data-grid",
                buttons=["download", "fullscreen"],
            )  # fmt: skip
    gr.Markdown("### Training images nearest to a sample")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            choice = chooser(shelf)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, min_width=110)
                detector = gr.Dropdown(DETECTORS, value="pixels", label="Compared by", min_width=150)
            go = gr.Button("Find", variant="primary", elem_id="find")
        with gr.Column(scale=3, min_width=300):
            found = gr.Gallery(
                show_label=False, columns=3, height="auto", interactive=False, format="png", object_fit="contain",
                elem_id="nearest", elem_classes="gallery", buttons=["fullscreen"],
            )  # fmt: skip
    tab.select(
        checked(partial(describe, shelf)), None, [text, classes, images], api_visibility="private",
        show_progress_on=text, concurrency_limit=None,
    )  # fmt: skip
    go.click(
        checked(partial(neighbours, shelf)), [choice.network, choice.label, seed, detector], found,
        api_name="nearest", **DEVICE,
    )  # fmt: skip
