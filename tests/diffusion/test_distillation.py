"""Distillation against a Gaussian, whose denoiser is known in closed form, and against formulas written out again."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from diffit.configs import get_preset
from diffit.diffusion import consistency, edm, euler, guided, heun
from diffit.diffusion.adm import Schedule, space_timesteps
from diffit.diffusion.distillation import (
    ConsistencyLoss,
    ProgressiveLoss,
    euler_step,
    heun_step,
    one_step_target,
    truncated_snr,
)
from diffit.diffusion.edm import edm_sigmas
from diffit.models import build

MU, S = 0.3, 0.5
exact = partial(assert_close, rtol=1e-12, atol=1e-12)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x₀ | x] for data N(MU, S²)."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ddim(x: float, sigma: float, sigma_next: float) -> float:
    """One step of DDIM on one number, of the Gaussian."""
    x0 = (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)
    eps = (x - x0) / sigma
    return x0 + sigma_next * eps


@pytest.mark.parametrize("steps", [1, 2, 6, 8])
def test_every_second_level_of_a_trailing_schedule_is_that_of_half_as_many_steps(steps):
    fine, coarse = (edm_sigmas(n, trailing=True) for n in (2 * steps, steps))
    assert torch.equal(fine[::2], coarse)
    assert (coarse[0].item(), coarse[-1].item()) == (pytest.approx(80), 0)
    fine, coarse = (space_timesteps(1000, n, "trailing") for n in (2 * steps, steps))
    assert torch.equal(fine[1::2], coarse)
    assert coarse[-1] == 999
    for name, low in (("cosine", 70), ("linear", 79)):
        respaced = [Schedule.named(name).respace(n, "trailing").sigmas() for n in (2 * steps, steps)]
        assert_close(respaced[0][::2], respaced[1], rtol=1e-9, atol=0)
        assert low < respaced[1][0] <= 80


def test_the_target_leads_in_one_step_exactly_where_two_steps_of_ddim_lead():
    sigmas = edm_sigmas(8, trailing=True)
    loss = ProgressiveLoss(lambda labels: gaussian, lambda net, labels: net, sigmas)
    images, seen = normal(40, 1, 2, 2), dict[str, Tensor]()

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        seen.update(x=x, sigma=sigma)
        return torch.zeros_like(x)

    steps = torch.arange(4).repeat(10)
    values = loss(student, images, level=steps, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i in range(40):
        place = 2 * (3 - int(steps[i]))
        start, middle, end = (float(sigmas[place + k]) for k in range(3))
        assert float(seen["sigma"][i]) == start
        exact(seen["x"][i], images[i] + start * noise[i])
        targets = []
        for x in seen["x"][i].flatten().tolist():
            x_end = ddim(ddim(x, start, middle), middle, end)
            # x_end = x0 + end · (x − x0)/start, solved for x0
            targets.append((start * x_end - end * x) / (start - end))
        square = sum(target**2 for target in targets) / 4
        assert float(values[i]) == pytest.approx(max(1 / start**2, 1) * square, rel=1e-9)


def test_a_student_that_gives_the_target_has_no_loss_and_lands_where_its_teacher_does():
    sigmas = edm_sigmas(4, trailing=True)
    x = normal(1, 6)
    two = euler(gaussian, x / sigmas[0], sigmas[:3])
    target = one_step_target(x, two, sigmas[:1], sigmas[2:3])
    exact(euler(lambda x, sigma: target, x / sigmas[0], sigmas[[0, 2]]), two)

    def perfect(x: Tensor, sigma: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for i, level in enumerate(sigma):
            k = int((sigmas == level).nonzero())
            x_end = euler(gaussian, x[i : i + 1] / sigmas[k], sigmas[k : k + 3])
            out[i] = (x_end - sigmas[k + 2] / sigmas[k] * x[i]) / (1 - sigmas[k + 2] / sigmas[k])
        return out

    loss = ProgressiveLoss(lambda labels: gaussian, lambda net, labels: net, sigmas)
    values = loss(perfect, normal(16, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    assert_close(values, torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-20)


@pytest.mark.parametrize(("step", "sampler"), [(euler_step, euler), (heun_step, heun)])
def test_a_step_of_levels_that_differ_is_the_samplers_step_at_each(step, sampler):
    sigmas = edm_sigmas(4, trailing=True)
    x = normal(4, 3)
    together = step(gaussian, x, sigmas[:-1], sigmas[1:])
    for i in range(4):
        alone = sampler(gaussian, x[i : i + 1] / sigmas[i], sigmas[i : i + 2])
        exact(together[i : i + 1], alone)


def test_the_weight_is_the_signal_to_noise_ratio_but_at_least_one():
    sigma = torch.tensor([0.002, 0.5, 1.0, 80.0], dtype=torch.float64)
    assert_close(truncated_snr(sigma), torch.tensor([250000.0, 4.0, 1.0, 1.0], dtype=torch.float64))


def test_each_sample_of_a_batch_is_guided_at_the_scale_of_its_own_level():
    sigma, x = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64), normal(3, 2)
    calls = []

    def uncond(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        return x / 7

    denoise = guided(gaussian, uncond, lambda sigma: 1 + float(sigma) / 2, tolerance=0.1)
    mixed = denoise(x, sigma)
    for i in range(3):
        exact(mixed[i : i + 1], denoise(x[i : i + 1], sigma[i]))
    exact(mixed[:1], gaussian(x[:1], sigma[:1]))  # within the tolerance of 1
    assert len(calls) == 3  # once for all, and for each alone but the first


def test_the_earlier_level_nears_its_own_in_stages():
    done = 0.0
    loss = ConsistencyLoss(stages=4, q=2.0, progress=lambda: done)
    t = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=torch.float64)
    for done, stage in ((0.0, 1), (0.24, 1), (0.25, 2), (0.6, 3), (0.99, 4), (1.0, 4)):  # noqa: B007 (seen by progress)
        ratios = [max(0.0, 1 - (1 + 8 / (1 + math.exp(v))) / 2**stage) for v in t.tolist()]
        r = loss.earlier(t)
        exact(r, t * torch.tensor(ratios, dtype=torch.float64))
        assert (r < t).all()


class Dropping(torch.nn.Module):
    """Scales its input by a weight, and drops half of it; keeps the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor, *_: object) -> Tensor:
        mask = F.dropout(torch.ones_like(x), 0.5, self.training)
        self.masks.append(mask)
        return self.weight.to(x.dtype) * x * mask


def test_both_passes_of_consistency_tuning_drop_the_same_and_use_randomness_once():
    net, loss = Dropping(), ConsistencyLoss(progress=lambda: 0.9)
    torch.manual_seed(3)
    loss(net, normal(8, 1, 4, 4, dtype=torch.float32), generator=torch.Generator().manual_seed(0))
    after = torch.get_rng_state()
    assert len(net.masks) == 2
    assert torch.equal(*net.masks)
    assert 0 < (net.masks[0] == 0).sum() < net.masks[0].numel()
    torch.manual_seed(3)
    F.dropout(torch.ones(8, 1, 4, 4), 0.5)
    assert torch.equal(after, torch.get_rng_state())


def test_consistency_loss_is_its_formula_and_only_the_noisier_pass_has_a_gradient():
    net = Dropping().eval()
    loss = ConsistencyLoss(stages=8, progress=lambda: 0.3, c=0.01)
    images, t = normal(5, 1, 2, 3), torch.tensor([0.004, 0.3, 1.0, 5.0, 60.0], dtype=torch.float64)
    found = loss(net, images, level=t, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    expected = []
    for i, level in enumerate(t.tolist()):
        earlier = level * max(0.0, 1 - (1 + 8 / (1 + math.exp(level))) / 2**3)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            total = sigma**2 + 0.25
            return 0.25 / total * x + sigma * 0.5 / total**0.5 * (weight * (x / total**0.5).float()).double()

        target = images[i] if earlier == 0 else denoise(images[i] + earlier * noise[i], earlier).detach()
        error = denoise(images[i] + level * noise[i], level) - target
        expected.append(((error.square().mean() + 1e-4).sqrt() - 0.01) / (level - earlier))
    wanted = torch.stack(expected)
    assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    wanted.sum().backward()
    assert_close(net.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)


def test_consistency_sampling_denoises_and_adds_new_noise():
    noise, new = normal(4, 2), normal(4, 2, seed=1)
    one = consistency(gaussian, noise, torch.tensor([80.0, 0.0]))
    exact(one, gaussian(80 * noise, torch.tensor(80.0)))
    two = consistency(gaussian, noise, torch.tensor([80.0, 0.7, 0.0], dtype=torch.float64), noise_source=lambda x: new)
    exact(two, gaussian(one + 0.7 * new, torch.tensor(0.7, dtype=torch.float64)))
    with pytest.raises(ValueError, match="pass noise_source"):
        consistency(gaussian, noise, torch.tensor([80.0, 0.7, 0.0]))


def test_the_denoiser_of_a_network_is_trained_by_either_loss():
    torch.manual_seed(0)
    net = torch.nn.Conv2d(1, 1, 3, padding=1)

    def call(x: Tensor, *_: object) -> Tensor:
        return net(x)

    def student(net, labels: Tensor | None):
        return edm.denoiser(net, labels)

    for loss in (ProgressiveLoss(lambda labels: gaussian, student, edm_sigmas(4, trailing=True)), ConsistencyLoss()):
        net.zero_grad()
        value = loss(call, normal(6, 1, 4, 4, dtype=torch.float32), generator=torch.Generator().manual_seed(0))
        assert value.shape == (6,)
        assert value.dtype == torch.float32
        value.mean().backward()
        assert net.weight.grad.abs().sum() > 0


def test_weights_that_both_passes_use_have_gradients_under_autocast():
    """Autocast keeps what it has cast, and what it casts without gradients has none."""
    found = []
    for enabled in (False, True):
        net = build(get_preset("debug").model)
        images = torch.zeros(2, 3, 16, 16)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = ConsistencyLoss(progress=lambda: 0.9)(net, images, generator=torch.Generator().manual_seed(0))
        loss.mean().backward()
        found.append({name for name, parameter in net.named_parameters() if parameter.grad is not None})
    assert found[0] == found[1]
    assert "head.weight" in found[1]
