"""Records as a table: their numbers, and what else differs between records of one metric."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffit.errors import printable
from diffit.metrics.record import own_numbers

# What differs by nature, has a column of its own, or explains another value.
LEFT_OUT = {"metric", "results", "kimg", "notes", "seconds", "seconds_per_image", "date", "repeats", "weights_sha256"}
LONGEST = 1000  # characters in a cell
LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "±": r"$\pm$"})

Table = tuple[list[str], list[list[str]]]


def compare(sources: Mapping[str, Sequence[dict[str, Any]]], *, exact: bool = False) -> Table:
    """Header and rows of the records of each source (a run or a file, by name), one row for each record.

    ``exact`` gives every number all of its digits, and deviations and errors a column of their own instead of a ±.
    """
    pairs = [(source, record) for source, records in sources.items() for record in records]
    settings = [dict(_settings(record)) for _, record in pairs]
    differing = [key for key in dict.fromkeys(key for s in settings for key in s) if _differs(key, pairs, settings)]
    rows: list[dict[str, str]] = []
    for (source, record), found in zip(pairs, settings, strict=True):
        row = {"run": source} if len(sources) > 1 else {}
        row |= {"metric": record["metric"], "kimg": _text(record.get("kimg"))}
        row |= {name: repr(v) for name, v in record["results"].items()} if exact else _rounded(record["results"])
        rows.append(row | {key.removeprefix("sampling."): _text(found.get(key)) for key in differing})
    numbers = [key for row in rows for key in row if key not in ("run", "metric", "kimg")]
    known = ["run"] * (len(sources) > 1) + ["metric"] + ["kimg"] * any(row["kimg"] for row in rows)
    last = [key.removeprefix("sampling.") for key in differing]
    header = list(dict.fromkeys([*known, *(key for key in numbers if key not in last), *last]))
    cells = [header, *([row.get(key, "") for key in header] for row in rows)]
    first, *others = ([printable(cell, LONGEST) for cell in line] for line in cells)  # records come from anywhere
    return first, others


def _rounded(numbers: dict[str, float]) -> dict[str, str]:
    spreads = {name: numbers.get(f"{name}_std", numbers.get(f"{name}_error")) for name in own_numbers(numbers)}
    return {n: f"{numbers[n]:.5g}" + ("" if spread is None else f" ± {spread:.2g}") for n, spread in spreads.items()}


def _settings(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict) and key not in LEFT_OUT:
            yield from _settings(value, f"{prefix}{key}.")
        elif prefix or not (key in LEFT_OUT or key == "images"):  # of a run these are 1000 times its kimg
            yield f"{prefix}{key}", value


def _differs(key: str, pairs: Sequence[tuple[str, dict[str, Any]]], settings: Sequence[dict[str, Any]]) -> bool:
    values: dict[str, Any] = {}
    return any(
        values.setdefault(record["metric"], found.get(key)) != found.get(key)
        for (_, record), found in zip(pairs, settings, strict=True)
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and len(value) == 64:  # a hash
        return value[:8]
    return str(value)


def format_plain(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [header, *rows]]
    return "\n".join(lines)


def format_markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def format_csv(header: list[str], rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")


def format_latex(header: list[str], rows: list[list[str]]) -> str:
    first, *others = (" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in [header, *rows])
    columns = "l" * len(header)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", first, r"\hline", *others, r"\end{tabular}"])


FORMATS = {"table": format_plain, "md": format_markdown, "csv": format_csv, "latex": format_latex}
