"""One training step: microbatches, gradients, optimiser, moving average. Nothing in it waits for the device."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, RAdam

from diffit.configs.resolve import accumulation
from diffit.configs.schema import Config, Training
from diffit.data.augment import Augment, flip_half
from diffit.models import DiffiT, build
from diffit.models.autoencoder import Autoencoder, draw_latents
from diffit.models.image import ImageDiffiT
from diffit.training.checkpoint import check_moments, load_state, save_state, state_groups, take_up
from diffit.training.ema import ema_beta, update_ema
from diffit.training.guard import Guard
from diffit.training.losses import build_loss
from diffit.training.meter import Meter
from diffit.training.muon import Muon, hidden_weights
from diffit.training.shard import gathered, part, shard, whole
from diffit.training.weighting import UncertaintyWeighting
from diffit.utils.distributed import Processes
from diffit.utils.images import to_float
from diffit.utils.memory import keep_freed_memory
from diffit.utils.precision import autocast, channels_last
from diffit.utils.randomness import DROPOUT, INIT, STEP, derive_seed
from diffit.weights.file import require_weights


def build_network(config: Config) -> DiffiT:
    """The network with weights that are a function of the seed, on the CPU so that every device begins alike."""
    with torch.random.fork_rng(devices=[]):  # by default it would open a context on every GPU of the machine
        torch.default_generator.manual_seed(derive_seed(config.training.seed, INIT))
        net = build(config.model)
        if isinstance(net, ImageDiffiT) and config.training.init != "xavier":
            net.init_weights(config.training.init)
    return channels_last(net) if isinstance(net, ImageDiffiT) else net


def build_optimizer(net: DiffiT, training: Training) -> torch.optim.Optimizer:
    """Adam; RAdam, whose first steps are short of themselves; or Muon with Adam."""
    groups = parameter_groups(net, training)
    adam: dict[str, Any] = {"lr": training.lr, "betas": training.betas, "eps": training.eps}
    if training.optimizer == "muon":
        return Muon(groups, **adam)
    return RAdam(groups, **adam) if training.optimizer == "radam" else Adam(groups, **adam, fused=True)


def learning_rate(training: Training, seen: int, end: int) -> float:
    """Of the step after which ``seen`` of ``end`` images are seen: it rises linearly, stays, and may fall to 0."""
    rampup = training.lr_rampup_kimg * 1000
    rate = training.lr * min(seen / rampup, 1.0) if rampup else training.lr
    if training.lr_decay:
        left = end - (seen - training.batch)
        rate *= min(max(left, training.batch) / (training.lr_decay * end), 1.0)
    return rate


def parameter_groups(net: DiffiT, training: Training) -> list[dict[str, Any]]:
    """What Muon moves, where it does, other convolutions, and the rest, with the ``scale`` of their learning rates."""
    muon = {id(weight) for weight in hidden_weights(net)} if training.optimizer == "muon" else set[int]()
    parameters = list(net.parameters())
    others = [parameter for parameter in parameters if id(parameter) not in muon]
    groups = [
        {"params": [p for p in parameters if id(p) in muon], "scale": 1.0, "muon": True},
        {"params": [p for p in others if p.ndim == 4], "scale": training.conv_lr},
        {"params": [p for p in others if p.ndim != 4], "scale": 1.0},
    ]
    return [group for group in groups if group["params"]]


def drop_labels(labels: Tensor, null: int, probability: float, generator: torch.Generator) -> Tensor:
    """Replace each label by the null class with that probability."""
    dropped = torch.rand(labels.shape, device=labels.device, generator=generator) < probability
    return torch.where(dropped, null, labels)


def clean_samples(
    data: Tensor, generator: torch.Generator, *, mirror: bool, autoencoder: Autoencoder | None, scale: float | None
) -> Tensor:
    """What the network is to learn of ``data``: images in [−1, 1], or latents sampled from their distribution.

    ``data`` is uint8 images ``(B, C, H, W)``, or cached moments ``(B, 4, C, h, w)``: mean and standard deviation, then
    those of the mirror image. ``scale`` is None for an image-space model. ``mirror`` flips half of the images. Cached
    or encoded here, the samples are the same.
    """
    if data.ndim == 5:
        moments = data[:, :2]
        if mirror:  # the same draw as flip_half's
            chosen = torch.rand(len(data), device=data.device, generator=generator) < 0.5
            moments = torch.where(chosen[:, None, None, None, None], data[:, 2:], moments)
        mean, std = moments.float().unbind(1)
    else:
        images = to_float(data)
        if mirror:
            images = flip_half(images, generator)
        if scale is None:
            return images
        assert autoencoder is not None
        mean, std = autoencoder.encode(images)
    assert scale is not None
    noise = torch.randn(mean.shape, device=mean.device, generator=generator)
    return draw_latents(mean, std, noise, scale)


class Stepper:
    """The state that training changes (network, average, optimiser, scaler, images seen) and the step that does it.

    A step's randomness is a function of (seed, images seen, microbatch); the number of processes only decides who
    computes which microbatch.
    """

    def __init__(
        self, config: Config, procs: Processes, net: DiffiT, precision: str, autoencoder: Autoencoder | None = None
    ) -> None:
        training = config.training
        if procs.device.type == "cpu":
            keep_freed_memory()
        self.config, self.procs, self.precision, self.autoencoder = config, procs, precision, autoencoder
        self.batch_gpu, self.rounds = accumulation(training.batch, training.batch_gpu, procs.count)
        self.net, self.ema = net.train(), copy.deepcopy(net).eval().requires_grad_(False)
        self.empty: DiffiT | None = None
        """Where the weights are sharded, the network without them."""
        if training.shard and procs.count > 1:
            self.empty = copy.deepcopy(self.ema).to("meta")
            shard(self.net, procs)
            shard(self.ema, procs)
        self.net, self.ema = self.net.to(procs.device), self.ema.to(procs.device)
        self.net.set_grad_ckpt(training.grad_ckpt)
        self.optimizer = build_optimizer(self.net, training)
        # Also without fp16: the fused optimiser then skips a step with a non-finite gradient without asking the CPU.
        self.scaler = torch.amp.GradScaler(procs.device.type, init_scale=2.0**16 if precision == "fp16" else 1.0)
        self.images_seen = 0
        self.seconds = 0.0  # that the run has taken, over all its parts
        self.judged = 0.0, 0.0  # the second of the run when metrics were last done, and the seconds that they took
        self.end = max(round(training.steps * training.batch / training.margin), training.batch)
        """Images after which the run is expected to be over, fewer than planned where the clock will end it: the
        learning rate and the loss may depend on the share that is done."""

        if training.compile:
            # Where nobody asked for it, what the compiler fails at is not compiled, and the run goes on.
            asked = "compile" not in training.chosen
            torch._dynamo.config.suppress_errors = not asked
            self.net.compile(fullgraph=asked and not training.grad_ckpt, dynamic=False)  # microbatches are of one size
        self.ddp: DiffiT | DistributedDataParallel = self.net
        if procs.count > 1 and self.empty is None:
            self.ddp = DistributedDataParallel(
                self.net, process_group=procs.steps, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        self.loss = build_loss(config, procs.device, precision, lambda: self.images_seen / self.end)
        uncertain = training.weighting == "uncertainty"
        self.weighting = UncertaintyWeighting(self.loss, procs.device) if uncertain else None
        self.augment = Augment(training.augment) if training.augment else None
        self.generator = torch.Generator(procs.device)
        self.meter = Meter(self.loss, procs.device)
        self.guard = Guard(procs.device, spikes=training.on_spike != "ignore")
        self.one = torch.ones((), device=procs.device)

    def step(self, feed: Iterator[tuple[Tensor, Tensor | None]]) -> None:
        training = self.config.training
        seen = self.images_seen + training.batch
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(training, seen, self.end)

        for round_ in range(self.rounds):
            images, labels = next(feed)
            last = round_ == self.rounds - 1
            sync = self.ddp.no_sync() if isinstance(self.ddp, DistributedDataParallel) and not last else nullcontext()
            with sync:
                loss = self.microbatch_loss(images, labels, self.procs.rank + round_ * self.procs.count)
                self.scaler.scale(loss.mean() / self.rounds).backward()

        if self.weighting is not None:
            self.weighting.gather(self.procs)
        parameters = [parameter for parameter in self.net.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients)) / self.scaler.scale(self.one)
        skip = self.guard.skips(norm)
        self.meter.add_gradients(norm, skip)
        if self.weighting is not None:
            self.weighting.update(skip)
        # The scaler leaves out the step, on all processes alike, where it finds a gradient that is not finite.
        gradients[0].mul_(torch.where(skip, torch.nan, 1.0))
        self.scaler.unscale_(self.optimizer)
        if training.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, training.grad_clip, norm)
        self.scaler.step(self.optimizer)
        if self.precision == "fp16":
            before = self.scaler.scale(self.one)
            self.scaler.update()
            # A spike is no overflow: the scale stays.
            self.scaler.update(torch.where(skip & norm.isfinite(), before, self.scaler.scale(self.one)))
        else:
            self.scaler.update(1.0)
        self.optimizer.zero_grad(set_to_none=True)

        self.images_seen = seen
        beta = training.ema_decay
        if beta is None:
            beta = ema_beta(training.batch, seen, training.ema_halflife_kimg, training.ema_rampup_ratio)
        update_ema(map(part, self.ema.parameters()), map(part, self.net.parameters()), beta, skip)

    def save(self, folder: Path, write: Callable[..., None] = save_state) -> None:
        """Write all that training changes as a training state, by :func:`save_state` or :meth:`StateWriter.save`.

        Where the weights are sharded, all other processes :meth:`lend` theirs at the same time.
        """
        metadata = {
            "images_seen": self.images_seen,
            "seconds": round(self.seconds, 1),
            "end": self.end,
            "judged": self.judged,
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "weighting": None if self.weighting is None else self.weighting.means.tolist(),
            "skipped": [int(self.meter.skipped), int(self.meter.skipped_in_a_row)],
            "config": self.config.model_dump(mode="json"),
        }
        write(folder, self.net, self.ema, self.optimizer, metadata)

    def lend(self) -> None:
        """This process's parts, to the first one that saves."""
        for group in state_groups(self.net, self.ema, self.optimizer).values() if self.empty is not None else ():
            for tensor in group.values():
                whole(tensor)

    def whole(self, net: DiffiT) -> DiffiT:
        """``net`` as a process can run it by itself, with the same weights or gathered ones, and not compiled.

        All processes call this together.
        """
        return copy.copy(net) if self.empty is None else gathered(net, self.empty)

    def restore(self, folder: Path) -> None:
        """Take up a training state exactly: weights, average, moments, loss scaler and place in the data.

        All processes call this together; only the first one reads ``folder``.
        """
        tensors = metadata = None
        with self.procs.together():
            if self.procs.is_first:
                tensors, metadata = load_state(folder)
                require_weights(self.net, tensors["model"], folder)
                require_weights(self.ema, tensors["ema"], folder)
                check_moments(self.net, self.optimizer, tensors["optimizer"])
        take_up(tensors, self.net, self.ema, self.optimizer, self.procs)
        metadata = self.procs.broadcast(metadata)
        if metadata["scaler"]:
            self.scaler.load_state_dict(metadata["scaler"])
        if "guard" in metadata:  # states of before 0.2 have none
            self.guard.load_state_dict(metadata["guard"])
            skipped, in_a_row = metadata["skipped"]
            self.meter.skipped.fill_(skipped)
            self.meter.skipped_in_a_row.fill_(in_a_row)
        if self.weighting is not None and metadata.get("weighting"):
            self.weighting.means.copy_(torch.tensor(metadata["weighting"]))
        self.images_seen, self.seconds = metadata["images_seen"], metadata.get("seconds", 0.0)
        ended, took = metadata.get("judged", self.judged)
        self.judged = ended, took
        minutes = self.config.training.clock_minutes
        if minutes is not None and minutes == metadata["config"]["training"].get("minutes"):  # else it was planned anew
            self.end = metadata.get("end", self.end)

    @property
    def ema_warming_up(self) -> bool:
        """Whether the average still forgets its beginning: its half-life ramps up, or a twentieth of it is left."""
        training = self.config.training
        if training.ema_decay is not None:
            return bool(training.ema_decay ** (self.images_seen / training.batch) > 0.05)
        return self.images_seen * training.ema_rampup_ratio < training.ema_halflife_kimg * 1000

    def clean(self, data: Tensor, generator: torch.Generator, *, mirror: bool) -> Tensor:
        """See :func:`clean_samples`."""
        spec = self.config.autoencoder
        return clean_samples(
            data, generator, mirror=mirror, autoencoder=self.autoencoder, scale=None if spec is None else spec.scale
        )

    def microbatch_loss(self, data: Tensor, labels: Tensor | None, m: int) -> Tensor:
        """Per-sample loss of the m-th microbatch of this step, weighted; ``data`` as in :func:`clean_samples`."""
        training = self.config.training
        self.generator.manual_seed(derive_seed(training.seed, STEP, self.images_seen, m))
        torch.manual_seed(derive_seed(training.seed, DROPOUT, self.images_seen, m))  # dropout has no generator
        x, augment_labels = self.clean(data, self.generator, mirror=training.mirror), None
        if self.augment is not None:
            x, augment_labels = self.augment(x, generator=self.generator)
        if labels is not None and training.label_drop:
            labels = drop_labels(labels, self.config.model.num_classes, training.label_drop, self.generator)
        level = self.loss.draw_level(x, self.generator)
        with autocast(self.procs.device, self.precision):
            loss = self.loss(self.ddp, x, labels, augment_labels, generator=self.generator, level=level)
        self.meter.add_losses(level, loss.detach())
        return loss if self.weighting is None else self.weighting(level, loss)
