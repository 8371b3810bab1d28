"""A metric against evaluations of the network: every sampler within every budget, and the cheapest that is good."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from diffit.configs.sampling import CONTINUOUS, DISCRETE, Sampling
from diffit.configs.schema import ADMDiffusion, Config
from diffit.errors import UserError, install_hint
from diffit.metrics.evaluate import evaluate_network
from diffit.metrics.record import read_records
from diffit.metrics.suite import Suite, best_record, headline
from diffit.metrics.table import Table
from diffit.sampling.cost import count_evaluations
from diffit.sampling.model import Model
from diffit.utils.files import whole_file

NEAR = 0.05  # of the best value: what counts as good
# What records of the same number agree in, next to the reference.
SAME = ("metric", "weights_sha256", "vae_sha256", "precision", "seeds", "detector")


@dataclass(frozen=True)
class Candidate:
    """A network by name, with the SHA-256 of its weights and the labels of the images that it is compared with."""

    name: str
    model: Model
    sha256: str
    real_labels: Tensor | None


def is_student(config: Config) -> bool:
    """Whether the network was distilled for the sampler and the steps in its file, and only for those."""
    return config.distillation is not None


def plan(
    model: Model, budgets: Sequence[int], samplers: Sequence[str] = (), scales: Sequence[float] = ()
) -> list[Model]:
    """The model with each sampler and guidance scale, at the most steps that each budget of evaluations allows.

    Evaluations are forward passes for an image: guidance makes two a step. By default all samplers that the model
    knows, at the file's own scale; a student is sampled as its file says. Raises :class:`UserError` for a sampler or
    scale that the model cannot do, and where a budget allows nothing.
    """
    if is_student(model.config):
        return [model]
    diffusion = model.config.diffusion
    most = diffusion.timesteps if isinstance(diffusion, ADMDiffusion) else max(budgets)
    known = (*CONTINUOUS, *DISCRETE) if isinstance(diffusion, ADMDiffusion) else CONTINUOUS
    found: dict[tuple[str, float, int], Model] = {}
    for scale in scales or (model.config.sampling.cfg_scale,):
        for sampler in samplers or known:

            def cost(steps: int, sampler: str = sampler, scale: float = scale) -> int:
                return sum(count_evaluations(model.with_sampling(sampler=sampler, steps=steps, cfg_scale=scale).config))

            for budget in budgets:
                steps = bisect_right(range(1, min(budget, most) + 1), budget, key=cost)
                if steps:
                    changes = {"sampler": sampler, "steps": steps, "cfg_scale": scale}
                    found[sampler, scale, steps] = model.with_sampling(**changes)
    if not found:
        raise UserError(f"--evaluations {max(budgets)}: a guided step has two; allow 2 or more")
    return list(found.values())


def measure(
    suite: Suite,
    settings: Sequence[tuple[Candidate, Model]],
    dest: Path,
    *,
    first_seed: int = 0,
    batch: int = 64,
) -> Iterator[dict[str, Any]]:
    """Yield the record of every setting, with its ``evaluations``; what is in ``dest`` already is not computed again.

    A setting is a candidate and one of the models that :func:`plan` makes of it; ``dest`` is a JSON-lines file. All
    processes call this together.
    """
    procs = suite.procs
    known = read_records(dest) if procs.is_first else []
    for candidate, model in settings:
        facts = {"network": candidate.name, "weights_sha256": candidate.sha256}
        found = _find(known, suite, model, facts, first_seed) if procs.is_first else None
        record: dict[str, Any] | None = procs.broadcast(found)
        if record is None:
            how: dict[str, Any] = {"first_seed": first_seed, "real_labels": candidate.real_labels, "batch": batch}
            (record,) = evaluate_network(suite, model, progress=True, facts=facts, **how)
            record["evaluations"] = sum(count_evaluations(model.config))
            known.append(record)
            if procs.is_first:  # as a whole: a kill may have cut off the last line
                with whole_file(dest) as part:
                    part.write_text("".join(json.dumps(each) + "\n" for each in known))
        yield record | facts


def _find(
    known: Sequence[dict[str, Any]], suite: Suite, model: Model, facts: dict[str, Any], first_seed: int
) -> dict[str, Any] | None:
    """The record among the ``known`` of what :func:`evaluate_network` would compute."""
    (metric,) = suite.metrics
    detector, reference = suite.detectors[metric.spec], suite.references.get(metric.spec)
    wanted: dict[str, Any] = {
        "metric": metric.name(detector),
        "weights_sha256": facts["weights_sha256"],
        "vae_sha256": None if model.autoencoder is None else model.autoencoder.sha256,
        "precision": model.precision,
        "sampling": model.config.sampling.model_dump(),
        "seeds": f"{first_seed}-{first_seed + metric.samples - 1}",
        "detector": {"name": detector.name, "sha256": detector.key},
        "reference": None if reference is None else {"sha256": reference.key},
    }

    def identity(record: dict[str, Any]) -> list[Any]:
        reference = (record.get("reference") or {}).get("sha256")
        return [*(record.get(key) for key in SAME), reference, _as_used(record["sampling"])]

    return next((old for old in known if "evaluations" in old and identity(old) == identity(wanted)), None)


def _as_used(sampling: dict[str, Any]) -> Sampling | None:
    """Of the levels fitted to a network only those that these settings use: others change no sample."""
    try:
        known = Sampling.model_validate(sampling)
    except ValidationError:  # of another version
        return None
    used = tuple(fit for fit in known.fitted if fit.sigmas == known.fitted_sigmas)
    return known.model_copy(update={"fitted": used})


def cheapest(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the records within :data:`NEAR` of the best value that with the fewest evaluations, then the fastest."""
    goal = headline(best_record(records)["results"])[1]
    good = [r for r in records if abs(headline(r["results"])[1] - goal) <= NEAR * abs(goal)]
    return min(good, key=lambda record: (record["evaluations"], record["seconds_per_image"]))


def title(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """What the setting is called among ``records``: its sampler, and what else differs between them."""
    parts = [record["sampling"]["sampler"]]
    if len({each["network"] for each in records}) > 1:
        parts.insert(0, record["network"].removesuffix(".safetensors"))
    if len({each["sampling"]["cfg_scale"] for each in records}) > 1:
        parts.append(f"guidance {record['sampling']['cfg_scale']:g}")
    return " ".join(parts)


def tabulate(records: Sequence[dict[str, Any]]) -> Table:
    """Header and rows, by setting and evaluations; the cheapest good one is marked."""
    name, _ = headline(records[0]["results"])
    best = cheapest(records)
    rows = [
        [
            title(record, records),
            str(record["sampling"]["steps"]),
            str(record["evaluations"]),
            f"{headline(record['results'])[1]:.4g}",
            f"{record['seconds_per_image']:.3g}",
            f"cheapest within {NEAR:.0%} of the best" if record is best else "",
        ]
        for record in records
    ]
    return ["sampler", "steps", "evaluations", name, "s/image", ""], rows


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """The number against evaluations, a line per setting. UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"{path}: a plot needs matplotlib: {install_hint('plot')}") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="evaluations of the network per image", ylabel=records[0]["metric"])
    lines: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["evaluations"]):
        lines.setdefault(title(record, records), []).append(record)
    for name, points in lines.items():
        x, y = [p["evaluations"] for p in points], [headline(p["results"])[1] for p in points]
        axes.plot(x, y, marker="o", markersize=4, label=name)
    best = cheapest(records)
    axes.plot(
        best["evaluations"], headline(best["results"])[1], "k*", markersize=14, fillstyle="none",
        label=f"cheapest within {NEAR:.0%} of the best",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    if all(headline(record["results"])[1] > 0 for record in records):
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
