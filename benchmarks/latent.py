"""The latent model, sampling and training, in turns: ``python -m benchmarks.latent [DEPTH BATCH]``.

fp32 without compilation against bf16, and against bf16 compiled; guidance with its needless halves and without. On a
GPU the model is XL/2 whole; on a CPU four of its 28 blocks, of which a step is made alike.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measure import DEVICE, in_turns, peak_mib, reset_peak
from benchmarks.step import beside_products
from diffit.configs.presets import imagenet256
from diffit.configs.schema import Config, LatentModel
from diffit.diffusion.adm import schedule_of
from diffit.models.cost import count_work
from diffit.models.latent import LatentDiffiT
from diffit.sampling.model import Model, prepare, sample
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import Processes

SKIP = 1e-2


def make(depth: int, batch: int) -> Config:
    base = imagenet256()
    model = base.model.model_copy(update={"depth": depth})
    assert isinstance(model, LatentModel)
    training = base.training.model_copy(update={"batch": batch})
    return base.model_copy(update={"model": model, "training": training})


def fresh(config: Config) -> LatentDiffiT:
    net = build_network(config).to(DEVICE)
    assert isinstance(net, LatentDiffiT)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)
    return net


def sampling_step(config: Config, precision: str, *, compiled: bool = False) -> Callable[[], object]:
    """One guided evaluation at the last timestep, where the scale is highest."""
    net = prepare(fresh(config), precision)
    if compiled:
        net.compile(fullgraph=True)
    batch = config.training.batch
    x = torch.randn(batch, *config.model.sample_shape, device=DEVICE)
    labels = torch.arange(batch, device=DEVICE) % config.model.num_classes
    assert config.diffusion.kind == "adm"
    denoise = Model(net, config, None, precision).denoiser(labels)
    sigma = schedule_of(config.diffusion).sigma[0]

    def run() -> object:
        with torch.no_grad():
            return denoise(x, sigma)

    return run


def training_step(config: Config, precision: str, *, compiled: bool = False) -> Callable[[], None]:
    training = config.training.model_copy(update={"compile": compiled})
    config = config.model_copy(update={"training": training})
    stepper = Stepper(config, Processes(0, 1, DEVICE), fresh(config), precision)
    moments = torch.zeros(training.batch, 4, *config.model.sample_shape, device=DEVICE)
    moments[:, 1::2] = 5.0
    labels = torch.arange(training.batch, device=DEVICE) % config.model.num_classes
    return lambda: stepper.step(iter([(moments, labels)]))


def ceiling(seconds_a_round: float = 0.5) -> float:
    """Multiply-accumulates a second of a large bf16 matrix product, in this run."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    (seconds,) = in_turns(lambda: a @ b, rounds=15)
    return n**3 / seconds


def compare(name: str, make_step: Callable[..., Callable[[], object]], config: Config, macs: float) -> None:
    """Images a second of three ways, as ratios to the first, and the last's share of the matrix ceiling."""
    ways = {"fp32 eager": ("fp32", False), "bf16 eager": ("bf16", False), "bf16 compiled": ("bf16", True)}
    reset_peak()
    steps = [make_step(config, precision, compiled=compiled) for precision, compiled in ways.values()]
    times = in_turns(*steps, rounds=5)
    batch, top = config.training.batch, ceiling()
    for way, seconds in zip(ways, times, strict=True):
        share = macs * batch / seconds / top
        print(
            f"{name}, batch {batch}, {way}: {seconds / times[0]:.2f} of fp32's time ({seconds * 1e3:.0f} ms, "
            f"{batch / seconds:.3g} img/s), {share:.0%} of the bf16 matrix ceiling ({top / 1e12:.3g} TMAC/s)",
            flush=True,
        )
    print(f"{name}: peak memory {peak_mib():.0f} MiB, all three ways held at once", flush=True)


def skipping(config: Config) -> None:
    """A short guided walk with every unconditional half, with those that the scale needs, and with a tolerance."""
    net = prepare(fresh(config))
    count = [0]
    net.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    constant = {"cfg_power": 0}
    walks, images, evaluations = [], [], []
    for changes in (constant, {}, {"cfg_skip": SKIP}):
        walk = partial(sample, net, config, [0], sampler="dpm++", steps=12, **changes)
        count[0] = 0
        images.append(walk())
        evaluations.append(count[0])
        walks.append(walk)
    every, needed, skipped = in_turns(*walks, rounds=3)
    difference = (images[2] - images[1]).square().mean().sqrt() / images[1].std()
    print(
        f"12 guided steps, power-cosine: {needed / every:.2f} of the time with both halves always "
        f"({evaluations[1]} : {evaluations[0]} evaluations); with --cfg-skip {SKIP:g} {skipped / every:.2f} "
        f"({evaluations[2]}), latents {difference:.1e} of their deviation away (random weights)",
        flush=True,
    )


def main(depth: int | None = None, batch: int | None = None) -> None:
    on_gpu = DEVICE.type == "cuda"
    config = make(depth or (28 if on_gpu else 4), batch or (32 if on_gpu else 1))
    macs = count_work(config).macs
    print(f"{config.preset} at depth {config.model.model_dump()['depth']}, {macs / 1e9:.1f} GMAC an evaluation")
    compare("guided sampling step", sampling_step, config, 2 * macs)
    whole, products, _ = beside_products(sampling_step(config, "bf16"), rounds=7)
    print(
        f"guided sampling step, bf16 eager: its matrix products alone, those of attention's kernel left out, take "
        f"{products / whole:.2f} of its time"
    )
    compare("training step", training_step, config, 3 * macs)
    skipping(config)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
