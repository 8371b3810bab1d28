"""The distance against closed forms and SciPy, the sums against NumPy, the bias against its formula."""

import time

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.testing import assert_close

from diffit.metrics.frechet import Moments, finite_sample_bias, frechet_distance, moments
from diffit.utils.distributed import Processes
from helpers import run_processes

ONE = Processes(0, 1, torch.device("cpu"))


def draw(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(d):
    return torch.linalg.qr(draw(d, d, seed=9)).Q


def scipy_distance(mu1, cov1, mu2, cov2):
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy())
    return float((mu1 - mu2).square().sum()) + float(np.trace((cov1 + cov2).numpy() - 2 * root.real))


@pytest.mark.parametrize("d", [16, pytest.param(2048, marks=pytest.mark.slow)])
def test_closed_forms(d):
    a, b = 0.1 + draw(d, 1, 1).square()[:, 0], 0.1 + draw(d, 1, 2).square()[:, 0]
    zero, shift = torch.zeros(d, dtype=torch.float64), draw(1, d, 3)[0]
    q = rotation(d)
    general = q * a @ q.T
    diagonal = float((a.sqrt() - b.sqrt()).square().sum())
    began = time.monotonic()
    found = [
        frechet_distance(zero, general, shift, general),
        frechet_distance(zero, general, zero, 4 * general),
        frechet_distance(zero, torch.diag(a), zero, torch.diag(b)),
        frechet_distance(zero, general, zero, q * b @ q.T),
    ]
    seconds = (time.monotonic() - began) / len(found)
    expected = [float(shift.square().sum()), float(a.sum()), diagonal, diagonal]
    assert_close(found, expected, rtol=1e-8, atol=0)
    worst = max(abs(f / e - 1) for f, e in zip(found, expected, strict=True))
    print(f"{d} dimensions: relative error {worst:.1e}, {seconds:.1f} s a distance")


@pytest.mark.parametrize("n", [40, 500])
def test_scipy_agrees(n):
    one, two = moments(draw(n, 32)), moments(draw(n, 32, 1) * 2 + 0.3)
    assert_close(frechet_distance(*one, *two), scipy_distance(*one, *two), rtol=1e-8, atol=0)


def test_low_rank_covariances_need_no_jitter_and_lose_no_digits():
    d = 512
    few, many = moments(draw(50, d)), moments(draw(5000, d))
    for one, two in ((few, few), (many, many)):
        assert abs(frechet_distance(*one, *two)) < 1e-8 * float(torch.trace(one[1]))
    # In the subspace that 50 samples span, the other covariance acts through its block there.
    values, vectors = torch.linalg.eigh(few[1])
    values, vectors = values[-49:], vectors[:, -49:]
    block = values.sqrt()[:, None] * (vectors.T @ many[1] @ vectors) * values.sqrt()
    trace = float(torch.linalg.eigvalsh(block).sqrt().sum())
    expected = float((few[0] - many[0]).square().sum() + few[1].trace() + many[1].trace()) - 2 * trace
    for one, two in ((few, many), (many, few)):
        assert_close(frechet_distance(*one, *two), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("n", [500, 2000, 10_000, 50_000])
def test_the_bias_between_samples_of_one_gaussian_is_the_known_one(n):
    d, repeats = 64, 24 if n <= 10_000 else 12
    pairs = [(moments(draw(n, d, 2 * i)), moments(draw(n, d, 2 * i + 1))) for i in range(repeats)]
    found = np.mean([frechet_distance(*one, *two) for one, two in pairs])
    known = (d * d + 5 * d) / (2 * n)
    print(f"n = {n}: {found:.5f}, {found / known - 1:+.2%} of the formula")
    assert_close(found, known, rtol=0.03, atol=0)
    assert_close(finite_sample_bias(torch.eye(d), n, n), known, rtol=1e-12, atol=0)


def test_the_bias_formula_holds_for_any_spectrum_and_sizes():
    d, scale = 32, 0.1 + torch.arange(32, dtype=torch.float64) / 8
    pairs = [(moments(draw(2000, d, 2 * i) * scale), moments(draw(20_000, d, 2 * i + 1) * scale)) for i in range(40)]
    found = np.mean([frechet_distance(*one, *two) for one, two in pairs])
    assert_close(found, finite_sample_bias(torch.diag(scale**2), 2000, 20_000), rtol=0.04, atol=0)


def test_moments_are_numpys_in_any_batches_and_order():
    x = draw(203, 24) * 3 + 1
    shuffled = x[torch.randperm(203, generator=torch.Generator().manual_seed(1))]
    for rows in (x, shuffled):
        for batch in (1, 7, 64):
            sums = Moments()
            for part in rows.float().split(batch):
                sums.add(part)
            mean, cov = sums.mean_and_cov()
            exact = x.float().double().numpy()
            assert sums.count == 203
            assert_close(mean.numpy(), exact.mean(0), rtol=1e-10, atol=0)
            assert_close(cov.numpy(), np.cov(exact, rowvar=False), rtol=1e-10, atol=1e-12)


REDUCE = """
import torch
from diffit.metrics.frechet import Moments
from diffit.metrics.features import Rows
from diffit.metrics.inception_score import ScoreSums
from diffit.utils.distributed import processes

with processes() as procs:
    x = torch.randn(203, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for sizes in ((102, 101), (203, 0), (13, 190)):
        sums = Moments()
        mine = x.split(sizes)[procs.rank]
        if len(mine):
            sums.add(mine)
        sums.reduce(procs, 24)
        mean, cov = sums.mean_and_cov()
        exact = torch.cov(x.T)
        assert sums.count == 203
        rows, score, alone = Rows(), ScoreSums(203), ScoreSums(203)
        positions, p = torch.arange(203), x.softmax(1)
        if len(mine):
            rows.add(positions.split(sizes)[procs.rank].flip(0), mine.flip(0))
            score.add(positions.split(sizes)[procs.rank], p.split(sizes)[procs.rank])
        alone.add(positions, p)
        rows.reduce(procs, 24)
        score.reduce(procs, 24)
        assert abs(score.score()[0] / alone.score()[0] - 1) < 1e-10
        assert not procs.is_first or torch.equal(rows.features, x.float())
        assert (mean - x.mean(0)).abs().max() < 1e-10 and (cov - exact).abs().max() < 1e-10 * exact.abs().max()
"""


@pytest.mark.slow
def test_uneven_shards_of_two_processes_add_up(tmp_path):
    run_processes(REDUCE, tmp_path)
