"""All that only a GPU can show, in one go: ``make gpu``, or ``python -m benchmarks.gpu [--cifar10 ARCHIVE]``.

Gradients of every attention path against float64, steps that nothing waits in, collectives, times, memory, a profile,
and CIFAR-10 for some minutes where its archive is given. What is found goes to ``benchmarks/results/<machine>.json``,
and whatever is wrong ends the command with status 1. On a machine without a GPU the same is done on small networks.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import DEVICE, in_turns, machine, peak_mib, reset_peak
from benchmarks.memory import Same
from diffit.configs.resolve import resolve
from diffit.models.attention import MAX_WINDOWS, TMSA
from diffit.models.cost import count_work, estimate
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import Processes, alone, processes

RESULTS = Path(__file__).parent / "results"
GPU = DEVICE.type == "cuda"
PRESETS = (
    {"cifar10": 128, "ffhq64": 32, "imagenet256": 32, "imagenet512": 8} if GPU else {"debug": 8, "latent-debug": 8}
)
# Map and window: windows, the whole map, lengths ≡ 64 mod 128 and odd ones, windows that are padded.
MAPS = (
    [(32, 4), (64, 8), (8, None), (24, None), (16, None), (32, None), (7, None), (10, 4)]
    if GPU
    else [(7, None), (10, 4)]
)
TOLERANCE = 4
"""On the errors of gradients, in multiples of those of plain matrix products in the same precision."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MANY = MAX_WINDOWS + 1000 if GPU else 1000
BUCKET = 25_000_000 if GPU else 250_000  # numbers of an all-reduce


def stepper_of(preset: str, batch: int, precision: str, procs: Processes, **options: Any) -> tuple[Stepper, Same]:
    config = resolve(preset, {"batch": batch * procs.count, "batch_gpu": batch, "cond": False, **options})
    stepper, shape = Stepper(config, procs, build_network(config), precision), config.model.sample_shape
    if config.autoencoder is None:
        data = torch.zeros(batch, *shape, dtype=torch.uint8, device=procs.device)
    else:
        data = torch.ones(batch, 4, *shape, device=procs.device)  # cached moments
    labels = torch.zeros(batch, dtype=torch.int64, device=procs.device) if config.model.num_classes else None
    return stepper, Same(data, labels)


def gradients(layer: TMSA, x: torch.Tensor, cond: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of the input and of all parameters, the bias table's among them."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        out = layer(x, cond)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).reshape(out.shape).sin()
    (out.double() * weights).sum().backward()
    return [part.grad.double().cpu() for part in (x, *layer.parameters()) if part.grad is not None]


def attention() -> dict[str, dict[str, float]]:
    """The largest error of a gradient, in multiples of its largest value, of each path and of plain products."""
    cases: list[tuple[int, int | None, int, int, int]] = [(side, window, 2, 64, 4) for side, window in MAPS]
    cases.append((4, 2, MANY // 4 + 1, 8, 1))  # on a GPU more windows than a kernel takes at a time
    found: dict[str, dict[str, float]] = {}
    for side, window, batch, dim, heads in cases:
        torch.manual_seed(0)
        exact = TMSA(dim, 32, heads, grid_size=side, window_size=window, fused=False).double()
        torch.nn.init.normal_(exact.relative_position_bias_table)
        x, cond = torch.randn(batch, side, side, dim), torch.randn(batch, 32)
        expected = gradients(exact, x.double(), cond.double(), torch.float64)
        for precision in ("fp32", "bf16", "fp16") if GPU else ("fp32", "bf16"):
            errors = {}
            for fused in (True, False):
                layer = TMSA(dim, 32, heads, grid_size=side, window_size=window, fused=fused)
                layer.load_state_dict(exact.state_dict())
                given = gradients(layer.to(DEVICE), x.to(DEVICE), cond.to(DEVICE), DTYPES[precision])
                off = [(a - b).abs().max() / b.abs().max() for a, b in zip(given, expected, strict=True)]
                errors["fused" if fused else "plain"] = float(torch.stack(off).max())  # NaN where one is
            found[f"map {side}, window {window}, batch {batch}, {precision}"] = errors
    return found


@contextmanager
def no_waiting() -> Iterator[None]:
    """RuntimeError where the CPU waits for the GPU."""
    if GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")


def steps(preset: str, batch: int, precision: str) -> dict[str, float]:
    """Time and memory of training steps, in which nothing waits."""
    reset_peak()
    before = peak_mib()
    stepper, data = stepper_of(preset, batch, precision, alone(DEVICE))
    for _ in range(2):  # what is allocated once
        stepper.step(data)
    with no_waiting():
        for _ in range(3):
            stepper.step(data)
    used = peak_mib() - before
    (seconds,) = in_turns(lambda: stepper.step(data), rounds=5 if GPU else 2)
    work = 3 * 2 * count_work(stepper.config).macs * batch  # the backward pass is two forward passes
    estimated = estimate(stepper.config, batch, precision, DEVICE.type).training_bytes / 2**20
    return {
        "images per second": batch / seconds,
        "TFLOPS": work / seconds / 1e12,
        "peak MiB": used,
        "estimated MiB": estimated,
    }


def kernels(preset: str, batch: int, precision: str) -> list[dict[str, Any]]:
    """The kernels that a step spends most time in."""
    stepper, data = stepper_of(preset, batch, precision, alone(DEVICE))
    stepper.step(data)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]) as seen:
        stepper.step(data)
    time = "self_device_time_total" if GPU else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, time))[:15]
    return [{"name": row.key[:120], "ms": getattr(row, time) / 1000, "calls": row.count} for row in rows]


def collectives() -> dict[str, Any]:
    """By all processes, under torchrun: an all-reduce, and the losses of whole and of sharded weights."""
    found: dict[str, Any] = {}
    with processes() as procs:
        ones = torch.ones(BUCKET, device=procs.device)
        dist.all_reduce(ones)
        found["sum"] = float(ones.double().mean())
        (seconds,) = in_turns(lambda: dist.all_reduce(ones), rounds=3)
        found["all-reduce GB per second"] = 2 * (procs.count - 1) / procs.count * ones.nbytes / seconds / 1e9
        for shard in (False, True):
            stepper, data = stepper_of("cifar10" if GPU else "debug", 4, "fp32", procs, shard=shard, augment=0.0)
            losses = []
            for _ in range(3):
                stepper.step(data)
                losses.append(stepper.meter.read(procs)["loss"])
            found["sharded losses" if shard else "losses"] = losses
        found["processes"] = procs.count
    return found if procs.is_first else {}


def launched(count: int) -> dict[str, Any]:
    """:func:`collectives` of ``count`` processes."""
    command = ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m", "benchmarks.gpu"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--collectives"], stdout=subprocess.PIPE, text=True, check=True,
        cwd=RESULTS.parents[1],
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    return found


def cifar10(archive: Path, minutes: float) -> dict[str, Any]:
    """The last statistics of a short training with the published recipe."""
    with tempfile.TemporaryDirectory() as folder:
        data, runs = Path(folder) / "cifar10.zip", Path(folder) / "runs"
        diffit = [sys.executable, "-m", "diffit"]
        subprocess.run([*diffit, "data", "convert", "--source", archive, "--dest", data], check=True)
        recipe = ["--preset", "cifar10"] if GPU else ["--preset", "small32", "--batch", "8"]
        length = ["--minutes", str(minutes), "--tick", "5"]
        subprocess.run([*diffit, "train", "--data", data, "--outdir", runs, *recipe, *length], check=True)
        (run_dir,) = runs.iterdir()
        found: dict[str, Any] = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])
        return found


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong, in words."""
    wrong = [
        f"{case}: a gradient is {error['fused']:.2g} of its largest value off, of plain products {error['plain']:.2g}"
        for case, error in found["attention"].items()
        if not error["fused"] <= TOLERANCE * error["plain"]
    ]
    together = found.get("collectives")
    if together is not None:
        if together["sum"] != together["processes"]:
            wrong.append(f"an all-reduce of ones over {together['processes']} processes is {together['sum']}")
        for whole, part in zip(together["losses"], together["sharded losses"], strict=True):
            if not abs(whole - part) <= 1e-4 * whole:
                wrong.append(f"sharded weights: a loss of {part}, whole ones {whole}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, metavar="ARCHIVE", help="cifar-10-python.tar.gz, or any archive of it")
    parser.add_argument("--minutes", type=float, default=10, help="to train on it (10)")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count(), help="of collectives (all GPUs)")
    parser.add_argument("--dest", type=Path, help="file of the results (benchmarks/results/<machine>.json)")
    parser.add_argument("--collectives", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.collectives:
        if found := collectives():
            print(json.dumps(found), flush=True)
        return 0
    found = {"machine": machine(), "cudnn": torch.backends.cudnn.version(), "nccl": _nccl()}
    dest = given.dest or RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', machine().lower()).strip('-')}.json"
    precisions = ("fp32", "bf16") if GPU else ("fp32",)
    sections: dict[str, Callable[[], Any]] = {"attention": attention}
    for preset, batch in PRESETS.items():
        for precision in precisions:
            sections[f"step, {preset}, {batch} images, {precision}"] = lambda case=(preset, batch, precision): steps(
                *case
            )
    first = next(iter(PRESETS.items()))
    sections["kernels"] = lambda: kernels(*first, precisions[-1])
    if given.processes > 1:
        sections["collectives"] = lambda: launched(given.processes)
    if given.cifar10 is not None:
        sections["cifar10"] = lambda: cifar10(given.cifar10, given.minutes)
    broken = []
    for name, section in sections.items():
        try:
            found[name] = section()
            print(f"{name}: {json.dumps(found[name])}", flush=True)
        except Exception as error:  # the others may be fine, and GPUs are rented by the minute
            found[name] = {}
            broken.append(f"{name}: {type(error).__name__}: {error}")
        dest.parent.mkdir(parents=True, exist_ok=True)
        dest.write_text(json.dumps(found, indent=2) + "\n")
    wrong = [*broken, *faults({"attention": {}} | {name: value for name, value in found.items() if value})]
    for line in wrong:
        print(f"FAULT {line}", flush=True)
    print(f"wrote {dest}", flush=True)
    return int(bool(wrong))


def _nccl() -> str | None:
    return ".".join(map(str, torch.cuda.nccl.version())) if GPU and dist.is_nccl_available() else None


if __name__ == "__main__":
    sys.exit(main())
