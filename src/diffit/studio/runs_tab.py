"""Runs: every run below a folder as it is now, refreshed while another process writes it."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from diffit.errors import UserError
from diffit.metrics.record import format_numbers
from diffit.studio.common import PRIVATE, checked, escape
from diffit.studio.shelf import Shelf
from diffit.studio.uploads import decode
from diffit.training.runs import RunView, compare_runs, read_run

SECONDS = 2.0  # between two looks at the folder
POINTS = 600  # of a curve: more than a plot has pixels
MAX_RUNS = 50
SHOWN = 11  # components that a run is shown in
SETTINGS = [
    "training.lr", "training.batch", "training.kimg", "training.label_drop", "training.augment", "training.seed",
    "training.precision", "training.ema_halflife_kimg", "model.num_classes", "data.path", "data.cond", "sampling.steps",
    "sampling.cfg_scale",
]  # fmt: skip


def curves(view: RunView, *names: str) -> pd.DataFrame:
    """(kimg, which, value) of statistics, thinned to what a plot can show."""
    rows = replace(view, stats=view.stats[:: max(len(view.stats) // POINTS, 1)]).series(*names)
    return pd.DataFrame([(kimg, _short(name), value) for kimg, name, value in rows], columns=["kimg", "which", "value"])


def _short(name: str) -> str:
    """``loss_sigma_0.11_0.22`` as ``0.11``: a legend of longer names does not fit on a telephone."""
    by_level = name.startswith(("loss_sigma_", "loss_t_", "loss_step_"))
    return name.rsplit("_", 2)[1] if by_level else name


def metric_table(view: RunView) -> Any:
    rows = [
        [record["kimg"], record["metric"], format_numbers(record["results"]), "; ".join(record.get("notes", []))]
        for record in view.metrics[-20:]
    ]
    return gr.update(value=rows, visible=bool(rows) or "hidden")


def fingerprint(path: Path) -> tuple[float, ...]:
    """Changes when a run writes something that the page shows."""
    try:
        return tuple(file.stat().st_mtime for file in sorted(path.glob("[lsmf]*.*")))
    except OSError:
        return ()


Seen = tuple[str | None, tuple[float, ...], int]
"""The run that a browser shows, its fingerprint, and how many grids it had: what decides whether to show it again."""


def grid_of(view: RunView, index: int) -> Any:
    """The grid of samples at a place of the slider, with its kimg for a title."""
    if not view.grids:
        return gr.update(value=None, label="Samples: none yet")
    kimg, path = list(view.grids.items())[min(index, len(view.grids) - 1)]
    return gr.update(value=decode(path.read_bytes(), path.name), label=f"Samples after {kimg:g} kimg")


def show(shelf: Shelf, name: str | None) -> list[Any]:
    """Everything that is shown of a run, in the order of the components."""
    view = read_run(shelf.run(name))
    last = max(len(view.grids) - 1, 0)
    return [
        "\n".join(f"- {escape(line)}" for line in view.health()),
        grid_of(view, last),
        gr.update(maximum=max(last, 1), value=last, visible=last > 0),
        view.resume(),
        curves(view, "loss", "val_loss"),
        curves(view, *view.by_level()),
        curves(view, "img_per_sec"),
        metric_table(view),
        "\n".join(view.log),
        "" if view.config is None else view.config.model_dump_json(indent=2),
        (name, fingerprint(view.path), len(view.grids)),
    ]


def tick(shelf: Shelf, name: str | None, seen: Seen, index: float) -> list[Any]:
    """Nothing is sent where nothing was written; that a run has gone is said once."""
    run = shelf.runs().get(name or "")
    now = () if run is None else fingerprint(run)
    if not name or seen[:2] == (name, now):
        return [gr.skip()] * SHOWN
    if run is None:
        return ["- the run's folder is gone; choose another run", *[gr.skip()] * (SHOWN - 2), (name, now, 0)]
    shown = show(shelf, name)
    if seen[0] == name and index < seen[2] - 1:  # an older grid is being looked at
        shown[1:3] = gr.skip(), gr.update(maximum=shown[-1][2] - 1)
    return shown


def first_of(shelf: Shelf, name: str | None) -> Any:
    """The newest run where none is chosen, for there was none when the page was made."""
    names = [] if name else list(shelf.runs())
    return gr.update(choices=names, value=names[0]) if names else gr.skip()


def side_by_side(shelf: Shelf, settings: list[str]) -> pd.DataFrame:
    """A table of all runs."""
    for setting in settings:
        if setting not in SETTINGS:
            raise UserError(f"setting {setting}: choose one of the list")
    some = dict(list(shelf.runs().items())[:MAX_RUNS])
    header, rows = compare_runs(some, settings)
    return pd.DataFrame(rows, columns=header)


def build(page: gr.Blocks, shelf: Shelf) -> None:
    if shelf.runs_dir is None:
        gr.Markdown("Start the page with `--runs DIR` to watch the runs in a folder.")
        return
    seen = gr.State((None, (), 0))
    names = list(shelf.runs())
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            run = gr.Dropdown(
                names, value=names[0] if names else None, label="Run", allow_custom_value=True, elem_id="run"
            )
            health = gr.Markdown("" if names else "No run yet: the first to begin is shown here.", elem_id="health")
            grid = gr.Image(label="Samples", format="png", interactive=False, elem_id="run-grid", buttons=["download"])
            when = gr.Slider(0, 1, 0, step=1, label="Grid, from the first to the newest", elem_id="when")
            resume = gr.Code(
                label="The command that resumes it", language="shell", interactive=False, wrap_lines=True, lines=1,
                max_lines=6,
            )  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            plots = [
                _plot("Loss", "loss"),
                _plot("Loss by noise level (lower end of each range)", "loss"),
                _plot("Images per second", "images per second", lines=False),
            ]
            metrics = gr.Dataframe(
                headers=["kimg", "metric", "value", "notes"], label="Metrics", interactive=False, wrap=True,
                visible="hidden",
            )  # fmt: skip
    with gr.Accordion("Log", open=False):
        log = gr.Textbox(label="The last lines of log.txt", lines=12, max_lines=20, interactive=False, elem_id="log")
    with gr.Accordion("Settings", open=False):
        options = gr.Code(label="training_options.json", language="json", interactive=False, lines=4, max_lines=30)
    with gr.Accordion("All runs side by side", open=False):
        chosen = gr.Dropdown(SETTINGS, value=SETTINGS[:3], multiselect=True, label="Settings", elem_id="settings")
        table = gr.Dataframe(interactive=False, elem_id="runs-table", wrap=True)

    shown = [health, grid, when, resume, *plots, metrics, log, options, seen]
    assert len(shown) == SHOWN
    run.input(checked(partial(show, shelf)), run, shown, **PRIVATE)
    run.focus(lambda: gr.update(choices=list(shelf.runs())), None, run, **PRIVATE)
    when.input(checked(partial(grid_at, shelf)), [run, when], grid, **PRIVATE)
    gr.on([page.load, chosen.change], checked(partial(side_by_side, shelf)), chosen, table, **PRIVATE)
    timer = gr.Timer(SECONDS)
    if not names:
        timer.tick(checked(partial(first_of, shelf)), run, run, **PRIVATE)
    gr.on([page.load, timer.tick], checked(partial(tick, shelf)), [run, seen, when], shown, **PRIVATE)


def grid_at(shelf: Shelf, name: str | None, index: float) -> Any:
    return grid_of(read_run(shelf.run(name)), int(index))


def _plot(title: str, y: str, *, lines: bool = True) -> gr.LinePlot:
    gr.Markdown(f"**{title}**")
    return gr.LinePlot(
        x="kimg", y="value", y_title=y, color="which" if lines else None, color_title=" ", show_label=False,
        height=300 if lines else 230, elem_classes="curve", tooltip="all",
    )  # fmt: skip
