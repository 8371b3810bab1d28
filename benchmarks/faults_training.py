"""Faults of training runs: killed, signalled, a rank lost or hung, a loader process lost, other numbers of processes.

Each row starts real commands and hurts them from outside; a wrapper only makes steps slow or switches residence off.
Commands are forks of a process that has torch loaded, but for those that torchrun starts.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from helpers import start, write_archive

ROOT = Path(__file__).resolve().parent.parent

OPTIONS = [
    "--preset",
    "debug",
    "--cond",
    "--grid",
    "2x2",
    "--batch-gpu",
    "4",
    "--tick",
    "0.04",
    "--dump",
    "1",
    "--keep",
    "0",
]

# Steps of a chosen length, and data that are streamed by workers though they would fit the memory.
WRAPPER = """
import sys, time
from diffit.training import loop, step
seconds, streamed = float(sys.argv.pop(1)), sys.argv.pop(1) == "streamed"
honest = step.Stepper.step
def slow(self, feed):
    honest(self, feed)
    time.sleep(seconds)
step.Stepper.step = slow
if streamed:
    loop.load_resident = lambda archive, procs, workers: (None, "streamed")
from diffit.__main__ import main
main()
"""


# Steps until the guard knows what is usual, then one whose loss is multiplied on one process only.
SPIKE = """
import sys, torch
import torch.distributed as dist
from diffit.configs.resolve import DataFacts, resolve
from diffit.training.batches import feed, microbatches
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import processes
factor = float(sys.argv[1])
with processes() as procs:
    config = resolve("debug", {"batch_gpu": 4}, DataFacts(3, (16, 16), None))
    stepper = Stepper(config, procs, build_network(config), "fp32")
    data = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    order = microbatches(32, 0, 0, 8, 4, procs.rank, procs.count)
    images = feed(type("Plain", (), {"labels": None}), order, torch.device("cpu"), resident=data, workers=0)
    for _ in range(20):
        stepper.step(images)
    def held():
        moments = [value for state in stepper.optimizer.state.values() for value in state.values()]
        return [tensor.clone() for tensor in (*stepper.net.parameters(), *stepper.ema.parameters(), *moments)]
    before, honest = held(), stepper.microbatch_loss
    last = procs.rank == procs.count - 1
    stepper.microbatch_loss = lambda *given: honest(*given) * (factor if last else 1)
    stepper.step(images)
    after = held()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "something moved"
    assert int(stepper.meter.skipped) == 1
    stepper.microbatch_loss = honest
    stepper.step(images)
    assert all(bool(tensor.isfinite().all()) for tensor in held()), "something is not finite"
    assert not torch.equal(held()[0], before[0])
"""

# The n-th time that something is brought to the disk fails as a broken disk does.
BROKEN = """
import errno, os, sys
honest, left = os.fsync, [int(sys.argv.pop(1))]
def failing(descriptor):
    left[0] -= 1
    if left[0] == 0:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    honest(descriptor)
os.fsync = failing
from diffit.cli import main
main()
"""


LOCK = threading.Lock()
PATIENCE = 900  # seconds that any command may take


class Forked:
    """A command in a process of its own, by the part of :class:`subprocess.Popen`'s interface that is used here.

    multiprocessing asks after all its processes whenever it starts one, which two threads must not do at a time.
    """

    def __init__(self, program: str, *words: object, output: Path) -> None:
        output.mkdir(exist_ok=True)
        self.output = output
        with LOCK:
            (self.process,) = start(program, *words, output=output, PYTHONPATH=str(ROOT / "src"))
        assert self.process.pid is not None
        self.pid = self.process.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with LOCK:
            self.returncode = self.process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As :meth:`subprocess.Popen.wait`; what hangs is killed after :data:`PATIENCE`, which fails its row."""
        ends = time.monotonic() + (PATIENCE if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > ends:
                if timeout is not None:
                    raise subprocess.TimeoutExpired("diffit", timeout)
                self.kill()
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def said(self) -> str:
        return printed(self.output)


def printed(folder: Path) -> str:
    """What a command has written so far, its progress before its results."""
    return "".join(path.read_text() for path in sorted(folder.glob("std*"), reverse=True))


@dataclass(frozen=True)
class Row:
    """What was injected how often, and what came of it; ``failures`` says where it was not as promised."""

    fault: str
    tried: int
    seen: str
    failures: tuple[str, ...] = ()


class Place:
    """A temporary folder with data, in which commands run."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="diffit-faults-"))
        self.data = write_archive(self.folder / "pets.zip", 24)
        for name, text in {"wrapper": WRAPPER, "spike": SPIKE, "broken": BROKEN}.items():
            (self.folder / f"{name}.py").write_text(text)
        self.runs = 0

    def start(
        self, outdir: str, *options: object, processes: int = 1, seconds: float = 0.0, streamed: bool = False
    ) -> Forked:
        program = [str(self.folder / "wrapper.py")]
        if processes > 1:
            program = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                       "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", *program]  # fmt: skip
        words: list[object] = [*program, seconds, "streamed" if streamed else "resident"]
        words += ["train", "--outdir", self.folder / outdir]
        words += ["--data", self.data, *OPTIONS, *options]
        return Forked(*map(str, words), output=self.folder / f"{outdir}.log")

    def diffit(self, *words: object, program: str = "diffit") -> Forked:
        """Any command, or a file in the place of ``diffit``."""
        self.runs += 1
        return Forked(program, *words, output=self.folder / f"command{self.runs}.log")

    def log(self, outdir: str) -> str:
        return printed(self.folder / f"{outdir}.log")

    def run_dir(self, outdir: str) -> Path | None:
        """The newest: a run that was killed before its first state is not taken up, and leaves its folder."""
        return max((self.folder / outdir).glob("0*"), default=None)

    def states(self, outdir: str) -> list[str]:
        run = self.run_dir(outdir)
        return sorted(path.name for path in run.glob("training-state-*")) if run else []

    def wait_for(self, outdir: str, pattern: str, seconds: float = 90) -> bool:
        """Until the run's folder holds a file of that pattern, or its log that text."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            run = self.run_dir(outdir)
            if (run and list(run.glob(pattern))) or pattern in self.log(outdir):
                return True
            time.sleep(0.05)
        return False

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def family(process: Forked) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
        return found
    except psutil.NoSuchProcess:
        return []


def ranks(process: Forked) -> list[psutil.Process]:
    """The training processes below torchrun, in the order of their ranks."""
    return [
        child for child in family(process) if child.ppid() == process.pid and "wrapper.py" in " ".join(child.cmdline())
    ]


def content(run: Path) -> dict[str, bytes]:
    """What a run's newest state and snapshot hold, but for the seconds it took."""
    state = sorted(run.glob("training-state-*"))[-1]
    found = {name: (state / f"{name}.safetensors").read_bytes() for name in ("model", "ema", "optimizer")}
    snapshot = sorted(run.glob("network-snapshot-*"))[-1]
    return found | {"snapshot": snapshot.read_bytes()[-4096:], "names": f"{state.name} {snapshot.name}".encode()}


def leftovers(run: Path) -> list[str]:
    return [
        path.name for path in run.iterdir() if path.name.startswith(".") or path.suffix in (".part", ".old", ".tmp")
    ]


def unlike(place: Place, name: str, expected: dict[str, bytes]) -> list[str]:
    """What is not as in a run to which nothing happened: its bytes, or that nothing is left over."""
    run = place.run_dir(name)
    if run is None or content(run) != expected:
        return [f"ended in other bytes: {place.log(name)[-800:]}"]
    return [f"left {left}"] if (left := leftovers(run)) else []


def kills(count: int, seed: int) -> Row:
    """SIGKILL at random moments, and the same command again until it is done."""
    place, rng, failures = Place(), random.Random(seed), []
    place.start("whole", "--kimg", "0.8").wait()
    expected = content(place.run_dir("whole"))  # type: ignore[arg-type]
    done = 0
    while done < count:
        name = f"killed{done}"
        while True:
            process = place.start(name, "--kimg", "0.8")
            try:
                process.wait(rng.uniform(0.3, 9) if done < count else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                continue
            if process.returncode:
                failures.append(f"{name}: exit {process.returncode}: {place.log(name).splitlines()[-1]}")
            break
        failures += [f"{name}: {wrong}" for wrong in unlike(place, name, expected)]
    place.close()
    return Row("SIGKILL at random moments", count, "the same bytes at the end, nothing left over", tuple(failures))


CASES = {
    "step": ("--kimg", "50"),
    "start-up": ("--kimg", "50"),
    "grid": ("--kimg", "50", "--grid", "24x24", "--snap", "1"),
    "metric": ("--kimg", "50", "--metrics", "kd20000_full:pixels", "--metrics-ticks", "1"),
}
MARKS = {
    "step": "stats.jsonl",
    "start-up": "reals.png",
    "grid": "then a grid of its samples",
    "metric": "training-state-*",
}


def signalled(processes: int, number: int, streamed: bool, phase: str) -> Row:
    """A signal in a phase, with steps of four seconds; the time until all processes are gone."""
    options, place, failures, name = CASES[phase], Place(), list[str](), "run"
    process = place.start(
        name, *options, processes=processes, seconds=4.0 if phase == "step" else 0.05, streamed=streamed
    )
    reached = place.wait_for(name, MARKS[phase], 300)
    time.sleep(0.3)
    below, began = family(process), time.monotonic()
    process.send_signal(number)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        failures.append("still there after 60 s")
        process.kill()
    took = time.monotonic() - began
    _, alive = psutil.wait_procs(below, timeout=6)  # loader processes look for their parent every five seconds
    states = place.states(name)
    if not reached:
        failures.append(f"{phase} was not reached")
    if took > 20:
        failures.append(f"took {took:.0f} s")
    if processes == 1 and process.returncode != 128 + number:
        failures.append(f"exit status {process.returncode}")
    if alive:
        failures.append(f"{len(alive)} orphans")
        for orphan in alive:
            orphan.kill()
    if not states:
        failures.append("no state")
    if "Traceback" in place.log(name).split("torch/distributed/elastic")[0] and processes == 1:
        failures.append("a traceback")
    logged = place.log(name)[-1500:]
    seen = f"gone in {took:.1f} s, {len(states)} states, exit {process.returncode}"
    kind = f"{signal.Signals(number).name} in a {phase}, {processes} process{'es' if processes > 1 else ''}"
    place.close()
    return Row(kind + (", streamed" if streamed else ""), 1, seen, tuple(f"{f}\n{logged}" for f in failures))


def lost_rank(number: int, timeout_minutes: float) -> Row:
    """One of two ranks killed or stopped in the middle; the other's message, its time, and the restart."""
    place, failures = Place(), []
    options = ("--kimg", "0.8", "--timeout-minutes", timeout_minutes)
    place.start("whole", *options, processes=2).wait()
    process = place.start("run", *options, processes=2, seconds=0.1)
    place.wait_for("run", "training-state-000000.120", 120)
    victim = ranks(process)[1]
    survivor = ranks(process)[0]
    victim.send_signal(number)
    began = time.monotonic()
    psutil.wait_procs([survivor], timeout=60 * timeout_minutes + 30)
    took = time.monotonic() - began
    if survivor.is_running():
        failures.append("the other rank is still there")
    if took > (15 if number == signal.SIGKILL else 60 * timeout_minutes):
        failures.append("too late")
    # torchrun asks the others to stop when it sees a dead one, which may be before they miss it.
    words = ("everything up to", "everything saved") if number == signal.SIGKILL else ("everything up to",)
    said = [line for line in place.log("run").splitlines() if any(word in line for word in words)]
    if not said:
        failures.append("no message")
    elif number == signal.SIGSTOP and "process 1 of 2" not in said[0]:
        failures.append(f"the message does not name the rank: {said[0]}")
    for child in [*ranks(process), victim]:
        if child.is_running():
            child.kill()
    process.kill()
    process.wait()
    place.start("run", *options, processes=2).wait()
    if content(place.run_dir("run")) != content(place.run_dir("whole")):  # type: ignore[arg-type]
        failures.append("the restart ended in other bytes")
    place.close()
    return Row(
        f"{signal.Signals(number).name} to one of two ranks", 1, f"the other gone after {took:.1f} s", tuple(failures)
    )


def lost_worker(number: int) -> Row:
    """A loader process ended from outside."""
    place, failures = Place(), []
    process = place.start("run", "--kimg", "50", "--workers", "2", seconds=0.2, streamed=True)
    place.wait_for("run", "stats.jsonl", 90)
    workers = [child for child in family(process) if child.pid != process.pid]
    workers[0].send_signal(number)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        failures.append("still there after 60 s")
        process.kill()
    log = place.log("run")
    if "a process that reads images has died" not in log or "Traceback" in log:
        failures.append(log[-1500:])
    if not place.states("run"):
        failures.append("no state")
    place.close()
    return Row(f"{signal.Signals(number).name} to a loader process", 1, "state saved, one line", tuple(failures))


def worlds() -> Row:
    """One process, then two, four and one again, against one throughout."""
    place, failures = Place(), []
    options = ("--batch-gpu", "2")
    place.start("whole", *options, "--kimg", "0.32").wait()
    for kimg, processes in ((0.08, 1), (0.16, 2), (0.24, 4), (0.32, 1)):
        place.start("run", *options, "--kimg", kimg, processes=processes).wait()
    losses = []
    for name in ("whole", "run"):
        run = place.run_dir(name)
        assert run is not None
        losses.append([json.loads(line)["loss"] for line in (run / "stats.jsonl").read_text().splitlines()])
    worst = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    if worst > 1e-6:
        failures.append(f"losses {worst:.1e} apart")
    place.close()
    return Row("1, 2, 4, 1 processes", 1, f"losses at most {worst:.1e} apart", tuple(failures))


def full_disk(sizes: list[int]) -> Row:
    """A file system of so many KiB; then room is made and the same command goes on. Needs root, for the mount."""
    place, failures = Place(), []
    place.start("whole", "--kimg", "0.32").wait()
    expected = content(place.run_dir("whole"))  # type: ignore[arg-type]
    full = 0
    for size in sizes:
        name = f"disk{size}"
        outdir = place.folder / name
        outdir.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", outdir], check=True)
        try:
            status = place.start(name, "--kimg", "0.32").wait()
            last = place.log(name).strip().splitlines()[-1]
            full += status != 0
            if status and ("the disk is full" not in last or "Traceback" in place.log(name)):
                failures.append(f"{size} KiB: {place.log(name)[-800:]}")
            subprocess.run(["mount", "-o", "remount,size=64m", outdir], check=True)
            place.start(name, "--kimg", "0.32").wait()
            failures += [f"{size} KiB: {wrong}" for wrong in unlike(place, name, expected)]
        finally:
            subprocess.run(["umount", outdir], check=False)
    place.close()
    return Row("a full disk", len(sizes), f"{full} times one line; the same bytes once there is room", tuple(failures))


def broken_disk(calls: Sequence[int]) -> Row:
    """EIO at the fsync of each of these numbers; then the disk is well again and the same command goes on."""
    place, failures, said = Place(), [], 0
    place.start("whole", "--kimg", "0.16").wait()
    expected = content(place.run_dir("whole"))  # type: ignore[arg-type]
    for call in calls:
        name = f"broken{call}"
        words = [call, "train", "--outdir", place.folder / name, "--data", place.data, *OPTIONS, "--kimg", "0.16"]
        done = place.diffit(*words, program=str(place.folder / "broken.py"))
        if done.wait():
            said += 1
            if "the disk cannot be read or written" not in done.said() or "Traceback" in done.said():
                failures.append(f"call {call}: {done.said()[-800:]}")
        place.start(name, "--kimg", "0.16").wait()
        failures += [f"call {call}: {wrong}" for wrong in unlike(place, name, expected)]
    place.close()
    return Row("a disk that breaks", len(calls), f"{said} times one line; the same bytes afterwards", tuple(failures))


def writers() -> Row:
    """Every command that writes, on a full and on a read-only file system, then with room. Needs root."""
    place, failures = Place(), []
    place.start("run", "--kimg", "0.08").wait()
    run = place.run_dir("run")
    assert run is not None
    network = next(run.glob("network-snapshot-*"))
    target = place.folder / "target"
    target.mkdir()
    commands = {
        "convert": ["data", "convert", "--source", place.data, "--dest", target / "a.zip", "--resolution", "64x64"],
        "sample": ["sample", "--network", network, "--outdir", target / "png", "--num-samples", "64", "--steps", "2"],
        "sample npz": ["sample", "--network", network, "--outdir", target / "npz", "--num-samples", "64", "--steps",
                       "2", "--format", "npz"],
        "export": ["export", "--network", network, "--to", "hub-folder", "--dest", target / "hub"],
        "train": ["train", "--data", place.data, "--outdir", target / "runs", *OPTIONS, "--kimg", "0.08"],
        "statistics": ["metrics", "ref", "--data", place.data, "--detector", "pixels", "--dest", target / "ref.npz"],
    }  # fmt: skip
    for name, words in commands.items():
        for options, expected in (("size=8k", "the disk is full"), ("size=8k,ro", "not writable")):
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", target], check=True)
            try:
                for remedy in (None, "remount,rw,size=64m"):
                    if remedy:
                        subprocess.run(["mount", "-o", remedy, target], check=True)
                    done = place.diffit(*words)
                    right = (done.wait() == 0) if remedy else (done.wait() == 1 and expected in done.said())
                    if not right or "Traceback" in done.said():
                        failures.append(f"{name} on {remedy or options}: exit {done.returncode}: {done.said()[-600:]}")
            finally:
                subprocess.run(["umount", target], check=False)
    place.close()
    return Row("each writer, a full and a read-only disk", 2 * len(commands), "one line; right once mended",
               tuple(failures))  # fmt: skip


def spikes(factor: str, processes: int) -> Row:
    """A loss multiplied on the last of some processes, in one step."""
    place = Place()
    script = str(place.folder / "spike.py")
    if processes > 1:
        launcher = ("--standalone", f"--nproc_per_node={processes}", script)
        done = place.diffit(*launcher, factor, program="torch.distributed.run")
    else:
        done = place.diffit(factor, program=script)
    failures = (done.said()[-1500:],) if done.wait() else ()
    place.close()
    where = "on one of two processes" if processes > 1 else "on one process"
    return Row(f"loss × {factor} {where}", 1, "not a bit moved, moments finite afterwards", failures)


def pairs(count: int) -> Row:
    """Two of the same command at once: two trainings of one run, two samplings into one folder."""
    place, failures, told = Place(), [], 0
    place.start("run", "--kimg", "0.08").wait()
    network = next(iter(place.run_dir("run").glob("network-snapshot-*")))  # type: ignore[union-attr]
    for i in range(count):
        if i % 2:
            both = [place.start("run", "--kimg", 0.08 + 0.04 * (i + 1), seconds=0.3) for _ in range(2)]
            statuses = [process.wait() for process in both]
            text = place.log("run")
        else:
            words = ["sample", "--network", network, "--outdir", place.folder / f"s{i}", "--seeds", "0-199"]
            both = [place.diffit(*words, "--steps", "6") for _ in range(2)]
            statuses = [process.wait() for process in both]
            text = "".join(process.said() for process in both)
            if len(list((place.folder / f"s{i}").glob("*.png"))) != 200:
                failures.append(f"pair {i}: not 200 images")
        told += sorted(map(bool, statuses)) == [False, True]
        if 0 not in statuses or (1 in statuses and "in use by process" not in text) or "Traceback" in text:
            failures.append(f"pair {i}: exit {statuses}: {text[-800:]}")
    place.close()
    return Row("two of the same command at once", count, f"{told} times the second was told", tuple(failures))


def rows(*, whole: bool) -> Iterator[Callable[[], Row]]:
    """All rows; not ``whole`` is a short form."""
    # Ten at a time, each with a seed of its own, that no row takes much longer than the others.
    yield from (partial(kills, 10 if whole else 3, seed) for seed in range(5 if whole else 1))
    one = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1] if whole else [signal.SIGTERM]
    for processes, streamed in ((1, False), (1, True), (2, False), (2, True)) if whole else ((2, False),):
        yield from (partial(signalled, processes, number, streamed, phase) for phase in CASES for number in one)
    yield partial(lost_rank, signal.SIGKILL, 0.5)
    yield partial(lost_rank, signal.SIGSTOP, 0.25)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV) if whole else (signal.SIGKILL,):
        yield partial(lost_worker, number)
    yield worlds
    for factor in ("100", "1e30", "nan") if whole else ("1e30",):
        yield from (partial(spikes, factor, processes) for processes in (1, 2))
    calls = [range(1, 11), range(11, 21), range(21, 31)] if whole else [range(1, 3)]
    yield from (partial(broken_disk, part) for part in calls)
    yield partial(pairs, 16 if whole else 2)
    if os.geteuid() == 0:
        sizes = [64, *range(300, 3200, 100)] if whole else [64, 600]
        parts = 3 if whole else 1
        yield from (partial(full_disk, sizes[part::parts]) for part in range(parts))
        yield writers


def main() -> int:
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each row waits for processes of its own
        for row in pool.map(lambda inject: inject(), rows(whole="--short" not in sys.argv)):
            print(f"{'FAILED' if row.failures else 'ok':7}{row.fault:55}{row.tried:4}  {row.seen}", flush=True)
            for failure in row.failures:
                print(f"         {failure}")
            failed += bool(row.failures)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
