"""Runs: every run below a folder as it is now, refreshed while another process writes it."""

from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from diffit.errors import UserError
from diffit.explore.runs import RunView, compare_runs, read_run
from diffit.metrics.record import format_numbers
from diffit.studio.common import checked, decode, escape
from diffit.studio.explore_tab import PRIVATE
from diffit.studio.shelf import Shelf

SECONDS = 2.0  # between two looks at the folder
POINTS = 600  # of a curve: more than a plot has pixels
MAX_RUNS = 50
SETTINGS = [
    "training.lr", "training.batch", "training.kimg", "training.label_drop", "training.augment", "training.seed",
    "training.precision", "training.ema_halflife_kimg", "model.num_classes", "data.path", "data.cond", "sampling.steps",
    "sampling.cfg_scale",
]  # fmt: skip


def curves(view: RunView, *names: str) -> pd.DataFrame:
    """(kimg, which, value) of statistics, thinned to what a plot can show."""
    rows = view.series(*names)
    rows = rows[:: max(len(rows) // (POINTS * max(len(names), 1)), 1)]
    return pd.DataFrame([(kimg, _short(name), value) for kimg, name, value in rows], columns=["kimg", "which", "value"])


def _short(name: str) -> str:
    """``loss_sigma_0.11_0.22`` as ``0.11 to 0.22``."""
    if not name.startswith(("loss_sigma_", "loss_t_")):
        return name
    low, high = name.rsplit("_", 2)[1:]
    return f"{low} to {high}"


def metric_table(view: RunView) -> list[list[Any]]:
    return [
        [record["kimg"], record["metric"], format_numbers(record["results"]), "; ".join(record.get("notes", []))]
        for record in view.metrics[-20:]
    ]


def picture_of(path: Path) -> Image.Image:
    return decode(path.read_bytes(), path.name)


def fingerprint(path: Path) -> tuple[float, ...]:
    """Changes when a run writes something that the page shows."""
    try:
        return tuple(file.stat().st_mtime for file in sorted(path.glob("[lsmf]*.*")))
    except OSError:
        return ()


def build(page: gr.Blocks, shelf: Shelf) -> None:
    if shelf.runs_dir is None:
        gr.Markdown("Start the page with `--runs DIR` to watch the runs in a folder.")
        return
    seen = gr.State((None, ()))
    names = list(shelf.runs())
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            run = gr.Dropdown(
                names, value=names[0] if names else None, label="Run", allow_custom_value=True, elem_id="run"
            )
            health = gr.Markdown("", elem_id="health")
            grid = gr.Image(label="Samples", format="png", interactive=False, elem_id="run-grid", buttons=["download"])
            when = gr.Slider(0, 1, 1, step=1, label="Grid, from the first to the newest", elem_id="when")
            resume = gr.Code(label="To go on with it", language="shell", interactive=False, wrap_lines=True, lines=1)
        with gr.Column(scale=3, min_width=300):
            loss = _plot("Loss", "loss-plot")
            levels = _plot("Loss by noise level", "levels-plot")
            speed = _plot("Images per second", "speed-plot")
            metrics = gr.Dataframe(
                headers=["kimg", "metric", "value", "notes"], label="Metrics", interactive=False, wrap=True
            )
    with gr.Accordion("Log", open=False):
        log = gr.Textbox(label="The last lines of log.txt", lines=12, max_lines=20, interactive=False, elem_id="log")
    with gr.Accordion("Settings", open=False):
        options = gr.Code(label="training_options.json", language="json", interactive=False, lines=4, max_lines=30)
    with gr.Accordion("All runs side by side", open=False):
        chosen = gr.Dropdown(SETTINGS, value=SETTINGS[:3], multiselect=True, label="Settings", elem_id="settings")
        table = gr.Dataframe(interactive=False, elem_id="runs-table", wrap=True)

    def show(name: str | None) -> list[Any]:
        view = read_run(shelf.run(name))
        last = len(view.grids) - 1
        return [
            "\n".join(f"- {escape(line)}" for line in view.health()),
            picture_of(list(view.grids.values())[-1]) if view.grids else None,
            gr.update(maximum=max(last, 1), value=max(last, 1)),
            view.resume(),
            curves(view, "loss", "val_loss"),
            curves(view, *view.by_level()),
            curves(view, "img_per_sec"),
            metric_table(view),
            "\n".join(view.log),
            "" if view.config is None else view.config.model_dump_json(indent=2),
            (name, fingerprint(view.path)),
        ]

    def tick(name: str | None, known: tuple[str | None, tuple[float, ...]]) -> Any:
        """Nothing is sent where nothing was written; that a run has gone is said once."""
        run = shelf.runs().get(name or "")
        now = (name, () if run is None else fingerprint(run))
        if not name or known == now:
            return [gr.skip()] * len(shown)
        if run is None:
            return ["- the run's folder is gone; choose another run", *[gr.skip()] * (len(shown) - 2), now]
        return show(name)

    def at(name: str | None, index: float) -> Image.Image | None:
        grids = list(read_run(shelf.run(name)).grids.values())
        return picture_of(grids[min(int(index), len(grids) - 1)]) if grids else None

    def side_by_side(settings: list[str]) -> Any:
        for setting in settings:
            if setting not in SETTINGS:
                raise UserError(f"setting {setting}: choose one of the list")
        some = dict(list(shelf.runs().items())[:MAX_RUNS])
        header, rows = compare_runs(some, settings)
        return pd.DataFrame(rows, columns=header)

    shown = [health, grid, when, resume, loss, levels, speed, metrics, log, options, seen]
    quiet: dict[str, Any] = {"show_progress": "hidden"} | PRIVATE
    run.input(checked(show), run, shown, **quiet)
    run.focus(lambda: gr.update(choices=list(shelf.runs())), None, run, **quiet)
    when.input(checked(at), [run, when], grid, **quiet)
    chosen.change(checked(side_by_side), chosen, table, **quiet)
    page.load(checked(side_by_side), chosen, table, **quiet)
    gr.Timer(SECONDS).tick(checked(tick), [run, seen], shown, **quiet)


def _plot(label: str, name: str) -> gr.LinePlot:
    return gr.LinePlot(x="kimg", y="value", color="which", label=label, height=230, elem_id=name, tooltip="all")
