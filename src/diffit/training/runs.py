"""A run as it is now, from its folder alone: another process may be writing it, or somebody may be deleting it."""

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffit.configs.schema import Config
from diffit.errors import UserError, printable
from diffit.metrics.record import format_numbers, read_records
from diffit.training.checkpoint import states
from diffit.training.run_dir import OPTIONS, read_options
from diffit.training.usual import usual_loss
from diffit.utils.files import read_jsonl
from diffit.utils.progress import duration

TAIL_LINES, TAIL_BYTES = 40, 16_384
QUIET = 3  # times the usual interval between two lines of statistics, after which a run counts as standing still


@dataclass(frozen=True)
class RunView:
    """Attributes:
    path: the folder.
    config: None where it cannot be read.
    stats: the lines of ``stats.jsonl``, oldest first.
    records: those of ``metric-*.jsonl``. Some of `diffit metrics calc` may lie next to the run's own.
    grids: kimg -> picture of samples, ascending.
    log: the last lines of ``log.txt``.
    written: when its statistics were last written, in seconds since 1970; 0 before the first.
    """

    path: Path
    config: Config | None
    stats: list[dict[str, Any]]
    records: list[dict[str, Any]]
    grids: dict[float, Path]
    log: list[str]
    written: float

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records that have a place in the run."""
        return [record for record in self.records if isinstance(record.get("kimg"), int | float)]

    @property
    def last(self) -> dict[str, Any]:
        return self.stats[-1] if self.stats else {}

    @property
    def kimg(self) -> float:
        return float(self.last.get("images", 0)) / 1000

    def series(self, *names: str) -> list[tuple[float, str, float]]:
        """(kimg, name, value) of these statistics wherever they were written and are numbers."""
        return [
            (line["images"] / 1000, name, line[name])
            for line in self.stats
            for name in names
            if isinstance(line.get(name), int | float)
        ]

    def by_level(self) -> list[str]:
        """Names of the statistics that are losses by noise level, in the order of the levels."""
        names = dict.fromkeys(name for line in self.stats for name in line)
        return [name for name in names if name.startswith(("loss_sigma_", "loss_t_", "loss_step_"))]

    def health(self) -> list[str]:
        """What a person wants to know first, one line each."""
        config, last = self.config, self.last
        if config is None:
            return ["its options cannot be read: another version wrote it, or it died in its first second"]
        length = config.training.expected_kimg(self.kimg)
        lines = [f"{self.kimg:,.6g} kimg ({self.kimg / length:.0%} of {length:,g}), {self._pace()}"]
        if isinstance(last.get("loss"), int | float):
            loss = self._loss(1000 * config.training.tick)
            usual = usual_loss(config, self.kimg, length)
            lines.append(f"loss {loss:.4g}" + ("" if usual is None else f"; {usual:.2g} is usual after so many images"))
        elif self.stats:
            lines.append("the last loss is not finite")
        skipped = last.get("skipped_steps", 0)
        lines.append("no step was skipped" if not skipped else f"{skipped} steps were skipped: see the log")
        latest = {record["metric"]: format_numbers(record["results"]) for record in self.metrics}
        return lines + [f"{metric}: {numbers}" for metric, numbers in latest.items()]

    def _loss(self, images: float) -> float:
        """Mean of the last lines that are of so many ``images`` together: the very last may be of a single step."""
        losses, weights = list[float](), list[float]()
        for i in reversed(range(len(self.stats))):
            loss = self.stats[i].get("loss")
            if not isinstance(loss, int | float) or sum(weights) >= images:
                break
            losses.append(loss)
            weights.append(self.stats[i]["images"] - (self.stats[i - 1]["images"] if i else 0))
        return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / max(sum(weights), 1)

    def _pace(self) -> str:
        if not self.stats:
            return "no statistics yet"
        age = max(time.time() - self.written, 0)
        usual = self.last.get("sec", 60.0)
        speed = self.last.get("img_per_sec")
        pace = f"{speed:,.4g} img/s" if isinstance(speed, int | float) else "running"
        if self.config is not None and self.kimg >= self.config.training.kimg:
            return f"finished; {pace} at the end"
        return pace if age < QUIET * max(usual, 20) else f"nothing new for {duration(age)}: stopped, or stuck"

    def resume(self) -> str:
        """The command that goes on with the run."""
        if self.config is None or not states(self.path):
            return "# no training state yet: nothing to go on from"
        words = ["diffit", "train", "--config", str(self.path / OPTIONS), "--outdir", str(self.path.parent)]
        words += ["--resume", str(self.path)]
        training = self.config.training
        if self.kimg >= training.kimg:  # only a greater length goes on
            minutes = training.clock_minutes
            words += ["--kimg", f"{2 * training.kimg:g}"] if minutes is None else ["--minutes", f"{3 * minutes:g}"]
        return shlex.join(words)


def read_run(path: Path) -> RunView:
    """What the folder of a run holds now. Raises :class:`UserError` where it is gone."""
    if not path.is_dir():
        raise UserError(f"{path.name}: the run's folder is gone; choose another run")
    stats_file = path / "stats.jsonl"
    records = [record for file in sorted(path.glob("metric-*.jsonl")) for record in read_records(file)]
    grids = {}
    for file in path.glob("fakes[0-9]*.png"):
        number = file.stem.removeprefix("fakes")
        if number.replace(".", "", 1).isdigit():
            grids[float(number)] = file
    if (first := path / "fakes_init.png").exists():
        grids.setdefault(0.0, first)
    stats = [line for line in read_jsonl(stats_file) if isinstance(line.get("images"), int)]
    return RunView(
        path,
        read_options(path),
        stats,
        records,
        dict(sorted(grids.items())),
        _tail(path / "log.txt"),
        stats_file.stat().st_mtime if stats else 0.0,
    )


def compare_runs(paths: Mapping[str, Path], settings: Sequence[str] = ()) -> tuple[list[str], list[list[Any]]]:
    """Header and a row for each run: kimg, loss, img/s, the last metric, and ``settings`` such as ``training.lr``.

    A run that goes while it is read is left out; a setting that a run does not have is empty.
    """
    header = ["run", "preset", "kimg", "loss", "img/s", "metric", *settings]
    rows = list[list[Any]]()
    for name, path in paths.items():
        try:
            view = read_run(path)
        except (UserError, OSError):
            continue
        metric = view.metrics[-1] if view.metrics else None
        row = [name, "" if view.config is None else view.config.preset, round(view.kimg, 3)]
        row += [view.last.get("loss"), view.last.get("img_per_sec")]
        row.append("" if metric is None else f"{metric['metric']}: {format_numbers(metric['results'])}")
        rows.append(row + [_setting(view.config, setting) for setting in settings])
    return header, rows


def _setting(config: Config | None, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, None) if not part.startswith("_") else None
    return str(value) if isinstance(value, tuple) else value


def _tail(path: Path) -> list[str]:
    """The last lines of a file, of which only its end is read."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [printable(line, 500) for line in text.splitlines()[-TAIL_LINES:]]
