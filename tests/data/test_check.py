import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from diffit.data.check import check
from diffit.errors import UserError
from diffit.utils.images import make_grid, save_grid
from helpers import write_archive


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 5, 7, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, images):
    names = [f"img{i}.png" for i in range(10)]
    for name, pixels in zip(names, images, strict=True):
        Image.fromarray(pixels).save(tmp_path / name)
    meta = {"labels": [[name, i % 3] for i, name in enumerate(names)], "class_names": ["a", "b", "c"]}
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    return tmp_path


def test_figures_agree_with_numpy(folder, images):
    report = check(folder, cond=True)
    assert report.problems == []
    assert (report.count, report.shapes, report.duplicates) == (10, {(3, 5, 7): 10}, 0)
    assert (report.labelled, report.class_counts, report.class_names) == (10, {0: 4, 1: 3, 2: 3}, ["a", "b", "c"])
    np.testing.assert_allclose(report.mean, images.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(report.std, images.std((0, 1, 2)), rtol=1e-12)
    assert report.num_bytes == sum(os.path.getsize(folder / name) for name in os.listdir(folder))


def test_the_samples_are_a_seeded_choice_of_the_images(folder, images):
    one, same, other = (check(folder, samples=4, seed=seed).samples for seed in (0, 0, 1))
    torch.testing.assert_close(one, same)
    assert not torch.equal(one, other)
    known = [pixels.transpose(2, 0, 1).tobytes() for pixels in images]
    assert len({known.index(sample.numpy().tobytes()) for sample in one}) == 4


def test_damage_is_listed_and_the_rest_is_still_counted(folder, images):
    (folder / "img3.png").write_bytes((folder / "img3.png").read_bytes()[:50])
    (folder / "img4.png").write_bytes(b"")
    Image.fromarray(images[5]).convert("CMYK").save(folder / "img5.jpg")
    (folder / "img5.png").unlink()
    report = check(folder)
    assert [name for name, _ in report.damaged] == ["img3.png", "img4.png", "img5.jpg"]
    assert report.shapes == {(3, 5, 7): 7}
    problems = " | ".join(report.problems)
    for part in ("3 images cannot be used", "no label (img5.jpg)", "1 files that are not there (img5.png)"):
        assert part in problems
    np.testing.assert_allclose(report.mean, np.delete(images, [3, 4, 5], 0).mean((0, 1, 2)))


def test_duplicates_mixed_sizes_and_wrong_class_names_are_found(folder, images):
    Image.fromarray(images[0]).save(folder / "img1.png", compress_level=0)  # the same pixels in other bytes
    Image.fromarray(images[0][:4]).save(folder / "img2.png")
    (folder / "dataset.json").write_text(
        json.dumps({"labels": {f"img{i}.png": i for i in range(10)}, "class_names": ["a"]})
    )
    report = check(folder)
    assert report.duplicates == 1
    problems = " | ".join(report.problems)
    assert "images differ (9 of 7x5 RGB, 1 of 7x4 RGB)" in problems
    assert "names 1 classes, but labels go up to 9" in problems


def test_channel_figures_are_those_of_the_commonest_kind_of_image(folder, images):
    Image.fromarray(images[0, ..., 0]).save(folder / "img0.png")
    report = check(folder)
    np.testing.assert_allclose(report.mean, images[1:].mean((0, 1, 2)))
    assert report.samples.shape == (9, 3, 5, 7)


def test_a_tiny_deviation_is_warned_of(tmp_path):
    """Scans of 12 bits that someone divided by 257: 16 levels are left."""
    scans = np.random.default_rng(0).integers(0, 16, (4, 8, 8), dtype=np.uint8)
    for i, scan in enumerate(scans):
        Image.fromarray(scan).save(tmp_path / f"{i}.png")
    report = check(tmp_path)
    warning, few = report.warnings
    assert few.startswith("4 images are few")
    assert f"standard deviation of {scans.std() / 127.5:.2g} on the scale -1 to 1" in warning
    assert "--range auto" in warning
    assert report.problems == []


def test_usual_images_are_not_warned_of_but_for_their_number(folder, tmp_path):
    assert [warning[:17] for warning in check(folder, cond=True).warnings] == ["10 images are few"]
    assert check(write_archive(tmp_path / "hundred.zip", 100), cond=True).warnings == []


def test_classes_without_images_and_identity_numbers_are_warned_of(folder):
    names = [f"img{i}.png" for i in range(10)]
    (folder / "dataset.json").write_text(
        json.dumps({"labels": [[name, 1 + 2 * (i % 2)] for i, name in enumerate(names)]})
    )
    report = check(folder, cond=True)
    assert (report.num_classes, report.problems) == (4, [])
    assert "2 of 4 classes have no images (0, 2)" in report.warnings[0]
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, 2**31 - 1] for name in names]}))
    assert "labels go up to 2147483647" in check(folder, cond=True).problems[0]
    report = check(folder)
    assert report.problems == []
    assert "labels go up to 2147483647" in report.warnings[0]


def test_missing_labels_are_a_problem_only_when_wanted(folder):
    (folder / "dataset.json").unlink()
    assert check(folder).problems == []
    assert "10 of 10 images have no label" in check(folder, cond=True).problems[0]
    (folder / "dataset.json").write_text("{")
    assert "not valid JSON" in check(folder).problems[0]


def test_no_archive_at_all_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        check(tmp_path)


def test_a_grid_goes_row_by_row_with_gaps_and_fills_up_with_white():
    images = torch.arange(5, dtype=torch.uint8).add(1).view(5, 1, 1, 1).expand(5, 3, 64, 64)
    picture = np.asarray(make_grid(images, (3, 2)))
    assert picture.shape == (130, 196, 3)
    assert picture[::66, ::66, 1].tolist() == [[1, 2, 3], [4, 5, 255]]
    assert (picture[64:66] == 255).all()
    assert (picture[:, 64:66] == 255).all()
    assert make_grid(images).size == (3 * 66 - 2, 2 * 66 - 2)
    assert make_grid(images[:4]).size == (130, 130)
    with pytest.raises(ValueError, match="do not fit"):
        make_grid(images, (2, 2))
    with pytest.raises(ValueError, match="expected uint8"):
        make_grid(images.float())


def test_names_stand_before_the_rows_and_leave_the_images_alone():
    images = torch.full((4, 3, 64, 64), 200, dtype=torch.uint8)
    bare, named = (np.asarray(make_grid(images, (2, 2), names)) for names in ((), ("cat", "d" * 100)))
    margin = named.shape[1] - bare.shape[1]
    np.testing.assert_array_equal(named[:, margin:], bare)
    assert margin < 300
    assert named[:64, :margin].min() < 100  # written, and cut where it is too long
    assert named[:64, : margin // 2].min() > 200  # to the right


def test_tiny_images_are_enlarged_without_blending(tmp_path):
    digits = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_grid(digits, tmp_path / "new" / "grid.png", grid=(3, 2))
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert (picture.size, picture.mode) == ((196, 130), "L")
        np.testing.assert_array_equal(np.asarray(picture)[4:64:8, 70:130:8], digits[1, 0])
    assert os.listdir(tmp_path / "new") == ["grid.png"]
