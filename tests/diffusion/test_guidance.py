"""Classifier-free guidance against its formula, with counted evaluations."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffit.diffusion.guidance import guided, like, power_cosine, within

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


def test_of_several_levels_each_sample_has_the_scale_of_its_own():
    """As alone, also where its scale is within the tolerance of 1, and then it is the conditional image."""
    sigmas = torch.tensor([0.5, 1.5], dtype=torch.float64)

    def split(denoise):
        return lambda x, sigma: denoise(x, sigma.reshape(-1, 1, 1, 1))

    for scales, tolerance in (((3.0, -0.5), 0.0), ((1.25, 3.0), 0.25), ((0.75, 3.0), 0.25)):
        of = dict(zip(sigmas.tolist(), scales, strict=True))

        def scale(sigma, of=of):
            return of[float(sigma)]

        both = guided(split(conditional), split(unconditional), scale, 3, tolerance=tolerance)(X, sigmas)
        for i, sigma in enumerate(sigmas):
            alone = guided(conditional, unconditional, of[float(sigma)], 3, tolerance=tolerance)(X[i : i + 1], sigma)
            assert_close(both[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    exactly = guided(split(conditional), split(unconditional), lambda sigma: 1.0)(X, sigmas)
    assert_close(exactly, split(conditional)(X, sigmas), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_multiply_the_samples_they_belong_to(shape, dtype):
    x, levels = torch.ones(shape, dtype=dtype, device="meta"), torch.tensor([1, 2, 3])
    moved = like(levels, x)
    assert (moved.device, moved.dtype, moved.shape) == (x.device, dtype, (3, *[1] * (len(shape) - 1)))
    assert like(levels[0], torch.ones(shape)).shape == (1,) * len(shape)


@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_channels_beyond_the_guided_stay_conditional(channels):
    u, c = unconditional(X, SIGMA), conditional(X, SIGMA)
    out = guided(conditional, unconditional, 4.4, channels)(X, SIGMA)
    assert_close(out[:, :channels], (u + 4.4 * (c - u))[:, :channels], rtol=1e-12, atol=1e-12)
    assert_close(out[:, channels:], c[:, channels:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_keeps_the_dtype_of_the_state(dtype):
    assert guided(conditional, unconditional, 2.5)(X.to(dtype), SIGMA).dtype == dtype


# --- scales that depend on the noise level ----------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "expected"), [(999, 1.0), (500, 1.033), (250, 1.773), (0, 4.4)])
def test_power_cosine_has_the_official_values(t, expected):
    assert power_cosine(4.4)(torch.tensor(t)) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("power", [0.5, 1.0, 4.0])
def test_power_cosine_is_its_formula_and_rises_to_the_scale(power):
    scale, values = power_cosine(4.6, power), []
    for t in range(0, 1000, 37):
        expected = 1 + 3.6 * (1 - math.cos(math.pi * (1 - t / 1000) ** power)) / 2
        values.append(scale(torch.tensor([t])))
        assert values[-1] == pytest.approx(expected, rel=1e-12)
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(4.6)


def counted(calls: list[float]):
    def denoise(x: Tensor, level: Tensor) -> Tensor:
        calls.append(float(level))
        return unconditional(x, level)

    return denoise


def test_where_the_scale_is_exactly_one_nothing_is_evaluated_and_tolerance_saves_more():
    """Over 250 of 1000 timesteps with the official scale: at t = 999 it is 1 to the last bit."""
    timesteps = [round(i * 999 / 249) for i in range(250)]
    calls = {}
    outputs = {}
    for tolerance in (0.0, 1e-2):
        calls[tolerance] = []
        denoise = guided(conditional, counted(calls[tolerance]), power_cosine(4.4), 3, tolerance=tolerance)
        outputs[tolerance] = [denoise(X, torch.tensor(float(t))) for t in timesteps]
    near = {t for t in timesteps if power_cosine(4.4)(torch.tensor(t)) - 1 <= 1e-2}
    assert set(calls[0.0]) >= {t for t in timesteps if t < 900}
    assert 999 not in calls[0.0]
    assert set(calls[1e-2]) == set(timesteps) - near
    assert len(near) > 100
    for t, exact, skipped in zip(timesteps, outputs[0.0], outputs[1e-2], strict=True):
        u, c = (denoise(X, torch.tensor(float(t))) for denoise in (unconditional, conditional))
        assert_close(skipped, exact, rtol=0, atol=0.0 if t not in near else 1.01e-2 * (c - u).abs().max().item())
        if power_cosine(4.4)(torch.tensor(t)) == 1:  # skipped also at tolerance 0, which is bitwise the same
            assert torch.equal(exact, torch.cat([torch.lerp(u, c, 1.0)[:, :3], c[:, 3:]], dim=1))


@pytest.mark.parametrize("scale", [3.0, lambda sigma: 3.0], ids=["constant", "function"])
def test_an_interval_guides_above_its_lower_end_up_to_and_with_its_upper(scale):
    calls: list[float] = []
    denoise = guided(conditional, counted(calls), within(scale, 0.5, 2.0))
    for sigma in (0.1, 0.5, 0.51, 2.0, 2.01):
        denoise(X, torch.tensor(sigma, dtype=torch.float64))
    assert calls == [0.51, 2.0]


def test_within_the_interval_the_scale_is_that_of_the_level():
    scale = within(lambda sigma: 1 + float(sigma), 0.5, 2.0)
    assert [scale(torch.tensor(sigma)) for sigma in (0.25, 0.75, 1.5, 3.0)] == [1.0, 1.75, 2.5, 1.0]


def test_an_interval_of_noise_levels_can_be_asked_of_timesteps():
    calls: list[float] = []
    denoise = guided(conditional, counted(calls), within(3.0, 0.5, 2.0, lambda t: t / 100))
    for t in (10.0, 50.0, 51.0, 200.0, 201.0):
        denoise(X, torch.tensor(t, dtype=torch.float64))
    assert calls == [51.0, 200.0]


def test_of_a_raw_output_the_fourth_channel_and_the_variances_stay_conditional():
    """CONTRACT: e = u + s·(c − u) on channels 0–2 of ε; channel 3 and the four variances as the class gives them."""
    x = torch.cat([X, X.flip(0) * 2], dim=1)  # (B, 8, …): ε and variances
    u, c = unconditional(x, SIGMA), conditional(x, SIGMA)
    out = guided(conditional, unconditional, 4.4, 3)(x, SIGMA)
    assert_close(out[:, :3], u[:, :3] + 4.4 * (c - u)[:, :3], rtol=1e-12, atol=1e-12)
    assert torch.equal(out[:, 3:], c[:, 3:])
