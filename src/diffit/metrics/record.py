"""The record of a number: everything that it depends on, as JSON."""

import importlib.metadata
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffit import __version__
from diffit.errors import UserError
from diffit.metrics.features import Metric
from diffit.metrics.suite import Suite, best_record
from diffit.utils.files import read_jsonl

PUBLISHED = 50_000  # samples of the field's figures
TOO_FEW = "too few samples for an estimate of the bias"  # fewer than two for each dimension, real or generated
PACKAGES = ("torch", "numpy", "pillow", "torch-fidelity")


def make_record(
    suite: Suite, metric: Metric, numbers: dict[str, float], source: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The record of the ``numbers`` of one ``metric``; ``source`` says what was evaluated."""
    detector, reference = suite.detectors[metric.spec], suite.references.get(metric.spec)
    record: dict[str, Any] = {
        "metric": metric.name(detector),
        "results": numbers,
        "samples": metric.samples,
        **source,
        "detector": {"name": detector.name, "sha256": detector.key},
    }
    if protocol := {key: value for part in metric.parts for key, value in part.protocol.items()}:
        record["protocol"] = protocol
    needs = [part.real_need for part in metric.parts if part.compares]
    if reference is not None and needs:
        real = {f"{need.what}_{need.output}": reference.count(need) or "not said by the file" for need in needs}
        record["reference"] = {"name": reference.name, "sha256": reference.key, "images": real}
    device = suite.procs.device
    return record | {
        "notes": notes(metric, numbers, official=detector.official),
        "versions": {"diffit": __version__} | {name: _version(name) for name in PACKAGES},
        "processes": suite.procs.count,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


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


def summarise_repeats(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best of several records of different seeds, with minimum, mean and standard deviation of each number.

    The best is that with the best main number, whether less of it or more is better.
    """
    best, numbers = best_record(records), {}
    for name in own_numbers(best["results"]):
        values = [record["results"][name] for record in records]
        numbers[name] = {
            "values": values,
            "minimum": min(values),
            "mean": statistics.fmean(values),
            "spread": statistics.stdev(values),
        }
    return best | {"repeats": {"seeds": [record["seeds"] for record in records], "numbers": numbers}}


def own_numbers(numbers: dict[str, float]) -> list[str]:
    """Names of the numbers that do not describe another one."""
    return [name for name in numbers if not name.endswith(("_bias", "_std", "_error"))]


def format_numbers(numbers: dict[str, float]) -> str:
    """``fid 12.35   is 7.02 ± 0.08``; what only describes another is left out."""
    parts = []
    for name in own_numbers(numbers):
        spread = numbers.get(f"{name}_std", numbers.get(f"{name}_error"))
        parts.append(f"{name} {numbers[name]:.5g}" + ("" if spread is None else f" ± {spread:.2g}"))
    return "   ".join(parts)


def record_file(metric: str) -> str:
    """``metric-fd1k_full-pixels.jsonl``: file systems and copying tools read other things into a colon."""
    return f"metric-{re.sub(r'[^A-Za-z0-9_.-]', '-', metric)}.jsonl"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, none where there is none; a last line that a kill cut off is left out."""
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        if not (isinstance(record.get("results"), dict) and isinstance(record.get("metric"), str)):
            raise UserError(
                f"{path}: line {number} is not a record of `diffit metrics calc`; pass such a file or a run"
            )
    return records
