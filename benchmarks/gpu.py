"""All that only a GPU can show, in one go: ``make gpu``, or ``python -m benchmarks.gpu [--cifar10 ARCHIVE]``.

Gradients of every attention path against float64, what the device reaches at most, steps that nothing waits in, with
``torch.compile`` and in either memory format, guided denoising, the price of a bias in attention, collectives, memory,
a profile, and CIFAR-10 for some minutes where its archive is given. What is found goes to
``benchmarks/results/<machine>.json``, and whatever is wrong ends the command with status 1. On a machine without a GPU
the same is done on small networks, and nothing is compiled.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import DEVICE, in_turns, machine, peak_mib, reset_peak
from diffit.configs.resolve import resolve
from diffit.models.attention import BACKENDS, MAX_WINDOWS, TMSA, in_parts, kernel_attention, plain_attention
from diffit.models.cost import count_work, estimate
from diffit.sampling import Model, prepare
from diffit.sampling.settings import with_sampling
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import Processes, alone, processes

RESULTS = Path(__file__).parent / "results"
GPU = DEVICE.type == "cuda"
PRESETS = (
    {"cifar10": 512, "ffhq64": 64, "imagenet256": 32, "imagenet512": 8} if GPU else {"debug": 8, "latent-debug": 8}
)
COMPILED = {"cifar10": ("default", "reduce-overhead"), "imagenet256": ("default",)} if GPU else {}
"""Modes of torch.compile; each costs about a minute."""
GUIDED = {"imagenet256": 32} if GPU else {"latent-debug": 2}
# Windows, heads, tokens and width of a head, as the presets have them.
SHAPES = (
    {"cifar10": (512 * 64, 4, 16, 32), "ffhq64": (64 * 64, 4, 64, 48), "imagenet256": (32, 16, 256, 72),
     "imagenet512": (8, 16, 1024, 72)}
    if GPU
    else {"debug": (32, 2, 16, 8)}
)  # fmt: skip
# Map and window: windows, the whole map, lengths ≡ 64 mod 128 and odd ones, windows that are padded.
MAPS = (
    [(32, 4), (64, 8), (8, None), (24, None), (16, None), (32, None), (7, None), (10, 4)]
    if GPU
    else [(7, None), (10, 4)]
)
TOLERANCE = 4
"""On the errors of gradients, in multiples of those of plain matrix products in the same precision."""
Batches = Iterator[tuple[torch.Tensor, torch.Tensor | None]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MANY = MAX_WINDOWS + 1000 if GPU else 1000
BUCKET = 25_000_000 if GPU else 250_000  # numbers of an all-reduce


def stepper_of(preset: str, batch: int, precision: str, procs: Processes, **options: Any) -> tuple[Stepper, Batches]:
    config = resolve(preset, {"batch": batch * procs.count, "batch_gpu": batch, "cond": False, **options})
    stepper, shape = Stepper(config, procs, build_network(config), precision), config.model.sample_shape
    if config.autoencoder is None:
        data = torch.zeros(batch, *shape, dtype=torch.uint8, device=procs.device)
    else:
        data = torch.ones(batch, 4, *shape, device=procs.device)  # cached moments
    labels = torch.zeros(batch, dtype=torch.int64, device=procs.device) if config.model.num_classes else None
    return stepper, itertools.repeat((data, labels))


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
                layer = TMSA(dim, 32, heads, grid_size=side, window_size=window)
                layer.attention = kernel_attention if fused else plain_attention  # also where windows are short
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


@cache
def ceiling(precision: str) -> float:
    """TFLOPS of one large matrix product; of float32 without TF32, which only convolutions use by default."""
    side = 8192 if GPU else 512
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPES[precision]) for _ in range(2))
    (seconds,) = in_turns(lambda: a @ b, rounds=10)
    return 2 * side**3 / seconds / 1e12


def copying() -> float:
    """GB per second of a copy on the device, bytes read and written."""
    source = torch.ones(2**28 if GPU else 2**22, device=DEVICE)
    dest = torch.empty_like(source)
    (seconds,) = in_turns(lambda: dest.copy_(source), rounds=10)
    return 2 * source.nbytes / seconds / 1e9


def steps(preset: str, batch: int, precision: str, mode: str | None = None) -> dict[str, float]:
    """Time and memory of training steps, in which nothing waits; compiled in that mode, where one is given."""
    reset_peak()
    before = peak_mib()
    stepper, data = stepper_of(preset, batch, precision, alone(DEVICE))
    if mode is not None:
        stepper.net.compile(mode=mode)
    began = time.perf_counter()
    for _ in range(2 if mode is None else 4):  # what is allocated once, or compiled, or recorded
        stepper.step(data)
    float(stepper.meter.last_loss)  # waits
    first = time.perf_counter() - began
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
        "share of the ceiling": work / seconds / 1e12 / ceiling(precision),
        "peak MiB": used,
        "estimated MiB": estimated,
        "seconds to warm up": first,
    }


def contiguous(preset: str, batch: int, precision: str) -> dict[str, float]:
    """Images per second with weights in channels_last, as we have them, and in PyTorch's own memory format."""
    ours, data = stepper_of(preset, batch, precision, alone(DEVICE))
    theirs, _ = stepper_of(preset, batch, precision, alone(DEVICE))
    for net in (theirs.net, theirs.ema):
        net.to(memory_format=torch.contiguous_format)
    times = in_turns(lambda: ours.step(data), lambda: theirs.step(data), rounds=5 if GPU else 2)
    return {name: batch / seconds for name, seconds in zip(("channels_last", "contiguous"), times, strict=True)}


def guided(preset: str, batch: int, *, compiled: bool) -> dict[str, float]:
    """Guided evaluations of a network per second, both halves in one batch."""
    config = resolve(preset, {})
    model = config.model.model_copy(update={"num_classes": config.model.num_classes or 1000})
    config = with_sampling(config.model_copy(update={"model": model}), guidance=2.0)
    net = prepare(build_network(config).to(DEVICE), "bf16")
    if compiled:
        net.compile()
    labels = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    denoise = Model(net, config, precision="bf16").denoiser(labels)
    x = torch.randn(batch, *config.model.sample_shape, device=DEVICE, dtype=torch.float64)
    sigma = torch.ones((), device=DEVICE)

    def run() -> None:
        with torch.no_grad():
            denoise(x, sigma)

    (seconds,) = in_turns(run, rounds=5 if GPU else 2)
    work = 2 * 2 * count_work(config).macs * batch
    return {
        "images per second": batch / seconds,
        "TFLOPS": work / seconds / 1e12,
        "share of the ceiling": work / seconds / 1e12 / ceiling("bf16"),
    }


def bias_price(windows: int, heads: int, tokens: int, width: int) -> dict[str, float]:
    """Milliseconds of attention, forward and backward in bf16: as written, fused with a bias, fused without one."""
    q, k, v = (torch.randn(windows, heads, tokens, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(heads, tokens, tokens, device=DEVICE)
    for tensor in (q, k, v, bias):
        tensor.requires_grad_()

    def unbiased(*given: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(BACKENDS):
            q, k, v = given
            return in_parts(F.scaled_dot_product_attention, q, k, v, limit=MAX_WINDOWS)

    def timed(attention: Callable[..., torch.Tensor], *given: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(*given).float().sum(), given)

    times = in_turns(
        timed(plain_attention, q, k, v, bias),
        timed(kernel_attention, q, k, v, bias),
        timed(unbiased, q, k, v),
        rounds=7 if GPU else 2,
    )
    return {name: 1000 * t for name, t in zip(("plain", "fused", "fused without bias"), times, strict=True)}


def kernels(preset: str, batch: int, precision: str) -> list[dict[str, Any]]:
    """The kernels that a step spends most time in."""
    stepper, data = stepper_of(preset, batch, precision, alone(DEVICE))
    stepper.step(data)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]) as seen:
        stepper.step(data)
    spent = "self_device_time_total" if GPU else "self_cpu_time_total"
    # On a GPU the kernels alone: what calls them has their time once more.
    events = [row for row in seen.key_averages() if not GPU or row.device_type.name == "CUDA"]
    rows = sorted(events, key=lambda row: -getattr(row, spent))[:15]
    return [{"name": row.key[:120], "ms": getattr(row, spent) / 1000, "calls": row.count} for row in rows]


def three_losses(procs: Processes, shard: bool) -> list[float]:
    """Losses of three steps. Nothing that holds on to the process group is left when it is taken down."""
    stepper, data = stepper_of("cifar10" if GPU else "debug", 4, "fp32", procs, shard=shard, augment=0.0)
    losses = []
    for _ in range(3):
        stepper.step(data)
        losses.append(stepper.meter.read(procs)["loss"])
    return losses


def collectives() -> dict[str, Any]:
    """By all processes, under torchrun: an all-reduce, and the losses of whole and of sharded weights."""
    found: dict[str, Any] = {}
    with processes() as procs:
        ones = torch.ones(BUCKET, device=procs.device)
        dist.all_reduce(ones)
        found["sum"] = float(ones.double().mean())
        (seconds,) = in_turns(lambda: dist.all_reduce(ones), rounds=3)
        found["all-reduce GB per second"] = 2 * (procs.count - 1) / procs.count * ones.nbytes / seconds / 1e9
        for name, shard in {"losses": False, "sharded losses": True}.items():
            found[name] = three_losses(procs, shard)
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
    parser.add_argument("--sections", default="", metavar="REGEX", help="only those with such names")
    parser.add_argument("--collectives", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.collectives:
        if found := collectives():
            print(json.dumps(found), flush=True)
        return 0
    found = {"machine": machine(), "cudnn": torch.backends.cudnn.version(), "nccl": _nccl()}
    dest = given.dest or RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', machine().lower()).strip('-')}.json"
    precisions = ("fp32", "bf16") if GPU else ("fp32",)
    first = next(iter(PRESETS.items()))
    sections: dict[str, Callable[[], Any]] = {"attention": attention}
    sections["ceilings, TFLOPS"] = lambda: {precision: ceiling(precision) for precision in precisions}
    sections["copy, GB per second"] = copying
    for preset, batch in PRESETS.items():
        for precision in precisions:
            sections[f"step, {preset}, {batch} images, {precision}"] = partial(steps, preset, batch, precision)
    sections["kernels"] = partial(kernels, *first, precisions[-1])
    sections["memory format"] = partial(contiguous, *first, precisions[-1])
    for preset, shape in SHAPES.items():
        sections[f"attention of {preset}, ms"] = partial(bias_price, *shape)
    for preset, batch in GUIDED.items():
        sections[f"guided, {preset}, {batch} images, bf16"] = partial(guided, preset, batch, compiled=False)
    for preset, modes in COMPILED.items():
        for mode in modes:
            case = (preset, PRESETS[preset], "bf16", mode)
            sections[f"step, {preset}, {PRESETS[preset]} images, bf16, compiled ({mode})"] = partial(steps, *case)
    for preset, batch in GUIDED.items() if GPU else ():
        sections[f"guided, {preset}, {batch} images, bf16, compiled"] = partial(guided, preset, batch, compiled=True)
    if given.processes > 1:
        sections["collectives"] = lambda: launched(given.processes)
    if given.cifar10 is not None:
        sections["cifar10"] = lambda: cifar10(given.cifar10, given.minutes)
    chosen = {name: section for name, section in sections.items() if re.search(given.sections, name)}
    if not chosen:
        parser.error(f"--sections {given.sections}: none of {', '.join(sections)}")
    if given.sections and dest.exists():  # the others stay
        found = json.loads(dest.read_text()) | found
    broken = []
    for name, section in chosen.items():
        if GPU:
            torch.cuda.empty_cache()
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
