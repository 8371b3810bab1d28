"""The card of a number: a JSON record of everything that it depends on."""

import importlib.metadata
import json
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffit import __version__
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.metrics.suite import PUBLISHED, Metric, Suite, better, headline
from diffit.utils.distributed import Processes

TOO_FEW = "too few samples for an estimate of the bias"  # fewer than two a dimension, real or generated
PACKAGES = ("torch", "numpy", "pillow", "torch-fidelity")


def describe_network(config: Config, seeds: Sequence[int], labels: str, **facts: Any) -> dict[str, Any]:
    """The part of a card that says how the samples were drawn."""
    return {
        "preset": config.preset,
        **facts,
        "seeds": f"{seeds[0]}-{seeds[-1]}",
        "labels": labels,
        "sampling": config.sampling.model_dump(mode="json"),
    }


def make_card(
    suite: Suite,
    metric: Metric,
    numbers: dict[str, float],
    source: dict[str, Any],
    procs: Processes,
    seconds: float,
) -> dict[str, Any]:
    detector, reference = suite.detectors[metric.spec], suite.references.get(metric.spec)
    card: dict[str, Any] = {
        "metric": metric.name(detector),
        "results": numbers,
        "samples": metric.samples,
        **source,
        "detector": {"name": detector.name, "sha256": detector.key},
    }
    if reference is not None:
        real = {
            f"{what}_{output}": need.count or reference.stored_count or "not said by the file"
            for (what, output), need in metric.real_needs(reference).items()
        }
        card["reference"] = {"name": reference.name, "sha256": reference.key, "images": real}
    card |= {
        "notes": notes(metric, numbers, official=detector.official),
        "versions": {"diffit": __version__} | {name: _version(name) for name in PACKAGES},
        "processes": procs.count,
        "device": torch.cuda.get_device_name(procs.device) if procs.device.type == "cuda" else procs.device.type,
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return card


def notes(metric: Metric, numbers: dict[str, float], *, official: bool) -> list[str]:
    """What a reader must know to compare the number with another one."""
    texts = []
    for name in ("fid", "fd"):
        if name in numbers and metric.samples < PUBLISHED:
            bias = numbers.get(f"{name}_bias")
            texts.append(
                f"{metric.samples} samples, published figures have {PUBLISHED}: "
                + (TOO_FEW if bias is None else f"about {bias:.3g} of the distance is the bias of finite samples")
                + "; compare only with figures of the same number"
            )
    if "is" in numbers and metric.samples < PUBLISHED:
        texts.append(f"{metric.samples} samples instead of {PUBLISHED}: Inception scores of few samples are too low")
    if not official:
        texts.append("features of another detector than FID's: compare only with figures of the same detector")
    return texts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def summarise_repeats(cards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best of several cards of different seeds, with minimum, mean and spread (standard deviation) of each number.

    The best is that with the best main number, whether less of it or more is better.
    """
    best = cards[0]
    for card in cards[1:]:
        (name, value), (_, known) = headline(card["results"]), headline(best["results"])
        best = card if better(name, value, known) else best
    numbers = {}
    for name in own_numbers(best["results"]):
        values = [card["results"][name] for card in cards]
        numbers[name] = {
            "values": values,
            "minimum": min(values),
            "mean": statistics.fmean(values),
            "spread": statistics.stdev(values),
        }
    return best | {"repeats": {"seeds": [card["seeds"] for card in cards], "numbers": numbers}}


def own_numbers(numbers: dict[str, float]) -> list[str]:
    """Names of the numbers that do not describe another one."""
    return [name for name in numbers if not name.endswith(("_bias", "_std", "_error"))]


def format_numbers(numbers: dict[str, float]) -> str:
    """``fid 12.35   is 7.02 ± 0.08``; what is only in the card is left out."""
    parts = []
    for name in own_numbers(numbers):
        spread = numbers.get(f"{name}_std", numbers.get(f"{name}_error"))
        parts.append(f"{name} {numbers[name]:.5g}" + ("" if spread is None else f" ± {spread:.2g}"))
    return "   ".join(parts)


def card_file(metric: str) -> str:
    """``metric-fd1k_full-pixels.jsonl``: file systems and copying tools read other things into a colon."""
    return f"metric-{re.sub(r'[^A-Za-z0-9_.-]', '-', metric)}.jsonl"


def read_cards(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, none where there is none; a last line that a kill cut off is left out."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text of `diffit metrics calc` records; give such a file or a run") from None
    cards = []
    for i, line in enumerate(lines):
        try:
            card = json.loads(line)
            if not (isinstance(card, dict) and isinstance(card["results"], dict) and isinstance(card["metric"], str)):
                raise ValueError("not a card")
            cards.append(card)
        except (ValueError, KeyError):
            if i < len(lines) - 1:
                raise UserError(f"{path}: line {i + 1} is not a record of `diffit metrics calc`") from None
    return cards
