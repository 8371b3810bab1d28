"""``report.html`` of a run: what a person wants to know first, samples over time, curves, records and settings."""

import html
import json
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffit.metrics.record import format_numbers
from diffit.metrics.suite import best_record, headline
from diffit.training.evaluator import best_file
from diffit.training.run_dir import OPTIONS
from diffit.training.runs import RunView, read_run
from diffit.training.usual import usual_loss
from diffit.utils.files import whole_file
from diffit.utils.html import Plot, details, page, picture, plots, slider
from diffit.utils.progress import duration
from diffit.weights import newest_snapshot

GRIDS = 30  # of the slider
SMOOTHED = 0.1  # of a curve's points weigh most in its smoothed value

Point = tuple[float, float]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the folder of a run: one file, which needs no network. Returns its path."""
    view = read_run(run_dir)
    body = [*_summary(view), *_images(view), "<h2>Curves</h2>", *plots(_curves(view))]
    if view.records:
        body += ["<h2>Metrics</h2>", _table(view.records)]
    body.append("<h2>Settings</h2>")
    if (options := run_dir / OPTIONS).exists():
        body.append(details(OPTIONS, f"<pre>{html.escape(options.read_text())}</pre>"))
    body.append(details("The end of log.txt", f"<pre>{html.escape(chr(10).join(view.log))}</pre>"))
    path = run_dir / "report.html"
    with whole_file(path, sync=False) as part:  # `diffit metrics show` makes it again
        part.write_text(page(run_dir.name, body))
    return path


def _summary(view: RunView) -> list[str]:
    """How far, how well, what is best, and the commands that come next."""
    seconds = sum(line["sec"] for line in view.stats if isinstance(line.get("sec"), int | float))
    lines = [f"{view.kimg * 1000:,.0f} images, {duration(seconds)} of training", *view.health()]
    lines += [_best(view, name) for name in dict.fromkeys(record["metric"] for record in view.metrics)]
    if (newest := newest_snapshot(view.path)) is not None:
        lines.append(f"newest snapshot: {newest.name}")
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    run = shlex.quote(str(view.path))
    commands = [view.resume(), f"diffit sample --network {run} --outdir samples --grid 8x8"]
    commands += [f"diffit metrics show {run}"] if view.metrics else []
    copied = "".join(f'<pre class="copy">{html.escape(command)}</pre>' for command in commands)
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    return [f"<p>Written {written}.</p><ul>{items}</ul>", "<h2>To go on, and to sample</h2>", copied]


def _best(view: RunView, metric: str) -> str:
    """The best value of a metric so far, and the file that has its weights."""
    best = best_record([record for record in view.metrics if record["metric"] == metric])
    weights = best_file(view.path, metric)
    where = f": {weights.name}" if weights.exists() else ""
    return f"best {metric}: {headline(best['results'])[1]:.5g} at {best['kimg']:g} kimg{where}"


def _images(view: RunView) -> list[str]:
    """Training images next to samples over time."""
    grids = list(view.grids.items())
    if len(grids) > GRIDS:
        grids = [grids[round(i * (len(grids) - 1) / (GRIDS - 1))] for i in range(GRIDS)]
    sampled = [(f"sampled after {kimg:g} kimg", path.read_bytes()) for kimg, path in grids]
    reals = view.path / "reals.png"
    cells = [picture(reals.read_bytes(), "training images")] if reals.exists() else []
    cells += [slider(sampled)] if sampled else []
    return ["<h2>Images</h2>", f'<div class="side">{"".join(cells)}</div>'] if cells else []


def _curves(view: RunView) -> list[Plot]:
    loss = _points(view, "loss")
    lines = [_line(loss, "loss", opacity=0.35), _line(_smooth(loss), "smoothed")]
    if held_out := _points(view, "val_loss"):
        lines.append(_line(held_out, "held-out images"))
    if view.config is not None:
        length = view.config.training.expected_kimg(view.kimg)
        usual = [(kimg, usual_loss(view.config, kimg, length)) for kimg, _ in loss]
        known = [(kimg, value) for kimg, value in usual if value is not None]
        lines += [_line(known, "usual", line={"dash": "dot"})] if known else []
    of_edm = view.config is not None and view.config.diffusion.kind == "edm"
    found = [Plot("Loss; near 1 nothing is learnt yet" if of_edm else "Loss", lines, y="loss")]
    if levels := view.by_level():
        named = [_line(_smooth(_points(view, name)), _level(name)) for name in levels]
        found.append(Plot("Loss by noise level, smoothed", named, y="loss"))
    for metric in dict.fromkeys(record["metric"] for record in view.metrics):
        points = [(r["kimg"], headline(r["results"])[1]) for r in view.metrics if r["metric"] == metric]
        found.append(Plot(metric, [_line(points, metric, mode="lines+markers")]))
    for name, title in (("lr", "Learning rate"), ("grad_norm", "Norm of the gradient"), ("img_per_sec", "Images/s")):
        found.append(Plot(title, [_line(_points(view, name), title)], from_zero=True))
    return found


def _points(view: RunView, name: str) -> list[Point]:
    return [(kimg, value) for kimg, _, value in view.series(name) if math.isfinite(value)]


def _line(points: Sequence[Point], name: str, **how: Any) -> dict[str, Any]:
    return {"x": [x for x, _ in points], "y": [y for _, y in points], "name": name, "mode": "lines"} | how


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over the points, without the bias of its start."""
    keep = 1 - 1 / max(SMOOTHED * len(points), 1)
    total = weight = 0.0
    smoothed = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def _level(name: str) -> str:
    """``loss_sigma_0.11_0.22`` as ``σ 0.11 to 0.22``."""
    kind, *bounds = name.removeprefix("loss_").split("_")
    return f"{'σ' if kind == 'sigma' else kind} {' to '.join(bounds)}"


def _table(records: Sequence[dict[str, Any]]) -> str:
    rows = [
        f"<tr><td>{html.escape(record['metric'])}</td><td>{html.escape(str(record.get('kimg', '')))}</td>"
        f"<td>{html.escape(format_numbers(record['results']))}</td>"
        f"<td>{details('record', f'<pre>{html.escape(json.dumps(record, indent=2))}</pre>')}</td></tr>"
        for record in records
    ]
    return "<table><tr><th>metric</th><th>kimg</th><th>value</th><th></th></tr>" + "".join(rows) + "</table>"
