"""From a teacher to students of few steps: a training run per stage, each with the student before it as its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal

from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, resolve
from diffit.configs.sampling import Sampling
from diffit.configs.schema import ADMDiffusion, Config, Distillation
from diffit.data.open import Archive, facts_of
from diffit.errors import UserError
from diffit.metrics.evaluate import evaluate_network
from diffit.metrics.suite import better, headline
from diffit.models.autoencoder import Autoencoder
from diffit.sampling.model import load
from diffit.sampling.settings import with_sampling
from diffit.training.evaluator import Evaluator, best_file
from diffit.training.loop import train
from diffit.training.run import Outcome
from diffit.training.run_dir import read_options
from diffit.utils.distributed import Processes, require_shared
from diffit.utils.precision import check_precision
from diffit.weights import newest_snapshot
from diffit.weights.file import locate, read_header, read_network_file, save_network, state_hash

Method = Literal["progressive", "consistency"]

STEPS: dict[Method, tuple[int, ...]] = {"progressive": (8, 4, 2, 1), "consistency": (2, 1)}
METHODS: dict[Method, dict[str, Any]] = {
    "progressive": {"lr_decay": 1.0},
    # Gradients double from stage to stage; 0.999 would divide them by the root of a mean over several stages.
    "consistency": {"lr_decay": 0.5, "optimizer": "radam", "betas": (0.9, 0.99), "metrics_ticks": 5},
}
# Of a teacher that learned as a preset with Muon does: as such students were measured.
AFTER_MUON = {"optimizer": "adam", "conv_lr": 0.25}
LR_AFTER_MUON = 1e-3
LR_SHARE = 0.5  # of the learning rate that the first teacher was trained with
JUDGE, MOST_VALUES = "fd1k_full:pixels", 1024  # small images are judged by their pixels where no metric is named
SIGMA_MID = 0.8  # where no metric is named; ECT has 0.821 for CIFAR-10
MIDDLE_LEVELS = [0.1 * 10 ** (k / 6) for k in range(13)]  # to choose from where one is
BATCH = 64  # samples that are judged together

DETERMINISTIC = {"S_churn": 0.0, "eta": 0.0, "levels": "fitted"}  # of which a student has none: its own
UNGUIDED = {"cfg_scale": 1.0, "cfg_power": None, "cfg_interval": None, "cfg_channels": None, "cfg_skip": 0.0}


@dataclass(frozen=True)
class Teacher:
    """A network file that students are made from."""

    path: str
    config: Config
    sha256: str
    """Over names and values of its weights."""

    @classmethod
    def read(cls, source: str | Path) -> "Teacher":
        """Of a file, a run folder (its newest snapshot) or a Hub id."""
        path = locate(source).resolve()
        state, config = read_network_file(path)
        return cls(str(path), config, state_hash(state))

    def student(self, method: Method, steps: int, options: Mapping[str, Any], facts: DataFacts) -> Config:
        """The run that makes a student of ``steps``; ``options`` are those of :func:`resolve`.

        Their ``cfg_scale`` is the teacher's. Raises :class:`UserError` where teacher, method, steps and data do not fit
        together.
        """
        teacher, options = self.config, dict(options)
        check_data(self, facts)
        scale = options.pop("cfg_scale", None)
        taught, sampling = self._progressive(steps, scale) if method == "progressive" else self._consistency(scale)
        guidance = 1.0 if taught is None else taught.cfg_scale
        if teacher.distillation is not None:
            guidance = teacher.distillation.cfg_scale
        spec = Distillation(
            method=method, teacher=self.path, teacher_sha256=self.sha256, cfg_scale=guidance, teacher_sampling=taught
        )
        own = get_preset(teacher.preset).training
        lr = teacher.training.lr * (LR_SHARE if teacher.distillation is None else 1.0)
        recipe: dict[str, Any] = {"batch": teacher.training.batch, "lr": lr}
        recipe |= {"weighting": None, "augment": 0.0, "label_drop": 0.0, "mirror": teacher.training.mirror}
        if own.optimizer == "muon":
            recipe |= AFTER_MUON
            if teacher.distillation is None and teacher.training.lr == own.lr:
                recipe["lr"] = LR_AFTER_MUON
        if teacher.autoencoder is None:
            recipe["metrics_ref"] = options.get("val")
            # A covariance takes a tenth as many images as it has dimensions.
            if prod(teacher.image_shape) <= min(MOST_VALUES, 10 * facts.images):
                recipe["metrics"] = (JUDGE,)
        training = own.model_copy(update=recipe | METHODS[method])
        base = teacher.model_copy(update={"training": training, "sampling": sampling, "distillation": spec})
        if isinstance(teacher.diffusion, ADMDiffusion):  # from ε an image cannot be had in a step
            diffusion = teacher.diffusion.model_copy(update={"prediction": "v"})
            base = base.model_copy(update={"diffusion": diffusion})
        # `resolve` adds the data, the length and what follows from it.
        return resolve(base, {"cond": teacher.model.num_classes > 0, "desc": f"{method}-{steps}"} | options, facts)

    def _progressive(self, steps: int, scale: float | None) -> tuple[Sampling, Sampling]:
        """How the teacher and a student of ``steps`` are sampled."""
        config, spec = self.config, self.config.distillation
        if spec is not None and spec.teacher_sampling is None:
            raise UserError(
                f"{self.path}: a student of consistency tuning, which has no trajectory to halve; give its own teacher"
            )
        if spec is not None and config.sampling.steps != 2 * steps:
            raise UserError(
                f"--steps {steps}: {self.path} is itself a student of {config.sampling.steps} steps; begin with half "
                "as many, or give its own teacher"
            )
        if config.diffusion.kind == "adm" and 2 * steps > config.diffusion.timesteps:
            timesteps = config.diffusion.timesteps
            raise UserError(f"--steps {steps}: the teacher has {timesteps} timesteps; use at most half as many")
        guided = with_sampling(config, cfg_scale=scale).sampling
        solver = "ddim" if config.diffusion.kind == "adm" else "euler"
        own = "heun" if guided.sampler == "heun" else solver
        taught = guided.model_copy(update=DETERMINISTIC | {"sampler": own, "steps": 2 * steps, "spacing": "trailing"})
        return taught, taught.model_copy(update=UNGUIDED | {"sampler": solver, "steps": steps})

    def _consistency(self, scale: float | None) -> tuple[None, Sampling]:
        """How a student of consistency tuning is sampled; its teacher is not, being where the weights begin."""
        config = self.config
        if config.diffusion.kind != "edm":
            raise UserError(
                f"{self.path}: consistency tuning is for EDM's noise levels, this model has a discrete schedule; use "
                "--method progressive"
            )
        if config.distillation is not None:
            raise UserError(f"{self.path}: itself a student ({config.distillation.method}); give its own teacher")
        if scale is not None:
            raise UserError(f"--cfg-scale {scale:g}: consistency tuning knows no guidance; leave it out")
        changes = DETERMINISTIC | UNGUIDED | {"sampler": "consistency", "steps": 1, "spacing": "linspace"}
        return None, config.sampling.model_copy(update=changes)


def check_data(teacher: Teacher, facts: DataFacts) -> None:
    """Raises :class:`UserError` unless the data are such as the teacher was trained on."""
    config = teacher.config
    ours = (facts.channels, *facts.image_size)
    if facts.latent_shape is not None and config.autoencoder is None:
        raise UserError(f"the data are latents, {teacher.path} is an image-space model: give it images")
    if ours != config.image_shape or facts.latent_shape not in (None, config.model.sample_shape):
        found, needed = (f"{shape[2]}×{shape[1]}×{shape[0]}" for shape in (ours, config.image_shape))
        raise UserError(f"{teacher.path}: a model of {needed}, the data are {found}; give data of the teacher's size")
    if config.model.num_classes and facts.num_classes != config.model.num_classes:
        raise UserError(
            f"{teacher.path}: {config.model.num_classes} classes, the data have {facts.num_classes or 'none'}; give "
            "data labelled as the teacher's"
        )


def check_steps(method: Method, steps: Sequence[int]) -> None:
    """Raises :class:`UserError` for steps of students that the method cannot make, one from the other."""
    text = ",".join(map(str, steps))
    if method == "consistency" and (not steps or set(steps) - {1, 2} or len(set(steps)) < len(steps)):
        raise UserError(f"--steps {text}: a student of consistency tuning takes 2 or 1; use 2,1")
    halves = [later * 2 == earlier for earlier, later in pairwise(steps)]
    if method == "progressive" and not (steps and min(steps) > 0 and all(halves)):
        raise UserError(f"--steps {text}: each student has half as many steps as the one before; use 8,4,2,1")


@dataclass(frozen=True)
class Order:
    """What ``diffit distill`` is to make."""

    network: str | Path
    """The first teacher."""
    method: Method
    steps: tuple[int, ...]
    """Of the students."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those of :func:`resolve`, and ``cfg_scale`` of the teacher. A length is that of all runs together."""

    @property
    def runs(self) -> tuple[int, ...]:
        """The steps that each run teaches; consistency tuning has one run for all."""
        return self.steps if self.method == "progressive" else (1,)

    def config(self, teacher: Teacher, steps: int, facts: DataFacts) -> Config:
        """The run that makes the student of ``steps`` from ``teacher``."""
        options = dict(self.options)
        for length in ("kimg", "minutes", "default_minutes"):
            if length in options:
                options[length] = options[length] / len(self.runs)
        return teacher.student(self.method, steps, options, facts)

    def next_stage(self, network: Path, made: Config) -> "Order":
        """The same after a run that ``made`` the teacher ``network``, which has the guidance built in.

        Where nobody asks for a length, the others are as long as that run, which may be one that went on.
        """
        options = {**self.options, "cfg_scale": None}
        if not {"kimg", "minutes"} & options.keys():
            minutes = made.training.clock_minutes
            length = {"kimg": made.training.kimg} if minutes is None else {"minutes": minutes}
            options |= {name: value * len(self.runs) for name, value in length.items()}
        return replace(self, network=network, options=options)


def distill(
    order: Order,
    archive: Archive,
    outdir: str | Path,
    procs: Processes,
    *,
    resume: str = "auto",
    val: Archive | None = None,
    autoencoder: Autoencoder | None = None,
) -> tuple[Outcome, list[Path]]:
    """The students of ``order``: files ``student-<steps>.safetensors`` in ``outdir``, next to a run folder each.

    A student is the best of its run by the first metric, where there is one, else its last snapshot, and the last
    snapshot is the next one's teacher. ``resume`` is ``auto`` or ``none``. Also returns where the last run ended. All
    processes call this together. Raises :class:`UserError` before any work where something does not fit.
    """
    check_steps(order.method, order.steps)
    facts, students = facts_of(archive), list[Path]()
    assert facts is not None
    with procs.together():
        if procs.is_first:
            Path(outdir).mkdir(parents=True, exist_ok=True)
    require_shared(Path(outdir), procs)
    for steps in order.runs:
        teacher = Teacher.read(order.network)
        procs.require_same(teacher.sha256, order.network, "weights", "name one file")  # a run that trains writes newer
        config = order.config(teacher, steps, facts)
        outcome = train(config, archive, outdir, procs, resume=resume, val=val, autoencoder=autoencoder)
        if outcome.signal is not None:  # also one that came when the stage was complete
            break
        precision = check_precision(config.training.precision, procs.device)
        judge = Evaluator(config, archive, procs, autoencoder, batch=BATCH, precision=precision)
        newest = procs.broadcast(newest_snapshot(outcome.run_dir))
        assert newest is not None
        kept = newest if judge.suite is None else best_file(outcome.run_dir, judge.suite.names[0])
        for count in (steps,) if order.method == "progressive" else order.steps:
            path = Path(outdir) / f"student-{count}.safetensors"
            changes: dict[str, Any] = {"steps": 2, "sigma_mid": find_sigma_mid(kept, judge)} if count != steps else {}
            with procs.together():
                if procs.is_first:
                    state, made = read_network_file(kept)
                    save_network(path, state, with_sampling(made, **changes), kimg=read_header(kept)[1])
            students.append(path)
        order = order.next_stage(newest, procs.broadcast(read_options(outcome.run_dir)) or config)
    return outcome, students


def find_sigma_mid(student: Path, judge: Evaluator) -> float:
    """The noise level of the second evaluation: that of :data:`MIDDLE_LEVELS` which the first metric finds best."""
    if judge.suite is None:
        return SIGMA_MID
    model = load(student, device=judge.procs.device, precision=judge.precision)
    best: tuple[float, float] | None = None
    for level in MIDDLE_LEVELS:
        two = model.with_sampling(steps=2, sigma_mid=level)
        record = evaluate_network(judge.suite, two, real_labels=judge.archive.labels, batch=BATCH)[0]
        name, value = headline(record["results"])
        if best is None or better(name, value, best[1]):
            best = level, value
    assert best is not None
    return best[0]
