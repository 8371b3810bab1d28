"""Solvers against a Gaussian, whose probability flow is known in closed form, and against DDIM as it is published."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffit.diffusion.adm import Schedule
from diffit.diffusion.edm import edm_sigmas
from diffit.diffusion.samplers import ddim, dpm_solver_pp, euler, heun
from diffit.utils.randomness import PerSampleNoise

MU, S = 0.3, 0.5
samplers = pytest.mark.parametrize("sampler", [euler, heun, dpm_solver_pp])


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x₀ | x] for data N(MU, S²)."""
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def exact(noise: Tensor, first: float, last: float) -> Tensor:
    """The flow of that Gaussian: x − MU shrinks as the standard deviation √(S² + σ²) does."""
    return MU + (noise * first - MU) * math.sqrt((S**2 + last**2) / (S**2 + first**2))


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (dpm_solver_pp, 2)])
def test_the_error_falls_with_the_order_of_the_method(sampler, order):
    noise, counts = normal(16), [64, 128, 256, 512]
    errors = []
    for steps in counts:
        sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
        errors.append((sampler(gaussian, noise, sigmas) - exact(noise, 10, 0.1)).abs().max().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.05)


@pytest.mark.parametrize(("sampler", "tolerance"), [(euler, 0.02), (heun, 1e-3), (dpm_solver_pp, 3e-3)])
def test_finely_sampled_it_has_the_moments_of_the_data(sampler, tolerance):
    quantiles = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    x = sampler(gaussian, quantiles, edm_sigmas(256))
    assert_close(x, exact(quantiles, 80, 0), rtol=0, atol=tolerance)
    assert x.mean().item() == pytest.approx(MU, abs=0.005)
    assert x.std().item() == pytest.approx(S, rel=0.02)


@samplers
def test_a_constant_denoiser_is_reached_exactly(sampler):
    x = sampler(lambda x, sigma: torch.full_like(x, 0.7), normal(8), edm_sigmas(5))
    assert_close(x, torch.full_like(x, 0.7), rtol=1e-12, atol=1e-12)


def test_heun_is_algorithm_1_on_plain_numbers():
    def drift(x: float, t: float) -> float:
        return (x - math.tanh(x / (1 + t))) / t

    times = [3.0, 1.0, 0.25, 0.0]
    x = 3.0 * 0.8
    for t, t_next in pairwise(times):
        d = drift(x, t)
        guess = x + (t_next - t) * d
        x = x + (t_next - t) * (d + drift(guess, t_next)) / 2 if t_next else guess
    out = heun(lambda x, s: torch.tanh(x / (1 + s)), torch.tensor([0.8], dtype=torch.float64), torch.tensor(times))
    assert out.item() == pytest.approx(x, rel=1e-12)


def test_dpm_solver_is_algorithm_2_on_plain_numbers():
    """arXiv 2211.01095, Algorithm 2 with α = 1, on unequal steps in λ."""
    times, x, before, h_before = [3.0, 1.0, 0.25, 0.2, 0.0], 3.0 * 0.8, 0.0, 0.0
    for i, (t, t_next) in enumerate(pairwise(times)):
        image = math.tanh(x / (1 + t))
        if not t_next:
            x = image
            break
        h = math.log(t / t_next)
        r = h_before / h
        direction = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * before if i else image
        x = t_next / t * x - math.expm1(-h) * direction
        before, h_before = image, h
    start, sigmas = torch.tensor([0.8], dtype=torch.float64), torch.tensor(times, dtype=torch.float64)
    out = dpm_solver_pp(lambda x, s: torch.tanh(x / (1 + s)), start, sigmas)
    assert out.item() == pytest.approx(x, rel=1e-12)


@samplers
def test_levels_may_end_above_zero(sampler):
    """A part of a trajectory, whose last step is not onto the clean image."""
    noise, sigmas = normal(4), torch.linspace(2, 1, 200, dtype=torch.float64)
    assert_close(sampler(gaussian, noise, sigmas), exact(noise, 2, 1), rtol=0, atol=2e-3)


def test_euler_takes_the_steps_of_ddim_at_eta_0():
    """arXiv 2010.02502, Eq. 12, in its own variables: z = √ᾱ·x with ᾱ = 1/(1 + σ²)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x + sigma)

    sigmas, noise = edm_sigmas(12), normal(20)
    alphas = (1 / (1 + sigmas**2)).tolist()
    z = noise * sigmas[0] * math.sqrt(alphas[0])
    for alpha, alpha_next, sigma in zip(alphas, alphas[1:], sigmas, strict=False):
        x0 = denoise(z / math.sqrt(alpha), sigma)
        epsilon = (z - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha)
        z = math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next) * epsilon
    assert_close(euler(denoise, noise, sigmas), z, rtol=1e-9, atol=1e-9)


# --- churn ----------------------------------------------------------------------------------------------------------


def test_churn_without_a_noise_source_is_refused():
    with pytest.raises(ValueError, match=r"noise_source.*torch\.randn_like"):
        heun(gaussian, normal(4), edm_sigmas(4), S_churn=1)


@pytest.mark.parametrize(
    ("S_churn", "S_min", "S_max", "S_noise"),
    [(2.0, 0.0, math.inf, 1.0), (1e9, 0.0, math.inf, 1.007), (1.0, 0.05, 50.0, 0.9), (3.0, 100.0, math.inf, 1.0)],
)
def test_churn_adds_what_algorithm_2_says(S_churn, S_min, S_max, S_noise):
    """Where the denoiser is the identity nothing but churn moves the state, and a source of ones makes it countable."""
    sigmas = edm_sigmas(8)
    expected = 0.0
    for sigma in sigmas[:-1].tolist():
        gamma = min(S_churn / 8, math.sqrt(2) - 1) if S_min <= sigma <= S_max else 0
        expected += S_noise * math.sqrt((sigma * (1 + gamma)) ** 2 - sigma**2)
    out = heun(
        lambda x, sigma: x,
        torch.zeros(3, dtype=torch.float64),
        sigmas,
        noise_source=torch.ones_like,
        S_churn=S_churn,
        S_min=S_min,
        S_max=S_max,
        S_noise=S_noise,
    )
    assert_close(out, torch.full_like(out, expected), rtol=1e-12, atol=1e-12)


def test_churn_is_on_at_all_levels_with_noise_of_one_unless_told_otherwise():
    sigmas = torch.tensor([3.0, 0.5, 1e-9, 0.0], dtype=torch.float64)
    churn = {"noise_source": torch.ones_like, "S_churn": 0.3}
    out = heun(lambda x, sigma: x, torch.zeros(1, dtype=torch.float64), sigmas, **churn)
    assert out.item() == pytest.approx(sum(sigma * math.sqrt(1.1**2 - 1) for sigma in sigmas.tolist()), rel=1e-12)


@pytest.mark.parametrize(("bounds", "churned"), [({"S_min": 0.5}, [3, 0.5]), ({"S_max": 0.5}, [0.5, 0.25])])
def test_the_bounds_of_churn_belong_to_its_range(bounds, churned):
    sigmas = torch.tensor([3.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    churn = {"noise_source": torch.ones_like, "S_churn": 0.3, **bounds}
    out = heun(lambda x, sigma: x, torch.zeros(1, dtype=torch.float64), sigmas, **churn)
    assert out.item() == pytest.approx(sum(sigma * math.sqrt(1.1**2 - 1) for sigma in churned), rel=1e-12)


@pytest.mark.parametrize("source", ["torch.randn_like", "PerSampleNoise"])
def test_churn_leaves_the_distribution_as_it_is(source):
    count = 300
    noise = normal(count, 100)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        draw = torch.randn_like if source == "torch.randn_like" else PerSampleNoise(range(count))
        x = heun(gaussian, noise, edm_sigmas(256), noise_source=draw, S_churn=20)
    assert x.mean().item() == pytest.approx(MU, abs=0.012)  # four standard errors of 30,000 numbers
    assert x.std().item() == pytest.approx(S, rel=0.016)
    # (1 + γ)^steps ≈ e¹⁹: hardly anything of the first noise is left.
    assert abs(np.corrcoef(x.flatten(), noise.flatten())[0, 1]) < 0.03


def test_without_churn_no_noise_is_asked_for():
    def source(x: Tensor) -> Tensor:
        raise AssertionError

    heun(gaussian, normal(2), edm_sigmas(4), noise_source=source)
    heun(gaussian, normal(2), edm_sigmas(4), noise_source=source, S_churn=5, S_min=1e5)
    euler(gaussian, normal(2), edm_sigmas(4), noise_source=source)
    dpm_solver_pp(gaussian, normal(2), edm_sigmas(4), noise_source=source)
    ddim(lambda x, t: x.sin(), normal(2, 1, 1), Schedule.named("linear").respace(4), noise_source=source)


# --- contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "evaluations"), [(euler, 7), (heun, 13), (dpm_solver_pp, 7)])
def test_it_evaluates_the_network_as_often_as_promised(sampler, evaluations):
    seen = []
    sampler(lambda x, sigma: seen.append(sigma) or gaussian(x, sigma), normal(2), edm_sigmas(7))
    assert len(seen) == evaluations
    assert all(sigma > 0 and sigma.ndim == 0 and sigma.device.type == "cpu" for sigma in seen)


@samplers
def test_the_callback_sees_each_step_before_it_is_taken(sampler):
    steps, noise, sigmas = [], normal(4), edm_sigmas(6)
    out = sampler(gaussian, noise, sigmas, callback=lambda *step: steps.append(step))
    assert [step[0] for step in steps] == list(range(6))
    assert_close(torch.stack([sigma for _, sigma, _, _ in steps]), sigmas[:-1], rtol=0, atol=0)
    assert_close(steps[0][2], noise * sigmas[0], rtol=0, atol=0)
    for _, sigma, x, denoised in steps:
        assert_close(denoised, gaussian(x, sigma), rtol=0, atol=0)
    assert_close(out, steps[-1][3], rtol=1e-12, atol=1e-12)  # the last step goes to σ = 0: it is the denoised image


@samplers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_state_keeps_its_dtype(sampler, dtype):
    seen = set()
    noise = normal(2, 1, 2, 2, dtype=torch.float64).to(dtype)
    churn = {"S_churn": 1.0, "noise_source": torch.randn_like} if sampler is heun else {}
    out = sampler(lambda x, sigma: seen.add(x.dtype) or gaussian(x, sigma), noise, edm_sigmas(3), **churn)
    assert out.dtype == dtype
    assert seen == {dtype}


@samplers
def test_it_leaves_its_arguments_as_they_were(sampler):
    noise, sigmas = normal(3), edm_sigmas(3)
    copies = noise.clone(), sigmas.clone()
    sampler(gaussian, noise, sigmas)
    assert_close((noise, sigmas), copies, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["heun", "euler", "dpm++", "ddpm", "ddim"])
def test_after_step_sees_every_state_and_what_it_returns_goes_on(name):
    """A state that is held at a constant stays it, whatever the sampler; the last one seen is the result."""
    from diffit.configs.presets import get_preset
    from diffit.sampling.model import Model

    config = get_preset("latent-debug")
    sampling = config.sampling.model_copy(update={"sampler": name, "steps": 5})
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = []

    def run(after_step):
        model = Model(lambda x, t, y: torch.cat([x / 2, x], dim=1), config.model_copy(update={"sampling": sampling}))
        return model.sample(noise=noise, noise_source=torch.zeros_like, after_step=after_step).double()

    def look(i, level, x):
        seen.append((i, float(level), x))
        return x

    result = run(look)
    assert [i for i, _, _ in seen] == list(range(5))
    assert [level for _, level, _ in seen] == sorted((level for _, level, _ in seen), reverse=True)
    torch.testing.assert_close(seen[-1][2].float().double(), result, rtol=0, atol=0)
    held = run(lambda i, level, x: torch.full_like(x, 7.0))
    torch.testing.assert_close(held, torch.full_like(noise, 7.0), rtol=0, atol=0)
