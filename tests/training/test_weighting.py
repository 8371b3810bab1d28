"""Noise levels that weigh by their mean loss: by hand, in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from diffit.diffusion.edm import EDMLoss
from diffit.training.weighting import LEVELS, MEMORY, SMALLEST, UncertaintyWeighting

CPU = torch.device("cpu")
TAKEN, LEFT_OUT = torch.tensor(False), torch.tensor(True)


def part(sigma):
    """Of the noise distribution, by its own formula: ln σ is normal with mean and standard deviation −1.2, 1.2."""
    share = 0.5 * (1 + math.erf((math.log(sigma) + 1.2) / 1.2 / math.sqrt(2)))
    return int(share * LEVELS)


def test_a_loss_is_divided_by_the_running_mean_of_its_level():
    weighting = UncertaintyWeighting(EDMLoss(), CPU)
    generator = torch.Generator().manual_seed(0)
    means = [1.0] * LEVELS
    for _ in range(40):
        level = EDMLoss().draw_level(torch.empty(24, 1), generator)
        loss = (0.1 + level).mul(torch.rand(24, generator=generator))
        found = torch.cat([weighting(level[:10], loss[:10]), weighting(level[10:], loss[10:])])
        parts = [part(float(sigma)) for sigma in level]
        assert_close(
            found.double(), loss.double() / torch.tensor([means[i] for i in parts]).double(), rtol=1e-5, atol=0
        )
        weighting.update(TAKEN)
        for i in set(parts):
            its = [float(value) for value, where in zip(loss, parts, strict=True) if where == i]
            share = MEMORY ** len(its)
            means[i] = share * means[i] + (1 - share) * sum(its) / len(its)
        assert_close(weighting.means.double(), torch.tensor(means).double(), rtol=1e-5, atol=0)
    assert min(means) < 0.7 < 1.5 < max(means)


def test_its_weights_are_those_that_edm2_would_learn():
    """u minimises the mean of loss/e^u + u: by gradient steps, for a level whose losses have the mean 0.3."""
    losses = -0.3 * torch.log(1 - (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    u = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([u], lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        (losses * torch.exp(-u) + u).mean().backward()
        optimizer.step()
    weighting = UncertaintyWeighting(EDMLoss(), CPU)
    for batch in losses[torch.randperm(2000, generator=torch.Generator().manual_seed(1))].float().split(20):
        weighting(torch.full((20,), 0.3), batch)
        weighting.update(TAKEN)
    weight = weighting(torch.tensor([0.3]), torch.ones(1))
    # The mean of the last 33 losses or so, whose standard deviation is 0.3.
    assert float(weight) == pytest.approx(float(torch.exp(-u.detach())), rel=3 / 65**0.5)


def test_what_is_not_finite_or_left_out_is_not_remembered_and_no_loss_is_divided_by_0():
    weighting = UncertaintyWeighting(EDMLoss(), CPU)
    weighting(torch.tensor([0.3]), torch.tensor([math.nan]))
    weighting.update(TAKEN)
    weighting(torch.tensor([0.3]), torch.tensor([50.0]))
    weighting.update(LEFT_OUT)
    assert torch.equal(weighting.means, torch.ones(LEVELS))
    for _ in range(2000):
        weighting(torch.tensor([0.3]), torch.zeros(1))
        weighting.update(TAKEN)
    assert float(weighting.means.min()) == pytest.approx(SMALLEST)
    assert weighting(torch.tensor([0.3]), torch.zeros(1)) == 0
