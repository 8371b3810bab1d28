"""Named metrics from end to end: the number in the name is the number used, and nothing else changes the value."""

import io
import json
import math
import random
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffit.data.archive import ImageArchive
from diffit.errors import UserError
from diffit.metrics import reference as reference_module
from diffit.metrics.detectors import Detector, make_detector
from diffit.metrics.evaluate import evaluate_images
from diffit.metrics.frechet import finite_sample_bias, frechet_distance, moments
from diffit.metrics.images import choose, open_images
from diffit.metrics.kid import kid
from diffit.metrics.precision_recall import precision_recall
from diffit.metrics.record import summarise_repeats
from diffit.metrics.reference import open_reference, read_arrays
from diffit.metrics.suite import Suite, parse_metric
from diffit.utils.distributed import Processes
from helpers import command, write_archive

ONE = Processes(0, 1, torch.device("cpu"))
NAMES = "fd60_full", "kd50_full", "pr1k3_full", "fd40"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("real") / "real.zip", 101)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("fake") / "fake.zip", 60, classes=2)


def numbers(fake, real, names, detector, batch=64):
    images = open_images(fake)
    suite = Suite(names, real, images.shape, ONE, detector=str(detector), batch=batch, allow_scripts=True)
    return {record["metric"].split(":")[0]: record["results"] for record in evaluate_images(suite, images, batch=batch)}


@pytest.mark.parametrize(
    ("text", "kind", "samples", "full", "neighbours"),
    [
        ("fid50k_full", "fid", 50_000, True, 3),
        ("fid10k_full", "fid", 10_000, True, 3),
        ("fid2k_full", "fid", 2000, True, 3),
        ("fid50k", "fid", 50_000, False, 3),
        ("fd1234", "fid", 1234, False, 3),
        ("kid50k_full", "kid", 50_000, True, 3),
        ("is50k", "is", 50_000, False, 3),
        ("pr50k3_full", "pr", 50_000, True, 3),
        ("pr10k5", "pr", 10_000, False, 5),
        ("pr1500_3_full", "pr", 1500, True, 3),
        ("pr1500_10", "pr", 1500, False, 10),
        ("adm50k", "adm", 50_000, False, 3),
        ("adm10k_fp64", "adm", 10_000, False, 3),
    ],
)
def test_names(text, kind, samples, full, neighbours):
    metric = parse_metric(text)
    assert (metric.kind, metric.samples, metric.full) == (kind, samples, full)
    assert getattr(metric, "neighbours", 3) == neighbours
    assert parse_metric(f"{text}:pixels").spec == parse_metric(text, "pixels").spec == "pixels"


def test_a_name_says_whose_features_it_compares():
    official = make_detector("pixels", ONE)
    assert parse_metric("fid10k_full:pixels").name(official) == "fd10k_full:pixels"
    assert parse_metric("kid500:pixels").name(official) == "kd500:pixels"
    assert parse_metric("pr2k3:pixels").name(official) == "pr2k3:pixels"
    for text in ("pr1500_3_full:pixels", "pr1500_10:pixels", "pr3k10_full:pixels", "adm5k_fp64:pixels", "is5k:pixels"):
        assert parse_metric(text).name(official) == text


@pytest.mark.parametrize(
    "text",
    ["fid", "fid0k", "fid50k_ful", "lpips50k", "pr50k", "fid50k3", "pr50k0", "pr1500", "pr1500_0", "fid1500_3", ""],
)
def test_unknown_names_are_answered_with_the_known(text):
    with pytest.raises(UserError, match=r"(fid50k|pr50k3)_full"):
        parse_metric(text)


def test_numbers_are_those_of_the_functions_on_all_features(fake, real, torchscript):
    detector = make_detector(str(torchscript), ONE, allow_scripts=True)
    x, y = (detector(ImageArchive(path).load_all())["pool"] for path in (fake, real))
    found = numbers(fake, real, ["fd60_full", "kd60_full", "fd40"], torchscript)
    chosen = choose(60, 60)
    assert_close(found["fd60_full"]["fd"], frechet_distance(*moments(x), *moments(y)), rtol=1e-8, atol=0)
    assert_close(found["fd60_full"]["fd_bias"], finite_sample_bias(moments(y)[1], 60, 101), rtol=1e-8, atol=0)
    assert_close(found["kd60_full"]["kd"], kid(x[chosen], y[choose(101, 101)])[0], rtol=1e-8, atol=0)
    some = moments(x[chosen[:40]]), moments(y[choose(101, 40)])
    assert_close(found["fd40"]["fd"], frechet_distance(*some[0], *some[1]), rtol=1e-8, atol=0)


def test_the_bias_is_stated_only_where_the_images_suffice_for_an_estimate(tmp_path):
    """Two for each of the 12 dimensions, of either kind."""
    few, many = (write_archive(tmp_path / f"{n}.zip", n, side=2) for n in (23, 24))
    for fake, real, stated in ((many, many, True), (few, many, False), (many, few, False)):
        images = open_images(fake)
        suite = Suite([f"fd{len(images)}_full"], real, images.shape, ONE, detector="pixels")
        (record,) = evaluate_images(suite, images)
        assert ("fd_bias" in record["results"]) == stated
        said = "of the distance is the bias" if stated else "too few samples for an estimate of the bias; compare"
        assert said in record["notes"][0]


def test_precision_and_recall_use_the_neighbours_of_the_name(real, tmp_path, torchscript):
    fake = write_archive(tmp_path / "fake.zip", 1000, side=16, classes=2)
    detector = make_detector(str(torchscript), ONE, allow_scripts=True)
    x, y = (detector(ImageArchive(path).load_all())["pool"] for path in (fake, real))
    found = numbers(fake, real, ["pr1k3_full", "pr1k5_full"], torchscript)
    for k in (3, 5):
        pair = tuple(found[f"pr1k{k}_full"].values())
        assert pair == precision_recall(x, y, k)
    assert found["pr1k3_full"] != found["pr1k5_full"]


@pytest.mark.parametrize("batch", [1, 7])
def test_the_batch_changes_rounding_only(fake, real, torchscript, batch, monkeypatch, tmp_path):
    expected = numbers(fake, real, ["fd60_full", "kd60_full"], torchscript)
    monkeypatch.setenv("DIFFIT_CACHE", str(tmp_path))
    found = numbers(fake, real, ["fd60_full", "kd60_full"], torchscript, batch=batch)
    for name, values in expected.items():
        assert_close(found[name], values, rtol=1e-5, atol=1e-9)


def test_order_and_container_change_nothing(fake, real, torchscript, tmp_path):
    """Shuffled, and as a folder: on features that are exact (pixels' sums), to the last digits."""
    with zipfile.ZipFile(fake) as file:
        names = [name for name in file.namelist() if name.endswith("png")]
        order = random.Random(0).sample(range(len(names)), len(names))
        for i, name in zip(order, names, strict=True):
            (tmp_path / f"{i:03d}.png").write_bytes(file.read(name))
    (one,), (two,) = (numbers(path, real, ["fd60_full"], torchscript).values() for path in (fake, tmp_path))
    assert_close(one, two, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_two_processes_and_uneven_shards_change_nothing(fake, real, torchscript, tmp_path):
    """60 images in batches of 7 and of 64: 32 and 28 of them, then 60 and none."""
    runs = []
    for processes, batch in ((1, 7), (2, 7), (2, 64)):
        done = command(
            "metrics", "calc", "--images", fake, "--ref", real, "--metrics", "fd60_full,kd60_full,fd40",
            "--detector", torchscript, "--allow-scripts", "--batch", batch, processes=processes,
            DIFFIT_CACHE=str(tmp_path / f"{processes}-{batch}"),
        )  # fmt: skip
        records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert [record["processes"] for record in records] == [processes] * 3
        runs.append([record["results"] for record in records])
    for other in runs[1:]:
        assert_close(other, runs[0], rtol=1e-5, atol=1e-9)


def test_real_statistics_are_read_once_and_kept_by_content_and_detector(fake, real, torchscript, tmp_path, monkeypatch):
    first = numbers(fake, real, ["fd60_full"], torchscript)
    cache = reference_module.cache_folder()
    (kept,) = cache.glob("*.npz")

    def never(*arguments, **keywords):
        raise AssertionError("the real images were read again")

    with monkeypatch.context() as patch:
        patch.setattr(reference_module, "gather", never)
        assert numbers(fake, real, ["fd60_full"], torchscript) == first
        copy = tmp_path / "elsewhere.zip"
        copy.write_bytes(real.read_bytes())
        assert numbers(fake, copy, ["fd60_full"], torchscript) == first
    numbers(fake, real, ["fd40"], torchscript)  # another number of images
    other = write_archive(tmp_path / "other.zip", 102)  # other images
    numbers(fake, other, ["fd60_full"], torchscript)
    assert len(list(cache.glob("*.npz"))) == 3
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: computed again
    assert numbers(fake, real, ["fd60_full"], torchscript) == first


def test_the_cache_is_where_the_variable_says_or_else_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFIT_CACHE", str(tmp_path / "mine"))
    assert reference_module.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DIFFIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert reference_module.cache_folder() == tmp_path / "xdg" / "diffit"
    assert reference_module.cache_folder().name.lower() == "diffit"


def test_an_adm_reference_batch_gives_statistics_and_images(inception_weights, tmp_path):
    """All five numbers of the ADM suite, on a detector that has them, from a file laid out as ADM's."""
    rng = np.random.default_rng(0)
    detector = make_detector(f"inception:{inception_weights}", ONE)
    array = rng.integers(256, size=(6, 16, 16, 3), dtype=np.uint8)
    arrays = {
        "arr_0": array,
        "mu": np.zeros(2048),
        "sigma": np.eye(2048),
        "mu_s": np.ones(2023),
        "sigma_s": np.eye(2023),
    }
    np.savez(tmp_path / "adm.npz", **arrays)
    official = detector.__class__("inception", detector.key, detector.extract, detector.device, any_size=True)
    found = open_reference(tmp_path / "adm.npz", official)
    assert len(found.images) == 6
    moments_pool, moments_spatial, features = needs = real_needs("adm50k")
    held = found.get(needs, ONE)
    assert held[moments_pool].cov.shape == (2048, 2048)
    assert float(held[moments_spatial].mean.sum()) == 2023
    pool = official(torch.from_numpy(array).movedim(3, 1))["pool"]
    assert_close(held[features], pool[choose(6, 6)])
    # The statistics in it are not those of another detector, whose own it takes from the images.
    assert open_reference(tmp_path / "adm.npz", detector).stored == {}


def real_needs(name):
    return [part.real_need for part in parse_metric(name).parts if part.compares]


def complete(images):
    """All outputs of Inception, smaller, by random filters; the probabilities depend on the images' mean too."""
    x = images.flatten(1).double() / 255
    weights = torch.randn(x.shape[1], 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pool, spatial, logits = (x @ weights).split([8, 6, 6], dim=1)
    return {"pool": pool, "spatial": spatial, "probabilities": logits.softmax(1)}


def stand_in(monkeypatch, extract):
    """A detector that goes by the name of FID's."""
    detector = Detector("inception", "a key", extract, ONE.device)
    monkeypatch.setattr("diffit.metrics.suite.make_detector", lambda spec, procs, allow_scripts: detector)
    return detector


def score(parts):
    """The Inception score by loops over the splits: mean, standard deviation."""
    scores = []
    for part in parts:
        kl = [float((row * (row / part.mean(0)).log()).sum()) for row in part]
        scores.append(np.exp(np.mean(kl)))
    return np.mean(scores), np.std(scores)


def tenths(p):
    return [p[i * len(p) // 10 : (i + 1) * len(p) // 10] for i in range(10)]


def test_all_numbers_of_the_adm_suite_and_the_inception_score_are_those_of_the_functions(fake, real, monkeypatch):
    monkeypatch.setattr("diffit.metrics.adm.SPLIT_SIZE", 25)  # 60 images: splits of 25, 25 and 10
    monkeypatch.setattr("diffit.metrics.adm.REAL_FEATURES", 90)
    detector = stand_in(monkeypatch, complete)
    x, y = (detector(ImageArchive(path).load_all()) for path in (fake, real))
    found = numbers(fake, real, ["adm60", "adm60_fp64", "is60", "is40"], "inception")
    chosen = choose(60, 60)
    expected = {
        "fid": frechet_distance(*moments(x["pool"]), *moments(y["pool"])),
        "sfid": frechet_distance(*moments(x["spatial"]), *moments(y["spatial"])),
        "is": score(x["probabilities"][chosen].split(25))[0],
    }
    for name, precision in (("adm60", "float16"), ("adm60_fp64", "float64")):
        some = y["pool"][choose(101, 90)].float()
        pair = precision_recall(x["pool"][chosen].float(), some, 3, precision=precision)
        assert 0 < pair[0] < 1 or 0 < pair[1] < 1
        every = expected | dict(zip(("precision", "recall"), pair, strict=True))
        assert_close({key: found[name][key] for key in every}, every, rtol=1e-8, atol=0)
    for count in (40, 60):
        pair = tuple(found[f"is{count}"].values())
        assert_close(pair, score(tenths(x["probabilities"][chosen[:count]])), rtol=1e-8, atol=1e-12)


def test_the_record_says_by_which_protocol_the_numbers_are(fake, real, monkeypatch):
    stand_in(monkeypatch, complete)
    images = open_images(fake)
    suite = Suite(["adm60", "adm60_fp64", "is60", "pr60_5_full", "fid60_full"], real, images.shape, ONE)
    records = {record["metric"]: record for record in evaluate_images(suite, images, seed=3)}
    assert {name: record.get("protocol") for name, record in records.items()} == {
        "adm60": {"split_size": 5000, "neighbours": 3, "distances": "float16"},
        "adm60_fp64": {"split_size": 5000, "neighbours": 3, "distances": "float64"},
        "is60": {"splits": 10},
        "pr60_5_full": {"neighbours": 5, "distances": "float64"},
        "fid60_full": None,
    }
    assert records["adm60"]["reference"]["images"] == {"moments_pool": 101, "moments_spatial": 101, "rows_pool": 101}
    assert records["fid60_full"]["images"]["seed"] == 3


def test_the_inception_score_of_sorted_images_is_one_number_alone_and_in_company(tmp_path, monkeypatch):
    """Of ten classes, in whose order the files are: every split has all classes in it, and not one."""
    for i in range(200):
        Image.new("RGB", (4, 4), (i // 20, 0, 0)).save(tmp_path / f"{i:03d}.png")
    stand_in(monkeypatch, lambda images: {
        "pool": images.flatten(1).double(), "probabilities": torch.eye(10)[images[:, 0, 0, 0].long()]
    })  # fmt: skip
    alone = numbers(tmp_path, None, ["is200"], "inception")["is200"]
    company = numbers(tmp_path, None, ["is200", "is100"], "inception")["is200"]
    assert alone == company
    assert 5 < alone["is"] < 10


def test_of_repeats_the_best_is_kept_and_every_number_summarised():
    """Distances fall, precision and scores rise; the mean and the spread are by hand."""
    precise = [
        {"precision": 0.5, "recall": 0.3},
        {"precision": 0.75, "recall": 0.1},
        {"precision": 0.25, "recall": 0.2},
    ]
    far = [{"fid": 3.0, "fid_bias": 0.1}, {"fid": 1.0, "fid_bias": 0.1}, {"fid": 2.0, "fid_bias": 0.1}]
    scores = [{"is": 8.0, "is_std": 0.1}, {"is": 9.0, "is_std": 0.3}, {"is": 7.0, "is_std": 0.2}]
    for results in (precise, far, scores):
        summary = summarise_repeats([{"seeds": f"{i}-{i}", "results": r} for i, r in enumerate(results)])
        assert summary["results"] == results[1]
        assert summary["seeds"] == "1-1"
        assert summary["repeats"]["seeds"] == ["0-0", "1-1", "2-2"]
        name, *_ = results[0]
        expected = {"precision": (0.25, 0.5, 0.25), "fid": (1.0, 2.0, 1.0), "is": (7.0, 8.0, 1.0)}[name]
        found = summary["repeats"]["numbers"]
        assert [found[name][key] for key in ("minimum", "mean", "spread")] == pytest.approx(expected)
        assert list(found) == [key for key in results[0] if "_" not in key]
        assert found[name]["values"] == [r[name] for r in results]
    assert summarise_repeats([{"seeds": "0-0", "results": r} for r in precise])["repeats"]["numbers"]["recall"] == {
        "values": [0.3, 0.1, 0.2], "minimum": 0.1, "mean": pytest.approx(0.2), "spread": pytest.approx(0.1),
    }  # fmt: skip


def test_edm_statistics_serve_fid_and_nothing_else(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    pixels = make_detector("pixels", ONE)
    official = pixels.__class__("inception", "key", pixels.extract, pixels.device)
    found = open_reference(tmp_path / "edm.npz", official)
    (need,) = real_needs("fid50k_full")
    assert found.count(need, 2048) is None
    for name, message in (("kid50k_full", "statistics but no images"), ("adm50k", "no spatial statistics")):
        with pytest.raises(UserError, match=message):
            found.get(real_needs(name), ONE)
    with pytest.raises(UserError, match="statistics of Inception features; detector pixels needs the images"):
        open_reference(tmp_path / "edm.npz", pixels)


def test_as_few_images_as_the_message_says_are_enough(tmp_path, monkeypatch):
    """Of 1×1 pixels a covariance is 3×3: two images; the score takes ten splits."""
    paths = {n: write_archive(tmp_path / f"{n}.zip", n, side=1) for n in (1, 2, 10)}
    with pytest.raises(UserError, match="1 images are too few for a 3×3 covariance; use 2 or more"):
        numbers(paths[1], paths[2], ["fd1_full"], "pixels")
    with pytest.raises(UserError, match="1 images are too few"):
        numbers(paths[2], paths[1], ["fd2_full"], "pixels")
    assert math.isfinite(numbers(paths[2], paths[2], ["fd2_full"], "pixels")["fd2_full"]["fd"])
    stand_in(monkeypatch, complete)
    with pytest.raises(UserError, match="9 images are too few for the 10 splits of the Inception score; use 10 or"):
        numbers(paths[10], None, ["is9"], "inception")
    assert math.isfinite(numbers(paths[10], None, ["is10"], "inception")["is10"]["is"])


def test_a_header_that_claims_more_than_the_memory_holds_is_named(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as file:
        for name in ("mu.npy", "sigma.npy"):
            file.writestr(name, header.getvalue())
    with pytest.raises(UserError, match=r"large\.npz: not read as statistics"):
        read_arrays(tmp_path / "large.npz")


def test_only_the_adm_suite_has_two_precisions():
    with pytest.raises(UserError, match="_fp64 is for adm"):
        parse_metric("pr50k3_full_fp64")


def test_the_seed_chooses_the_subset_of_images(fake, real, torchscript):
    images = open_images(fake)
    suite = Suite(["fd20_full"], real, images.shape, ONE, detector=str(torchscript), allow_scripts=True)
    values = [evaluate_images(suite, images, seed=seed)[0]["results"]["fd"] for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    detector = make_detector(str(torchscript), ONE, allow_scripts=True)
    x, y = (detector(ImageArchive(path).load_all())["pool"] for path in (fake, real))
    expected = frechet_distance(*moments(x[choose(60, 20, seed=1)]), *moments(y))
    assert_close(values[2], expected, rtol=1e-8, atol=0)


def test_mistakes_are_one_line_each_and_said_first(fake, real, tmp_path, torchscript, monkeypatch):
    def never(*arguments, **keywords):
        raise AssertionError("work had started")

    monkeypatch.setattr("diffit.metrics.suite.gather", never)
    other = write_archive(tmp_path / "other.zip", 80, side=8)
    objects = tmp_path / "objects.npz"
    np.savez(objects, mu=np.array([{}], dtype=object), sigma=np.eye(3))
    shapes = tmp_path / "shapes.npz"
    np.savez(shapes, mu=np.zeros(3), sigma=np.eye(2))
    theirs = tmp_path / "theirs.npz"
    np.savez(theirs, mu=np.zeros(12), sigma=np.eye(12), detector="pixels", detector_key="0123")
    empty = tmp_path / "empty"
    empty.mkdir()
    for images, ref, names, detector, message in (
        (fake, real, ["fd10_full"], "pixels", "10 images are too few for a 768×768 covariance; use 77 or more"),
        (fake, real, ["fd70_full"], torchscript, "is of 70 images, fake.zip holds 60"),
        (fake, None, ["fd60_full"], torchscript, "compares with real images: name them with --ref"),
        (fake, other, ["fd60_full"], torchscript, "reference other.zip of 8×8×3; they must be of one size"),
        (fake, objects, ["fd60_full"], torchscript, "Python objects, which could run code"),
        (fake, shapes, ["fd60_full"], torchscript, r"mu \(3,\) and sigma \(2, 2\) differ"),
        (fake, theirs, ["fd60_full"], torchscript, "statistics of detector pixels, the metric's is filters-"),
        (fake, tmp_path / "none.npz", ["fd60_full"], torchscript, "no such file"),
        (fake, empty, ["fd60_full"], torchscript, "holds no images"),
        (fake, real, [], torchscript, "no metric is named; known are"),
        (fake, real, ["is60"], torchscript, "has no probabilities output"),
        (fake, real, ["adm60"], torchscript, "has no spatial output"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            numbers_of(images, ref, names, detector)
        assert "\n" not in str(caught.value)


def numbers_of(images, ref, names, detector):
    opened = open_images(images)
    evaluate_images(Suite(names, ref, opened.shape, ONE, detector=str(detector), allow_scripts=True), opened)
