"""Streams that depend on their keys alone, and are unrelated for different keys."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from diffit.sampling.labels import random_labels
from diffit.training.batches import epoch_order, image_indices
from diffit.utils.randomness import LABEL, NOISE, ORDER, STEP, PerSampleNoise, derive_seed, make_generator

SHAPE = (2, 3, 4)
keys = st.lists(st.integers(0, 2**40), min_size=1, max_size=5).map(tuple)


def noise(seeds, shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    return PerSampleNoise(seeds)(torch.empty(len(seeds), *shape, dtype=dtype))


@given(keys)
def test_a_derived_seed_is_the_same_each_time_and_fits_every_generator(key):
    assert derive_seed(*key) == derive_seed(*key)
    assert 0 <= derive_seed(*key) < 2**63


@given(keys, keys)
@example((5,), (5, 0))
@example((2**32 + 7, NOISE), (7, LABEL))
@example((3, 4), (4, 3))
def test_different_keys_give_different_seeds(one, other):
    assert (one == other) == (derive_seed(*one) == derive_seed(*other))


def test_the_noise_of_a_sample_has_more_than_32_bits_behind_it():
    """torch's CPU generator keeps the low half of its seed: the first two of 150,000 pictures to come out alike."""
    assert (noise([41_780]) != noise([104_948])).any()


def test_a_sample_is_the_same_in_any_company_and_order():
    together = noise([5, 0, 9, 2, 7, 1, 3])
    for i, seed in enumerate([5, 0, 9, 2, 7, 1, 3]):
        assert_close(noise([seed])[0], together[i], rtol=0, atol=0)


def test_a_stream_goes_on_from_call_to_call_whatever_the_company():
    both, alone, like = PerSampleNoise([4, 8]), PerSampleNoise([8]), torch.empty(1, *SHAPE)
    steps = [both(like.expand(2, -1, -1, -1)) for _ in range(3)]
    for step in steps:
        assert_close(alone(like)[0], step[1], rtol=0, atol=0)
    assert (steps[0] != steps[1]).any()


def test_noise_is_standard_normal_within_and_across_seeds():
    drawn = noise(range(2000), (10,)).double()
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(drawn[:, 0].numpy(), "norm").pvalue > 0.01
    neighbours = stats.pearsonr(drawn[1:].flatten().numpy(), drawn[:-1].flatten().numpy())
    assert neighbours.pvalue > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_takes_the_dtype_asked_for_without_changing_its_numbers(dtype):
    assert_close(noise([1, 2], dtype=dtype), noise([1, 2]).to(dtype), rtol=0, atol=0)


def test_noise_goes_to_the_device_asked_for():
    assert PerSampleNoise([1])(torch.empty(1, 2, device="meta")).device.type == "meta"


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"2 seeds.*batch of 3"):
        PerSampleNoise([1, 2])(torch.empty(3, *SHAPE))


def test_labels_are_uniform_and_never_the_null_class():
    labels = random_labels(range(5000), 10)
    assert labels.dtype == torch.int64
    assert stats.chisquare(labels.bincount(minlength=10).numpy()).pvalue > 0.01
    assert labels.max() == 9


def test_labels_are_functions_of_their_seeds():
    assert random_labels([3, 1, 2], 100).tolist() == [random_labels([seed], 100).item() for seed in (3, 1, 2)]
    assert random_labels([], 10).shape == (0,)


def test_the_streams_of_one_seed_are_apart():
    labels, drawn = random_labels(range(2000), 2**24).numpy(), noise(range(2000), (16,)).abs().numpy()
    assert stats.spearmanr(labels, drawn[:, 0]).pvalue > 0.01
    numbers = {stream: torch.rand(8, generator=make_generator(7, stream)).tolist() for stream in (NOISE, LABEL, ORDER)}
    assert len({tuple(row) for row in numbers.values()}) == 3


def test_a_generator_lives_on_the_device_asked_for():
    assert make_generator(1).device == make_generator(1, device="cpu").device == torch.device("cpu")
    with pytest.raises(RuntimeError, match=r"(?i)meta"):  # which has none
        make_generator(1, device="meta")


def test_ambient_randomness_is_neither_read_nor_moved():
    def draw():
        return noise([1, 2]), random_labels([1, 2], 1000), torch.rand(3, generator=make_generator(1, 2))

    torch.manual_seed(0)
    first = draw()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert_close(draw(), first, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


# --- as they were when they were written down: the image of a seed and the course of a run stay what they are ---------


def test_the_streams_have_the_numbers_they_were_published_with():
    assert (NOISE, LABEL, ORDER, STEP) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("key", "seed"),
    [
        ((0,), 3717377837946358015),
        ((1,), 892115846157824453),
        ((0, 0), 1945321144695561289),
        ((7, NOISE), 8420321427907636907),
        ((2**32 + 7, LABEL), 2586833806496693200),
        ((2**40, 3, 1), 4680218921772856541),
        ((1, 2, 3), 1147671286981233739),
    ],
)
def test_derived_seeds_are_pinned(key, seed):
    assert derive_seed(*key) == seed


def test_the_noise_of_a_seed_is_pinned_in_its_first_and_second_draw():
    source, like = PerSampleNoise([0, 1, 2**33 + 5]), torch.empty(3, 4)
    first = [
        [-0.5486779, 1.7575802, -0.5596716, -0.2583213],
        [-0.6230236, 0.4948297, -0.0940975, -0.2933332],
        [1.2906693, -0.0190611, -1.3717892, 0.3093947],
    ]
    second = [
        [-0.7058359, -0.3549940, 0.5592677, -1.3590490],
        [1.8570532, -2.1559765, -0.0860140, 0.7727154],
        [-0.5139198, 0.0356219, -0.3461398, -0.9766378],
    ]
    assert_close(torch.stack([source(like), source(like)]), torch.tensor([first, second]), rtol=0, atol=1e-6)


def test_the_class_of_a_seed_is_pinned():
    labels = random_labels([*range(8), 2**35], 1000)
    assert labels.tolist() == [899, 379, 350, 333, 505, 385, 63, 667, 656]


def test_the_order_of_the_images_is_pinned():
    assert epoch_order(10, 0, 0).tolist() == [9, 7, 5, 8, 3, 0, 2, 4, 1, 6]
    assert epoch_order(10, 0, 1).tolist() == [6, 3, 9, 1, 4, 7, 2, 8, 5, 0]
    assert epoch_order(10, 1, 0).tolist() == [5, 8, 3, 2, 1, 6, 0, 4, 7, 9]
    assert image_indices(10, 0, 8, 4).tolist() == [1, 6, 6, 3], "from one epoch into the next"


def test_the_generator_of_a_step_is_pinned():
    generator = make_generator(7, STEP, 64, 1)
    assert torch.randint(1000, (6,), generator=generator).tolist() == [836, 162, 32, 575, 547, 776]
    assert_close(torch.rand(2, generator=generator).tolist(), [0.6429083, 0.4968109], rtol=0, atol=1e-6)
    assert_close(torch.randn(3, generator=generator).tolist(), [0.5695869, 2.0388479, 1.2110002], rtol=0, atol=1e-6)
