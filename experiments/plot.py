"""Curves of all runs in a file: ``python -m experiments.plot unet.jsonl --dest docs/img/unet.png``.

Held-out loss against images and against minutes of a core, one line a seed, and the loss by noise level at the end.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import click

from experiments.learning import Results

LINE = 200
"""Characters beside one another under the panels."""


def label(record: dict[str, Any]) -> str:
    """The name, of a recipe what is said of it, and the length of a run by the clock."""
    said = [record["name"], *(f"{key} {value}" for key, value in (record.get("recipe") or {}).items())]
    return ", ".join([*said, f"{record['minutes']:g} minutes"] if "minutes" in record else said)


@click.command()
@click.argument("found", type=click.Path(path_type=Path, exists=True))
@click.option("--dest", type=click.Path(path_type=Path), required=True, help="Picture to write.")
def main(found: Path, dest: Path) -> None:
    """Draw what ablations and comparisons have written."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    records = Results(found).records
    names = list(dict.fromkeys(map(label, records)))
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8))
    colours = plt.get_cmap("tab20" if len(names) > 10 else "tab10")
    for number, name in enumerate(names):
        its = [record["points"] for record in records if label(record) == name]
        for seed, points in enumerate(its):
            style = {"color": colours(number), "lw": 1, "label": None if seed else name}
            losses = [point["loss"] for point in points]
            panels[0].plot([point["images"] / 1000 for point in points], losses, **style)
            panels[1].plot([point["seconds"] / 60 for point in points], losses, **style)
        levels = [fmean(points[-1]["by_level"][i] for points in its) for i in range(len(its[0][-1]["by_level"]))]
        panels[2].plot(levels, color=colours(number), lw=1, marker="o", ms=3)
    panels[0].set(xlabel="thousands of images", ylabel="held-out loss", yscale="log")
    panels[1].set(xlabel="minutes of a core", yscale="log")
    panels[2].set(xlabel="eighth of the noise levels, low to high", ylabel="held-out loss at the end")
    for panel in panels[:2]:
        panel.yaxis.set_major_formatter("{x:.3g}")
        panel.yaxis.set_minor_formatter("{x:.3g}")
    columns = max(min(LINE // (max(map(len, names)) + 6), len(names)), 1)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=columns, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.01 + 0.05 * -(-len(names) // columns), 1, 1))
    figure.savefig(dest, dpi=110)
    click.echo(f"{dest}: {len(records)} runs")


if __name__ == "__main__":
    main()
