"""Sample: seeds of a class, watched while they are denoised."""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from torch import Tensor

from diffit.diffusion.samplers import Callback
from diffit.errors import UserError, printable
from diffit.sampling.cost import count_evaluations
from diffit.sampling.labels import class_title
from diffit.sampling.model import Model
from diffit.studio.common import DEVICE, PRIVATE, Scratch, checked, escape, grid_picture, let_cancel
from diffit.studio.controls import ask, chooser, config_of, solver_controls, solver_values
from diffit.studio.request import RANDOM, Request
from diffit.studio.shelf import MAX_IMAGES, Shelf
from diffit.studio.watch import watched
from diffit.utils.images import to_uint8

HISTORY = 20  # requests that the browser keeps


def sample(shelf: Shelf, scratch: Scratch, *asked: Any) -> Iterator[Any]:
    """Yields (picture, status, command, Python, files, request) while the images come about.

    ``asked`` are the values of the controls, as :func:`ask` takes them.
    """
    request, model = ask(shelf, *asked)
    source = shelf.networks()[request.network]
    vae = shelf.vae_for(source)
    command, python = request.command(source, vae), request.python(source, vae)
    began, steps = time.monotonic(), model.config.sampling.steps
    many = f"**{request.count} images**" if request.count > 1 else "**1 image**"
    yield None, f"{many}, step 0 of {steps}", command, python, None, None

    def work(callback: Callback) -> Tensor:
        return model.sample(request.seeds, request.label, callback=callback)

    for images, status in watched(model, work, steps):
        if status:
            yield grid_picture(images), f"{many}, {status}", command, python, None, None
        else:
            done = f"{many} {finished(model, request, time.monotonic() - began)}"
            files = save(scratch, request, model, images)
            yield grid_picture(images), done, command, python, files, as_record(request)


def finished(model: Model, request: Request, seconds: float) -> str:
    conditional, unconditional = count_evaluations(model.config)
    evaluations = f"{conditional + unconditional} evaluations each"
    if unconditional:
        evaluations += f", {unconditional} of them without the class"
    if not model.config.model.num_classes:
        label = "no classes"
    elif request.label is None:
        label = "random classes"
    else:
        label = class_title(model.config, int(request.label))
    size = "×".join(map(str, model.config.image_shape[:0:-1]))
    pace = f"{size} pixels in {seconds:.2f} s ({request.count / seconds:.3g} img/s)"
    return f"of {pace} · {evaluations} · {model.precision} on {model.device} · {escape(printable(label))}"


def save(scratch: Scratch, request: Request, model: Model, images: Tensor) -> list[str]:
    """A grid as PNG, the array as the ADM evaluation reads it, and the settings: paths to download."""
    folder = scratch.folder()
    name = f"seeds-{request.first_seed}-{request.first_seed + request.count - 1}"
    grid_picture(images).save(folder / f"{name}.png")
    np.savez(folder / f"{name}.npz", arr_0=to_uint8(images, model.config.sampling.rounding).cpu().permute(0, 2, 3, 1))
    record = as_record(request) | {"sampling": model.config.sampling.model_dump(mode="json")}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    return [str(path) for path in sorted(folder.iterdir())]


def as_record(request: Request) -> dict[str, Any]:
    return {
        "network": request.network, "first_seed": request.first_seed, "count": request.count, "label": request.label,
        "settings": request.settings, "precision": request.precision,
    }  # fmt: skip


def remember(history: Any, request: dict[str, Any] | None) -> tuple[Any, Any]:
    """The browser's history with one request more at its head, and the list that shows it."""
    kept = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    if request is not None:
        kept = [request, *(entry for entry in kept if entry != request)][:HISTORY]
    return kept, gr.update(choices=[title(entry) for entry in kept], value=None)


def title(entry: dict[str, Any]) -> str:
    first, count = entry.get("first_seed"), entry.get("count")
    parts = [Path(str(entry.get("network"))).name, f"{count} from seed {first}"]
    if entry.get("label") is not None:
        parts.append(f"class {entry['label']}")
    settings = entry.get("settings")
    parts += [f"{name} {value}" for name, value in settings.items()] if isinstance(settings, dict) else []
    return printable(" · ".join(map(str, parts)))


def recall(shelf: Shelf, history: Any, chosen: str | None) -> list[Any]:
    """What the controls showed for a line of the history; its images, being functions of these, come again."""
    for entry in history if isinstance(history, list) else ():
        if isinstance(entry, dict) and title(entry) == chosen:
            label, config = entry.get("label"), config_of(shelf, entry.get("network"))
            settings = entry.get("settings") if isinstance(entry.get("settings"), dict) else {}
            return [
                entry.get("network"),
                RANDOM if label is None else str(label),
                entry.get("first_seed"),
                entry.get("count"),
                *solver_values(config, settings, str(entry.get("precision", "auto"))),
            ]
    raise UserError("this line of the history is gone; sample again")


def build(page: gr.Blocks, shelf: Shelf, scratch: Scratch) -> None:
    history = gr.BrowserState([], storage_key="diffit-studio-history", secret="diffit-studio")
    request = gr.State(None)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            choice = chooser(shelf)
            with gr.Row():
                first = gr.Number(0, label="First seed", precision=0, min_width=110)
                count = gr.Slider(1, MAX_IMAGES, 16, step=1, label="Images", min_width=150)
            with gr.Accordion("Solver and guidance", open=False):
                solver = solver_controls(shelf, choice.network)
            with gr.Row():
                go = gr.Button("Sample", variant="primary", elem_id="sample", min_width=110)
                cancel = gr.Button("Cancel", elem_id="cancel", min_width=110)
            past = gr.Dropdown([], label="History, kept in this browser", elem_id="history")
        with gr.Column(scale=3, min_width=300):
            picture = gr.Image(
                label="Samples", format="png", interactive=False, elem_id="samples", buttons=["download", "fullscreen"]
            )
            status = gr.Markdown("", elem_id="status")
            files = gr.File(label="Download", file_count="multiple", visible="hidden", interactive=False)
            with gr.Accordion("The same as a command and in Python", open=False):
                command = _code("Command line", "shell")
                python = _code("Python", "python")

    def run(*values: Any) -> Iterator[Any]:
        for *shown, paths, record in sample(shelf, scratch, *values):
            yield *shown, gr.update(value=paths, visible=bool(paths) or "hidden"), record

    inputs = [choice.network, choice.label, first, count, *solver]
    event = go.click(
        checked(run), inputs, [picture, status, command, python, files, request],
        api_name="sample", show_progress="minimal", show_progress_on=status, **DEVICE,
    )  # fmt: skip
    event.success(remember, [history, request], [history, past], **PRIVATE)
    let_cancel(cancel, status, event)
    page.load(lambda saved: remember(saved, None), history, [history, past], **PRIVATE)
    past.input(checked(partial(recall, shelf)), [history, past], inputs, **PRIVATE)


def _code(label: str, language: str) -> gr.Code:
    return gr.Code(label=label, language=language, interactive=False, wrap_lines=True, lines=1, max_lines=8)
