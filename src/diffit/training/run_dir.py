"""The folder of a run: its name, its log, its statistics, and finding one to take up again."""

import itertools
import json
import logging
import math
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from diffit.configs.resolve import unasked
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.training.checkpoint import PREFIX, read_progress, states, verify_state
from diffit.training.tracking import open_trackers
from diffit.utils.distributed import Processes
from diffit.utils.files import disk_errors, sweep, whole_file
from diffit.utils.locks import exclusive, is_free
from diffit.weights import snapshots

logger = logging.getLogger(__name__)

OPTIONS = "training_options.json"
STARTING = 60.0  # seconds that a run without a lock may be about to take it

# Fields that may change between a stop and a resume: they say how long, how often and how fast, not what is learned.
FREE: Any = {
    "training": {
        "kimg", "tick", "snap", "dump", "workers", "metrics", "metrics_ref", "metrics_ticks", "compile", "grad_ckpt",
        "shard", "max_skipped", "grid", "desc", "minutes", "snap_minutes", "dump_minutes", "keep", "metrics_sampler",
        "metrics_steps", "chosen", "track", "on_spike", "on_error", "timeout_minutes", "allow_scripts",
        "metrics_budget",
    },
    "sampling": True,
    "data": {"val", "empty_classes", "path", "content"},
    "distillation": {"teacher", "teacher_sha256"},
}  # fmt: skip


def same_run(asked: Config, recorded: Config) -> bool:
    """Whether two configurations differ at most in what may change on resuming, or was not asked for."""
    return not differences(asked, recorded)


def differences(asked: Config, recorded: Config) -> list[str]:
    """What is asked for otherwise than a run has it, as ``lr 0.001 (the run has 0.002)``."""
    free = FREE | {"training": FREE["training"] | unasked(asked)}
    ours, theirs = (config.model_dump(exclude=free) for config in (asked, recorded))
    if not same_data(asked, recorded):
        ours["data"]["path"], theirs["data"]["path"] = asked.data.path, recorded.data.path
    if not same_teacher(asked, recorded):
        for config, said in ((asked, ours), (recorded, theirs)):
            said["distillation"] |= config.model_dump(include={"distillation": {"teacher"}})["distillation"]
    return [
        f"{name} {ours[room].get(name)} (the run has {theirs[room].get(name)})"
        for room in ("data", "training", "diffusion", "autoencoder", "model", "distillation")
        if ours[room] != theirs[room]
        for name in dict.fromkeys([*(ours[room] or {}), *(theirs[room] or {})])
        if (ours[room] or {}).get(name) != (theirs[room] or {}).get(name)
    ] + (["preset"] if asked.preset != recorded.preset else [])


def same_data(asked: Config, recorded: Config) -> bool:
    """Whether two runs are of the same images, wherever they lie; by the path where a run has no hash of them."""
    if asked.data.content is None or recorded.data.content is None:
        return asked.data.path == recorded.data.path
    return asked.data.content == recorded.data.content


def same_teacher(asked: Config, recorded: Config) -> bool:
    """Whether two students have the same teacher, wherever it lies, or one of the same place."""
    ours, theirs = asked.distillation, recorded.distillation
    if ours is None or theirs is None:
        return True
    return ours.teacher == theirs.teacher or ours.teacher_sha256 == theirs.teacher_sha256


def stage(config: Config) -> tuple[str, int] | None:
    """What tells the runs of one distillation apart: the method and the student's steps; None of other trainings."""
    student = config.distillation
    return None if student is None else (student.method, config.sampling.steps)


def refuse_other_content(asked: Config, recorded: Config, run_dir: Path) -> None:
    """Raises :class:`UserError` where an archive or teacher of the same place is another than a run began with."""
    ours, theirs = asked.distillation, recorded.distillation
    if ours and theirs and ours.teacher == theirs.teacher and ours.teacher_sha256 != theirs.teacher_sha256:
        raise UserError(
            f"{ours.teacher}: other weights than {run_dir} has for its teacher ({theirs.teacher_sha256[:12]}, now "
            f"{ours.teacher_sha256[:12]}); restore them, or begin a new run with --resume none"
        )
    if asked.data.path == recorded.data.path and not same_data(asked, recorded):
        assert asked.data.content is not None
        assert recorded.data.content is not None
        raise UserError(
            f"{asked.data.path}: other images than {run_dir} began with ({recorded.data.content[:12]}, now "
            f"{asked.data.content[:12]}); restore them, or begin a new run with --resume none"
        )


def kimg_number(config: Config, images_seen: int) -> str:
    """kimg in file names, ``000200``, with as many decimals as keep two saves apart."""
    decimals = 0 if config.training.tick >= 1 else max(math.ceil(-math.log10(config.training.batch / 1000)), 0)
    return _kimg_text(images_seen, decimals)


def _kimg_text(images_seen: int, decimals: int) -> str:
    whole = images_seen // 1000 if not decimals else images_seen / 1000
    return f"{whole:0{6 + (decimals and decimals + 1)}.{decimals}f}"


def is_later(path: Path, images_seen: int) -> bool:
    """Whether a state or snapshot is of more images: its name has them rounded, and so must those be."""
    number = re.findall(r"\d+(?:\.\d+)?", path.name)[-1]
    return float(number) > float(_kimg_text(images_seen, len(number.partition(".")[2])))


def runs(outdir: Path) -> list[Path]:
    """Run folders, oldest first."""
    if not outdir.is_dir():
        return []
    return sorted((path for path in outdir.iterdir() if re.match(r"\d{5}-", path.name)), key=lambda path: path.name)


def create_run(outdir: Path, config: Config, processes: int) -> Path:
    """``<outdir>/00000-<data>-<preset>-gpus1-batch128[-desc]`` with the next free number."""
    desc = config.training.desc
    data = Path(config.data.path).stem if config.data.path else "data"
    parts = [data, config.preset, f"gpus{processes}", f"batch{config.training.batch}", desc]
    name = "-".join(part for part in parts if part)
    remove_stillborn(outdir)
    first = max((int(path.name[:5]) for path in runs(outdir)), default=-1) + 1
    with disk_errors(outdir):
        for number in itertools.count(first):
            path = outdir / f"{number:05d}-{name}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:  # by another command that was started in this moment
                continue
            return path
    raise AssertionError


def remove_stillborn(outdir: Path) -> None:
    """Remove the folders of runs that ended before anything was trained, next to those that may be starting."""
    for run_dir in runs(outdir):
        # Whatever is left of them, under whatever name: somebody may have kept the best weights alone, or moved all.
        left = (f"*{PREFIX}*", "*.safetensors", "metric-*.jsonl", "fakes[0-9]*.png")
        stats = run_dir / "stats.jsonl"
        trained = any(any(run_dir.glob(form)) for form in left) or (stats.exists() and stats.stat().st_size > 0)
        if trained or not (run_dir / OPTIONS).exists() or time.time() - run_dir.stat().st_mtime < STARTING:
            continue
        if is_free(run_dir):
            logger.warning("%s: removed; it ended before its first save", run_dir)
            shutil.rmtree(run_dir, ignore_errors=True)


def write_options(run_dir: Path, config: Config) -> None:
    with whole_file(run_dir / OPTIONS) as part:
        part.write_text(config.model_dump_json(indent=2) + "\n")


def read_options(run_dir: Path) -> Config | None:
    path = run_dir / OPTIONS
    try:
        return Config.from_json(path.read_text(), str(path))
    except (OSError, UserError):  # a run of another version, or one that died in its first second
        return None


def akin(outdir: Path, config: Config) -> Iterator[tuple[Path, Config, list[Path]]]:
    """Runs of the same kind as ``config`` asks for, the newest first: folder, options, states."""
    for run_dir in reversed(runs(outdir)):
        options = read_options(run_dir)
        if options is not None and stage(options) == stage(config):
            yield run_dir, options, states(run_dir)


def find_resumable(outdir: Path, config: Config) -> Path | None:
    """The newest training state of the newest run in ``outdir`` whose options match ``config``.

    Where the newest run is another one, a warning says in what it differs and how to go on with it.
    """
    nearest: tuple[Path, list[str]] | None = None
    for run_dir, options, found in akin(outdir, config):
        if not found:
            if not is_free(run_dir):
                logger.warning("a new run begins: %s is another process's, which has saved nothing yet", run_dir)
            continue
        other = differences(config, options)
        if not other:
            refuse_other_content(config, options, run_dir)
            return found[-1]
        nearest = nearest or (run_dir, other)
    if nearest is not None:
        run_dir, other = nearest
        logger.warning(
            "a new run begins: %s differs in %s; to go on with it nevertheless: --resume %s",
            run_dir, ", ".join(other[:3]) + (", …" if len(other) > 3 else ""), run_dir,
        )  # fmt: skip
    return None


def refuse_later_elsewhere(config: Config, outdir: Path, state: Path | None, procs: Processes) -> None:
    """UserError on all where another node has a later state than the one, or none, that process 0 goes on from.

    Which node process 0 is on is torchrun's choice, and may be another one after a restart.
    """
    first: int = procs.broadcast(read_progress(state)[0] if state is not None and procs.is_first else 0)
    with procs.together():
        for _, options, found in () if procs.is_first else akin(outdir, config):
            if found and same_run(config, options):
                if read_progress(found[-1])[0] > first:
                    raise UserError(
                        f"{found[-1]} on {socket.gethostname()} is later than what process 0 has in its own {outdir}; "
                        "give an --outdir that all nodes see, copy the run there, or begin again with --resume none"
                    )
                break


def retire_later(state: Path) -> list[Path]:
    """Rename the states and snapshots of a run that are later than the one that it goes on from; their new names.

    A run that goes back would otherwise be taken up, pruned and sampled at the end of the branch that was left.
    """
    run_dir, seen = state.parent, read_progress(state)[0]
    return [put_aside(path, "retired") for path in (*states(run_dir), *snapshots(run_dir)) if is_later(path, seen)]


def put_aside(path: Path, word: str) -> Path:
    """Rename what a run no longer uses, ``word`` first; its new name."""
    names = (f"{word}{number}-{path.name}" for number in ("", *range(2, 1000)))
    return path.rename(next(aside for name in names if not (aside := path.with_name(name)).exists()))


def locate_state(path: Path) -> Path:
    """The state that ``--resume PATH`` means: a state itself, or the newest of a run."""
    if (path / "manifest.json").is_file():
        return path
    found = states(path) if path.is_dir() else []
    if not found:
        raise UserError(f"--resume {path}: neither a training-state folder nor a run that holds one")
    return found[-1]


def find_state(config: Config, outdir: Path, resume: str, held: ExitStack) -> Path | None:
    """The state to go on from: ``resume`` is ``auto``, ``none``, or the path of a state or a run.

    Its run is this process's alone until ``held`` is closed. Its files are whole: ``auto`` puts a damaged state aside
    and takes the one before; UserError where there is none.
    """
    if resume == "none":
        return None
    if resume != "auto":
        state = locate_state(Path(resume))
        if (recorded := read_options(state.parent)) is not None:
            refuse_other_content(config, recorded, state.parent)
            hold(state.parent, held)
        verify_state(state)
        return state
    newest = find_resumable(outdir, config)
    if newest is not None:
        hold(newest.parent, held)
    for state in reversed(states(newest.parent) if newest else []):
        try:
            verify_state(state)
            return state
        except UserError as error:
            aside = put_aside(state, "damaged")
            logger.warning("%s; it is %s now, and the state before it is taken", error, aside.name)
    if newest is not None:
        raise UserError(f"{newest.parent}: every state is damaged; --resume none begins again")
    return None


def hold(run_dir: Path, held: ExitStack) -> None:
    """Keep other commands out of a run until ``held`` is closed, and remove what dead ones left half written in it."""
    held.enter_context(exclusive(run_dir, "use another --outdir"))
    sweep(run_dir)


def prune_snapshots(run_dir: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest snapshots, where that is not 0; grids and the best weights stay."""
    for old in snapshots(run_dir)[:-keep] if keep else ():
        old.unlink()


class RunLog:
    """``log.txt``, ``stats.jsonl`` and what trackers keep of a run. Only the first process has one."""

    def __init__(self, run_dir: Path, config: Config, images_seen: int) -> None:
        self.run_dir = run_dir
        for path in (run_dir / "stats.jsonl", *run_dir.glob("metric-*.jsonl")):
            truncate_jsonl(path, images_seen)
        with disk_errors(run_dir):
            self.trackers = open_trackers(run_dir, config, images_seen)

    def line(self, text: str) -> None:
        with disk_errors(self.run_dir), (self.run_dir / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def stats(self, images_seen: int, scalars: dict[str, float]) -> None:
        with disk_errors(self.run_dir):
            with (self.run_dir / "stats.jsonl").open("a") as file:
                file.write(strict_json({"images": images_seen, **scalars}) + "\n")
            self._track(scalars, images_seen)

    def metric(self, path: Path, record: dict[str, Any]) -> None:
        """Add a record, which has ``images``, to its JSON-lines file, and its numbers to the trackers."""
        with disk_errors(path), path.open("a") as file:
            file.write(strict_json(record) + "\n")
        results = {f"{record['metric']}/{name}": value for name, value in record["results"].items()}
        self._track(results, record["images"])

    def _track(self, values: dict[str, float], images_seen: int) -> None:
        for tracker in self.trackers:
            tracker.scalars(values, images_seen)

    def picture(self, name: str, path: Path, images_seen: int) -> None:
        """A grid that was written."""
        for tracker in self.trackers:
            tracker.picture(name, path, images_seen)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def strict_json(record: dict[str, Any]) -> str:
    """JSON as its standard has it: a number that is not finite is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(part) for key, part in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), allow_nan=False)


def truncate_jsonl(path: Path, images_seen: int) -> None:
    """Drop the lines after ``images_seen``, so that a resumed run writes one continuous curve."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            images = json.loads(line).get("images")
        except (ValueError, AttributeError):  # the last line of a run that was killed while writing it
            continue
        if not (isinstance(images, int) and images > images_seen):  # records of other things stay
            kept.append(line + "\n")
    with whole_file(path) as part:
        part.write_text("".join(kept))
