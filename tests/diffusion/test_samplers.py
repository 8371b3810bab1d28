"""Solvers against a Gaussian, whose probability flow is known in closed form, and against DDIM as it is published."""

import math
from functools import partial
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import integrate, interpolate, stats
from torch import Tensor
from torch.testing import assert_close

from diffit.configs.sampling import Sampler
from diffit.diffusion.adm import Schedule
from diffit.diffusion.edm import edm_sigmas, lambda_sigmas
from diffit.diffusion.samplers import consistency, ddim, dpm_solver_pp, dpm_solver_pp_sde, euler, heun, unipc
from diffit.utils.randomness import PerSampleNoise

MU, S = 0.3, 0.5
dpm_solver_pp_3m = partial(dpm_solver_pp, order=3)
unipc2 = partial(unipc, order=2)
still = partial(dpm_solver_pp_sde, eta=0.0)
samplers = pytest.mark.parametrize(
    "sampler", [euler, heun, dpm_solver_pp, dpm_solver_pp_3m, unipc2, unipc, still],
    ids=["euler", "heun", "2m", "3m", "unipc2", "unipc3", "sde-still"],
)  # fmt: skip


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x₀ | x] for data N(MU, S²)."""
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def exact(noise: Tensor, first: float, last: float) -> Tensor:
    """The flow of that Gaussian: x − MU shrinks as the standard deviation √(S² + σ²) does."""
    return MU + (noise * first - MU) * math.sqrt((S**2 + last**2) / (S**2 + first**2))


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x₀ | x] for data of which 30 % are N(−0.6, 0.15²) and 70 % N(0.5, 0.25²)."""
    means, variances = x.new_tensor([-0.6, 0.5]), x.new_tensor([0.15, 0.25]) ** 2
    total = variances + sigma**2
    log_likelihood = x.new_tensor([0.3, 0.7]).log() - total.log() / 2 - (x[..., None] - means) ** 2 / (2 * total)
    return (log_likelihood.softmax(-1) * (variances * x[..., None] + sigma**2 * means) / total).sum(-1)


ORDERS = [(dpm_solver_pp, 2), (dpm_solver_pp_3m, 3), (unipc2, 3), (unipc, 4)]
"""UniPC's corrector is of one order more than its predictor."""


@pytest.mark.parametrize(("sampler", "order"), ORDERS, ids=["2m", "3m", "unipc2", "unipc3"])
def test_on_two_modes_the_error_falls_with_the_order_of_the_method(sampler, order):
    noise = normal(16)
    flow = integrate.solve_ivp(
        lambda t, x: (x - mixture(torch.from_numpy(x), torch.tensor(t, dtype=torch.float64)).numpy()) / t,
        (10, 0.1), (noise * 10).numpy(), method="DOP853", rtol=1e-11, atol=1e-11,
    ).y[:, -1]  # fmt: skip
    counts, errors = [32, 64, 128], []
    for steps in counts:
        sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
        errors.append(np.abs(sampler(mixture, noise, sigmas).numpy() - flow).max())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.3)


@pytest.mark.parametrize(("order", "corrected"), [(3, False), (2, True), (3, True)])
def test_a_step_is_the_integral_of_the_polynomial_through_the_images(order, corrected):
    """On unequal steps, by SciPy's interpolation and quadrature. Of two images it is their value at half the step."""
    sigmas = torch.tensor([9.0, 4.0, 2.5, 1.0, 0.7, 0.2], dtype=torch.float64)
    lambdas = (-np.log(sigmas.numpy())).tolist()

    def denoise(x: float, sigma: float) -> float:
        return math.tanh(x / (1 + sigma)) + 0.1 * sigma

    def move(x: float, i: int, known: dict[float, float]) -> float:
        start, end = lambdas[i], lambdas[i + 1]
        curve = interpolate.lagrange(list(known), list(known.values()))
        if len(known) == 2:
            return math.exp(start - end) * x + (1 - math.exp(start - end)) * curve((start + end) / 2)
        return math.exp(start - end) * x + integrate.quad(lambda u: math.exp(u - end) * curve(u), start, end)[0]

    x, images, previous = 0.8 * 9, {}, 0.0
    for i in range(5):
        before = dict(list(images.items())[-min(order, i) :]) if i else {}
        images[lambdas[i]] = denoise(x, sigmas[i].item())
        if corrected and i:
            x = move(previous, i - 1, before | {lambdas[i]: images[lambdas[i]]})
        previous = x
        x = move(x, i, dict(list(images.items())[-order:]))
    sampler = partial(unipc if corrected else dpm_solver_pp, order=order)
    noise = torch.tensor([0.8], dtype=torch.float64)
    out = sampler(lambda x, s: torch.tanh(x / (1 + s)) + 0.1 * s, noise, sigmas)
    assert out.item() == pytest.approx(x, rel=1e-9)


@pytest.mark.parametrize("denoise", [gaussian, mixture])
def test_on_a_fine_enough_trajectory_more_order_is_less_error_at_eight_evaluations(denoise):
    """From σ = 3 to 0.3. Over EDM's whole range a step in ln σ is 1.5, and order 3 is worse than order 2."""
    noise, sigmas = normal(200), torch.logspace(math.log10(3), math.log10(0.3), 9, dtype=torch.float64)
    fine = heun(denoise, noise, torch.logspace(math.log10(3), math.log10(0.3), 400, dtype=torch.float64))
    two, three, pc = (
        (f(denoise, noise, sigmas) - fine).square().mean() for f in (dpm_solver_pp, dpm_solver_pp_3m, unipc)
    )
    assert max(pc, three) < two / 3


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


# --- the stochastic solver ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_the_stochastic_solver_has_the_distribution_of_the_data(eta):
    count = 20_000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        x = dpm_solver_pp_sde(
            gaussian, normal(count), lambda_sigmas(120, 0.01, 40), eta=eta, noise_source=torch.randn_like
        )
    assert x.mean().item() == pytest.approx(MU, abs=4 * S / count**0.5)
    assert x.std().item() == pytest.approx(S, rel=4 / (2 * count) ** 0.5)
    assert stats.kstest(x.numpy(), stats.norm(MU, S).cdf).pvalue > 1e-3


def test_the_variance_of_a_coarse_stochastic_trajectory_is_that_of_its_linear_recursion():
    """For data N(0, S²) a step maps the states linearly: their covariance follows exactly, and few steps show it."""
    sigmas, eta = torch.tensor([4.0, 1.5, 0.6, 0.0], dtype=torch.float64), 0.7
    weights = [S**2 / (S**2 + s**2) for s in (4.0, 1.5, 0.6)]
    rows = np.array([[4.0, 0.0, 0.0]])  # x as a linear map of the start and the noises
    images = []
    for i, (s, t) in enumerate(pairwise((4.0, 1.5, 0.6))):
        images.append(weights[i] * rows[-1])
        h = math.log(s / t)
        target = images[0] if i == 0 else images[1] + h / (2 * math.log(4.0 / 1.5)) * (images[1] - images[0])
        noise = np.eye(3)[i + 1] * t * math.sqrt(1 - math.exp(-2 * eta * h))
        step = t / s * math.exp(-eta * h)
        rows = np.vstack([rows, step * rows[-1] + (1 - step) * target + noise])
    expected = np.linalg.norm(weights[2] * rows[-1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        x = dpm_solver_pp_sde(
            lambda x, sigma: x * (S**2 / (S**2 + sigma**2)),
            normal(40_000),
            sigmas,
            eta=eta,
            noise_source=torch.randn_like,
        )
    assert x.std().item() == pytest.approx(expected, rel=4 / 80_000**0.5)


def test_without_noise_the_stochastic_solver_is_the_deterministic_one():
    noise, sigmas = normal(20), edm_sigmas(9)
    assert_close(still(mixture, noise, sigmas), dpm_solver_pp(mixture, noise, sigmas), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"noise_source.*torch\.randn_like"):
        dpm_solver_pp_sde(mixture, noise, sigmas)


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
    for sampler in (dpm_solver_pp, dpm_solver_pp_3m, unipc2, unipc, still):
        sampler(gaussian, normal(2), edm_sigmas(4), noise_source=source)
    ddim(lambda x, t: x.sin(), normal(2, 1, 1), Schedule.named("linear").respace(4), noise_source=source)


# --- contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [(euler, 7), (heun, 13), (dpm_solver_pp, 7), (dpm_solver_pp_3m, 7), (unipc, 7), (still, 7)],
)
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


def test_consistency_sampling_is_algorithm_1_on_plain_numbers():
    """Noise is added at every level but the last, and what `after_step` returns goes on."""
    sigmas, new, start = [4.0, 0.5, 0.25, 0.0], [0.75, -1.5], 1.25
    x, states = start * sigmas[0], []
    for sigma, sigma_next, n in zip(sigmas[:-1], sigmas[1:], [*new, 0.0], strict=True):
        seen = x
        x = (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2) + sigma_next * n + 1
        states.append((sigma, seen, x - 1))
    source, looked, stepped = iter(new), [], []

    def after_step(i, sigma, x):
        stepped.append((i, float(sigma), x.item()))
        return x + 1

    result = consistency(
        gaussian, torch.tensor([start], dtype=torch.float64), torch.tensor(sigmas),
        noise_source=lambda x: torch.full_like(x, next(source)),
        callback=lambda i, sigma, x, denoised: looked.append((i, float(sigma), x.item())), after_step=after_step,
    )  # fmt: skip
    assert result.item() == pytest.approx(x, rel=1e-12)
    for i, (sigma, before, after) in enumerate(states):
        assert looked[i] == (i, sigma, pytest.approx(before, rel=1e-12))
        assert stepped[i] == (i, sigma, pytest.approx(after, rel=1e-12))


def test_only_the_orders_that_are_known_are_accepted():
    for sampler in (unipc, dpm_solver_pp):
        with pytest.raises(ValueError, match="order 4: multistep solvers are of order 1 to 3"):
            sampler(gaussian, normal(2), edm_sigmas(3), order=4)


def test_what_after_step_adds_is_not_taken_back_by_the_corrector():
    """Where images do not depend on the state, a shift after a step shrinks as the state does."""
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)

    def shift(i: int, sigma: Tensor, x: Tensor) -> Tensor:
        return x + 1 if i == 0 else x

    plain, shifted = (
        unipc(lambda x, sigma: sigma.expand_as(x), normal(3), sigmas, after_step=step)
        for step in (lambda i, sigma, x: x, shift)
    )
    assert_close(shifted - plain, torch.full_like(plain, 0.5 / 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in get_args(Sampler) if name != "consistency"])
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
