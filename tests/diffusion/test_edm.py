"""EDM's formulas written out in Python's own floats, and what they must mean."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from diffit.diffusion.edm import EDMLoss, denoiser, edm_sigmas, lambda_sigmas

SIGMAS = [0.002, 0.1, 0.5, 3.0, 80.0]


class Recorder:
    """A network that remembers what it was called with and returns fixed numbers."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.calls = seed, []

    def __call__(
        self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        self.calls.append((x, c_noise, class_labels, augment_labels))
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64).to(x)


def images(count: int = 5, *, seed: int = 1, dtype=torch.float64) -> Tensor:
    return torch.randn(count, 2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype) / 2


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_preconditioning_is_table_1_in_float64(sigma, sigma_data):
    net, x = Recorder(), images()
    out = denoiser(net, sigma_data=sigma_data, dtype=torch.float64)(x, torch.tensor(sigma, dtype=torch.float64))
    seen, c_noise, *labels = net.calls[0]
    total = sigma**2 + sigma_data**2
    assert labels == [None, None]
    assert_close(seen, x / math.sqrt(total), rtol=1e-12, atol=0)
    assert_close(c_noise, torch.full((5,), math.log(sigma) / 4, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    expected = sigma_data**2 / total * x + sigma * sigma_data / math.sqrt(total) * Recorder()(x, *[None] * 3)
    assert_close(out, expected, rtol=1e-12, atol=1e-14)


def test_a_noise_level_for_all_is_that_level_for_each():
    x, levels = images(), torch.tensor(SIGMAS, dtype=torch.float64)
    denoise = denoiser(lambda x, *_: x.tanh(), dtype=torch.float64)
    together = denoise(x, levels)
    for i, level in enumerate(levels):
        assert_close(denoise(x, level)[i], together[i], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [torch.float32, torch.float64, torch.bfloat16])
def test_the_network_sees_its_dtype_and_the_state_keeps_its_own(state, inner):
    net = Recorder()
    out = denoiser(net, dtype=inner)(images(dtype=state), torch.tensor(2.0))
    assert out.dtype == state
    assert [part.dtype for part in net.calls[0][:2]] == [inner, inner]


def test_labels_reach_the_network():
    net, labels, augment = Recorder(), torch.arange(5), torch.ones(5, 9)
    denoiser(net, labels, augment)(images(), torch.tensor(1.0))
    assert net.calls[0][2] is labels
    assert net.calls[0][3] is augment
    EDMLoss()(net, images(), labels, augment, generator=torch.Generator().manual_seed(0))
    assert net.calls[1][2] is labels
    assert net.calls[1][3] is augment


def test_the_loss_is_the_weighted_error_of_the_denoiser_written_out():
    y, sigma, loss = images(), torch.tensor(SIGMAS, dtype=torch.float64), EDMLoss(sigma_data=0.7)
    values = loss(Recorder(), y, generator=torch.Generator().manual_seed(3), level=sigma)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for i, s in enumerate(SIGMAS):
        total = s**2 + 0.49
        F = Recorder()(y.float(), *[None] * 3)[i].double()
        D = 0.49 / total * (y[i] + s * noise[i]) + s * 0.7 / math.sqrt(total) * F
        expected = total / (s * 0.7) ** 2 * ((D - y[i]) ** 2).mean()
        assert_close(values[i], expected, rtol=1e-10, atol=0)


def test_weight_and_c_out_cancel_so_that_the_loss_is_the_error_of_the_network_itself():
    y, sigma = images(), torch.tensor(SIGMAS, dtype=torch.float64)
    values = EDMLoss()(Recorder(), y, generator=torch.Generator().manual_seed(3), level=sigma)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s = sigma[:, None, None, None]
    c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
    target = (y - c_skip * (y + s * noise)) / c_out  # EDM Eq. 8
    error = (Recorder()(y.float(), *[None] * 3).double() - target).square().flatten(1).mean(1)
    assert_close(values, error, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_network_of_zeros_has_loss_1_at_every_noise_level(sigma):
    y = torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 2
    levels = torch.full((4000,), sigma)
    values = EDMLoss()(lambda x, *_: torch.zeros_like(x), y, generator=torch.Generator().manual_seed(1), level=levels)
    assert values.mean().item() == pytest.approx(1, abs=0.025)  # 64,000 pixels: four standard errors


@pytest.mark.parametrize(("P_mean", "P_std"), [(-1.2, 1.2), (0.4, 1.0)])
def test_the_logarithm_of_sigma_is_normal(P_mean, P_std):
    sigma = EDMLoss(P_mean, P_std).draw_level(torch.empty(20_000, 1), torch.Generator().manual_seed(0))
    assert sigma.shape == (20_000,)
    assert stats.kstest(sigma.log().double().numpy(), "norm", (P_mean, P_std)).pvalue > 0.01


def test_a_level_rises_with_the_normal_number_that_it_is_drawn_from():
    normal = torch.randn(6, generator=torch.Generator().manual_seed(3)).tolist()
    levels = EDMLoss(0.4, 1.5).draw_level(images(6), torch.Generator().manual_seed(3)).tolist()
    assert levels == pytest.approx([math.exp(0.4 + 1.5 * n) for n in normal], rel=1e-6)


def test_the_loss_is_a_function_of_its_generator_and_leaves_ambient_randomness_alone():
    state = torch.get_rng_state()
    first, again, other = (
        EDMLoss()(Recorder(), images(), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert_close(first, again, rtol=0, atol=0)
    assert (first != other).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_stays_on_the_device_of_the_images():
    loss = EDMLoss()(lambda x, *_: x, images().to("meta"))
    assert loss.device.type == "meta"
    assert denoiser(lambda x, *_: x)(images().to("meta"), torch.tensor(2.0)).device.type == "meta"


def test_noise_levels_and_noise_are_independent():
    net = Recorder()
    loss, zeros = EDMLoss(), torch.zeros(3000, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    loss(net, zeros, generator=generator)
    x, c_noise, *_ = net.calls[0]
    sigma = (4 * c_noise).exp()
    noise = x.flatten() * (sigma**2 + 0.25).sqrt() / sigma
    assert stats.kstest(noise.double().numpy(), "norm").pvalue > 0.01
    assert stats.pearsonr(noise.numpy(), c_noise.numpy()).pvalue > 0.01
    assert stats.pearsonr(noise.abs().numpy(), c_noise.numpy()).pvalue > 0.01


def test_the_loss_reaches_the_networks_parameters():
    weight = torch.zeros((), requires_grad=True)
    EDMLoss()(lambda x, *_: weight * x, images(), generator=torch.Generator().manual_seed(0)).mean().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite()
    assert weight.grad


def test_the_defaults_are_those_of_edm():
    """CONTRACT §2."""
    loss = EDMLoss()
    assert (loss.P_mean, loss.P_std, loss.sigma_data, loss.level_name) == (-1.2, 1.2, 0.5, "sigma")
    assert_close(edm_sigmas(18), edm_sigmas(18, sigma_min=0.002, sigma_max=80.0, rho=7.0), rtol=0, atol=0)
    x, sigma = images(), torch.tensor(0.7)
    out = denoiser(Recorder())(x, sigma)
    assert_close(out, denoiser(Recorder(), sigma_data=0.5, dtype=torch.float32)(x, sigma), rtol=0, atol=0)


@pytest.mark.parametrize(("P_mean", "P_std"), [(-1.2, 1.2), (0.4, 1.0)])
@pytest.mark.parametrize("bins", [1, 2, 5])
def test_the_bins_are_visited_equally_often(bins, P_mean, P_std):
    edges = EDMLoss(P_mean, P_std).bin_edges(bins)
    shares = [i / bins for i in range(1, bins)]
    assert_close(edges.log().double().numpy(), stats.norm(P_mean, P_std).ppf(shares), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 18, 40])
@pytest.mark.parametrize(("low", "high", "rho"), [(0.002, 80.0, 7.0), (0.03, 3.0, 1.0)])
def test_the_schedule_is_equation_5(steps, low, high, rho):
    sigmas = edm_sigmas(steps, sigma_min=low, sigma_max=high, rho=rho)
    expected = [
        (high ** (1 / rho) + (i / (steps - 1) if i else 0) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(steps)
    ]
    assert_close(sigmas, torch.tensor([*expected, 0], dtype=torch.float64), rtol=1e-12, atol=0)
    assert sigmas[0].item() == pytest.approx(high, rel=1e-12)
    assert steps == 1 or sigmas[-2].item() == pytest.approx(low, rel=1e-12)
    assert (sigmas.diff() < 0).all()


def test_levels_even_in_lambda_are_a_geometric_series():
    sigmas = lambda_sigmas(5, 0.01, 100.0)
    assert_close(sigmas, torch.tensor([100, 10, 1, 0.1, 0.01, 0], dtype=torch.float64), rtol=1e-12, atol=0)
    assert lambda_sigmas(1, 0.01, 100.0).tolist() == pytest.approx([100, 0])
