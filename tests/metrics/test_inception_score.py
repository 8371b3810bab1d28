"""The score against a direct computation from its definition."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffit.metrics.inception_score import InceptionScore
from diffit.utils.distributed import Processes

ONE = Processes(0, 1, torch.device("cpu"))


def direct(p, edges):
    scores = []
    for start, stop in pairwise(edges):
        part = p[start:stop]
        kl = [(row * (np.log(row) - np.log(part.mean(0)))).sum() for row in part]
        scores.append(np.exp(np.mean(kl)))
    return np.mean(scores), np.std(scores)


def of(metric, order, batch, p):
    """(score, deviation) by the metric's own accumulator."""
    sums = metric.need.accumulator()
    for part in order.split(batch):
        sums.add(part, p[part])
    return sums.reduce(ONE, p.shape[1])


@pytest.mark.parametrize(
    ("metric", "edges"),
    [
        (InceptionScore(200), range(0, 201, 20)),
        (InceptionScore(203), [0, 21, 41, 61, 82, 102, 122, 143, 163, 183, 203]),
        (InceptionScore(203, split_size=50), [0, 50, 100, 150, 200, 203]),
        (InceptionScore(200, split_size=50), [0, 50, 100, 150, 200]),
        (InceptionScore(203, split_size=5000), [0, 203]),
    ],
)
def test_running_sums_are_the_definition_in_any_batches_and_order(metric, edges):
    p = torch.randn(metric.samples, 12, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    every = torch.arange(metric.samples)
    for order in (every, every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1))]):
        for batch in (1, 7, 64):
            assert_close(of(metric, order, batch, p), direct(p.double().numpy(), edges), rtol=1e-10, atol=1e-12)


def test_certain_and_even_classes_score_their_number():
    p = torch.eye(5).repeat(40, 1)
    assert_close(of(InceptionScore(200), torch.arange(200), 200, p), (5.0, 0.0), rtol=1e-12, atol=1e-12)


def test_published_splits_of_50k_are_the_same_both_ways_and_of_10k_are_two():
    splits = [len(InceptionScore(n, split_size=size).starts) + 1
              for n, size in ((50_000, None), (50_000, 5000), (10_000, 5000))]  # fmt: skip
    assert splits == [10, 10, 2]


def test_scores_of_other_splits_are_not_taken_for_one_another():
    """46,000 images are ten splits either way, but not the same ones."""
    assert InceptionScore(46_000).need != InceptionScore(46_000, split_size=5000).need
    assert InceptionScore(46_000).need == InceptionScore(46_000, full=True).need
