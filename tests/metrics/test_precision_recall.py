"""Precision and recall against prdc; nearest neighbours against scikit-learn; tiles against no tiles."""

import sys

import pytest
import torch
from prdc import compute_prdc
from sklearn.neighbors import NearestNeighbors
from torch.testing import assert_close

from diffit.metrics.precision_recall import covered, nearest, precision_recall, radii


def draw(n, d, seed, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale


def test_precision_and_recall_are_prdcs(monkeypatch):
    for k in (3, 5):
        for scale in (0.7, 1.0, 1.5):
            real, fake = draw(300, 12, 0), draw(200, 12, 1, scale)
            theirs = compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
            assert_close(precision_recall(fake, real, k), (theirs["precision"], theirs["recall"]), rtol=0, atol=1e-12)
    whole = precision_recall(fake, real, 3)
    monkeypatch.setattr(sys.modules[nearest.__module__], "TILE", 1000)
    assert precision_recall(fake, real, 3) == whole


def test_nearest_neighbours_are_scikit_learns():
    x, y = draw(50, 6, 0), draw(70, 6, 1)
    distances, indices = NearestNeighbors(n_neighbors=4).fit(y.double().numpy()).kneighbors(x.double().numpy())
    found = nearest(x, y, 4)
    assert_close(found[0].numpy(), distances, rtol=1e-10, atol=0)
    assert (found[1].numpy() == indices).all()


@pytest.mark.parametrize("tile", [25, 400, 2500, 2**23])
def test_tiles_of_any_size_give_what_the_whole_matrix_gives(tile, monkeypatch):
    """Sides of 5, 20, 50: narrower than k, a divisor of one set, of none; and all at once."""
    monkeypatch.setattr(sys.modules[nearest.__module__], "TILE", tile)
    x, y = draw(60, 6, 0), draw(101, 6, 1)
    whole = (x[:, None] - y).double().norm(dim=2)
    distances, indices = whole.sort(dim=1)
    found = nearest(x, y, 7)
    assert_close(found, (distances[:, :7], indices[:, :7]), rtol=1e-6, atol=0)
    own = (y[:, None] - y).double().norm(dim=2).sort(dim=1).values  # the first is the feature itself
    assert_close(radii(y, 7), own[:, 7], rtol=1e-6, atol=0)
    radius = own[:, 2] * 0.9
    expected = float((whole <= radius).any(dim=1).double().mean())
    assert 0 < expected < 1
    assert covered(x, y, radius) == expected


def test_a_radius_does_not_count_the_feature_itself_but_counts_its_copies():
    x = draw(5, 3, 0)
    assert radii(torch.cat([x, x]), 1).max() < 1e-6
    assert radii(x, 1).min() > 0.1
