"""The discrete diffusion against formulas written out here in plain float64 numbers, and against diffusers."""

import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from diffit.configs.schema import ADMDiffusion
from diffit.diffusion.adm import (
    ADMLoss,
    Schedule,
    cosine_betas,
    denoiser,
    discretized_gaussian_log_likelihood,
    linear_betas,
    predictor,
    schedule_of,
    space_timesteps,
    split_output,
)
from diffit.diffusion.samplers import ddim, ddpm, dpm_solver_pp, dpm_solver_pp_sde, euler, heun, unipc

LINEAR, COSINE = Schedule.named("linear"), Schedule.named("cosine")
named = pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tables:
    """DDPM's quantities for a list of betas, number by number (arXiv 2006.11239, Eq. 4 and 7)."""

    def __init__(self, betas: list[float]) -> None:
        self.beta, self.alpha_bar, product = betas, [], 1.0
        for beta in betas:
            product *= 1 - beta
            self.alpha_bar.append(product)
        self.before = [1.0, *self.alpha_bar[:-1]]
        rows = list(zip(betas, self.alpha_bar, self.before, strict=True))
        self.variance = [beta * (1 - before) / (1 - a) for beta, a, before in rows]
        self.share_x0 = [math.sqrt(before) * beta / (1 - a) for beta, a, before in rows]
        self.share_x = [math.sqrt(1 - beta) * (1 - before) / (1 - a) for beta, a, before in rows]
        self.log_variance = [math.log(v) for v in [self.variance[1], *self.variance[1:]]]


def linear_by_hand(steps: int = 1000) -> list[float]:
    return [1e-4 + (0.02 - 1e-4) * i / (steps - 1) for i in range(steps)]


def cosine_by_hand(steps: int = 1000) -> list[float]:
    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]


def respaced_by_hand(betas: list[float], kept: list[int]) -> Tables:
    """Betas of the timesteps ``kept`` whose ᾱ are those of the whole: β = 1 − ᾱ[kept]/ᾱ[the kept before]."""
    whole, before, new = Tables(betas), 1.0, []
    for i in kept:
        new.append(1 - whole.alpha_bar[i] / before)
        before = whole.alpha_bar[i]
    return Tables(new)


def network(x: Tensor, t: Tensor) -> Tensor:
    """Something nonlinear with a learned variance that depends on everything: ``(B, 2C, …)``."""
    t = t.to(x).reshape(-1, *[1] * (x.ndim - 1)) / 1000
    return torch.cat([torch.tanh(x + t), torch.sin(3 * x - 5 * t)], dim=1)


# --- schedules ------------------------------------------------------------------------------------------------------


def test_betas_are_the_published_ones():
    assert linear_betas().dtype == torch.float64
    assert_close(linear_betas().tolist(), linear_by_hand(), rtol=1e-13, atol=0)
    assert_close(cosine_betas().tolist(), cosine_by_hand(), rtol=1e-9, atol=0)
    assert cosine_betas().max() == 0.999


def test_a_configuration_names_its_schedule():
    found = schedule_of(ADMDiffusion(schedule="cosine", timesteps=50))
    assert_close(found.betas, cosine_betas(50), rtol=0, atol=0)
    assert found.timesteps.tolist() == list(range(50))


def test_fewer_steps_end_in_as_much_noise():
    ends = [Schedule.named("linear", steps).alpha_bar[-1].log().item() for steps in (200, 1000, 4000)]
    assert_close(ends, [ends[1]] * 3, rtol=0.1, atol=0)


@named
def test_tables_are_those_of_ddpm(schedule):
    tables = Tables(schedule.betas.tolist())
    for found, expected in [
        (schedule.alpha_bar, tables.alpha_bar),
        (schedule.alpha_bar_before, tables.before),
        (schedule.posterior_variance, tables.variance),
        (schedule.posterior_log_variance, tables.log_variance),
        (schedule.sigma, [math.sqrt((1 - a) / a) for a in tables.alpha_bar]),
    ]:
        assert found.dtype == torch.float64
        assert_close(found.tolist(), expected, rtol=1e-10, atol=0)


def test_250_steps_have_stride_999_over_249_rounded_one_by_one():
    kept, position = [], 0.0
    for _ in range(250):
        kept.append(round(position))
        position += 999 / 249
    found = space_timesteps(1000, 250)
    assert found.tolist() == kept
    assert (found[0], found[-1], len(set(kept))) == (0, 999, 250)
    assert set((found[1:] - found[:-1]).tolist()) == {4, 5}


def test_positions_are_added_up_before_they_are_rounded():
    """At 21 steps the tenth falls on 499.5, where a product would round the other way."""
    differ = 0
    for count in range(2, 400):
        strides = [0.0] + [999 / (count - 1)] * (count - 1)
        expected = [round(position) for position in accumulate(strides)]
        assert space_timesteps(1000, count).tolist() == expected
        differ += expected != [round(i * (999 / (count - 1))) for i in range(count)]
    assert differ > 0


@pytest.mark.parametrize(
    ("count", "spacing", "kept"),
    [
        (1, "linspace", [0]),
        (2, "linspace", [0, 999]),
        (5, "linspace", [0, 250, 500, 749, 999]),
        (25, "linspace", [round(i * 999 / 24) for i in range(25)]),
        (1000, "linspace", list(range(1000))),
        (50, "leading", list(range(0, 1000, 20))),
        (1, "leading", [0]),
        (1000, "leading", list(range(1000))),
        (25, "leading", list(range(0, 1000, 40))),
        (334, "leading", list(range(0, 1000, 3))),
    ],
)
def test_spacings(count, spacing, kept):
    assert space_timesteps(1000, count, spacing).tolist() == kept
    assert LINEAR.respace(count, spacing).timesteps.tolist() == kept


@pytest.mark.parametrize(
    ("total", "count", "kept"),
    [(10, 1, [9]), (10, 4, [1, 4, 6, 9]), (1000, 8, [124, 249, 374, 499, 624, 749, 874, 999]), (3, 3, [0, 1, 2])],
)
def test_trailing_ends_at_the_last_timestep_and_every_second_is_that_of_half_as_many(total, count, kept):
    assert space_timesteps(total, count, "trailing").tolist() == kept
    if count % 2 == 0:
        assert space_timesteps(total, count // 2, "trailing").tolist() == kept[1::2]


def test_trailing_leaves_out_levels_above_80_where_no_digit_of_the_image_is_left():
    """On a schedule that has a level of 80.5 and one of 79."""
    alpha_bar = 1 / (1 + torch.tensor([1.0, 79, 80.5, 900], dtype=torch.float64) ** 2)
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    schedule = Schedule(betas, torch.arange(4))
    assert schedule.respace(2, "trailing").timesteps.tolist() == [0, 1]
    assert schedule.respace(2, "linspace").timesteps.tolist() == [0, 3]


def test_leading_has_the_smallest_whole_stride_that_leaves_as_many():
    for total in (1, 7, 60):
        possible = {}
        for stride in range(total, 0, -1):
            possible[len(range(0, total, stride))] = list(range(0, total, stride))
        for count in range(1, total + 1):
            if count in possible:
                assert space_timesteps(total, count, "leading").tolist() == possible[count]
            else:
                with pytest.raises(ValueError, match=f"no whole stride leaves {count} of {total} timesteps; use"):
                    space_timesteps(total, count, "leading")


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("count", [0, -3, 1001])
def test_impossible_numbers_of_steps_are_refused_with_the_possible(count, spacing):
    with pytest.raises(ValueError, match=f"steps {count}: the schedule has 1000 timesteps; use 1 to 1000"):
        LINEAR.respace(count, spacing)


shorter = pytest.mark.parametrize(("steps", "spacing"), [(250, "linspace"), (25, "linspace"), (50, "leading")])


@pytest.mark.parametrize("respace", [LINEAR.respace, LINEAR.multistep_sigmas])
def test_an_unknown_spacing_is_refused(respace):
    with pytest.raises(ValueError, match="spacing 'even': use linspace, leading or trailing"):
        respace(10, "even")


@shorter
def test_a_respaced_schedule_has_betas_of_its_own_and_the_same_alpha_bar(steps, spacing):
    respaced = LINEAR.respace(steps, spacing)
    tables = respaced_by_hand(linear_by_hand(), respaced.timesteps.tolist())
    assert_close(respaced.betas.tolist(), tables.beta, rtol=1e-10, atol=0)
    assert_close(respaced.alpha_bar, LINEAR.alpha_bar[respaced.timesteps], rtol=1e-10, atol=0)
    assert_close(respaced.posterior_log_variance.tolist(), tables.log_variance, rtol=1e-9, atol=0)


def test_a_schedule_moves_with_its_timesteps():
    respaced = LINEAR.respace(7)
    moved, away = respaced.to(torch.device("cpu")), respaced.to(torch.device("meta"))
    assert_close((moved.betas, moved.timesteps), (respaced.betas, respaced.timesteps), rtol=0, atol=0)
    assert away.betas.device.type == away.timesteps.device.type == "meta"


def test_a_respaced_schedule_can_be_respaced_again():
    twice = LINEAR.respace(500, "leading").respace(50, "leading")
    assert twice.timesteps.tolist() == list(range(0, 1000, 20))
    assert_close(twice.betas, LINEAR.respace(50, "leading").betas, rtol=1e-10, atol=0)


def test_a_single_step_is_possible():
    x = ddpm(network, randn(2, 1, 2, 2), LINEAR.respace(1), noise_source=torch.zeros_like)
    assert x.isfinite().all()


@named
@pytest.mark.parametrize("steps", [1000, 250, 7])
def test_noise_levels_and_timesteps_are_each_others_inverse(schedule, steps):
    respaced = schedule.respace(steps)
    t = torch.linspace(0, 999, 700, dtype=torch.float64)
    assert_close(respaced.timestep_of(respaced.sigma_of(t)), t, rtol=1e-9, atol=1e-9)
    assert_close(respaced.timestep_of(respaced.sigma), respaced.timesteps.double(), rtol=0, atol=1e-9)
    assert_close(respaced.sigma_of(respaced.timesteps), respaced.sigma, rtol=1e-12, atol=0)
    # Between timesteps: NumPy's interpolation in ln σ.
    sigma = np.geomspace(respaced.sigma[0], respaced.sigma[-1], 101)
    expected = np.interp(np.log(sigma), respaced.sigma.log().numpy(), respaced.timesteps.numpy())
    assert_close(respaced.timestep_of(torch.from_numpy(sigma)), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_noise_levels_beyond_the_table_are_its_ends():
    ends = LINEAR.timestep_of(torch.tensor([1e-9, 1e9], dtype=torch.float64))
    assert_close(ends, torch.tensor([0.0, 999.0], dtype=torch.float64), rtol=0, atol=1e-9)


def test_timesteps_beyond_the_table_go_on_along_its_last_segment():
    low, high = LINEAR.sigma[:2].log().tolist(), LINEAR.sigma[-2:].log().tolist()
    found = LINEAR.sigma_of(torch.tensor([-0.5, 1000.0])).log()
    expected = torch.tensor([low[0] - (low[1] - low[0]) / 2, 2 * high[1] - high[0]], dtype=torch.float64)
    assert_close(found, expected, rtol=1e-10, atol=0)


def test_continuous_samplers_get_falling_levels_and_zero():
    sigmas = LINEAR.respace(12).sigmas()
    assert sigmas.shape == (13,)
    assert sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()
    assert_close(sigmas[0].item(), math.sqrt(1 / Tables(linear_by_hand()).alpha_bar[-1] - 1), rtol=1e-10, atol=0)


# --- one step -------------------------------------------------------------------------------------------------------


@named
@pytest.mark.parametrize("i", [0, 1, 500, 999])
def test_posterior_and_learned_range_are_the_formulas(schedule, i):
    tables = Tables(schedule.betas.tolist())
    x, x0, v = (randn(2, 3, 2, 2, seed=seed) for seed in range(3))
    step = torch.tensor(i)
    assert_close(
        schedule.posterior_mean(x0, x, step), tables.share_x0[i] * x0 + tables.share_x[i] * x, rtol=1e-9, atol=1e-9
    )
    f = (v + 1) / 2
    expected = f * math.log(tables.beta[i]) + (1 - f) * tables.log_variance[i]
    assert_close(schedule.log_variance(v, step), expected, rtol=1e-10, atol=1e-10)
    a = tables.alpha_bar[i]
    noisy = math.sqrt(a) * x0 + math.sqrt(1 - a) * v
    assert_close(schedule.predict_x0(v, noisy, step), x0, rtol=1e-6 if schedule is COSINE else 1e-10, atol=1e-7)


def test_the_ends_of_the_learned_range_are_beta_and_the_posterior():
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for i in (1, 77, 999):
        found = [LINEAR.log_variance(sign * ones, torch.tensor(i)).exp().item() for sign in (1, -1)]
        assert_close(found, [LINEAR.betas[i].item(), LINEAR.posterior_variance[i].item()], rtol=1e-10, atol=0)


@pytest.mark.parametrize("clip", [False, True])
def test_a_step_of_several_timesteps_at_once_is_each_alone(clip):
    x, steps = randn(3, 2, 2, 2), torch.tensor([0, 400, 999])
    output = network(x, LINEAR.timesteps[steps])
    together = LINEAR.p_step(output, x, steps, clip=clip)
    for n, i in enumerate(steps):
        alone = LINEAR.p_step(output[n : n + 1], x[n : n + 1], i, clip=clip)
        assert_close([part[n : n + 1] for part in together], list(alone), rtol=1e-12, atol=1e-12)
    assert (together[2].abs().max() <= 1) == clip


def test_outputs_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="must give 4 or 8, not 6"):
        split_output(torch.zeros(1, 6, 2, 2), 4)


# --- samplers -------------------------------------------------------------------------------------------------------


def ddpm_by_hand(tables: Tables, timesteps: list[int], x: Tensor, noises: list[Tensor], *, learned: bool) -> Tensor:
    noise = iter(noises)
    for i in reversed(range(len(timesteps))):
        eps, v = network(x, torch.tensor([float(timesteps[i])])).chunk(2, dim=1)
        a = tables.alpha_bar[i]
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        mean = tables.share_x0[i] * x0 + tables.share_x[i] * x
        f = (v + 1) / 2 if learned else torch.zeros_like(v)
        log_variance = f * math.log(tables.beta[i]) + (1 - f) * tables.log_variance[i]
        x = mean if i == 0 else mean + torch.exp(0.5 * log_variance) * next(noise)
    assert next(noise, None) is None
    return x


@shorter
@pytest.mark.parametrize("learned", [True, False])
def test_ddpm_with_given_noise_is_algorithm_2(steps, spacing, learned):
    respaced = LINEAR.respace(steps, spacing)
    noises = [randn(2, 3, 2, 2, seed=seed) for seed in range(1, len(respaced))]
    start, given, seen = randn(2, 3, 2, 2), iter(noises), []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.item())
        return network(x, t) if learned else network(x, t)[:, :3]

    out = ddpm(predict, start, respaced, noise_source=lambda x: next(given))
    tables = respaced_by_hand(linear_by_hand(), respaced.timesteps.tolist())
    assert_close(
        out, ddpm_by_hand(tables, respaced.timesteps.tolist(), start, noises, learned=learned), rtol=1e-8, atol=1e-8
    )
    assert seen == respaced.timesteps.tolist()[::-1], "the network sees original timesteps"
    assert next(given, None) is None


@named
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_equation_12(schedule, eta):
    respaced = schedule.respace(25)
    noises = [randn(2, 3, 2, 2, seed=seed) for seed in range(1, 25)]
    a = [1.0, *Tables(respaced.betas.tolist()).alpha_bar]
    x = start = randn(2, 3, 2, 2)
    for i in reversed(range(25)):
        eps = network(x, respaced.timesteps[i])[:, :3]
        spread = eta * math.sqrt((1 - a[i]) / (1 - a[i + 1]) * (1 - a[i + 1] / a[i]))
        x0 = (x - math.sqrt(1 - a[i + 1]) * eps) / math.sqrt(a[i + 1])
        x = math.sqrt(a[i]) * x0 + math.sqrt(max(1 - a[i] - spread**2, 0)) * eps
        if i:
            x = x + spread * noises[25 - 1 - i]
    given = iter(noises)
    out = ddim(network, start, respaced, eta=eta, noise_source=lambda x: next(given))
    assert_close(out, x, rtol=1e-7, atol=1e-7)


def test_ddim_without_noise_asks_for_none_and_with_it_needs_a_source():
    respaced, x = LINEAR.respace(5), randn(1, 1, 2, 2)
    ddim(network, x, respaced)
    with pytest.raises(ValueError, match=r"noise_source.*torch\.randn_like"):
        ddim(network, x, respaced, eta=0.1)


def test_clipping_holds_the_predicted_image_within_its_range():
    respaced = LINEAR.respace(20)
    for sampler in (ddpm, ddim):
        seen: list[Tensor] = []
        out = sampler(
            lambda x, t: -3 * x, randn(2, 1, 2, 2), respaced,
            noise_source=torch.zeros_like, clip=True, callback=lambda i, t, x, x0, seen=seen: seen.append(x0),
        )  # fmt: skip
        assert max(x0.abs().max().item() for x0 in seen) == 1
        assert out.abs().max() <= 1


def test_ddim_takes_the_noise_that_belongs_to_the_clipped_image():
    """x₀ is clamped, and ε is then what leads from it to x; the last step forgets ε, so the states are compared."""
    respaced, start = LINEAR.respace(9), randn(2, 1, 3, 3)
    a = [1.0, *Tables(respaced.betas.tolist()).alpha_bar]
    x, expected, clipped = start, [], []
    for i in reversed(range(9)):
        x0 = (x - math.sqrt(1 - a[i + 1]) * torch.tanh(x)) / math.sqrt(a[i + 1])
        clipped.append((x0.abs() > 1).double().mean().item())
        x0 = x0.clamp(-1, 1)
        eps = (x - math.sqrt(a[i + 1]) * x0) / math.sqrt(1 - a[i + 1])
        x = math.sqrt(a[i]) * x0 + math.sqrt(1 - a[i]) * eps
        expected.append(x)
    states: list[Tensor] = []
    ddim(lambda x, t: torch.tanh(x), start, respaced, clip=True, after_step=lambda i, t, x: states.append(x) or x)
    assert_close(states, expected, rtol=1e-9, atol=1e-9)
    assert any(0 < share < 1 for share in clipped)


def test_nothing_is_clipped_unless_asked_for():
    x, step = 3 * randn(2, 1, 3, 3), torch.tensor(500)
    output = torch.zeros_like(x)
    assert LINEAR.p_step(output, x, step)[2].abs().max() > 3
    for sampler in (ddpm, ddim):
        seen: list[Tensor] = []
        options = {"noise_source": torch.zeros_like, "callback": lambda i, t, x, x0, seen=seen: seen.append(x0)}
        sampler(lambda x, t: torch.zeros_like(x), x, LINEAR.respace(5), **options)
        assert max(x0.abs().max().item() for x0 in seen) > 3
    sigma = torch.tensor(2.0, dtype=torch.float64)
    loose, clipped = (
        denoiser(lambda x, t: torch.zeros_like(x), LINEAR, **clip)(x, sigma) for clip in ({}, {"clip": True})
    )
    assert_close(loose, x, rtol=0, atol=0)
    assert_close(clipped, x.clamp(-1, 1), rtol=0, atol=0)


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_the_callback_sees_each_timestep_before_the_step_is_taken(sampler):
    respaced, steps, start = LINEAR.respace(6), [], randn(1, 1, 2, 2)
    sampler(network, start, respaced, noise_source=torch.zeros_like, callback=lambda *step: steps.append(step))
    assert [step[0] for step in steps] == list(range(6))
    assert [int(step[1]) for step in steps] == respaced.timesteps.tolist()[::-1]
    assert_close(steps[0][2], start, rtol=0, atol=0)


# --- the change of variables ----------------------------------------------------------------------------------------


@named
@pytest.mark.parametrize(("steps", "spacing"), [(50, "linspace"), (50, "leading"), (7, "linspace")])
def test_euler_on_the_noise_levels_is_ddim(schedule, steps, spacing):
    respaced = schedule.respace(steps, spacing)
    noise = randn(2, 3, 2, 2)
    # x = √ᾱ·(x₀ + σε) there, x₀ + σε here; both begin with the same network input, euler with noise·σ.
    start = noise * respaced.sigmas()[0] * respaced.alpha_bar[-1].sqrt()
    expected = ddim(network, start, respaced)
    assert_close(euler(denoiser(network, schedule), noise, respaced.sigmas()), expected, rtol=1e-7, atol=1e-7)


def test_the_denoiser_sees_the_whole_schedule_whatever_the_trajectory():
    seen = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.item())
        return network(x, t)

    respaced = LINEAR.respace(25)
    heun(denoiser(predict, LINEAR), randn(1, 1, 2, 2), respaced.sigmas())
    assert_close(sorted({round(t, 6) for t in seen}), respaced.timesteps.double().tolist(), rtol=0, atol=1e-6)


def test_a_noise_level_for_each_sample_is_that_level_alone():
    x, levels = randn(3, 2, 2, 2), torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64)
    denoise = denoiser(network, LINEAR)
    together = denoise(x, levels)
    for n, level in enumerate(levels):
        assert_close(together[n : n + 1], denoise(x[n : n + 1], level), rtol=1e-12, atol=1e-12)


def test_the_predictor_calls_the_network_in_its_dtype_and_answers_in_that_of_the_state():
    seen = []

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype, t.tolist(), y))
        return x.repeat(1, 2, 1, 1)

    labels = torch.tensor([1, 2])
    out = predictor(net, labels, dtype=torch.bfloat16)(randn(2, 1, 2, 2), torch.tensor([999]))
    assert out.dtype == torch.float64
    assert seen == [(torch.bfloat16, torch.float32, [999.0], labels)]


# --- a Gaussian, of which everything is known -----------------------------------------------------------------------

MU, S = 0.3, 0.5


def gaussian_eps(schedule: Schedule):
    """E[ε | x] at timestep t for data N(MU, S²), ᾱ between timesteps interpolated as the network's t is."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        a = 1 / (1 + schedule.sigma_of(t).to(x) ** 2)
        a = a.reshape(-1, *[1] * (x.ndim - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * MU) / (a * S**2 + 1 - a)

    return predict


def test_a_network_that_predicts_v_is_seen_as_one_of_noise():
    """v of the Gaussian, E[√ᾱ·ε − √(1 − ᾱ)·x₀ | x], at whole timesteps and between them; what follows it stays."""

    def net(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        a = (1 / (1 + COSINE.sigma_of(t.double()) ** 2)).reshape(-1, 1).to(x)
        mean = (a.sqrt() * S**2 * x + (1 - a) * MU) / (a * S**2 + 1 - a)  # of x₀
        v = a.sqrt() * gaussian_eps(COSINE)(x, t.double()) - (1 - a).sqrt() * mean
        return torch.cat([v, 7 * x], dim=1)

    x, t = randn(4, 2), torch.tensor([0.0, 300.25, 900.0, 998.5])
    found = predictor(net, dtype=torch.float64, v_on=COSINE)(x, t)
    assert_close(found, torch.cat([gaussian_eps(COSINE)(x, t), 7 * x], dim=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("prediction", "limit"), [("epsilon", 80), ("v", 1)])
def test_an_error_in_v_is_no_larger_in_the_image(prediction, limit):
    """At σ = 80 that of ε is 80 times as large: what progressive distillation to one step fails by."""
    sigma, error = torch.tensor(80.0, dtype=torch.float64), 0.01
    x0, noise = randn(1, 3, 4, 4), randn(1, 3, 4, 4)
    alpha = 1 / math.sqrt(1 + 80**2)
    exact = noise if prediction == "epsilon" else alpha * noise - 80 * alpha * x0
    v_on = COSINE if prediction == "v" else None
    predict = predictor(lambda *_: exact + error, dtype=torch.float64, v_on=v_on)
    off = denoiser(predict, COSINE)(x0 + sigma * noise, sigma) - x0
    assert limit / 2 * error < off.abs().max() < limit * error * 1.01


def test_ddpm_over_all_steps_has_the_moments_of_the_data():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = ddpm(gaussian_eps(LINEAR), randn(20_000, 1), LINEAR, noise_source=torch.randn_like)
    assert x.mean().item() == pytest.approx(MU, abs=4 * S / 20_000**0.5)
    assert x.std().item() == pytest.approx(S, rel=4 / 40_000**0.5 + 0.003)
    assert stats.kstest(x.flatten().numpy(), stats.norm(MU, S).cdf).pvalue > 1e-3


def exact_flow(noise: Tensor, sigma: float, end: float = 0.0) -> Tensor:
    return MU + (noise * sigma - MU) * math.sqrt((S**2 + end**2) / (S**2 + sigma**2))


def test_ddim_over_all_steps_follows_the_flow():
    quantiles = torch.special.ndtri((torch.arange(500, dtype=torch.float64) + 0.5) / 500)[:, None]
    sigma = LINEAR.sigma[-1].item()
    start = quantiles * sigma * LINEAR.alpha_bar[-1].sqrt()
    x = ddim(gaussian_eps(LINEAR), start, LINEAR)
    assert_close(x, exact_flow(quantiles, sigma), rtol=0, atol=6e-3)


@pytest.mark.parametrize(("sampler", "order"), [(dpm_solver_pp, 2), (euler, 1), (heun, 2)])
def test_the_error_falls_with_the_order_of_the_method(sampler, order):
    """Between noise levels in the table's interior: the last step, onto σ = 0, is of first order for all."""
    denoise, noise = denoiser(gaussian_eps(LINEAR), LINEAR), randn(16, 1)
    counts, errors = [32, 64, 128, 256], []
    for steps in counts:
        sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
        errors.append((sampler(denoise, noise, sigmas) - exact_flow(noise, 10, 0.1)).abs().max().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.12)


@pytest.mark.parametrize("steps", [8, 12, 25])
def test_few_steps_of_dpm_solver_are_much_better_than_as_many_of_ddim(steps):
    noise, denoise = randn(64, 1), denoiser(gaussian_eps(LINEAR), LINEAR)
    errors = []
    for sampler, sigmas in (
        (dpm_solver_pp, LINEAR.multistep_sigmas(steps)),
        (euler, LINEAR.respace(steps).sigmas()),
    ):
        assert len(sigmas) == steps + 1
        errors.append((sampler(denoise, noise, sigmas) - exact_flow(noise, sigmas[0].item())).abs().max().item())
    assert errors[0] < 0.85 * errors[1]


def test_a_multistep_trajectory_has_one_timestep_more_and_leaves_out_the_last():
    kept = [round(i * 999 / 12) for i in range(12, 0, -1)]
    sigmas = LINEAR.multistep_sigmas(12)
    assert_close(sigmas[:-1], LINEAR.sigma[kept], rtol=1e-9, atol=0)
    assert sigmas[-1] == 0
    for whole in ((50, "leading"), (1000, "linspace")):
        assert_close(LINEAR.multistep_sigmas(*whole), LINEAR.respace(*whole).sigmas(), rtol=0, atol=0)


# --- diffusers ------------------------------------------------------------------------------------------------------


def test_dpm_solver_is_that_of_diffusers():
    """Its tables are float32, so to 1e-4. ``final_sigmas_type="zero"`` makes its last step the one onto σ = 0."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        1000, 1e-4, 0.02, "linear", algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        lower_order_final=True, final_sigmas_type="zero", timestep_spacing="linspace",
    )  # fmt: skip
    for steps in (5, 12, 25):  # at others the rounding of a half differs
        theirs.set_timesteps(steps)
        sigmas = LINEAR.multistep_sigmas(steps)
        assert_close(LINEAR.timestep_of(sigmas[:-1]).round().long(), theirs.timesteps)
        noise = randn(4, 3, 2, 2)
        x = noise * sigmas[0] / (1 + sigmas[0] ** 2).sqrt()
        for t in theirs.timesteps:
            x = theirs.step(network(x, t)[:, :3], t, x).prev_sample
        out = dpm_solver_pp(denoiser(network, LINEAR), noise, sigmas)
        assert_close(out, x, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_is_that_of_diffusers(order):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UniPCMultistepScheduler(
        1000, 1e-4, 0.02, "linear", solver_order=order, solver_type="bh2", predict_x0=True, lower_order_final=True,
        final_sigmas_type="zero", timestep_spacing="linspace",
    )  # fmt: skip
    for steps in (5, 12):
        theirs.set_timesteps(steps)
        sigmas = torch.cat([LINEAR.sigma[theirs.timesteps], torch.zeros(1, dtype=torch.float64)])
        noise = randn(4, 3, 2, 2)
        x = noise * sigmas[0] / (1 + sigmas[0] ** 2).sqrt()
        for t in theirs.timesteps:
            x = theirs.step(network(x, t)[:, :3], t, x).prev_sample
        out = unipc(denoiser(network, LINEAR), noise, sigmas, order=order)
        assert_close(out, x, rtol=1e-3, atol=1e-3, check_dtype=False)


def test_the_stochastic_dpm_solver_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        1000, 1e-4, 0.02, "linear", algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint",
        lower_order_final=True, final_sigmas_type="zero", timestep_spacing="linspace",
    )  # fmt: skip
    theirs.set_timesteps(12)
    sigmas = torch.cat([LINEAR.sigma[theirs.timesteps], torch.zeros(1, dtype=torch.float64)])
    noise, added = randn(4, 3, 2, 2), [randn(4, 3, 2, 2, seed=i) for i in range(12)]
    x = noise * sigmas[0] / (1 + sigmas[0] ** 2).sqrt()
    for t, z in zip(theirs.timesteps, added, strict=True):
        x = theirs.step(network(x, t)[:, :3], t, x, variance_noise=z.float()).prev_sample
    source = iter(added)
    out = dpm_solver_pp_sde(denoiser(network, LINEAR), noise, sigmas, noise_source=lambda like: next(source))
    assert_close(out, x, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_ddpm_is_that_of_diffusers_over_all_steps():
    """Its tables are float32. Only the whole schedule compares: its respaced ones have timesteps of other spacings.

    Fixed variance, since its ``learned_range`` splits the variance off only where the sample has 3 channels and the
    output 6; a latent's 4 and 8 make it take the variance for noise.
    """
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type="fixed_small_log", clip_sample=False)
    theirs.set_timesteps(1000)
    x = start = randn(2, 4, 2, 2)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * (0.5 + t.to(x) / 2000)

    for t in theirs.timesteps:
        # The step without noise, to which we add ours: it draws its own.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, t=t, **_: randn(*shape, seed=int(t))
            )
            x = theirs.step(predict(x, t), t, x).prev_sample
    steps = iter(range(999, 0, -1))
    out = ddpm(predict, start, LINEAR, noise_source=lambda x: randn(*x.shape, seed=next(steps)))
    assert_close(out, x, rtol=1e-3, atol=1e-3, check_dtype=False)


def test_ddpm_with_learned_range_is_a_step_of_diffusers_at_three_channels():
    """Its learned range clips β̃ at 1e-20 in place of the second entry, so the first timestep is left out."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=False)
    x, noise = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    for i in (1, 300, 999):
        output = network(x, torch.tensor([i]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
            expected = theirs.step(output, i, x).prev_sample
        mean, log_variance, _ = LINEAR.p_step(output, x, torch.tensor(i))
        assert_close(mean + (log_variance / 2).exp() * noise, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_that_of_diffusers_where_the_stride_is_whole(eta):
    """With "leading" spacing and no offset, which is ours of that name.

    With "linspace" it takes ᾱ of ``t − 1000/steps`` for the next timestep rather than of the next timestep itself.
    """
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True, steps_offset=0, timestep_spacing="leading"
    )
    theirs.set_timesteps(50)
    assert theirs.timesteps.tolist() == list(range(980, -1, -20))
    x = start = randn(2, 4, 2, 2)
    for t in theirs.timesteps:
        noise = randn(2, 4, 2, 2, seed=int(t)) if eta else None
        x = theirs.step(network(x, t)[:, :4], t, x, eta=eta, variance_noise=noise).prev_sample
    steps = iter(range(980, 0, -20))
    out = ddim(
        network, start, LINEAR.respace(50, "leading"), eta=eta, noise_source=lambda x: randn(*x.shape, seed=next(steps))
    )
    assert_close(out, x, rtol=1e-4, atol=1e-4, check_dtype=False)


# --- losses ---------------------------------------------------------------------------------------------------------


def gelu_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def loss_by_hand(tables: Tables, x0: np.ndarray, noise: np.ndarray, output: np.ndarray, i: int) -> float:
    """MSE(ε) and the variational bound's term in bits, for one sample (iDDPM, Eq. 4–7, 15)."""
    channels = len(x0)
    eps, v = output[:channels], output[channels:]
    a = tables.alpha_bar[i]
    x = math.sqrt(a) * x0 + math.sqrt(1 - a) * noise
    f = (v + 1) / 2
    log_variance = f * math.log(tables.beta[i]) + (1 - f) * tables.log_variance[i]
    predicted = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    mean = tables.share_x0[i] * predicted + tables.share_x[i] * x
    if i == 0:
        std = np.exp(0.5 * log_variance)
        above, below = gelu_cdf((x0 - mean + 1 / 255) / std), gelu_cdf((x0 - mean - 1 / 255) / std)
        probability = np.where(x0 < -0.999, above, np.where(x0 > 0.999, 1 - below, above - below))
        term = -np.log(np.maximum(probability, 1e-12))
    else:
        true_mean = tables.share_x0[i] * x0 + tables.share_x[i] * x
        variance, true_variance = np.exp(log_variance), math.exp(tables.log_variance[i])
        term = 0.5 * (
            log_variance - math.log(true_variance) + true_variance / variance + (true_mean - mean) ** 2 / variance - 1
        )
    return float(((eps - noise) ** 2).mean() + term.mean() / math.log(2))


def drawn_noise(shape, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@named
def test_the_loss_is_its_formula_at_every_kind_of_timestep(schedule):
    x0 = randn(5, 2, 3, 3).clamp(-1, 1)
    x0[0, 0, 0] = torch.tensor([-1.0, 1.0, 0.3])  # both tails of the decoder term
    levels = torch.tensor([0, 1, 2, 500, 999])
    noise = drawn_noise(x0.shape, 3)
    outputs = []

    def net(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert t.tolist() == levels.tolist()
        # Near the truth, so that the decoder term is not all floor.
        out = torch.cat([noise + 0.1 * torch.sin(7 * x), torch.cos(5 * x)], dim=1)
        outputs.append(out)
        return out

    loss = ADMLoss(schedule)(net, x0, generator=torch.Generator().manual_seed(3), level=levels)
    tables = Tables(schedule.betas.tolist())
    expected = [
        loss_by_hand(tables, x0[n].numpy(), noise[n].numpy(), outputs[0][n].numpy(), int(i))
        for n, i in enumerate(levels)
    ]
    assert_close(loss.tolist(), expected, rtol=1e-7, atol=0)


def test_the_loss_of_v_is_that_of_its_noise_with_its_own_error_squared():
    """The error in v against a target written out, and the variances' term of the ε that v says, as tested above."""
    x0, levels = randn(3, 1, 3, 3).clamp(-1, 1), torch.tensor([0, 400, 999])
    noise, variance = drawn_noise(x0.shape, 4), randn(3, 1, 3, 3)
    alpha = [math.sqrt(float(COSINE.alpha_bar[i])) for i in levels]
    beta = [math.sqrt(1 - a * a) for a in alpha]
    v = torch.stack([a * noise[n] - b * x0[n] for n, (a, b) in enumerate(zip(alpha, beta, strict=True))])
    guess = v + 0.1 * torch.sin(5 * v)
    # v = αε − βx₀ and x = αx₀ + βε are a rotation, whose inverse gives ε = αv + βx.
    eps = torch.stack([a * guess[n] + b * (a * x0[n] + b * noise[n])
                       for n, (a, b) in enumerate(zip(alpha, beta, strict=True))])  # fmt: skip

    def loss(output: Tensor, prediction: str) -> Tensor:
        found = ADMLoss(COSINE, prediction)
        return found(lambda *_: output, x0, generator=torch.Generator().manual_seed(4), level=levels)

    squared = (guess - v).square().flatten(1).mean(1)
    assert_close(loss(guess, "v"), squared, rtol=1e-9, atol=0)
    term = loss(torch.cat([eps, variance], 1), "epsilon") - loss(eps, "epsilon")
    assert_close(loss(torch.cat([guess, variance], 1), "v"), squared + term, rtol=1e-6, atol=0)


def test_a_network_without_variances_has_the_mean_squared_error_alone():
    x0, levels = randn(3, 2, 3, 3), torch.tensor([0, 10, 999])
    loss = ADMLoss(COSINE)(
        lambda x, t, y: torch.zeros_like(x), x0, generator=torch.Generator().manual_seed(3), level=levels
    )
    assert_close(loss, drawn_noise(x0.shape, 3).square().flatten(1).mean(1), rtol=1e-12, atol=0)


def test_the_network_sees_the_noisy_image_the_timestep_and_the_labels():
    x0, levels, labels = randn(2, 1, 2, 2), torch.tensor([3, 700]), torch.tensor([4, 5])
    seen = []

    def net(*arguments):
        seen.append(arguments)
        return torch.zeros(2, 2, 2, 2, dtype=torch.float64)

    loss = ADMLoss(LINEAR)
    loss(net, x0, labels, generator=torch.Generator().manual_seed(3), level=levels)
    loss(net, x0, labels, torch.ones(2, 9), generator=torch.Generator().manual_seed(3), level=levels)
    a = torch.tensor(Tables(linear_by_hand()).alpha_bar, dtype=torch.float64)[levels].reshape(2, 1, 1, 1)
    assert_close(seen[0][0], a.sqrt() * x0 + (1 - a).sqrt() * drawn_noise(x0.shape, 3), rtol=1e-10, atol=1e-10)
    assert seen[0][1].tolist() == [3, 700]
    assert seen[0][2].tolist() == [4, 5]
    assert [len(arguments) for arguments in seen] == [3, 4]
    assert seen[1][3].shape == (2, 9)


def test_the_variational_term_teaches_the_variance_alone():
    """ε gets the gradient of the squared error and of nothing else; v gets one, at the first timestep too."""
    x0, levels = randn(4, 2, 3, 3).clamp(-1, 1), torch.tensor([0, 1, 300, 999])
    noise = drawn_noise(x0.shape, 3)
    eps = (noise + 0.1 * randn(4, 2, 3, 3, seed=8)).requires_grad_()
    v = (0.3 * randn(4, 2, 3, 3, seed=9)).requires_grad_()
    loss = ADMLoss(LINEAR)(
        lambda x, t, y: torch.cat([eps, v], dim=1), x0, generator=torch.Generator().manual_seed(3), level=levels
    )
    loss.sum().backward()
    assert_close(eps.grad, 2 * (eps.detach() - noise) / 18, rtol=1e-10, atol=1e-12)
    assert v.grad.flatten(1).abs().amax(1).min() > 0

    tables, step = Tables(linear_by_hand()), 1e-6
    for n, i in enumerate(levels.tolist()):  # and it is the slope of the formula
        outputs = [torch.cat([eps[n], v[n]]).detach().numpy() for _ in range(2)]
        outputs[0][2, 1, 1] += step
        outputs[1][2, 1, 1] -= step
        high, low = (loss_by_hand(tables, x0[n].numpy(), noise[n].numpy(), output, i) for output in outputs)
        assert v.grad[n, 0, 1, 1].item() == pytest.approx((high - low) / (2 * step), rel=1e-4, abs=1e-9)


def test_everything_stays_on_the_device_of_the_images():
    images = torch.zeros(2, 3, 4, 4, device="meta")
    loss = ADMLoss(LINEAR)(lambda x, t, y: torch.cat([x, x], dim=1), images)
    assert loss.device.type == "meta"
    for sampler in (ddpm, ddim):
        predict = predictor(lambda x, t, y: torch.cat([x, x], dim=1))
        x = sampler(predict, images, LINEAR.respace(3), noise_source=torch.randn_like, clip=True)
        assert x.device.type == "meta"
    assert denoiser(predict, LINEAR)(images, torch.tensor(2.0)).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_and_loss_keep_their_dtype(dtype):
    x, seen = randn(2, 1, 2, 2).to(dtype), set()

    def net(x: Tensor, t: Tensor, *_: Tensor | None) -> Tensor:
        seen.add(x.dtype)
        return torch.cat([x, x], dim=1)

    assert ADMLoss(LINEAR)(net, x, generator=torch.Generator().manual_seed(0)).dtype == dtype
    for sampler in (ddpm, ddim):
        assert sampler(net, x, LINEAR.respace(3), noise_source=torch.randn_like, clip=True).dtype == dtype
    assert denoiser(net, LINEAR)(x, torch.tensor(2.0, dtype=torch.float64)).dtype == dtype
    assert seen == {dtype}


def test_gradients_stay_finite_far_from_the_data():
    """Latents reach far beyond the range that the decoder term is made for."""
    x0 = torch.tensor([-30.0, -1.5, 0.0, 2.0, 30.0]).reshape(1, 1, 5, 1).repeat(4, 1, 1, 1)
    output = torch.full((4, 2, 5, 1), 3.0, requires_grad=True)
    levels = torch.tensor([0, 0, 1, 999])
    loss = ADMLoss(LINEAR)(lambda *_: output * 1.0, x0, generator=torch.Generator().manual_seed(0), level=levels)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert output.grad.isfinite().all()


def test_levels_of_the_decoder_are_near_those_of_a_normal_distribution():
    """The probabilities of all 256 levels sum to 1, and each is within the approximation's 3e-4 of the exact one."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.1, 0.2), (-0.9, 0.05), (0.5, 0.01)):
        logs = discretized_gaussian_log_likelihood(
            levels, torch.full_like(levels, mean), torch.full_like(levels, math.log(std))
        )
        assert_close(logs.exp().sum().item(), 1.0, rtol=0, atol=1e-8)
        edges = np.concatenate([[-np.inf], levels[:-1].numpy() + 1 / 255, [np.inf]])
        exact = np.diff(stats.norm(mean, std).cdf(edges))
        assert np.abs(logs.exp().numpy() - exact).max() < 6e-4


def test_timesteps_are_drawn_uniformly_and_the_bins_are_equal():
    loss = ADMLoss(LINEAR)
    assert loss.level_name == "t"
    levels = loss.draw_level(torch.zeros(50_000, 1), torch.Generator().manual_seed(0))
    assert torch.equal(levels, loss.draw_level(torch.zeros(50_000, 1), torch.Generator().manual_seed(0)))
    assert levels.dtype == torch.int64
    assert (levels.min(), levels.max()) == (0, 999)
    counts = torch.bincount(torch.bucketize(levels, loss.bin_edges(5)), minlength=5)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert stats.chisquare(torch.bincount(levels, minlength=1000).numpy()).pvalue > 1e-3


def term_in_mpmath(name: str, i: int, x0: float, noise: float, eps: float, v: float) -> tuple[float, float]:
    """The variational term of one value in bits, and its slope in v, with thirty digits (iDDPM, Eq. 4–7, 15)."""
    from mpmath import mp, mpf

    mp.dps = 30
    if name == "linear":
        betas = [mpf("1e-4") + (mpf("0.02") - mpf("1e-4")) * n / 999 for n in range(i + 2)]
    else:
        cosines = [mp.cos((mpf(n) / 1000 + mpf("0.008")) / mpf("1.008") * mp.pi / 2) ** 2 for n in range(i + 3)]
        betas = [min(1 - cosines[n + 1] / cosines[n], mpf("0.999")) for n in range(i + 2)]
    products = [mpf(1)]
    for b in betas:
        products.append(products[-1] * (1 - b))
    before, a, beta = products[i], products[i + 1], betas[i]
    n = max(i, 1)  # the first, which is 0, is replaced by the second
    posterior = betas[n] * (1 - products[n]) / (1 - products[n + 1])
    x0, noise, eps, v = (mpf(number) for number in (x0, noise, eps, v))
    x = mp.sqrt(a) * x0 + mp.sqrt(1 - a) * noise
    predicted = (x - mp.sqrt(1 - a) * eps) / mp.sqrt(a)
    share_x0, share_x = mp.sqrt(before) * beta / (1 - a), mp.sqrt(1 - beta) * (1 - before) / (1 - a)
    true_mean, mean = (share_x0 * image + share_x * x for image in (x0, predicted))

    def term(v):
        variance = beta ** ((1 + v) / 2) * posterior ** ((1 - v) / 2)
        if i:
            exponent = (posterior + (true_mean - mean) ** 2) / variance - 1 + mp.log(variance / posterior)
            return exponent / 2 / mp.log(2)

        def cdf(z):
            return (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (z + mpf("0.044715") * z**3))) / 2

        above, below = (cdf((x0 - mean + edge) / mp.sqrt(variance)) for edge in (mpf(1) / 255, -mpf(1) / 255))
        probability = above if x0 < -0.999 else 1 - below if x0 > 0.999 else above - below
        return -mp.log(probability) / mp.log(2)

    return float(term(v)), float(mp.diff(term, v))


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("i", [0, 1, 20, 500, 998])
def test_in_float32_the_loss_and_its_gradient_are_those_of_thirty_digits(name, i):
    x0, generator = randn(1, 1, 3, 4).clamp(-1, 1).float(), torch.Generator()
    noise = torch.randn(x0.shape, generator=generator.manual_seed(3))
    eps, v = (noise + 0.3 * randn(*x0.shape, seed=4)).float(), (0.5 * randn(*x0.shape, seed=5)).float().requires_grad_()
    found = ADMLoss(Schedule.named(name))(
        lambda *_: torch.cat([eps, v], 1), x0, generator=generator.manual_seed(3), level=torch.tensor([i])
    )
    found.sum().backward()
    assert found.dtype == torch.float32
    rows = zip(*(part.flatten().tolist() for part in (x0, noise, eps, v)), strict=True)
    terms, slopes = zip(*(term_in_mpmath(name, i, *row) for row in rows), strict=True)
    expected = np.mean(terms) + (eps.double() - noise.double()).square().mean().item()
    assert_close(found.item(), expected, rtol=1e-6, atol=0)
    assert_close(v.grad.flatten().double(), torch.tensor(slopes, dtype=torch.float64) / 12, rtol=1e-5, atol=0)
