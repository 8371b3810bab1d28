"""Our use of the Inception network against torch-fidelity's, torchmetrics', and the protocol spelled out."""

import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from diffit.metrics.detectors import make_detector
from diffit.metrics.frechet import frechet_distance, moments
from diffit.metrics.inception_score import ScoreSums
from diffit.metrics.precision_recall import precision_recall
from diffit.utils.distributed import Processes

ONE = Processes(0, 1, torch.device("cpu"))


def smooth(n, channels, side, seed=0):
    """uint8 images of a few random waves: unlike noise they differ from each other as pictures do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 5, 5, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def ours(inception_weights):
    return make_detector(f"inception:{inception_weights}", ONE)


@pytest.fixture(scope="module")
def theirs(inception_weights):
    return FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception_weights))


def test_weights_that_are_not_the_official_ones_lend_their_name_to_the_number(ours):
    assert ours.name.startswith("inception-")
    assert not ours.official


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 64, 256, 400])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_those_of_torch_fidelity_and_torchmetrics(ours, theirs, inception_weights, side, channels):
    from torchmetrics.image.fid import FrechetInceptionDistance

    images = smooth(2, channels, side)
    rgb = images.repeat(1, 3 // channels, 1, 1)
    found = ours(images)
    pool, logits = theirs(rgb)
    scale = float(pool.abs().max())
    assert pool.std(0).mean() > 1e-3 * scale  # the random network tells images apart
    assert_close(found["pool"], pool, rtol=0, atol=1e-6 * scale)
    assert_close(found["probabilities"], logits.softmax(1), rtol=1e-5, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(inception_weights), antialias=False)
    assert_close(found["pool"], metric.inception(rgb), rtol=0, atol=1e-6 * scale)


@pytest.mark.slow
def test_fid_sfid_and_scores_are_those_of_a_direct_computation(ours, theirs):
    """FID to 6 digits with both libraries; sFID, IS, precision and recall from the protocol's own words."""
    from prdc import compute_prdc
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    fake, real = smooth(12, 3, 32, 1), smooth(12, 3, 32, 2)
    found = {name: ours(images) for name, images in (("fake", fake), ("real", real))}
    fid = frechet_distance(*moments(found["fake"]["pool"]), *moments(found["real"]["pool"]))
    # Their eigenvalues of a general 2048×2048 matrix take minutes: they see the first 192 features, NumPy sees all.
    some = {name: outputs["pool"][:, :192].double() for name, outputs in found.items()}
    statistics = [fid_features_to_statistics(features) for features in some.values()]
    expected = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    pairs = [moments(features) for features in some.values()]
    assert_close(frechet_distance(*pairs[0], *pairs[1]), expected, rtol=2e-6, atol=0)
    assert_close(float(_compute_fid(*pairs[0], *pairs[1])), expected, rtol=2e-6, atol=0)
    assert_close(fid, numpy_frechet(*(found[name]["pool"].double().numpy() for name in found)), rtol=1e-8, atol=0)

    spatial = {name: mixed_6_conv(theirs, images) for name, images in (("fake", fake), ("real", real))}
    for name, values in spatial.items():
        assert values.shape == (12, 2023)
        assert_close(found[name]["spatial"], values, rtol=1e-5, atol=1e-5)
    direct = numpy_frechet(*(spatial[name][:, :300].double().numpy() for name in ("fake", "real")))
    sfid = frechet_distance(*(x for name in found for x in moments(found[name]["spatial"][:, :300])))
    assert_close(sfid, direct, rtol=1e-5, atol=0)

    logits = found["fake"]["pool"].double().numpy() @ theirs.fc.weight.double().numpy().T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = [p[3 * i : 3 * i + 3] for i in range(4)]
    scores = [np.exp(np.mean(np.sum(q * (np.log(q) - np.log(q.mean(0))), 1))) for q in parts]
    sums = ScoreSums([3, 6, 9])
    sums.add(torch.arange(12), found["fake"]["probabilities"])
    assert_close(sums.reduce(ONE, 1008), (np.mean(scores), np.std(scores)), rtol=1e-6, atol=1e-6)

    x, y = (found[name]["pool"] for name in ("fake", "real"))
    prdc = compute_prdc(y.double().numpy(), x.double().numpy(), nearest_k=3)
    assert precision_recall(x, y, 3) == (prdc["precision"], prdc["recall"])


def mixed_6_conv(net, images):
    """TensorFlow's mixed_6/conv, (B, 17, 17, C), its first 7 channels: the first branch of the fourth 17×17 block."""
    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), (299, 299), align_corners=False)
    x = (x - 128) / 128
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
                 "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):  # fmt: skip
        x = getattr(net, name)(x)
    x = net.Mixed_6d.branch1x1(x)
    return torch.from_numpy(x.numpy().transpose(0, 2, 3, 1)[..., :7].reshape(len(images), -1))


def numpy_frechet(x, y):
    """In the span of the samples, where the covariances of few images live: Σ₁^½ Σ₂^½ has the singular values of
    X Yᵀ / (n − 1), with X and Y the centred samples."""
    a, b = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum() / (len(x) - 1)
    return np.square(x.mean(0) - y.mean(0)).sum() + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * cross
