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

from diffit.errors import UserError, printable
from diffit.explore.live import live
from diffit.sampling.cost import count_evaluations
from diffit.sampling.labels import class_title
from diffit.sampling.model import Model
from diffit.studio.common import DEVICE, Scratch, checked, escape, grid_picture
from diffit.studio.controls import ask, chooser, config_of, solver_controls, solver_values
from diffit.studio.request import RANDOM, Request
from diffit.studio.shelf import Shelf
from diffit.utils.images import to_uint8

HISTORY = 20  # requests that the browser keeps
EVERY = 0.15  # seconds between two pictures: a page is no film
LATENT_EVERY = 1.0  # the same where a decoder makes each of them


def sample(
    shelf: Shelf, scratch: Scratch, network: str, label: str, first: Any, count: Any, *solver: Any
) -> Iterator[Any]:
    """Yields (picture, status, command, Python, files, request) while the images come about."""
    request, model = ask(shelf, network, label, first, count, solver)
    source = shelf.networks()[request.network]
    command, python = request.command(source), request.python(source)
    began, shown = time.monotonic(), 0.0
    steps = model.config.sampling.steps
    yield None, f"**{request.count} images**, step 0 of {steps}", command, python, None, None
    for progress in live(lambda callback: model.sample(request.seeds, request.label, callback=callback)):
        if progress.result is not None:
            seconds = time.monotonic() - began
            picture, files = grid_picture(progress.result), save(scratch, request, model, progress.result)
            yield picture, finished(model, request, seconds), command, python, files, as_record(request)
        elif time.monotonic() - shown > (EVERY if model.autoencoder is None else LATENT_EVERY):
            shown = time.monotonic()
            status = (
                f"**{request.count} images**, step {progress.step + 1} of {steps}, noise level {progress.level:.3g}"
            )
            yield grid_picture(decoded(model, progress.denoised)), status, command, python, None, None


def decoded(model: Model, x: Tensor | None) -> Tensor:
    assert x is not None
    return x.float() if model.autoencoder is None else model.autoencoder.decode(x.float())


def finished(model: Model, request: Request, seconds: float) -> str:
    conditional, unconditional = count_evaluations(model.config)
    label = "classes drawn by the seeds" if request.label is None else class_title(model.config, int(request.label))
    if not model.config.model.num_classes:
        label = "no classes"
    return (
        f"**{request.count} images** of {'×'.join(map(str, model.config.image_shape[:0:-1]))} pixels in "
        f"{seconds:.2f} s ({request.count / seconds:.3g} img/s) · {conditional + unconditional} evaluations each"
        + (f" ({unconditional} without the class)" if unconditional else "")
        + f" · {model.precision} on {model.device} · {escape(printable(label))}"
    )


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
                first = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=110)
                count = gr.Slider(1, 64, 16, step=1, label="Images", min_width=150)
            with gr.Accordion("Solver and guidance", open=False):
                solver = solver_controls(shelf, choice.network)
            with gr.Row():
                go = gr.Button("Sample", variant="primary", elem_id="sample")
                cancel = gr.Button("Cancel", elem_id="cancel")
            past = gr.Dropdown([], label="History", info="in this browser", elem_id="history")
        with gr.Column(scale=3, min_width=300):
            picture = gr.Image(
                label="Samples", format="png", interactive=False, elem_id="samples", buttons=["download", "fullscreen"]
            )
            status = gr.Markdown("", elem_id="status")
            files = gr.File(label="Download", file_count="multiple", visible="hidden", interactive=False)
            with gr.Accordion("The same as a command and in Python", open=False):
                command = gr.Code(
                    label="Command line", language="shell", interactive=False, wrap_lines=True, lines=1, max_lines=6
                )
                python = gr.Code(
                    label="Python", language="python", interactive=False, wrap_lines=True, lines=1, max_lines=8
                )

    def run(*values: Any) -> Iterator[Any]:
        for picture, status, command, python, files, record in sample(shelf, scratch, *values):
            yield picture, status, command, python, gr.update(value=files, visible=bool(files) or "hidden"), record

    inputs = [choice.network, choice.label, first, count, *solver]
    event = go.click(
        checked(run), inputs, [picture, status, command, python, files, request],
        api_name="sample", show_progress="minimal", show_progress_on=status, **DEVICE,
    )  # fmt: skip
    private: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    event.success(remember, [history, request], [history, past], **private)
    cancel.click(lambda: "cancelled", None, status, cancels=[event], **private)
    page.load(lambda saved: remember(saved, None), history, [history, past], **private)
    past.input(checked(partial(recall, shelf)), [history, past], inputs, **private)
