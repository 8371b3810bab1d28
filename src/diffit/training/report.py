"""Reports that one HTML file holds: pictures are data URIs, curves are SVG, and nothing is fetched."""

import html
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffit.metrics.record import format_numbers, read_records
from diffit.metrics.suite import headline
from diffit.utils.files import read_jsonl, whole_file
from diffit.utils.html import page, picture

WIDTH, HEIGHT, MARGIN = 440, 220, 46
CURVES = ("loss", "val_loss", "grad_norm", "img_per_sec")


def curve(points: Sequence[tuple[float, float]], title: str) -> str:
    """A line through ``(kimg, value)`` as SVG, its extremes written at the axes."""
    points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    right, bottom = WIDTH - 12, HEIGHT - 24

    def place(x: float, y: float) -> str:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return f"{MARGIN + across * (right - MARGIN):.1f},{bottom - up * (bottom - 12):.1f}"

    line = " ".join(place(x, y) for x, y in points)
    dots = "".join('<circle cx="{}" cy="{}" r="2.5" fill="#06c"/>'.format(*place(*p).split(",")) for p in points[-60:])
    labels = "".join(
        f'<text x="{x}" y="{y}" font-size="11" text-anchor="{anchor}">{text}</text>'
        for x, y, anchor, text in (
            (MARGIN - 4, 16, "end", f"{y1:.4g}"),
            (MARGIN - 4, bottom, "end", f"{y0:.4g}"),
            (MARGIN, HEIGHT - 8, "start", f"{x0:g}"),
            (right, HEIGHT - 8, "end", f"{x1:g} kimg"),
        )
    )
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" role="img"><polyline points="{line}" fill="none" '
        f'stroke="#06c" stroke-width="1.5"/>{dots}{labels}</svg><figcaption>{html.escape(title)}</figcaption></figure>'
    )


def write_report(run_dir: Path) -> Path:
    """``report.html`` of a run: metrics with their records, curves, grids, settings. Returns its path."""
    stats = read_jsonl(run_dir / "stats.jsonl")
    files = sorted(run_dir.glob("metric-*.jsonl"))
    records = [some for some in map(read_records, files) if some]
    curves = []
    for some in records:  # records of `diffit metrics calc` may lie next to the run's own, and have no place in time
        points = [(record["kimg"], headline(record["results"])[1]) for record in some if is_of_a_run(record)]
        if points:
            curves.append(curve(points, some[0]["metric"]))
    curves += [curve([(s["kimg"], s[name]) for s in stats if name in s], name) for name in CURVES]
    body = [f"<p>written {time.strftime('%Y-%m-%d %H:%M:%S')}; all curves over thousands of images (kimg)</p>"]
    if records:
        body += ["<h2>Metrics</h2>", _table([record for some in records for record in some])]
    body += ["<h2>Curves</h2>", f'<div class="curves">{"".join(curves)}</div>', "<h2>Images</h2>"]
    grids = ["reals.png", "fakes_init.png", *[path.name for path in sorted(run_dir.glob("fakes[0-9]*.png"))[-2:]]]
    body += [picture((run_dir / name).read_bytes(), name) for name in grids if (run_dir / name).exists()]
    options = run_dir / "training_options.json"
    if options.exists():
        body += ["<h2>Settings</h2>", f"<pre>{html.escape(options.read_text())}</pre>"]
    path = run_dir / "report.html"
    with whole_file(path) as part:
        part.write_text(page(run_dir.name, body))
    return path


def is_of_a_run(record: dict[str, Any]) -> bool:
    return isinstance(record.get("kimg"), int | float)


def _table(records: Sequence[dict[str, Any]]) -> str:
    rows = [
        f"<tr><td>{html.escape(record['metric'])}</td><td>{html.escape(str(record.get('kimg', '')))}</td>"
        f"<td>{html.escape(format_numbers(record['results']))}</td>"
        f"<td><details><summary>record</summary><pre>{html.escape(json.dumps(record, indent=2))}</pre></details>"
        "</td></tr>"
        for record in records
    ]
    return "<table><tr><th>metric</th><th>kimg</th><th>value</th><th></th></tr>" + "".join(rows) + "</table>"
