"""Noise levels that are fitted: closed-form denoisers, the file's header, and what then uses them."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffit.cli import cli
from diffit.configs.presets import get_preset
from diffit.configs.sampling import FittedLevels, Sampling
from diffit.diffusion.edm import edm_sigmas, lambda_sigmas
from diffit.diffusion.samplers import dpm_solver_pp, heun, unipc
from diffit.errors import UserError
from diffit.sampling import load, with_sampling
from diffit.sampling.levels import noise_levels
from diffit.sampling.tune import Part, fit_levels, with_fitted
from diffit.training.step import build_network
from diffit.weights.file import read_header, save_network

FITTED = FittedLevels(sampler="unipc", sigmas=(70.0, 5.0, 0.4))


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x₀ | x] for data N(0.3, 0.5²)."""
    return (0.25 * x + sigma**2 * 0.3) / (0.25 + sigma**2)


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x₀ | x] for data of which 30 % are N(−0.6, 0.15²) and 70 % N(0.5, 0.25²)."""
    means, variances = x.new_tensor([-0.6, 0.5]), x.new_tensor([0.15, 0.25]) ** 2
    total = variances + sigma**2
    log_likelihood = x.new_tensor([0.3, 0.7]).log() - total.log() / 2 - (x[..., None] - means) ** 2 / (2 * total)
    return (log_likelihood.softmax(-1) * (variances * x[..., None] + sigma**2 * means) / total).sum(-1)


@pytest.mark.parametrize("solver", [dpm_solver_pp, unipc], ids=["2m", "unipc3"])
@pytest.mark.parametrize("denoise", [gaussian, mixture])
def test_fitted_levels_are_closer_at_eight_evaluations_than_any_others(solver, denoise):
    """On states that they were not fitted to, than the usual levels of either spacing with the usual solver."""
    quantiles = torch.special.ndtri((torch.arange(128, dtype=torch.float64) + 0.5) / 128)
    target = heun(denoise, quantiles, lambda_sigmas(300, 0.001, 80))
    usual = [edm_sigmas(8), lambda_sigmas(8, 0.002, 80)]
    fitted = fit_levels(solver, [Part(denoise, quantiles[::2], target[::2])], usual[1], iterations=12)
    assert fitted[0] < 80
    assert (fitted.diff() < 0).all()
    own = solver(denoise, quantiles[1::2], torch.cat([fitted, fitted.new_zeros(1)]))
    others = [dpm_solver_pp(denoise, quantiles[1::2], sigmas) for sigmas in usual]
    distance, *rest = ((x - target[1::2]).square().mean().item() for x in (own, *others))
    assert distance < 0.5 * min(rest)


def test_the_file_says_what_was_fitted_and_a_number_of_steps_uses_it():
    config = with_fitted(get_preset("cifar10"), [FITTED])
    assert noise_levels(with_sampling(config, steps=3)).tolist() == [70.0, 5.0, 0.4, 0.0]
    assert with_sampling(config, steps=3).sampling.sampler == "unipc"
    for how in ({"steps": 4}, {"steps": 3, "sampler": "heun"}, {"steps": 3, "levels": "own"}, {}):
        changed = with_sampling(config, **how)
        assert changed.sampling.sampler == "heun"
        assert_close(noise_levels(changed), edm_sigmas(changed.sampling.steps), rtol=0, atol=0)
    again = FITTED.model_copy(update={"sigmas": (60.0, 4.0, 0.3)})
    other = FITTED.model_copy(update={"sigmas": (60.0, 4.0)})
    assert with_fitted(config, [again, other]).sampling.fitted == (again, other)


def test_levels_of_either_family():
    own, even = (noise_levels(with_sampling(get_preset("imagenet256"), sampler="unipc", steps=8, levels=levels))
                 for levels in ("own", "lambda"))  # fmt: skip
    assert_close(even[:-1].log().diff(), torch.full((7,), float((even[6] / even[0]).log()) / 6, dtype=torch.float64))
    assert own[0] == even[0]
    assert_close(
        noise_levels(with_sampling(get_preset("cifar10"), levels="lambda", steps=3)).tolist(), [80.0, 0.4, 0.002, 0.0]
    )


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ((1.0, 2.0), "noise levels fall"),
        ((1.0, 1.0), "noise levels fall"),
        ((1.0, 0.0), "greater than 0"),
        ((math.inf, 1.0), "finite"),
        ((math.nan,), "finite"),
        ((2e6, 1.0), "1000000"),
        ((), "at least 1 item"),
        (tuple(float(i) for i in range(1001, 0, -1)), "at most 1000 items"),
    ],
)
def test_levels_that_are_none_are_refused(sigmas, message):
    with pytest.raises(ValueError, match=message):
        FittedLevels(sampler="unipc", sigmas=sigmas)


def test_settings_of_tuples_are_read_from_a_header_as_they_were_written():
    sampling = Sampling(fitted=(FITTED,), cfg_interval=(0.1, 2.0), steps=3)
    assert Sampling.model_validate_json(sampling.model_dump_json()) == sampling
    assert Sampling.model_validate(sampling.model_dump()) == sampling


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        (
            "cifar10",
            {"levels": "fitted"},
            r"fitted: the file has none for heun in 18 steps \(it has unipc in 3",
        ),
        ("cifar10", {"steps": 3, "rho": 5.0}, "--rho 5.0: the file's fitted noise levels are used; add --levels own"),
        ("cifar10", {"levels": "lambda", "rho": 5.0}, "--rho 5.0: it spaces the model's own levels"),
        ("cifar10", {"sampler": "unipc", "S_churn": 3.0}, "unipc has no such setting; use --sampler heun"),
        ("cifar10", {"sampler": "unipc", "eta": 0.5}, "unipc has no such setting; use --sampler ddim"),
        ("imagenet256", {"sampler": "ddim", "levels": "lambda"}, "ddim has no such setting; use --sampler heun"),
        ("imagenet256", {"sampler": "unipc", "steps": "ddim50", "levels": "lambda"}, "ddim50 chooses timesteps"),
    ],
)
def test_what_would_have_no_effect_is_refused(preset, changes, message):
    with pytest.raises(UserError, match=message):
        with_sampling(with_fitted(get_preset(preset), [FITTED]), **changes)


def test_the_stochastic_solver_is_stochastic_unless_told_otherwise():
    config = get_preset("cifar10")
    assert with_sampling(config, sampler="dpm++2m-sde").sampling.eta == 1
    assert with_sampling(config, sampler="dpm++2m-sde", eta=0.5).sampling.eta == 0.5
    assert with_sampling(with_sampling(config, sampler="dpm++2m-sde"), sampler="heun").sampling == Sampling(steps=18)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network that is not trained, but whose every part has an effect on the image."""
    config = get_preset("debug")
    net = build_network(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    path = tmp_path_factory.mktemp("n") / "net.safetensors"
    save_network(path, net.state_dict(), config, kimg=1.5)
    return path


def test_the_command_writes_levels_into_the_header_and_sampling_uses_them(network, tmp_path, capsys):
    words = ["tune-schedule", "--network", network, "--steps", "2,3", "--sampler", "dpm++", "--seeds", "0-11"]
    cli([*map(str, words), "--dest", str(tmp_path / "tuned.safetensors")], standalone_mode=False)
    text = capsys.readouterr().out
    assert text.count("mean squared distance to 32 steps of heun, by levels: own") == 2
    config, kimg = read_header(tmp_path / "tuned.safetensors")
    assert kimg == 1.5
    assert [(fit.sampler, len(fit.sigmas)) for fit in config.sampling.fitted] == [("dpm++", 2), ("dpm++", 3)]
    before, after = (load(path, device="cpu") for path in (network, tmp_path / "tuned.safetensors"))
    assert after.config.sampling.model_copy(update={"fitted": ()}) == before.config.sampling
    assert_close(after.sample(range(3)), before.sample(range(3)), rtol=0, atol=0)
    seeds = range(50, 58)
    fine = before.sample(seeds, sampler="heun", steps=40)
    few = [model.sample(seeds, steps=3, **how) for model, how in ((after, {}), (before, {"sampler": "dpm++"}))]
    assert (few[0] - fine).square().mean() < (few[1] - fine).square().mean()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps: a fit needs 1 step or more"),
        (["--steps", "2", "--seeds", "0-2"], "--seeds: 3 are too few"),
    ],
)
def test_what_cannot_be_fitted_is_named(network, words, message):
    with pytest.raises(UserError, match=message):
        cli(["tune-schedule", "--network", str(network), *words], standalone_mode=False)


def test_a_file_of_others_is_not_written_to(tmp_path):
    from diffit.sampling.tune import tune_file
    from diffit.weights.file import save_tensors

    save_tensors({"pos_embed": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match="not a file of yours that diffit wrote; name the one to write with --dest"):
        tune_file(tmp_path / "theirs.safetensors", [{"steps": 8}])


def test_fits_that_are_no_better_are_not_kept_and_cost_no_others(network, tmp_path, monkeypatch, capsys):
    from diffit.sampling import tune

    def fitted(model, seeds, **how):
        steps = model.config.sampling.steps
        sigmas = tuple(float(steps - i) for i in range(steps))
        levels = FittedLevels(sampler=model.config.sampling.sampler, sigmas=sigmas)
        return tune.Fit(levels, {"own": 2.0, "lambda": 3.0, "fitted": 1.0 if steps == 3 else 2.5}, 32)

    monkeypatch.setattr(tune, "tune_levels", fitted)
    dest = tmp_path / "tuned.safetensors"
    words = ["tune-schedule", "--network", str(network), "--sampler", "dpm++", "--dest", str(dest), "--steps"]
    cli([*words, "2,3,4"], standalone_mode=False)
    assert [len(fit.sigmas) for fit in read_header(dest)[0].sampling.fitted] == [3]
    text = capsys.readouterr().out
    assert text.count("not kept, use more --seeds") == 2
    assert "--steps 3 --outdir samples" in text
    before = dest.read_bytes()
    with pytest.raises(UserError, match="no fitted levels are closer than --levels own; use more --seeds"):
        cli([*words, "2"], standalone_mode=False)
    assert dest.read_bytes() == before


@pytest.mark.parametrize("sampler", ["unipc", "unipc2", "dpm++3m", "dpm++2m-sde"])
def test_one_seed_is_one_image_whatever_the_batch(network, sampler):
    model = load(network, device="cpu").with_sampling(sampler=sampler, steps=4)
    together = model.sample(range(5))
    alone = torch.cat([model.sample([seed]) for seed in range(5)])
    assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_a_latent_model_is_fitted_as_well():
    config = get_preset("latent-debug")
    from diffit.sampling.model import Model
    from diffit.sampling.tune import tune_levels

    net = build_network(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    model = Model(net.eval().requires_grad_(False), config).with_sampling(sampler="unipc", steps=3)
    fit = tune_levels(model, range(8), iterations=4)
    assert len(fit.levels.sigmas) == 3
    assert fit.fine_steps == 32
    assert set(fit.distances) == {"own", "lambda", "fitted"}
