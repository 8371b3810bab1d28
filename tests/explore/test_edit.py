"""Variation and inpainting on a Gaussian, whose denoiser and conditional distributions are known, and on networks."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from diffit.configs.presets import get_preset
from diffit.errors import UserError
from diffit.explore import inpaint, noise_levels, vary
from diffit.models import load_autoencoder
from diffit.sampling import Model
from explore.toys import image_model, latent_model
from helpers import write_vae

SIDE = 4
MEAN = torch.linspace(-0.4, 0.4, SIDE * SIDE, dtype=torch.float64)


def covariance() -> torch.Tensor:
    """Pixels of deviation ½ whose correlation falls with their distance."""
    y, x = (grid.flatten().double() for grid in torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"))
    return 0.25 * torch.exp(-torch.hypot(y[:, None] - y, x[:, None] - x) / 1.5)


class Gaussian(Model):
    """N(MEAN, covariance) as a model: E[x₀ | x₀ + σε = x] in closed form in place of a network."""

    device = torch.device("cpu")

    def denoiser(self, labels=None):
        values, vectors = torch.linalg.eigh(covariance())

        def denoise(x, sigma):
            gain = vectors * (values / (values + sigma**2)) @ vectors.T
            return (MEAN + (x.flatten(1) - MEAN) @ gain).view_as(x)

        return denoise


def gaussian(**sampling) -> Gaussian:
    config = get_preset("debug")
    model = config.model.model_copy(update={"num_classes": 0, "image_size": (SIDE, SIDE), "channels": 1})
    config = config.model_copy(update={"model": model})
    return Gaussian(SimpleNamespace(), config).with_sampling(
        **({"steps": 40, "sigma_max": 5.0, "sigma_min": 0.02} | sampling)
    )


def conditional(known: torch.Tensor, hole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the pixels in ``hole`` given the others (Schur complement)."""
    cov, rest = covariance(), ~hole
    gain = cov[hole][:, rest] @ torch.linalg.inv(cov[rest][:, rest])
    return MEAN[hole] + gain @ (known[rest] - MEAN[rest]), cov[hole][:, hole] - gain @ cov[rest][:, hole]


def test_inpainting_a_gaussian_has_the_mean_and_spread_of_the_conditional_distribution(monkeypatch):
    count, generator = 1000, torch.Generator().manual_seed(0)
    # A stream for every seed would be most of the time, and is another test's matter.
    noise = lambda seeds: lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    monkeypatch.setattr("diffit.explore.edit.PerSampleNoise", noise)
    image = torch.zeros(1, 1, SIDE, SIDE)
    image[0, 0, :2] = torch.tensor([[0.9, 0.7, 0.2, -0.3], [0.8, 0.5, 0.1, -0.5]])
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[2:] = True
    painted = inpaint(gaussian(), image, mask, range(count), resamples=30).double()
    hole = mask.flatten()
    mean, cov = conditional(image.double().flatten(), hole)
    values = painted.flatten(1)[:, hole]
    errors = (values.mean(0) - mean) / (cov.diagonal() / count).sqrt()
    assert errors.abs().max() < 3, errors
    assert_close(values.std(0), cov.diagonal().sqrt(), rtol=0.15, atol=0)  # few steps of DDPM
    assert torch.equal(painted[:, 0, :2].float(), image[:, 0, :2].expand(count, -1, -1))
    once = inpaint(gaussian(), image, mask, range(count), resamples=1).double().flatten(1)[:, hole]
    assert ((once.mean(0) - mean) / (cov.diagonal() / count).sqrt()).abs().max() > 6  # what resampling is for


@pytest.mark.parametrize("sampler", ["heun", "euler", "dpm++"])
def test_a_variation_of_a_gaussian_is_what_the_noisy_image_can_come_from(sampler):
    """The ODE is linear: each eigenvector's share of image and noise has a closed form, (λ/(λ + σ²))^½."""
    image, level, count = torch.full((1, 1, SIDE, SIDE), 0.6), 0.8, 2000
    varied = vary(gaussian(sampler=sampler, steps=200), image, level, range(count)).double().flatten(1)
    values, vectors = torch.linalg.eigh(covariance())
    shrink = vectors @ torch.diag((values / (values + level**2)).sqrt()) @ vectors.T
    mean = MEAN + shrink @ (0.6 - MEAN)
    spread = (shrink @ shrink).diagonal().sqrt() * level
    assert ((varied.mean(0) - mean) / (spread / math.sqrt(count))).abs().max() < 4
    assert_close(varied.std(0), spread, rtol=0.08, atol=0)


@pytest.mark.parametrize("how", [{}, {"sampler": "ddpm"}, {"cfg_scale": 2.0}], ids=str)
def test_edits_are_functions_of_seed_and_image_alone(how, tmp_path):
    model = image_model(**how) if "sampler" not in how else with_vae(latent_model(**how), tmp_path)
    images = torch.rand(3, *model.config.image_shape) * 2 - 1
    mask = torch.zeros(images.shape[-2:], dtype=torch.bool)
    mask[:6, 3:] = True
    edits = {
        "vary": lambda chosen, seeds: vary(model, chosen, 0.7, seeds, 1),
        "inpaint": lambda chosen, seeds: inpaint(model, chosen, mask, seeds, 1, resamples=2),
    }
    for edit in edits.values():
        together = edit(images, [4, 9, 2])
        assert together.shape == images.shape
        assert_close(edit(images[1:2], [9]), together[1:2], rtol=1e-3, atol=1e-3)
        assert (edit(images[1:2], [8]) - together[1:2]).abs().max() > 1e-3
    painted = inpaint(model, images[:1], mask, [0, 1], 1, resamples=2)
    assert torch.equal(painted[..., ~mask], images[:1].expand(2, -1, -1, -1)[..., ~mask])
    assert (painted[0] - painted[1])[:, mask].abs().max() > 1e-3


def with_vae(model: Model, folder) -> Model:
    return Model(model.net, model.config, load_autoencoder(write_vae(folder / "vae")))


def test_a_variation_at_the_highest_level_is_a_plain_sample_of_a_black_image_and_at_the_lowest_the_image():
    model = image_model(steps=6)
    image = torch.rand(1, 3, 12, 20) * 2 - 1
    near = vary(model, image, 0.003, [5], 1)
    assert (near - image).abs().max() < 0.05
    far = vary(model, torch.zeros_like(image), float(noise_levels(model)[0]), [5], 1)
    assert_close(far, model.sample([5], 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, image: vary(model, image, 90.0), "level 90: use a noise level"),
        (lambda model, image: vary(model, image, 0.0), "level 0"),
        (lambda model, image: vary(model, image[..., 1:], 1.0), "takes .* 3 channels of 12×20"),
        (lambda model, image: vary(model, image.expand(2, -1, -1, -1), 1.0, [1, 2, 3]), "2 images for 3 seeds"),
        (lambda model, image: inpaint(model, image, image[0, 0] > 0, resamples=0), "resamples 0"),
    ],
)
def test_what_cannot_be_edited_is_said(call, words):
    with pytest.raises(UserError, match=words):
        call(image_model(), torch.zeros(1, 3, 12, 20))


def test_latents_without_an_autoencoder_cannot_be_edited():
    model = latent_model()
    with pytest.raises(UserError, match="autoencoder"):
        vary(model, torch.zeros(1, *model.config.image_shape), 1.0)
