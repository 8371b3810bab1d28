"""Augmentation against closed forms, SciPy's resampling, and pictures whose transform is known exactly."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor

from diffit.data.augment import AUGMENT_LABELS, DELAY, SYM6, Augment, filters, transform, warp


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) * 2 - 1


def label(**values: float) -> Tensor:
    """One label row: zeros but for the named entries."""
    names = ["x_flip", "y_flip", "scale", "cos_minus_1", "sin", "stretch_x", "stretch_y", "n_x", "n_y"]
    assert values.keys() <= set(names)
    return torch.tensor([[values.get(name, 0.0) for name in names]])


def source_positions(labels: Tensor, height: int, width: int) -> np.ndarray:
    """What the table of labels says, in float64, one matrix a row and inverted numerically: ``(2, H, W)``, (y, x)."""
    x_flip, y_flip, n, cos_minus_1, sin, stretch_x, stretch_y, n_x, n_y = labels.double().tolist()
    axis = math.atan2(stretch_y, stretch_x) / 2
    frame = np.array([[math.cos(axis), -math.sin(axis)], [math.sin(axis), math.cos(axis)]])
    amount = 2 ** (0.2 * math.hypot(stretch_x, stretch_y))
    mirror = np.diag([1 - 2 * x_flip, 1 - 2 * y_flip])
    turn = np.array([[cos_minus_1 + 1, -sin], [sin, cos_minus_1 + 1]])
    forward = frame @ np.diag([amount, 1 / amount]) @ frame.T @ turn @ (2 ** (0.2 * n) * mirror)
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    move = np.array([n_x * width / 8, n_y * height / 8])
    target = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1)
    source = (target - centre - move) @ np.linalg.inv(forward).T + centre
    return np.moveaxis(source, -1, 0)[::-1]


def cosines(y: np.ndarray, x: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture that is its own mirror image about the border pixels, and so is known at any distance from them."""
    rng = np.random.default_rng(3)
    u, v = np.pi * x / (width - 1), np.pi * y / (height - 1)
    return sum(rng.normal() * np.cos(k * u) * np.cos(m * v) / 3 for k in range(4) for m in range(4))


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> Tensor:
    return Augment(0.3)(torch.zeros(20_000, 1, 2, 2), generator=generator())[1].double()


def assert_rate(hits: Tensor, probability: float) -> None:
    assert stats.binomtest(int(hits.sum()), len(hits), probability).pvalue > 1e-3


def test_each_transform_happens_with_its_probability(many: Tensor) -> None:
    assert many.shape == (20_000, AUGMENT_LABELS) == (20_000, Augment.label_dim)
    on = many != 0
    assert_rate(on[:, 0], 0.5)
    assert_rate(on[:, 1], 0.3 / 2)
    for column in (2, 4, 5, 7):
        assert_rate(on[:, column], 0.3)
    assert_rate(~on[:, 2:].any(1), 0.7**4)
    assert_rate(~on[:, 1:].any(1), 0.7**4 * 0.85)
    assert (on[:, 7] == on[:, 8]).all()  # a move has both its parts


def test_labels_follow_the_published_distributions(many: Tensor) -> None:
    assert set(many[:, :2].unique().tolist()) == {0.0, 1.0}
    for column in (2, 7, 8):
        drawn = many[:, column][many[:, column] != 0]
        assert stats.kstest(drawn, "norm").pvalue > 1e-3
    turned = many[many[:, 4] != 0]
    angle = torch.atan2(turned[:, 4], turned[:, 3] + 1)
    torch.testing.assert_close((turned[:, 3] + 1) ** 2 + turned[:, 4] ** 2, torch.ones(len(turned)).double())
    assert stats.kstest(angle, "uniform", args=(-math.pi, 2 * math.pi)).pvalue > 1e-3
    stretched = many[many[:, 5] != 0]
    assert stats.kstest(stretched[:, 5:7].norm(dim=1), "halfnorm").pvalue > 1e-3
    rotated = stretched[:, 6] != 0
    assert_rate(rotated, 0.5)
    assert stats.kstest(stretched[~rotated, 5], "norm").pvalue > 1e-3
    double = torch.atan2(stretched[rotated, 6], stretched[rotated, 5])
    assert stats.kstest(double, "uniform", args=(-math.pi, 2 * math.pi)).pvalue > 1e-3


def test_transforms_are_drawn_independently(many: Tensor) -> None:
    happened = (many[:, [0, 1, 2, 4, 5, 7]] != 0).double()
    correlation = torch.corrcoef(happened.T) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)
    both = many[(many[:, [2, 5, 7]] != 0).all(1)]
    assert torch.corrcoef(both[:, [2, 5, 7, 8]].T).sub(torch.eye(4)).abs().max() < 5 / math.sqrt(len(both))


# --- untouched images -----------------------------------------------------------------------------------------------


def test_probability_zero_mirrors_half_of_the_images_and_nothing_else() -> None:
    images = noise(64, 3, 9, 12)
    augmented, labels = Augment(0.0)(images, generator=generator())
    flipped = labels[:, 0] == 1
    assert 16 < flipped.sum() < 48
    assert (labels[:, 1:] == 0).all()
    assert torch.equal(augmented[~flipped], images[~flipped])
    assert torch.equal(augmented[flipped], images[flipped].flip(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_image_that_is_not_moved_keeps_its_bits(dtype: torch.dtype) -> None:
    images = noise(256, 1, 8, 8).to(dtype)
    augmented, labels = Augment(0.12)(images, generator=generator(1))
    assert augmented.dtype == dtype
    assert labels.dtype == torch.float32
    still = (labels[:, 2:] == 0).all(1)
    assert 100 < still.sum() < 200
    for before, after, (x_flip, y_flip) in zip(
        images[still], augmented[still], labels[still, :2].tolist(), strict=True
    ):
        before = before.flip(-1) if x_flip else before
        assert torch.equal(after, before.flip(-2) if y_flip else before)
    assert not any(torch.equal(a, b) for a, b in zip(images[~still], augmented[~still], strict=True))


# --- the labels tell all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (33, 21)])
def test_labels_determine_the_picture_exactly(height: int, width: int) -> None:
    y, x = np.mgrid[:height, :width].astype(float)
    picture = torch.from_numpy(cosines(y, x, height, width)).float()
    augmented, labels = Augment(0.8)(picture.expand(200, 2, -1, -1), generator=generator())
    expected = np.stack([cosines(*source_positions(row, height, width), height, width) for row in labels])
    error = (augmented - torch.from_numpy(expected)[:, None]).abs()
    # Of a picture that spans 4: at most a tenth of a pixel where turned, since sym6 is not quite symmetric.
    assert error.max() < 0.1
    assert error.square().mean().sqrt() < 0.02


def test_labels_determine_the_picture_as_scipy_resamples_it() -> None:
    rough = noise(1, 1, 32, 48, seed=5)[0, 0].numpy()
    picture = ndimage.gaussian_filter(rough, 2.0, mode="mirror") * 4
    augmented, labels = Augment(1.0)(torch.from_numpy(picture).expand(64, 1, -1, -1), generator=generator())
    for row, got in zip(labels, augmented[:, 0], strict=True):
        expected = ndimage.map_coordinates(picture, source_positions(row, 32, 48), order=3, mode="mirror")
        torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=0.07, rtol=0)


@pytest.mark.parametrize(
    ("values", "moved", "atol"),
    [
        ({"n_x": 1.0}, lambda image: torch.roll(image, 4, dims=-1), 1e-5),
        ({"n_y": -0.75}, lambda image: torch.roll(image, -3, dims=-2), 1e-5),
        # A filter that is not quite symmetric, turned, does not quite undo itself.
        ({"cos_minus_1": -1.0, "sin": 1.0}, lambda image: torch.rot90(image, -1, dims=(-2, -1)), 0.1),
        ({"cos_minus_1": -2.0}, lambda image: image.flip(-1, -2), 0.1),
    ],
)
def test_directions_are_those_of_roll_and_rot90(values: dict[str, float], moved, atol: float) -> None:
    picture = torch.from_numpy(ndimage.gaussian_filter(noise(32, 32).numpy(), 1.5)) * 4  # within ±1
    got = transform(picture[None, None], label(**values))[0, 0]
    torch.testing.assert_close(got[5:-5, 5:-5], moved(picture)[5:-5, 5:-5], atol=atol, rtol=0)


def test_whole_pixels_are_moved_without_loss_and_the_border_is_a_mirror() -> None:
    images = noise(2, 3, 16, 24)  # white noise: the hardest to resample
    got = transform(images, label(n_x=5 / 3, n_y=-1.0).expand(2, -1))  # 5 to the right, 2 up
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (5, 5)), mode="reflect")
    torch.testing.assert_close(got, torch.from_numpy(padded[:, :, 4:20, 0:24].copy()), atol=1e-4, rtol=0)


def test_stretching_along_an_axis_needs_twice_its_angle() -> None:
    y, x = np.mgrid[:32, :32] - 15.5
    blob = torch.from_numpy(np.exp(-(x**2 + y**2) / 18)).float()[None, None]
    for axis in (0.0, 0.4, math.pi / 2, 2.5):
        got = transform(blob, label(stretch_x=2 * math.cos(2 * axis), stretch_y=2 * math.sin(2 * axis)))[0, 0]
        along, across = x * math.cos(axis) + y * math.sin(axis), y * math.cos(axis) - x * math.sin(axis)
        amount = 2**0.4
        expected = np.exp(-((along / amount) ** 2 + (across * amount) ** 2) / 18)
        torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=0.02, rtol=0)


# --- filter ---------------------------------------------------------------------------------------------------------


def test_sym6_is_orthonormal_with_six_vanishing_moments_and_nearly_symmetric() -> None:
    f, k = SYM6.numpy(), np.arange(12.0)
    np.testing.assert_allclose(f.sum(), math.sqrt(2), atol=1e-12)
    overlap = np.correlate(f, f, "full")[11::2]
    np.testing.assert_allclose(overlap, np.eye(6)[0], atol=1e-11)
    moments = [np.sum((-1) ** k * (k - 5.5) ** power * f) for power in range(7)]
    np.testing.assert_allclose(moments[:6], 0, atol=1e-8)
    assert abs(moments[6]) > 1
    # Filters with these properties share one amplitude response and differ in phase; that of sym6 is nearly linear.
    frequency = np.linspace(0.01, np.pi / 2, 50)
    delay = -np.angle(np.exp(-1j * np.outer(frequency, k - DELAY)) @ f) / frequency
    assert delay.min() > -0.2
    assert delay.max() < 0.1


@pytest.mark.parametrize("size", [2, 3, 8, 33])
def test_doubling_keeps_constants_slopes_and_curvatures(size: int) -> None:
    up, down = filters(size)
    assert up.shape == (4 * size - 3, size)
    assert down.shape == (size, 2 * size + 10)
    torch.testing.assert_close(up.sum(1), torch.ones(4 * size - 3).double())
    torch.testing.assert_close(down.sum(1), torch.ones(size).double())
    torch.testing.assert_close(up[0], up[-1])  # periodic
    samples, pixels = torch.arange(4 * size - 3).double(), torch.arange(size).double()
    inside = (samples >= 10) & (samples < 2 * size)  # no mirror image reaches these
    torch.testing.assert_close((up @ pixels)[inside], ((samples - DELAY) / 2)[inside], atol=0.05, rtol=0)
    curvature = (up @ pixels**2)[inside].diff(n=2)
    torch.testing.assert_close(curvature, torch.full_like(curvature, 0.5))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (7, 13), (2, 3)])
def test_resampling_in_place_changes_nothing_up_to_the_border(height: int, width: int) -> None:
    images = noise(2, 3, height, width)
    torch.testing.assert_close(warp(images, torch.zeros(2, 9)), images, atol=2e-5, rtol=0)


# --- the callable ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 5, 17), (4, 2, 2)])
def test_any_shape_and_constants_stay_constant(shape: tuple[int, ...]) -> None:
    images = torch.full((16, *shape), 0.7)
    augmented, _ = Augment(1.0)(images, generator=generator())
    torch.testing.assert_close(augmented, images, atol=1e-5, rtol=0)


def test_the_seed_decides_and_the_ambient_generator_is_left_alone() -> None:
    images, ambient = noise(8, 3, 16, 16), torch.get_rng_state()
    first, second, other = (Augment(0.5)(images, generator=generator(seed)) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(torch.get_rng_state(), ambient)


def test_the_generator_advances_alike_for_every_probability() -> None:
    states, mirrored, images = [], [], noise(32, 1, 8, 8)
    for probability in (0.0, 0.12, 1.0):
        g = generator()
        mirrored.append(Augment(probability)(images, generator=g)[1][:, 0])
        states.append(g.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    assert torch.equal(mirrored[0], mirrored[2])


def test_an_image_does_not_depend_on_its_neighbours_and_the_input_is_kept() -> None:
    images = noise(8, 3, 16, 16)
    kept = images.clone()
    alone, _ = Augment(1.0)(images, generator=generator())
    assert torch.equal(images, kept)
    others = noise(8, 3, 16, 16, seed=9)
    others[3] = images[3]
    beside, _ = Augment(1.0)(others, generator=generator())
    torch.testing.assert_close(beside[3], alone[3], atol=1e-6, rtol=0)
    assert (beside[2] - alone[2]).abs().max() > 0.1


@pytest.mark.parametrize("probability", [-0.1, 1.5, math.nan])
def test_a_probability_outside_the_unit_interval_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\], not"):
        Augment(probability)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_the_gpu_nothing_waits_and_the_picture_is_the_same(device: str) -> None:
    images = noise(16, 3, 32, 32).cuda()
    augment, g = Augment(0.5), generator(device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmented, labels = augment(images, generator=g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(augmented.cpu(), transform(images.cpu(), labels.cpu()), atol=5e-3, rtol=0)
