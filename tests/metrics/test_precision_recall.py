"""Precision and recall against prdc and NumPy, nearest neighbours against scikit-learn, tiles against no tiles."""

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from sklearn.neighbors import NearestNeighbors
from torch.testing import assert_close

from diffit.metrics.precision_recall import DISTANCES, Distances, euclidean, nearest, precision_recall, radii


def gaussian(n, d, seed, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale


def test_precision_and_recall_are_prdcs(monkeypatch):
    for k in (3, 5):
        for scale in (0.7, 1.0, 1.5):
            real, fake = gaussian(300, 12, 0), gaussian(200, 12, 1, scale)
            theirs = compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
            assert_close(precision_recall(fake, real, k), (theirs["precision"], theirs["recall"]), rtol=0, atol=1e-12)
    whole = precision_recall(fake, real, 3)
    monkeypatch.setitem(DISTANCES, "float64", Distances(euclidean, 31))
    assert precision_recall(fake, real, 3) == whole


def test_nearest_neighbours_are_scikit_learns():
    x, y = gaussian(50, 6, 0), gaussian(70, 6, 1)
    distances, indices = NearestNeighbors(n_neighbors=4).fit(y.double().numpy()).kneighbors(x.double().numpy())
    found = nearest(x, y, 4)
    assert_close(found[0].numpy(), distances, rtol=1e-10, atol=0)
    assert (found[1].numpy() == indices).all()


@pytest.mark.parametrize("side", [5, 20, 50, 2896])
def test_tiles_of_any_size_give_what_the_whole_matrix_gives(side, monkeypatch):
    """Narrower than k, a divisor of one set, of none; and all at once."""
    tiles = Distances(euclidean, side)
    monkeypatch.setitem(DISTANCES, "float64", tiles)
    x, y = gaussian(60, 6, 0), gaussian(101, 6, 1)
    whole = (x[:, None] - y).double().norm(dim=2)
    distances, indices = whole.sort(dim=1)
    found = nearest(x, y, 7, distances=tiles)
    assert_close(found, (distances[:, :7], indices[:, :7]), rtol=1e-6, atol=0)
    radius_y, radius_x = ((z[:, None] - z).double().norm(dim=2).sort(dim=1).values[:, 7] for z in (y, x))
    assert_close(radii(y, 7, distances=tiles), radius_y, rtol=1e-6, atol=0)  # the first is the feature itself
    expected = [
        float((whole <= radius_y).any(1).double().mean()),
        float((whole <= radius_x[:, None]).any(0).double().mean()),
    ]
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert list(precision_recall(x, y, 7)) == expected


def test_a_radius_does_not_count_the_feature_itself_but_counts_its_copies():
    x, exact = gaussian(5, 3, 0), DISTANCES["float64"]
    assert radii(torch.cat([x, x]), 1, distances=exact).max() < 1e-6
    assert radii(x, 1, distances=exact).min() > 0.1


def published(fake, real, k, dtype):
    """The published evaluator's steps in NumPy: squared distances by |u|² − 2uv + |v|² rounded to ``dtype`` throughout,
    a radius at place ``k`` of the sorted row that includes the feature itself, and ≤."""

    def squared(u, v):
        u, v = u.astype(dtype), v.astype(dtype)
        uu, vv = (np.square(x).sum(1, dtype=np.float32).astype(dtype) for x in (u, v))
        uv = np.array([[np.dot(a.astype(np.float32), b.astype(np.float32)) for b in v] for a in u]).astype(dtype)
        return np.maximum(uu[:, None] - dtype(2) * uv + vv[None, :], dtype(0)).astype(np.float32)

    radius_real, radius_fake = (np.sort(squared(x, x), axis=1)[:, k] for x in (real, fake))
    between = squared(real, fake)
    return (between <= radius_real[:, None]).any(0).mean(), (between <= radius_fake).any(1).mean()


def test_float16_distances_are_those_of_numpy_and_move_the_number():
    """Non-negative features of norm² about 500, as Inception's: distances are multiples of ¼ or ½."""
    fake, real = gaussian(200, 1000, 0).abs() * 0.7, gaussian(150, 1000, 1).abs() * 0.72
    exact, rounded = precision_recall(fake, real), precision_recall(fake, real, precision="float16")
    assert rounded == published(fake.numpy(), real.numpy(), 3, np.float16)
    assert rounded != exact
    assert_close(exact, published(fake.numpy(), real.numpy(), 3, np.float64), rtol=0, atol=0.01)


def test_where_float16_overflows_float32_is_used():
    fake, real = gaussian(60, 12, 0) * 100, gaussian(50, 12, 1) * 100
    rounded = precision_recall(fake, real, precision="float16")
    assert rounded == published(fake.numpy(), real.numpy(), 3, np.float32) == precision_recall(fake, real)
    assert 0 < rounded[0] < 1


def test_arrays_of_any_kind_are_taken_and_wrong_ones_refused():
    fake, real = gaussian(30, 4, 0), gaussian(20, 4, 1)
    expected = precision_recall(fake.double(), real.double(), 2)
    assert precision_recall(fake.double().numpy(), real.double().numpy()[::-1][::-1], 2) == expected
    for arguments, message in (
        ((fake[:, :3], real), "fake has 3 features and real 4"),
        ((fake[0], real), r"fake has shape \(4,\); expected 2 dimensions"),
        ((fake, real / 0), "real has values that are not finite"),
        ((fake, real, 20), "k is 20; expected 1 or more, and fewer than the features: 30 of fake, 20 of real"),
        ((fake, real, 0), "k is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            precision_recall(*arguments)
