"""Noise levels fitted to a network: those from which few steps end closest to where many of its own would."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from diffit.configs.sampling import FittedLevels, ODESampler
from diffit.configs.schema import ADMDiffusion, Config
from diffit.diffusion.guidance import Denoiser
from diffit.errors import UserError
from diffit.sampling.labels import choose_labels
from diffit.sampling.levels import noise_levels, solver_of
from diffit.sampling.model import Model, prepare
from diffit.utils import hub
from diffit.utils.randomness import PerSampleNoise
from diffit.weights.file import load_network, locate, read_header, read_network_file, save_network
from diffit.weights.header import CONFIG_KEY, METADATA, read_tensor_header

FINER = 8  # steps of the trajectory that is aimed at, to each of those that are fitted
FEWEST = 32  # of them
ITERATIONS = 40
LEAST = 0.02  # between neighbouring levels in ln σ: a polynomial through images at one level is none
Show = Callable[[int, int], None]


@dataclass(frozen=True)
class Fit:
    """Levels and, on seeds that they were not fitted to, mean squared distances to the fine trajectory's samples."""

    levels: FittedLevels
    distances: dict[str, float]
    """By the levels: ``own``, ``lambda``, ``fitted``."""
    fine_steps: int
    """Of Heun's method, that the distances are to."""

    @property
    def best(self) -> str:
        """The levels that are closest."""
        return min(self.distances, key=lambda name: self.distances[name])

    @property
    def is_better(self) -> bool:
        return self.best == "fitted"


@dataclass(frozen=True)
class Part:
    """Some seeds: their noise and the samples of the fine trajectory, both ``(B, C, h, w)``."""

    denoise: Denoiser
    noise: Tensor
    target: Tensor


def tune_levels(
    model: Model, seeds: Sequence[int], *, batch: int = 64, iterations: int = ITERATIONS, show: Show | None = None
) -> Fit:
    """Levels for the sampler, steps and guidance of ``model.config``, fitted to three quarters of the ``seeds``.

    The sampler is differentiated with respect to its levels, and L-BFGS moves them, from the model's own levels or
    those even in ln σ, whichever are closer. Raises :class:`UserError` where the sampler adds noise, or is on
    timesteps of its own.
    """
    sampling, diffusion = model.config.sampling, model.config.diffusion
    if sampling.sampler not in (known := get_args(ODESampler)) or sampling.S_churn:
        raise UserError(f"sampler {sampling.sampler}: it adds noise, or has timesteps; use one of {', '.join(known)}")
    if len(seeds) < 4:
        raise UserError(f"--seeds: {len(seeds)} are too few to fit to and to check with; use 4 or more")
    held = len(seeds) // 4
    fine_steps = max(FEWEST, FINER * sampling.steps)
    if isinstance(diffusion, ADMDiffusion):
        fine_steps = min(fine_steps, diffusion.timesteps)
    fitted_to = list(_parts(model, seeds[held:], fine_steps, batch))
    unseen = list(_parts(model, seeds[:held], fine_steps, batch))
    solver = solver_of(sampling)

    @torch.no_grad()
    def distance(sigmas: Tensor, parts: Sequence[Part]) -> float:
        total = sum(float((solver(p.denoise, p.noise, sigmas) - p.target).square().sum()) for p in parts)
        return total / sum(p.target.numel() for p in parts)

    starts = {name: noise_levels(model.with_sampling(levels=name).config) for name in ("own", "lambda")}
    first = min(starts.values(), key=lambda sigmas: distance(sigmas, fitted_to))
    found = fit_levels(solver, fitted_to, first, iterations=iterations, show=show)
    levels = FittedLevels.model_validate(
        {"sampler": sampling.sampler, "sigmas": tuple(float(f"{s:.6g}") for s in found.tolist())}
    )
    fitted = torch.tensor([*levels.sigmas, 0.0], dtype=torch.float64)
    distances = {name: distance(sigmas, unseen) for name, sigmas in (starts | {"fitted": fitted}).items()}
    return Fit(levels, distances, fine_steps)


def _parts(model: Model, seeds: Sequence[int], fine_steps: int, batch: int) -> Iterator[Part]:
    fine = replace(model, autoencoder=None).with_sampling(sampler="heun", steps=fine_steps, levels="own")
    for start in range(0, len(seeds), batch):
        some = seeds[start : start + batch]
        classes = choose_labels(model.config, some)
        shape = len(some), *model.config.model.sample_shape
        noise = PerSampleNoise(some)(torch.empty(shape, dtype=torch.float64, device=model.device))
        labels = None if classes is None else classes.to(model.device)
        yield Part(model.denoiser(labels), noise, fine.sample(some, classes).double())


def fit_levels(
    solver: Callable[..., Tensor],
    parts: Sequence[Part],
    first: Tensor,
    *,
    iterations: int = ITERATIONS,
    show: Show | None = None,
) -> Tensor:
    """Levels ``(n,)`` float64 whose samples are closest to the targets, from those of ``first`` ``(n + 1,)`` on.

    They fall, from below the noisiest of ``first``: λ = −ln σ rises by between :data:`LEAST` and its whole range.
    """
    lambdas = -first[:-1].log()
    gaps = torch.cat([lambdas.new_tensor([2 * LEAST]), lambdas.diff().clamp(min=2 * LEAST)])
    most = float(lambdas[-1] - lambdas[0]) + 2
    theta = torch.logit((gaps - LEAST) / most).requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=iterations, tolerance_change=1e-6, line_search_fn="strong_wolfe")
    evaluated = 0

    def levels() -> Tensor:
        return (-(lambdas[0] + (LEAST + most * theta.sigmoid()).cumsum(0))).exp()

    def closure() -> Tensor:
        nonlocal evaluated
        optimizer.zero_grad()
        total = theta.new_zeros(())
        for part in parts:
            sigmas = torch.cat([levels(), theta.new_zeros(1)])
            loss = (solver(part.denoise, part.noise, sigmas) - part.target).square().sum()
            loss.backward()
            total += loss.detach().cpu()
        assert theta.grad is not None
        theta.grad /= total  # of ln(total): its steps and tolerances are relative
        evaluated += 1
        if show is not None:
            show(min(evaluated, iterations), iterations)
        return total.log()

    optimizer.step(closure)
    return levels().detach()


def tune_file(
    network: str | Path,
    settings: Sequence[Mapping[str, Any]],
    seeds: Sequence[int] = range(256),
    *,
    dest: Path | None = None,
    device: str | torch.device = "cpu",
    batch: int = 64,
    show: Show | None = None,
) -> tuple[Path, list[Fit]]:
    """Fit levels for each of the settings, fields of ``Sampling``: ``{"sampler": "unipc", "steps": 8}``.

    Those that are closer than the model's own are kept in the header of ``dest``, by default the file itself; raises
    :class:`UserError`, with nothing written, where none are.
    """
    path = locate(network)
    if dest is None:
        ours = CONFIG_KEY in read_tensor_header(path).get(METADATA, {})
        if not ours or (not Path(network).exists() and hub.looks_like_id(str(network))):
            raise UserError(f"{network}: not a file of yours that diffit wrote; name the one to write with --dest")
        dest = path
    net, config = load_network(path, device)
    model = Model(prepare(net), config)
    models = [model.with_sampling(**how, levels="own") for how in settings]
    fits = [tune_levels(how, seeds, batch=batch, show=show) for how in models]
    if not (better := [fit.levels for fit in fits if fit.is_better]):
        raise UserError(
            f"{network}: on other seeds no fitted levels are closer than --levels {fits[0].best}; use more --seeds"
        )
    state, _ = read_network_file(path)
    save_network(dest, state, with_fitted(config, better), kimg=read_header(path)[1])
    return dest, fits


def with_fitted(config: Config, new: Sequence[FittedLevels]) -> Config:
    """``config`` with fitted levels, each in the place of those for the same sampler and steps."""
    taken = {(fit.sampler, len(fit.sigmas)) for fit in new}
    kept = [fit for fit in config.sampling.fitted if (fit.sampler, len(fit.sigmas)) not in taken]
    sampling = config.sampling.model_copy(update={"fitted": (*kept, *new)})
    return config.model_copy(update={"sampling": sampling})
