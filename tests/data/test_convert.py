"""Expected pixels are computed with numpy, not with the converter's own functions."""

import errno
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from diffit.data import ImageArchive
from diffit.data.convert import convert
from diffit.data.pixels import eight_bit, gray_values
from diffit.data.transforms import center_crop, center_crop_dhariwal, center_crop_letterbox, center_crop_wide, pad
from diffit.errors import UserError
from diffit.utils.files import whole_file

REAL_DATA = Path(__file__).parents[3] / "shared" / "data" / "cifar10-train-jpeg.zip"


def random_pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(image: Image.Image | np.ndarray, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


@pytest.fixture
def classes(tmp_path) -> Path:
    """Three classes of four 8x6 images."""
    for i in range(12):
        save(random_pixels(i, 6, 8, 3), tmp_path / "raw" / ["cat", "dog", "owl"][i // 4] / f"{i}.png")
    return tmp_path / "raw"


def only(folder: Path, tmp_path: Path, **options) -> np.ndarray:
    """The single image of ``folder`` after conversion, (H, W, C)."""
    convert(folder, tmp_path / "out.zip", overwrite=True, **options)
    return ImageArchive(tmp_path / "out.zip")[0].permute(1, 2, 0).numpy()


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_class_folders_become_an_archive_in_the_documented_layout(classes, tmp_path, dest):
    report = convert(classes, tmp_path / dest)
    archive = ImageArchive(tmp_path / dest, cond=True)
    assert archive.file_names == [f"00000/img{i:08d}.png" for i in range(12)]
    assert archive.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert archive.class_names == ["cat", "dog", "owl"]
    np.testing.assert_array_equal(archive.load_all(), [random_pixels(i, 6, 8, 3).transpose(2, 0, 1) for i in range(12)])
    assert (report.written, report.image_shape, report.labelled, report.num_classes) == (12, (3, 6, 8), True, 3)
    assert leftovers(tmp_path) == sorted([dest, "raw"])


def test_the_zip_is_uncompressed_and_the_same_bytes_every_time(classes, tmp_path):
    for name, workers in (("a.zip", 1), ("b.zip", 3)):
        convert(classes, tmp_path / name, workers=workers)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(archive.read("dataset.json"))["labels"][4] == ["00000/img00000004.png", 1]
    convert(classes, tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for name in archive.namelist():
            assert (tmp_path / "folder" / name).read_bytes() == archive.read(name)


def test_converting_an_archive_again_changes_nothing(classes, tmp_path):
    convert(classes, tmp_path / "a.zip")
    convert(tmp_path / "a.zip", tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_images_are_dealt_to_folders_of_a_thousand(tmp_path):
    images = np.zeros((1001, 1, 1), np.uint8)
    idx = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes() + images.tobytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx)
    convert(tmp_path / "train-images-idx3-ubyte", tmp_path / "a.zip")
    archive = ImageArchive(tmp_path / "a.zip")
    assert archive.file_names[-2:] == ["00000/img00000999.png", "00001/img00001000.png"]
    assert archive.image_shape == (1, 1, 1)


def test_max_images_is_a_seeded_subset_with_its_own_labels(classes, tmp_path):
    chosen = {}
    for seed in (0, 1):
        convert(classes, tmp_path / f"{seed}.zip", max_images=5, seed=seed)
        archive = ImageArchive(tmp_path / f"{seed}.zip", cond=True)
        originals = [random_pixels(i, 6, 8, 3).transpose(2, 0, 1).tobytes() for i in range(12)]
        chosen[seed] = [originals.index(image.numpy().tobytes()) for image in archive.load_all()]
        assert archive.labels.tolist() == [i // 4 for i in chosen[seed]]
        assert archive.num_classes == 3
    assert all(indices == sorted(set(indices)) for indices in chosen.values())
    assert chosen[0] != chosen[1]
    assert list(range(5)) not in chosen.values()


# ---- pixels ----


@given(hnp.arrays(np.uint16, (3, 4)))
def test_sixteen_bits_are_scaled_and_not_clipped(values):
    for form in ("PNG", "TIFF", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, form)
        image = Image.open(buffer)
        result = np.asarray(eight_bit(image, "L", values=gray_values(image))[0])
        np.testing.assert_array_equal(result, np.rint(values / 65535 * 255))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])  # Pillow turns a TIFF by itself when its pixels are loaded
@given(orientation=st.integers(1, 8), upright=hnp.arrays(np.uint8, (2, 3, 3)))
def test_exif_orientation_is_applied(form, orientation, upright):
    # What a camera stores for each orientation: the transformation of the EXIF standard, undone.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).save(buffer, form, exif=exif)
    np.testing.assert_array_equal(np.asarray(eight_bit(Image.open(buffer), "RGB")[0]), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_lose_the_image(tmp_path):
    save(np.full((8, 8, 3), 90, np.uint8), tmp_path / "in" / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert abs(int(only(tmp_path / "in", tmp_path)[0, 0, 0]) - 90) <= 2


def test_cmyk_becomes_rgb(tmp_path):
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[..., 1] = 255  # all magenta
    save(Image.fromarray(ink, "CMYK"), tmp_path / "in" / "a.jpg", quality=100)
    np.testing.assert_allclose(only(tmp_path / "in", tmp_path)[4, 4], [255, 0, 255], atol=4)


def test_palettes_become_their_colours_and_transparent_entries_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 0, 1, 2, 3])
    save(image, tmp_path / "plain" / "a.png")
    save(image, tmp_path / "clear" / "a.png", transparency=bytes([255, 255, 0]))
    save(image, tmp_path / "gif" / "a.gif", transparency=2)
    assert only(tmp_path / "plain", tmp_path).tolist() == [[[10, 20, 30], [200, 100, 0], [1, 2, 3]]]
    for name in ("clear", "gif"):
        assert only(tmp_path / name, tmp_path).tolist() == [[[10, 20, 30], [200, 100, 0], [255, 255, 255]]]


@given(hnp.arrays(np.uint8, (4, 3, 4)))
def test_transparency_is_laid_on_white(rgba):
    result = np.asarray(eight_bit(Image.fromarray(rgba), "RGB")[0]).astype(float)
    alpha = rgba[..., 3:] / 255
    np.testing.assert_allclose(result, rgba[..., :3] * alpha + 255 * (1 - alpha), atol=1)


def test_gray_with_alpha_and_one_bit_images_are_gray(tmp_path):
    save(Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA"), tmp_path / "a" / "a.png")
    save(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), tmp_path / "b" / "a.png")
    assert only(tmp_path / "a", tmp_path).tolist() == [[[100], [255]]]
    assert only(tmp_path / "b", tmp_path).tolist() == [[[0], [255]]]


def test_channels_follow_the_images_unless_told(tmp_path):
    save(np.full((4, 4), 7, np.uint8), tmp_path / "in" / "a.png")
    assert only(tmp_path / "in", tmp_path).shape == (4, 4, 1)
    assert only(tmp_path / "in", tmp_path, channels="rgb").shape == (4, 4, 3)
    save(np.full((4, 4, 3), (255, 0, 0), np.uint8), tmp_path / "in" / "b.png")
    assert only(tmp_path / "in", tmp_path).tolist() == np.full((4, 4, 3), 7).tolist()
    convert(tmp_path / "in", tmp_path / "gray.zip", channels="gray")
    assert ImageArchive(tmp_path / "gray.zip")[1].unique().tolist() == [76]  # 0.299 of 255


def test_float_images_are_refused_because_their_white_is_unknown(tmp_path):
    save(np.ones((4, 4), np.float32), tmp_path / "in" / "a.tif")
    with pytest.raises(UserError, match=r"a.tif.*32-bit"):
        convert(tmp_path / "in", tmp_path / "out.zip")


def test_metadata_of_the_source_is_left_behind(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "a private remark"
    profile = b"a private profile"
    save(np.zeros((8, 8, 3), np.uint8), tmp_path / "in" / "a.png", exif=exif, icc_profile=profile)
    convert(tmp_path / "in", tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive, Image.open(archive.open("00000/img00000000.png")) as image:
        image.load()
        assert image.info == {}


# ---- sizes ----


def test_center_crop_takes_the_middle():
    pixels = random_pixels(0, 10, 20, 3)
    result = np.asarray(center_crop(Image.fromarray(pixels), (10, 10)))
    np.testing.assert_array_equal(result, pixels[:, 5:15])
    result = np.asarray(center_crop(Image.fromarray(pixels), (20, 5)))
    np.testing.assert_array_equal(result, pixels[2:7])


@given(*(st.integers(1, 40) for _ in range(4)))
def test_every_transform_gives_exactly_the_size_asked_for(width, height, to_width, to_height):
    image = Image.new("RGB", (width, height), "red")
    assert center_crop(image, (to_width, to_height)).size == (to_width, to_height)
    assert center_crop_dhariwal(image, (to_width, to_width)).size == (to_width, to_width)
    wide, high = max(to_width, to_height), min(to_width, to_height)
    result = np.asarray(center_crop_letterbox(image, (wide, high)))
    assert result.shape == (wide, wide, 3)
    assert (result[..., 0] == 255).any(axis=1).sum() == high


def test_center_crop_letterbox_puts_black_bars_above_and_below():
    pixels = random_pixels(0, 6, 8, 3) | 1
    result = np.asarray(center_crop_letterbox(Image.fromarray(pixels), (8, 4)))
    np.testing.assert_array_equal(result[2:6], pixels[1:5])
    assert not result[:2].any()
    assert not result[6:].any()


def test_center_crop_dhariwal_halves_by_means_and_crops_the_middle():
    pixels = random_pixels(0, 32, 64, 3) & 0xF0  # so that the means are whole numbers
    halved = pixels
    for _ in range(2):
        h, w, _ = halved.shape
        halved = halved.reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3))
    result = np.asarray(center_crop_dhariwal(Image.fromarray(pixels), (8, 8)))
    np.testing.assert_array_equal(result, halved[:, 4:12])


def test_center_crop_dhariwal_ends_with_bicubic_to_the_short_side():
    image = Image.fromarray(random_pixels(0, 20, 28, 3))
    expected = np.asarray(image.resize((22, 16), Image.Resampling.BICUBIC))[:, 3:19]  # 28 * 16 / 20 = 22.4
    np.testing.assert_array_equal(np.asarray(center_crop_dhariwal(image, (16, 16))), expected)


def test_center_crop_wide_keeps_the_columns_and_is_the_peers(tmp_path):
    """All 12 columns and the middle 8 / 12 of the rows, stretched to 8 x 4; the whole image where it is 8 wide."""
    pixels = random_pixels(0, 9, 12, 3) | 1
    expected = np.asarray(Image.fromarray(pixels[1:7]).resize((8, 4), Image.Resampling.LANCZOS))  # 9 * 8 / 12 = 6 rows
    result = np.asarray(center_crop_wide(Image.fromarray(pixels), (8, 4)))
    assert result.shape == (8, 8, 3)
    np.testing.assert_array_equal(result[2:6], expected)
    assert not result[:2].any()
    assert not result[6:].any()
    same = random_pixels(1, 4, 8, 3)
    np.testing.assert_array_equal(np.asarray(center_crop_wide(Image.fromarray(same), (8, 4)))[2:6], same)
    save(random_pixels(0, 9, 7, 3), tmp_path / "in" / "narrow.png")
    save(random_pixels(0, 9, 12, 3), tmp_path / "in" / "wide.png")
    options = {"resolution": (8, 4), "transform": "center-crop-wide"}
    with pytest.raises(UserError, match=r"'narrow.png' .*7x9, too small .*center-crop-letterbox enlarges"):
        convert(tmp_path / "in", tmp_path / "out.zip", **options)
    report = convert(tmp_path / "in", tmp_path / "out.zip", on_error="skip", **options)
    assert (report.written, report.image_shape) == (1, (3, 8, 8))


def test_pad_puts_digits_into_the_middle_of_black(tmp_path):
    digit = random_pixels(0, 28, 28) | 1
    save(digit, tmp_path / "in" / "a.png")
    padded = only(tmp_path / "in", tmp_path, resolution=(32, 32), transform="pad")[..., 0]
    np.testing.assert_array_equal(padded, np.pad(digit, 2))
    assert pad(Image.new("L", (3, 4)), (8, 6)).size == (8, 6)
    with pytest.raises(UserError, match=r"'a.png' .*28x28, too large to pad to 28x20; use a larger --resolution"):
        convert(tmp_path / "in", tmp_path / "no.zip", resolution=(28, 20), transform="pad")


def test_resolution_makes_mixed_sizes_equal_and_without_it_they_are_named(tmp_path):
    save(np.full((6, 8, 3), 50, np.uint8), tmp_path / "in" / "a.png")
    save(np.full((9, 9, 3), 60, np.uint8), tmp_path / "in" / "b.png")
    for on_error in ("stop", "skip"):
        with pytest.raises(UserError, match=r"'b.png' is 9x9 but 'a.png' is 8x6: pass --resolution"):
            convert(tmp_path / "in", tmp_path / "out.zip", on_error=on_error)
    assert leftovers(tmp_path) == ["in"]
    convert(tmp_path / "in", tmp_path / "out.zip", resolution=(5, 4))
    archive = ImageArchive(tmp_path / "out.zip")
    assert archive.image_shape == (3, 4, 5)
    assert [image.unique().tolist() for image in archive] == [[50], [60]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "center-crop"}, "needs a resolution"),
        ({"transform": "crop", "resolution": (4, 4)}, "'crop' is not known"),
        ({"resolution": (0, 4)}, "0x4 is not possible"),
        ({"transform": "center-crop-dhariwal", "resolution": (8, 4)}, "makes squares, not 8x4"),
        ({"transform": "center-crop-wide", "resolution": (4, 8)}, "makes wide images, not 4x8"),
        ({"max_images": 0}, "max_images is 0"),
        ({"on_error": "ignore"}, "'ignore' is not known"),
        ({"channels": "rgba"}, "'rgba' is not known"),
        ({"class_order": "random"}, "'random' is not known"),
        ({"frames": "last"}, "'last' is not known"),
        ({"transform": "center-crop-letterbox", "resolution": (4, 8)}, "makes wide images, not 4x8"),
    ],
)
def test_impossible_options_are_refused_before_any_work(classes, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        convert(classes, tmp_path / "out.zip", **options)
    assert leftovers(tmp_path) == ["raw"]


def test_an_option_that_convert_does_not_know_is_refused(classes, tmp_path):
    with pytest.raises(TypeError, match="resolutoin"):
        convert(classes, tmp_path / "out.zip", resolutoin=(4, 4))
    assert leftovers(tmp_path) == ["raw"]


# ---- labels ----


def labelled(folder: Path, labels: list[int], **meta) -> Path:
    names = [f"{i}.png" for i in range(len(labels))]
    for i, name in enumerate(names):
        save(random_pixels(i, 4, 4, 3), folder / name)
    (folder / "dataset.json").write_text(json.dumps({"labels": list(zip(names, labels, strict=True))} | meta))
    return folder


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ([1, 2, 3, 1], [0, 1, 2, 0], ["1", "2", "3"]),
        ([0, 5, 5, 9], [0, 1, 1, 2], ["0", "5", "9"]),
        ([7, 2_000_000_000, 2**31 - 1, 7], [0, 1, 2, 0], ["7", "2000000000", "2147483647"]),
        ([3, 10**30], [0, 1], ["3", str(10**30)]),
    ],
)
def test_labels_with_gaps_are_numbered_densely_and_keep_their_originals_as_names(tmp_path, labels, numbers, names):
    report = convert(labelled(tmp_path / "in", labels), tmp_path / "out.zip", cond=True)
    archive = ImageArchive(tmp_path / "out.zip", cond=True)
    assert (archive.labels.tolist(), archive.num_classes, archive.class_names) == (numbers, len(names), names)
    assert len(report.notes) == 1
    assert f"are numbered 0 to {len(names) - 1} in this order, and class_names keeps the originals" in report.notes[0]


def test_dense_labels_stay_as_they_are_without_a_word(tmp_path):
    report = convert(labelled(tmp_path / "in", [2, 0, 1]), tmp_path / "out.zip")
    archive = ImageArchive(tmp_path / "out.zip", cond=True)
    assert (archive.labels.tolist(), archive.class_names, report.notes) == ([2, 0, 1], None, [])


def test_named_classes_without_images_are_left_out_and_named(tmp_path):
    source = labelled(tmp_path / "in", [0, 2, 2], class_names=["cat", "dog", "owl", "yak"])
    report = convert(source, tmp_path / "out.zip")
    archive = ImageArchive(tmp_path / "out.zip", cond=True)
    assert (archive.labels.tolist(), archive.class_names) == ([0, 1, 1], ["cat", "owl"])
    assert "2 classes without images are left out (dog, yak)" in report.notes


def test_a_subset_keeps_the_numbers_of_its_source_and_says_which_classes_it_lost(classes, tmp_path):
    report = convert(classes, tmp_path / "out.zip", max_images=1)
    archive = ImageArchive(tmp_path / "out.zip", cond=True)
    assert archive.class_names == ["cat", "dog", "owl"]
    assert archive.num_classes == 3
    assert any(note.startswith("2 of 3 classes keep no image (") for note in report.notes)


def test_class_folders_are_in_natural_or_plain_order_and_the_difference_is_said(tmp_path):
    for i, name in enumerate(["0", "1", "2", "10"]):
        save(np.full((4, 4), i, np.uint8), tmp_path / "in" / name / "a.png")
    report = convert(tmp_path / "in", tmp_path / "natural.zip")
    assert ImageArchive(tmp_path / "natural.zip").class_names == ["0", "1", "2", "10"]
    assert [note for note in report.notes if "(0, 1, 10, 2), as --class-order plain does" in note]
    report = convert(tmp_path / "in", tmp_path / "plain.zip", class_order="plain")
    archive = ImageArchive(tmp_path / "plain.zip", cond=True)
    assert archive.class_names == ["0", "1", "10", "2"]
    by_gray = {int(image[0, 0, 0]): label for image, label in zip(archive, archive.labels.tolist(), strict=True)}
    assert by_gray == {0: 0, 1: 1, 3: 2, 2: 3}
    assert report.notes == []


def test_numeric_identity_folders_are_classes_and_parts_of_a_collection_become_so_when_asked(tmp_path):
    for name in ("0000045", "0000099", "0000100"):
        save(random_pixels(0, 4, 4, 3), tmp_path / "ids" / name / "a.png")
    convert(tmp_path / "ids", tmp_path / "ids.zip")
    assert ImageArchive(tmp_path / "ids.zip", cond=True).class_names == ["0000045", "0000099", "0000100"]
    for name in ("00000", "00001"):
        save(random_pixels(0, 4, 4, 3), tmp_path / "parts" / name / "a.png")
    report = convert(tmp_path / "parts", tmp_path / "parts.zip")
    assert not report.labelled
    assert report.notes == ["folders 00000, 00001 are parts of one collection; --cond makes them classes"]
    with pytest.raises(UserError, match=r"has no labels: drop --cond, or make them .*--cond`"):
        ImageArchive(tmp_path / "parts.zip", cond=True)
    convert(tmp_path / "parts", tmp_path / "parts.zip", cond=True, overwrite=True)
    assert ImageArchive(tmp_path / "parts.zip", cond=True).class_names == ["00000", "00001"]


# ---- trouble ----


def test_broken_images_stop_the_run_or_are_skipped_and_named(classes, tmp_path, monkeypatch):
    whole = (classes / "dog" / "5.png").read_bytes()
    (classes / "dog" / "5.png").write_bytes(whole[:60])
    (classes / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cat/0.png.*--on-error skip"):
        convert(classes, tmp_path / "out.zip")
    assert leftovers(tmp_path) == ["raw"]
    report = convert(classes, tmp_path / "out.zip", on_error="skip")
    assert [name for name, _ in report.skipped] == ["cat/0.png", "dog/5.png"]
    archive = ImageArchive(tmp_path / "out.zip", cond=True)
    assert archive.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 4
    assert archive.file_names[-1] == "00000/img00000009.png"  # no gaps
    np.testing.assert_array_equal(archive[0], random_pixels(1, 6, 8, 3).transpose(2, 0, 1))


def test_a_source_of_nothing_but_broken_images_leaves_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="none of 1 images can be read"):
        convert(tmp_path / "in", tmp_path / "out.zip", on_error="skip")
    assert leftovers(tmp_path) == ["in"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_count_as_broken(classes, tmp_path, monkeypatch):
    save(np.zeros((10, 10, 3), np.uint8), classes / "owl" / "bomb.png")
    monkeypatch.setenv("DIFFIT_MAX_MEGAPIXELS", "0.00006")
    report = convert(classes, tmp_path / "out.zip", on_error="skip")
    assert [name for name, _ in report.skipped] == ["owl/bomb.png"]
    assert "decompression bomb" in report.skipped[0][1]


def test_unsafe_zip_members_are_refused(tmp_path):
    save(np.zeros((4, 4, 3), np.uint8), tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "../../a.png")
    with pytest.raises(UserError, match="unsafe path"):
        convert(tmp_path / "in.zip", tmp_path / "out.zip")


def test_labels_missing_for_some_images_are_dropped_or_with_cond_an_error(classes, tmp_path):
    save(random_pixels(0, 6, 8, 3), classes / "stray.png")
    with pytest.raises(UserError, match=r"1 of 13 images have no label \(stray.png\)"):
        convert(classes, tmp_path / "out.zip", cond=True)
    report = convert(classes, tmp_path / "out.zip")
    assert not report.labelled
    assert not ImageArchive(tmp_path / "out.zip").has_labels
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
    with pytest.raises(UserError, match="has no labels"):
        convert(tmp_path / "out.zip", tmp_path / "b.zip", cond=True)


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_an_interrupted_run_leaves_nothing_and_keeps_the_old_archive(classes, tmp_path, dest):
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(classes, tmp_path / dest, progress=interrupt)
    assert leftovers(tmp_path) == ["raw"]
    convert(classes, tmp_path / dest)
    with pytest.raises(KeyboardInterrupt):
        convert(classes, tmp_path / dest, resolution=(4, 4), overwrite=True, progress=interrupt)
    assert leftovers(tmp_path) == sorted(["raw", dest])
    assert ImageArchive(tmp_path / dest).image_shape == (3, 6, 8)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(classes, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(UserError, match=r"out.zip: the disk is full"):
        convert(classes, tmp_path / "out.zip")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"out: the disk is full"):
        convert(classes, tmp_path / "out")
    assert leftovers(tmp_path) == ["raw"]


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_an_existing_archive_is_replaced_only_with_overwrite(classes, tmp_path, dest):
    convert(classes, tmp_path / dest, max_images=2)
    with pytest.raises(UserError, match=r"exists: .*--overwrite"):
        convert(classes, tmp_path / dest)
    convert(classes, tmp_path / dest, overwrite=True)
    assert len(ImageArchive(tmp_path / dest)) == 12
    assert leftovers(tmp_path) == sorted(["raw", dest])


def test_what_is_not_an_archive_is_never_overwritten(classes, tmp_path):
    (tmp_path / "home" / "thesis").mkdir(parents=True)
    (tmp_path / "home" / "dataset.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.zip").mkdir()
    for dest in ("home", "file", "folder.zip"):
        with pytest.raises(UserError, match="never replaced"):
            convert(classes, tmp_path / dest, overwrite=True)
    with pytest.raises(UserError, match=r"out.zip(: not writable|.* folder is needed)"):
        convert(classes, tmp_path / "file" / "out.zip")
    for dest in (classes, classes / "out.zip", tmp_path):
        with pytest.raises(UserError, match="lie in one another"):
            convert(classes, dest, overwrite=True)
    (tmp_path / "empty").mkdir()
    convert(classes, tmp_path / "empty")
    convert(classes, tmp_path / "new" / "deep" / "a.zip")


@pytest.mark.skipif(not REAL_DATA.exists(), reason="shared/data/cifar10-train-jpeg.zip is not here")
def test_cifar_as_jpeg_files_keeps_its_ten_classes(tmp_path):
    report = convert(REAL_DATA, tmp_path / "cifar10.zip", max_images=300, cond=True)
    archive = ImageArchive(tmp_path / "cifar10.zip", cond=True)
    assert (report.found, len(archive), archive.image_shape, archive.num_classes) == (50_000, 300, (3, 32, 32), 10)
    assert archive.class_names is not None
    assert archive.class_names[0] == "airplane"
    images = archive.load_all()
    with zipfile.ZipFile(REAL_DATA) as raw:  # a label and its image belong together
        ship = sorted(n for n in raw.namelist() if n.startswith("ship"))
        pixels = {np.asarray(Image.open(io.BytesIO(raw.read(n)))).tobytes() for n in ship}
    is_ship = [image.permute(1, 2, 0).numpy().tobytes() in pixels for image in images]
    assert is_ship == (archive.labels == archive.class_names.index("ship")).tolist()


def png16(values: np.ndarray, color_type: int) -> bytes:
    """A PNG of 16 bits a channel, (H, W, C), put together by hand: Pillow writes none with transparency."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_transparency_of_sixteen_bits_is_what_it_is_whatever_the_range_of_the_colours(tmp_path):
    (tmp_path / "in").mkdir()
    values = np.full((4, 4, 4), 1023, np.uint16)  # of 10 bits
    values[..., 3] = 32768
    (tmp_path / "in" / "a.png").write_bytes(png16(values, 6))
    assert np.unique(only(tmp_path / "in", tmp_path, background="black")).tolist() == [128]


def test_gray_of_sixteen_bits_with_transparency_is_converted(tmp_path):
    (tmp_path / "in").mkdir()
    values = np.stack([np.full((4, 4), 40 * 257), np.full((4, 4), 65535)], axis=-1)
    (tmp_path / "in" / "a.png").write_bytes(png16(values, 4))
    assert np.unique(only(tmp_path / "in", tmp_path)).tolist() == [40]


def test_what_hidden_folders_hold_is_nobodys_business(classes, tmp_path):
    (classes / ".git").mkdir()
    (classes / ".git" / "hooks").symlink_to(tmp_path)
    assert convert(classes, tmp_path / "out.zip").written == 12


def test_what_a_killed_conversion_left_is_removed_by_the_next(classes, tmp_path):
    with whole_file(tmp_path / "out.zip") as part:
        pass
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    left = tmp_path / part.name.replace(f".{os.getpid()}-", f".{process.pid}-")
    left.write_bytes(b"half")
    (tmp_path / "out.zip").unlink()
    convert(classes, tmp_path / "out.zip")
    assert leftovers(tmp_path) == ["out.zip", "raw"]
