"""The score against a direct computation from its definition."""

import numpy as np
import torch
from torch.testing import assert_close

from diffit.metrics.inception_score import ScoreSums


def direct(p, splits):
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        kl = [(row * (np.log(row) - np.log(part.mean(0)))).sum() for row in part]
        scores.append(np.exp(np.mean(kl)))
    return np.mean(scores), np.std(scores)


def test_running_sums_are_the_definition_in_any_batches_and_order():
    p = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    for order in (torch.arange(200), torch.randperm(200, generator=torch.Generator().manual_seed(1))):
        for batch in (1, 7, 64):
            sums = ScoreSums(200)
            for part in order.split(batch):
                sums.add(part, p[part])
            assert_close(sums.score(), direct(p.double().numpy(), 10), rtol=1e-10, atol=1e-12)


def test_certain_and_even_classes_score_their_number():
    p = torch.eye(5).repeat(40, 1)
    sums = ScoreSums(200, splits=4)
    sums.add(torch.arange(200), p)
    assert_close(sums.score(), (5.0, 0.0), rtol=1e-12, atol=1e-12)
