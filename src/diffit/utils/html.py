"""Pages that one HTML file holds: pictures are data URIs, the library that plots is inside, and nothing is fetched."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffit.errors import install_hint

LARGE = 300_000  # bytes of a picture: more are made smaller, or a page of many would not load
SIDE = 1024  # pixels

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66em; margin: 1.5em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.4em; overflow-wrap: anywhere } h2 { font-size: 1.1em; margin-top: 2em } summary { cursor: pointer }
img { max-width: 100% } figure { margin: 0; min-width: 0 } figcaption { font-size: .9em; color: #555 }
table { border-collapse: collapse; display: block; overflow-x: auto } td, th { padding: .2em .8em .2em 0;
text-align: left; vertical-align: top; border-bottom: 1px solid #ddd } input[type=range] { width: 100% }
pre { background: #f4f4f4; padding: .7em 1em; overflow: auto }
pre.copy { user-select: all; cursor: pointer; white-space: pre-wrap; overflow-wrap: anywhere }
.side { display: grid; gap: 1.5em; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22em), 1fr)) }"""

SLIDER = """for (const slider of document.querySelectorAll("input[type=range]")) {
  const shown = slider.parentElement.querySelectorAll("figure");
  slider.oninput = () => shown.forEach((figure, i) => { figure.hidden = i != slider.value; });
}"""
PLOTS = """for (const plot of document.querySelectorAll(".plot"))
  Plotly.newPlot(plot, JSON.parse(plot.dataset.figure));"""
# Without the button that would upload the numbers to Plotly's servers.
CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""}


@dataclass(frozen=True)
class Plot:
    """One diagram. ``traces`` are Plotly's: dictionaries of ``x``, ``y``, ``name`` and how they are shown."""

    title: str
    traces: Sequence[dict[str, Any]]
    x: str = "kimg"
    y: str = ""
    from_zero: bool = False
    layout: dict[str, Any] | None = None


def page(title: str, body: Sequence[str]) -> str:
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{STYLE}</style>\n<h1>{name}</h1>\n" + "\n".join(body) + "\n</html>\n"
    )


def picture(data: bytes, caption: str, *, hidden: bool = False) -> str:
    """A figure of a PNG, with its caption; a large one becomes a smaller JPEG."""
    kind = "png"
    if len(data) > LARGE:
        image, smaller, kind = Image.open(io.BytesIO(data)), io.BytesIO(), "jpeg"
        image.thumbnail((SIDE, SIDE))
        image.convert("RGB").save(smaller, "JPEG", quality=85)
        data = smaller.getvalue()
    source, text = base64.b64encode(data).decode(), html.escape(caption)
    return (
        f'<figure{" hidden" * hidden}><img alt="{text}" src="data:image/{kind};base64,{source}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def slider(pictures: Sequence[tuple[str, bytes]]) -> str:
    """One of the captioned ``pictures`` at a time, the last at first."""
    last = len(pictures) - 1
    figures = (picture(data, caption, hidden=i < last) for i, (caption, data) in enumerate(pictures))
    control = f'<input type="range" aria-label="which picture" max="{last}" value="{last}">' if last else ""
    return f"<div>{''.join(figures)}{control}</div>" + (f"<script>{SLIDER}</script>" if last else "")


def plots(figures: Sequence[Plot]) -> list[str]:
    """The diagrams, zoomable, and the library that draws them; what to install where it is not there."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        return [f"<p>Curves need plotly: <code>{html.escape(install_hint('plot'))}</code></p>"]
    cells = (f"<figure><figcaption>{html.escape(plot.title)}</figcaption>{_div(plot)}</figure>" for plot in figures)
    scripts = f"<script>{get_plotlyjs()}</script><script>{PLOTS}</script>"
    return ['<div class="side">', *cells, "</div>", scripts]


def _div(plot: Plot) -> str:
    layout = {
        "height": 300,
        "margin": {"l": 60, "r": 15, "t": 15, "b": 45},
        "hovermode": "x unified",
        "showlegend": len(plot.traces) > 1,
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "xaxis": {"title": {"text": plot.x, "standoff": 5}, "automargin": True},
        "yaxis": {"title": {"text": plot.y}, "automargin": True, "rangemode": "tozero" if plot.from_zero else "normal"},
    }
    figure = json.dumps({"data": list(plot.traces), "layout": layout | (plot.layout or {}), "config": CONFIG})
    return f'<div class="plot" data-figure="{html.escape(figure)}"></div>'


def details(title: str, inside: str) -> str:
    """Folded until it is opened; ``inside`` is HTML."""
    return f"<details><summary>{html.escape(title)}</summary>{inside}</details>"
