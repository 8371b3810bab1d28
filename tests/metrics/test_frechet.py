"""The distance against closed forms and SciPy, the sums against NumPy, the bias against its formula."""

import time

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.testing import assert_close

from diffit.metrics.detectors import Detector
from diffit.metrics.frechet import (
    FID,
    Gaussian,
    Moments,
    finite_sample_bias,
    frechet_distance,
    moments,
    square_root,
)
from diffit.utils.distributed import Processes
from helpers import run_processes

ONE = Processes(0, 1, torch.device("cpu"))


def gaussian(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(d):
    return torch.linalg.qr(gaussian(d, d, seed=9)).Q


def scipy_distance(mu1, cov1, mu2, cov2):
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy())
    return float((mu1 - mu2).square().sum()) + float(np.trace((cov1 + cov2).numpy() - 2 * root.real))


@pytest.mark.parametrize("d", [16, 1024])
def test_closed_forms(d):
    a, b = 0.1 + gaussian(d, 1, 1).square()[:, 0], 0.1 + gaussian(d, 1, 2).square()[:, 0]
    zero, shift = torch.zeros(d, dtype=torch.float64), gaussian(1, d, 3)[0]
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
    one, two = moments(gaussian(n, 32)), moments(gaussian(n, 32, 1) * 2 + 0.3)
    assert_close(frechet_distance(*one, *two), scipy_distance(*one, *two), rtol=1e-8, atol=0)


def test_low_rank_covariances_need_no_jitter_and_lose_no_digits():
    d = 512
    few, many = moments(gaussian(50, d)), moments(gaussian(5000, d))
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
    pairs = [(moments(gaussian(n, d, 2 * i)), moments(gaussian(n, d, 2 * i + 1))) for i in range(repeats)]
    found = np.mean([frechet_distance(*one, *two) for one, two in pairs])
    known = (d * d + 5 * d) / (2 * n)
    print(f"n = {n}: {found:.5f}, {found / known - 1:+.2%} of the formula")
    assert_close(found, known, rtol=0.03, atol=0)
    assert_close(finite_sample_bias(torch.eye(d), n, n), known, rtol=1e-12, atol=0)


def test_the_bias_formula_holds_for_any_spectrum_and_sizes():
    d, scale = 32, 0.1 + torch.arange(32, dtype=torch.float64) / 8
    pairs = [
        (moments(gaussian(2000, d, 2 * i) * scale), moments(gaussian(20_000, d, 2 * i + 1) * scale)) for i in range(40)
    ]
    found = np.mean([frechet_distance(*one, *two) for one, two in pairs])
    assert_close(found, finite_sample_bias(torch.diag(scale**2), 2000, 20_000), rtol=0.04, atol=0)


def test_moments_are_numpys_in_any_batches_and_order():
    x = gaussian(203, 24) * 3 + 1
    shuffled = x[torch.randperm(203, generator=torch.Generator().manual_seed(1))]
    for rows in (x, shuffled):
        for batch in (1, 7, 64):
            sums = Moments()
            for part in rows.float().split(batch):
                sums.add(torch.arange(len(part)), part)
            found = sums.reduce(ONE, 24)
            exact = x.float().double().numpy()
            assert found.count == 203
            for mean, cov in ((found.mean, found.cov), moments(x.float()), moments(x.float().numpy())):
                assert_close(mean.numpy(), exact.mean(0), rtol=1e-10, atol=0)
                assert_close(cov.numpy(), np.cov(exact, rowvar=False), rtol=1e-10, atol=1e-12)


REDUCE = """
import torch
from diffit.metrics import features as kept
from diffit.metrics.frechet import Moments
from diffit.metrics.features import Rows
from diffit.metrics.inception_score import ScoreSums
from diffit.utils.distributed import Processes, processes

with processes() as procs:
    x = torch.randn(203, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    positions, p = torch.arange(203), x.softmax(1)
    alone = ScoreSums([100])
    alone.add(positions, p)
    expected, _ = alone.reduce(Processes(0, 1, torch.device("cpu")), 24)
    for sizes in ((102, 101), (203, 0), (13, 190)):
        sums, rows, score = Moments(), Rows(), ScoreSums([100])
        mine = positions.split(sizes)[procs.rank]
        if len(mine):
            sums.add(mine, x[mine])
            rows.add(mine.flip(0), x[mine].flip(0))
            score.add(mine, p[mine])
        found = sums.reduce(procs, 24)
        exact = torch.cov(x.T)
        assert found.count == 203
        assert (found.mean - x.mean(0)).abs().max() < 1e-10
        assert (found.cov - exact).abs().max() < 1e-10 * exact.abs().max()
        assert abs(score.reduce(procs, 24)[0] / expected - 1) < 1e-10
        features = rows.reduce(procs, 24)
        assert not procs.is_first or torch.equal(features, x.float())
    kept.TILE = 8
    for sizes in ((102, 101), (203, 0), (48, 155), (24, 179), (1, 202), (0, 203)):
        rows = Rows()
        for part in positions.split(sizes)[procs.rank].flip(0).split(31):
            rows.add(part, x[part])
        features = rows.reduce(procs, 24)
        assert not rows.tiles  # nothing is kept that was sent
        assert not procs.is_first or torch.equal(features, x.float())
    assert Rows().reduce(procs, 24).shape == (0, 24)
"""


@pytest.mark.slow
def test_uneven_shards_of_two_processes_add_up(tmp_path):
    run_processes(REDUCE, tmp_path)


def test_one_process_that_saw_no_images_reduces_to_sums_of_the_asked_dimension():
    found = Moments().reduce(ONE, 5)
    assert found.count == 0
    assert found.mean.shape == (5,)
    assert found.cov.shape == (5, 5)
    assert found.mean.dtype == found.cov.dtype == torch.float64  # other processes add theirs to it


def test_one_process_reduces_without_a_process_group_to_unbiased_moments():
    """Of 1, 3 and 8: mean 4, variance 26/2."""
    sums = Moments()
    sums.add(torch.arange(3), torch.tensor([[1.0], [3.0], [8.0]]))
    found = sums.reduce(ONE, 1)
    assert (found.count, found.mean.tolist(), found.cov.tolist()) == (3, [4.0], [[13.0]])
    assert found.cov.dtype == torch.float64


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, ">f4"])
def test_numpy_arrays_of_any_float_dtype_are_taken(dtype):
    """Values that float16 holds exactly: ‖(3, 4)‖² + tr(4 + 1 − 2·2) twice."""
    mu1, mu2 = np.array([0, 0], dtype), np.array([3, 4], dtype)
    cov1, cov2 = np.diag([4, 4]).astype(dtype), np.diag([1, 1]).astype(dtype)
    for array in (mu1, cov1):
        array.flags.writeable = False
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(27, rel=1e-12)
    tensors = [torch.tensor(x.astype(np.float64), requires_grad=True) for x in (mu1, cov1, mu2, cov2)]
    assert frechet_distance(*tensors) == frechet_distance(mu1, cov1, mu2, cov2)


def test_arrays_that_are_no_moments_are_refused_with_their_shapes():
    mu, cov = np.zeros(3), np.eye(3)
    for arguments, message in (
        ((mu, cov, mu[:2], cov[:2, :2]), r"shapes \(3,\), \(3, 3\), \(2,\), \(2, 2\); expected \(d,\), \(d, d\)"),
        ((mu, cov[:2], mu, cov), r"shapes \(3,\), \(2, 3\)"),
        ((mu, cov, mu, cov[:, :2]), r"expected \(d,\)"),
        ((mu, mu, mu, cov), r"cov1 has shape \(3,\); expected 2 dimensions"),
        ((cov, cov, mu, cov), r"mu1 has shape \(3, 3\); expected 1 dimensions"),
        ((mu, cov, mu, np.full((3, 3), np.nan)), "cov2 has values that are not finite"),
        ((mu, cov, np.array([1, np.inf, 0]), cov), "mu2 has values that are not finite"),
        ((mu, cov.astype(complex), mu, cov), "cov1 is an array of complex128; expected real numbers"),
        ((np.zeros(0), np.zeros((0, 0)), mu, cov), "at least one value"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*arguments)
    assert moments(np.array([[1.0, 2.0], [3.0, 2.0]]))[1].tolist() == [[2, 0], [0, 0]]
    with pytest.raises(ValueError, match="one row; a covariance needs two or more"):
        moments(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"^cov has shape"):
        finite_sample_bias(mu, 5, 5)
    with pytest.raises(ValueError, match="features has values that are not finite"):
        moments(np.full((4, 3), np.inf))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(
    "spectrum", [(4, 3, 2, 1), (4, 3, 2, 0), (4, 3, 1e-17, 0), (4, 0, 0, 0), (0, 0, 0, 0), (1, 1e-7, 1e-9, 1e-12)]
)
def test_the_square_root_has_as_many_columns_as_the_covariance_has_rank(spectrum, scale):
    """Whatever the scale: eigenvalues below 4 machine epsilons of the largest are rounding."""
    values = torch.tensor(spectrum, dtype=torch.float64) * scale
    rank = sum(value > 1e-15 * max(spectrum) for value in spectrum)
    for cov in (torch.diag(values), rotation(4) * values @ rotation(4).T):
        root = square_root((cov + cov.T) / 2)
        assert root.shape == (4, rank)
        assert_close(root @ root.T, cov, rtol=0, atol=1e-14 * float(cov.abs().max()))


def test_the_bias_is_that_of_its_formula_term_by_term():
    """λ = 3, 1 and a null direction, by hand: pairs 3·3/6 + 1·1/2 + 2·3·1/4 = 3.5; 1.25·4 + 0.5·3.5 = 6.75."""
    cov = torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))
    assert finite_sample_bias(cov, 100) == pytest.approx(0.0675, rel=1e-12)
    assert finite_sample_bias(cov.numpy(), 100, 50) == pytest.approx(0.0675 * 3, rel=1e-12)
    q = rotation(3)
    assert finite_sample_bias(q @ cov @ q.T, 100, 100) == pytest.approx(0.135, rel=1e-10)


@pytest.mark.parametrize(("n1", "n2", "stated"), [(8, 8, True), (8, None, True), (7, 8, False), (8, 7, False)])
def test_the_metric_states_its_bias_from_two_images_for_each_dimension_on(n1, n2, stated):
    cov = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    metric = FID(n1, full=True, output="spatial")
    fake, real = Gaussian(torch.zeros(4), cov, n1), Gaussian(torch.full((4,), 2.0), cov, n2)
    numbers = metric.numbers(fake, real, Detector("inception", "", lambda x: {}, torch.device("cpu")))
    assert numbers["sfid"] == pytest.approx(16)
    assert ("sfid_bias" in numbers) == stated
    if stated:
        assert numbers["sfid_bias"] == pytest.approx(finite_sample_bias(cov, n1, n2 or float("inf")))


@pytest.mark.parametrize("output", ["pool", "spatial"])
def test_it_asks_for_the_moments_of_its_features_of_as_many_samples_as_it_says(output):
    need = FID(50, output=output).need
    assert (need.output, need.count, need.accumulator) == (output, 50, Moments)


def test_a_covariance_of_d_dimensions_is_asked_of_a_tenth_as_many_images_and_of_two():
    assert [FID(50).fewest(dim)[0] for dim in (1, 20, 21, 768, 2048)] == [2, 2, 3, 77, 205]


def test_images_that_are_all_alike_are_as_far_apart_as_their_means():
    zero, mu = np.zeros((3, 3)), np.array([1.0, 2.0, 2.0])
    assert frechet_distance(mu, zero, np.zeros(3), zero) == 9
    assert frechet_distance(mu, zero, np.zeros(3), np.eye(3)) == 12
    assert finite_sample_bias(zero, 10) == 0


def test_a_covariance_of_full_rank_is_factored_by_cholesky():
    """Not by its eigenvectors, which take longer."""
    cov = moments(gaussian(100, 8))[1]
    assert_close(square_root(cov).numpy(), scipy.linalg.cholesky(cov.numpy(), lower=True), rtol=1e-12, atol=1e-14)
