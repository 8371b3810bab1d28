import torch
from torch.testing import assert_close

from diffit.training.ema import ema_beta, update_ema


def test_average_equals_the_closed_form():
    beta, steps = 0.9, 20
    values = torch.randn(steps, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average = [torch.ones(3, dtype=torch.float64)]
    for value in values:
        update_ema(average, [value], beta)
    powers = beta ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    assert_close(
        average[0], beta**steps * torch.ones(3, dtype=torch.float64) + (1 - beta) * (powers[:, None] * values).sum(0)
    )


def test_half_of_the_average_is_gone_after_one_half_life():
    share = 1.0
    for _ in range(5000 // 50):
        share *= ema_beta(50, images_seen=10**9, halflife_kimg=5, rampup_ratio=0.05)
    assert_close(share, 0.5)


def test_a_half_life_may_be_shorter_than_an_image_or_nothing():
    assert ema_beta(1, images_seen=10**9, halflife_kimg=0.0005, rampup_ratio=0.05) == 0.25
    assert ema_beta(1, images_seen=10**9, halflife_kimg=0, rampup_ratio=0.05) == 0


def test_during_warm_up_the_half_life_is_a_share_of_the_images_seen():
    assert_close(ema_beta(100, images_seen=2000, halflife_kimg=500, rampup_ratio=0.05), 0.5)
    assert ema_beta(100, images_seen=0, halflife_kimg=500, rampup_ratio=0.05) == 0


def test_a_skipped_step_moves_no_bit_and_another_is_as_ever():
    average, current = [torch.tensor([0.1, -0.7])], [torch.tensor([3.0, float("inf")])]
    before = average[0].clone()
    update_ema(average, [torch.tensor([3.0, 1e30])], 0.9, skip=torch.tensor(True))
    assert torch.equal(average[0], before)
    update_ema(average, current, 0.75, skip=torch.tensor(False))
    assert_close(average[0], torch.tensor([0.75 * 0.1 + 0.25 * 3.0, float("inf")]))


def test_update_leaves_no_graph_behind():
    current = torch.ones(2, requires_grad=True)
    average = [torch.zeros(2)]
    update_ema(average, [current], 0.5)
    assert not average[0].requires_grad
    assert_close(average[0], torch.full((2,), 0.5))
