"""KID against a naive double loop and torchmetrics' estimator."""

import math

import pytest
import torch
from torch.testing import assert_close
from torchmetrics.image.kid import poly_mmd

from diffit.metrics.kid import choose_blocks, kid, squared_mmd


def gaussian(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_estimate_is_that_of_loops_and_of_torchmetrics():
    x, y = gaussian(9, 5, 0).double(), gaussian(7, 5, 1, 0.5).double()

    def kernel(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    loops = sum(kernel(x[i], x[j]) for i in range(9) for j in range(9) if i != j) / 72
    loops += sum(kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
    loops -= 2 * sum(kernel(a, b) for a in x for b in y) / 63
    assert_close(float(squared_mmd(x, y)), loops, rtol=1e-12, atol=0)
    assert_close(squared_mmd(x[:7], y), poly_mmd(x[:7], y, degree=3, gamma=None, coef=1.0), rtol=1e-12, atol=0)


def test_one_block_is_the_whole_estimate_and_many_agree_within_their_error():
    fake, real = gaussian(2000, 16, 0, 0.3), gaussian(2500, 16, 1)
    whole = float(squared_mmd(fake, real))
    value, error = kid(fake, real, block=100)
    assert 0 < error < value
    assert abs(value - whole) < 4 * error
    single, none = kid(fake[:50], real[:50], block=1000)
    assert_close(single, float(squared_mmd(fake[:50], real[:50])), rtol=1e-9, atol=0)
    assert math.isnan(none)


@pytest.mark.parametrize(("n", "m"), [(100, 100), (30, 100), (100, 35)])
def test_it_has_no_bias_and_an_error_whatever_the_sizes(n, m):
    found = [kid(gaussian(n, 8, 2 * i), gaussian(m, 8, 2 * i + 1), block=10) for i in range(100)]
    values = [value for value, _ in found]
    mean = sum(values) / 100
    spread = (sum((v - mean) ** 2 for v in values) / 99) ** 0.5
    assert abs(mean) < 4 * spread / 10
    assert all(math.isfinite(error) and error > 0 for _, error in found)


def test_a_large_set_is_used_whole_and_a_small_one_again():
    """A fake image far from all others changes the value wherever it stands."""
    for block, small, large in ((10, 25, 60), (1000, 7, 50)):
        fake, real = gaussian(large, 4, 0), gaussian(small, 4, 1)
        expected = kid(fake, real, block=block)[0]
        used = 0
        for i in range(large):
            other = fake.clone()
            other[i] += 9
            used += kid(other, real, block=block)[0] != expected
        block = min(block, small)
        assert used == large // block * block


def test_no_image_is_twice_in_a_block_and_all_are_chosen_alike():
    chosen = choose_blocks(25, 10, 400, torch.Generator().manual_seed(0))
    assert chosen.shape == (400, 10)
    assert all(len(set(row)) == 10 for row in chosen.tolist())
    # 160 choices of each are expected, with a standard deviation below 7; pairs meet 60 times each, with one near 8.
    counts = torch.bincount(chosen.flatten(), minlength=25)
    assert (counts - 160).abs().max() < 30
    member = torch.zeros(400, 25).scatter(1, chosen, 1)
    pairs = (member.T @ member)[~torch.eye(25, dtype=torch.bool)]
    assert (pairs - 60).abs().max() < 40


def test_arrays_are_taken_and_wrong_ones_refused():
    fake, real = gaussian(20, 4, 0), gaussian(30, 4, 1)
    assert kid(fake.numpy(), real.numpy(), block=10) == kid(fake, real, block=10)
    for arguments, message in (
        ((fake[:1], real), "blocks of 1 image: fake has 1, real 30"),
        ((fake, real[:, :2]), "fake has 4 features and real 2"),
    ):
        with pytest.raises(ValueError, match=message):
            kid(*arguments)
