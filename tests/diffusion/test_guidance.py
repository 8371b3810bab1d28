"""Classifier-free guidance against its formula, with counted evaluations."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffit.diffusion.guidance import guided

X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SIGMA = torch.tensor(1.5, dtype=torch.float64)


def conditional(x: Tensor, sigma: Tensor) -> Tensor:
    return x.tanh() * sigma


def unconditional(x: Tensor, sigma: Tensor) -> Tensor:
    return x.sin() - sigma


def never(x: Tensor, sigma: Tensor) -> Tensor:
    raise AssertionError("the unconditional denoiser was evaluated")


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.01, 4.4, -1.0])
def test_it_extrapolates_from_unconditional_through_conditional(scale):
    u, c = unconditional(X, SIGMA), conditional(X, SIGMA)
    out = guided(conditional, unconditional, scale)(X, SIGMA)
    assert_close(out, u + scale * (c - u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1, 1.0, lambda sigma: 1.0, lambda sigma: torch.ones(())])
def test_a_scale_of_one_never_evaluates_the_unconditional_denoiser(scale):
    assert_close(guided(conditional, never, scale)(X, SIGMA), conditional(X, SIGMA), rtol=0, atol=0)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.0])
def test_a_scale_may_depend_on_sigma(sigma):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    denoise = guided(conditional, unconditional, lambda sigma: 1 + sigma**2)
    u, c = unconditional(X, sigma), conditional(X, sigma)
    assert_close(denoise(X, sigma), u + (1 + sigma**2) * (c - u), rtol=1e-12, atol=1e-12)


def test_a_scale_may_switch_guidance_off_for_some_noise_levels():
    denoise = guided(conditional, never, lambda sigma: 3.0 if sigma > 2 else 1.0)
    assert_close(denoise(X, SIGMA), conditional(X, SIGMA), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="unconditional"):
        denoise(X, SIGMA * 2)


@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_channels_beyond_the_guided_stay_conditional(channels):
    u, c = unconditional(X, SIGMA), conditional(X, SIGMA)
    out = guided(conditional, unconditional, 4.4, channels)(X, SIGMA)
    assert_close(out[:, :channels], (u + 4.4 * (c - u))[:, :channels], rtol=1e-12, atol=1e-12)
    assert_close(out[:, channels:], c[:, channels:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_keeps_the_dtype_of_the_state(dtype):
    assert guided(conditional, unconditional, 2.5)(X.to(dtype), SIGMA).dtype == dtype
