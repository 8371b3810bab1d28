"""What people bring: deep scans, colour profiles, transparency, animations. Expected pixels come from formulas."""

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffit.data import ImageArchive, check, convert
from diffit.data.pixels import color, eight_bit, scale
from diffit.errors import UserError

SRGB = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))  # chromaticities of red, green, blue; white is D65
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060))
D65, D50 = np.array([0.3127, 0.3290]), np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def save(folder: Path, **images: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def converted(folder: Path, **options) -> tuple[np.ndarray, list[str]]:
    """(images (N, C, H, W), notes)."""
    dest = folder.parent / "out.zip"
    report = convert(folder, dest, overwrite=True, **options)
    return ImageArchive(dest).load_all().numpy(), report.notes


def png_of_sixteen_bits(values: np.ndarray) -> bytes:
    """Pillow cannot write colour with 16 bits, so the PNG is put together here; (H, W, 3 or 4)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of_sixteen_bits(values: np.ndarray, order: str, packed: bool) -> bytes:
    """One strip, with the byte order ``<`` or ``>``; (H, W, 3)."""
    height, width, channels = values.shape
    data = values.astype(order + "u2").tobytes()
    data = zlib.compress(data) if packed else data
    bits_at = 8 + 2 + 12 * 10 + 4
    tags = [(256, width), (257, height), (258, None), (259, 8 if packed else 1), (262, 2)]
    tags += [(273, bits_at + 2 * channels), (277, channels), (278, height), (279, len(data)), (284, 1)]
    out = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    for tag, value in tags:
        kind, count = (3, channels) if value is None else (4, 1)
        out += struct.pack(order + "HHII", tag, kind, count, bits_at if value is None else value)
    return out + struct.pack(f"{order}I{channels}H", 0, *[16] * channels) + data


# ---- more than 8 bits ----


@pytest.mark.parametrize(
    ("bits", "peak"), [(8, 200), (10, 600), (12, 4000), (12, 4095), (14, 4096), (16, 16384), (16, 65535)]
)
def test_the_range_of_a_set_is_the_fewest_bits_that_hold_its_values(tmp_path, bits, peak):
    rng = np.random.default_rng(bits)
    scans = {name: rng.integers(0, peak, (6, 5), dtype=np.uint16) for name in "abc"}
    scans["b"][2, 3] = peak  # one bright pixel in one image decides for all
    images, notes = converted(save(tmp_path / "in", **scans))
    expected = [np.rint(scans[name].astype(float) * 255 / (2**bits - 1)) for name in "abc"]
    np.testing.assert_array_equal(images[:, 0], expected)
    assert notes == [
        f"3 images have 16 bits, and values up to {peak}: 0 to {2**bits - 1} became 0 to 255 (--range full|LOW,HIGH)"
    ]


def test_a_range_that_is_given_is_used_and_clips(tmp_path):
    folder = save(tmp_path / "in", a=np.array([[0, 100, 300, 500, 60000]], np.uint16))
    for asked in ("100,500", (100, 500)):
        assert converted(folder, value_range=asked)[0].ravel().tolist() == [0, 0, 128, 255, 255]
    assert converted(folder, value_range="full")[0].ravel().tolist() == [0, 0, 1, 2, 233]
    assert converted(folder, value_range="full")[1] == []
    for wrong in ("5", "9,2", "a,b", "3,3", "half"):
        with pytest.raises(UserError, match="use auto, full, or LOW,HIGH"):
            convert(folder, tmp_path / "no.zip", value_range=wrong)


def test_images_of_eight_bits_next_to_scans_stay_as_they_are(tmp_path):
    plain = np.arange(30, dtype=np.uint8).reshape(5, 6)
    folder = save(tmp_path / "in", a=plain, b=(plain.astype(np.uint16) << 4), c=plain)
    images, notes = converted(folder)
    np.testing.assert_array_equal(images[[0, 2], 0], [plain, plain])
    np.testing.assert_array_equal(images[1, 0], np.rint(plain.astype(float) * 16 * 255 / 1023))
    assert notes[0].startswith("1 images have 16 bits, and values up to 464")


@pytest.mark.parametrize("form", ["png", "<", "<packed", ">", ">packed"])
def test_colour_of_sixteen_bits_keeps_its_lower_bytes(tmp_path, form):
    values = np.random.default_rng(0).integers(0, 4096, (5, 7, 3), dtype=np.uint16)
    values[0, 0, 0] = 4095
    data = png_of_sixteen_bits(values) if form == "png" else tiff_of_sixteen_bits(values, form[0], "packed" in form)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ("a.png" if form == "png" else "a.tif")).write_bytes(data)
    with pytest.raises(UserError, match="has 16 bits a channel"):
        ImageArchive(tmp_path / "in")
    images, notes = converted(tmp_path / "in")
    np.testing.assert_array_equal(images[0].transpose(1, 2, 0), np.rint(values * (255 / 4095)))
    assert "0 to 4095 became" in notes[0]


def test_transparency_of_sixteen_bits_is_scaled_too(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (4, 4, 4), dtype=np.uint16)
    values[0, 0] = 65535
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png_of_sixteen_bits(values))
    images, _ = converted(tmp_path / "in", background="black")
    expected = values[..., :3] / 65535 * (values[..., 3:] / 65535) * 255
    np.testing.assert_allclose(images[0].transpose(1, 2, 0), expected, atol=1)


def test_float_images_need_a_range_and_get_it(tmp_path):
    (tmp_path / "in").mkdir()
    values = np.array([[-1.0, 0.0, 0.5, 1.0, np.nan]], np.float32)
    Image.fromarray(values).save(tmp_path / "in" / "a.tif")
    with pytest.raises(UserError, match=r"'a.tif' .*32-bit pixels without a defined white; pass --range LOW,HIGH"):
        convert(tmp_path / "in", tmp_path / "out.zip")
    assert converted(tmp_path / "in", value_range="-1,1")[0].ravel().tolist() == [0, 128, 191, 255, 0]


@given(st.integers(0, 60000), st.integers(1, 5000), st.lists(st.integers(0, 65535), min_size=1, max_size=20))
def test_scaling_keeps_order_and_reaches_both_ends(low, width, values):
    levels = np.asarray(scale(np.array([[low, *sorted(values), low + width]]), (low, low + width)))[0]
    assert (levels[0], levels[-1]) == (0, 255)
    inner = levels[1:-1].astype(int)
    assert (np.diff(inner) >= 0).all()


# ---- colour profiles ----


def adapted(primaries) -> np.ndarray:
    """Linear RGB to XYZ relative to D50, by the definition of a colour space and Bradford's adaptation."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    white = np.array([D65[0] / D65[1], 1, (1 - D65.sum()) / D65[1]])
    matrix = xyz * np.linalg.solve(xyz, white)
    gain = (BRADFORD @ D50) / (BRADFORD @ white)
    return np.linalg.inv(BRADFORD) @ np.diag(gain) @ BRADFORD @ matrix


def srgb_curve(x: np.ndarray) -> np.ndarray:
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def profile(primaries=None, gamma: float | None = None) -> bytes:
    """An ICC profile of version 2: three columns and one curve, or of gray without ``primaries``."""

    def s15(values) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    table = np.linspace(0, 1, 1024)
    table = srgb_curve(table) if gamma is None else table**gamma
    curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + np.rint(table * 65535).astype(">u2").tobytes()
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": s15(D50)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip(b"rgb", adapted(primaries).T, strict=True):
            tags[bytes([name]) + b"XYZ"], tags[bytes([name]) + b"TRC"] = s15(column), curve
    index, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        index += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    space = b"GRAY" if primaries is None else b"RGB "
    header = bytes(4) + bytes(4) + struct.pack(">I", 0x02100000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    header += bytes(28) + b"".join(struct.pack(">i", round(v * 65536)) for v in D50)
    header = header.ljust(128, b"\0")
    whole = header + index + data
    return struct.pack(">I", len(whole)) + whole[4:]


def seen_as(srgb: np.ndarray, primaries, gamma: float | None) -> np.ndarray:
    """The levels that stand for these sRGB levels in another space."""
    linear = srgb_curve(srgb / 255) @ (np.linalg.inv(adapted(primaries)) @ adapted(SRGB)).T
    if gamma is not None:
        return np.rint(255 * linear.clip(0, 1) ** (1 / gamma)).astype(np.uint8)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded.clip(0, 1)).astype(np.uint8)


@pytest.mark.parametrize(("primaries", "gamma"), [(DISPLAY_P3, None), (ADOBE_RGB, 563 / 256)])
def test_profiles_of_other_spaces_are_converted_and_counted(tmp_path, primaries, gamma):
    srgb = np.random.default_rng(0).integers(40, 216, (6, 6, 3)).astype(np.uint8)
    srgb[0, 0] = 255, 0, 0
    stored = seen_as(srgb, primaries, gamma)
    if primaries is DISPLAY_P3:
        assert stored[0, 0].tolist() == [234, 51, 35]
    (tmp_path / "in").mkdir()
    Image.fromarray(stored).save(tmp_path / "in" / "a.png", icc_profile=profile(primaries, gamma))
    Image.fromarray(srgb).save(tmp_path / "in" / "b.png", icc_profile=profile(SRGB))
    Image.fromarray(srgb).save(tmp_path / "in" / "c.png")
    images, notes = converted(tmp_path / "in")
    images = images.transpose(0, 2, 3, 1).astype(int)
    assert np.abs(images[0] - srgb).max() <= 3
    np.testing.assert_array_equal(images[1:], [srgb, srgb])  # one that is sRGB already is not rounded again
    assert notes == ["1 images had the colour profile of another space and were converted to sRGB"]
    assert [w for w in check(tmp_path / "in").warnings if "1 images have a colour profile other than sRGB" in w]


def test_profiles_keep_transparency_and_palettes_and_gray(tmp_path):
    red = seen_as(np.array([[[255, 0, 0]]], np.uint8), DISPLAY_P3, None)[0, 0]
    p3 = profile(DISPLAY_P3)
    half = Image.new("RGBA", (2, 2), (*red.tolist(), 128))
    half.info["icc_profile"] = p3
    done = eight_bit(half, "RGB", background=(0, 0, 0))
    np.testing.assert_allclose(np.asarray(done[0])[0, 0], [128, 0, 0], atol=2)
    assert done[1] == {"profile", "transparent"}
    palette = Image.new("RGB", (2, 2), tuple(red.tolist())).quantize(4)
    palette.info["icc_profile"] = p3
    np.testing.assert_allclose(np.asarray(eight_bit(palette, "RGB")[0])[0, 0], [255, 0, 0], atol=2)
    gray = Image.new("L", (2, 2), 128)
    gray.info["icc_profile"] = profile(gamma=1.0)  # half the light, which sRGB writes as 188
    assert abs(int(np.asarray(eight_bit(gray, "L")[0])[0, 0]) - 188) <= 2


def test_profiles_that_are_damaged_or_of_another_kind_of_pixel_are_left_alone():
    image = Image.new("RGB", (2, 2), (10, 200, 30))
    for data in (b"x", b"\0" * 200, profile(gamma=1.0), profile(DISPLAY_P3)[:300]):
        image.info["icc_profile"] = data
        done = eight_bit(image, "RGB")
        assert np.asarray(done[0])[0, 0].tolist() == [10, 200, 30]
        assert done[1] == set()


def test_lab_images_become_rgb():
    red = 54.3 * 2.55, 80.8 + 128, 69.9 + 128  # L*, a*, b* of sRGB's red relative to D50
    lab = Image.merge("LAB", [Image.new("L", (2, 2), round(value)) for value in red])
    np.testing.assert_allclose(np.asarray(eight_bit(lab, "RGB")[0])[0, 0], [255, 0, 0], atol=6)


# ---- transparency ----


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("white", (255, 255, 255)),
        ("black", (0, 0, 0)),
        ("#102030", (16, 32, 48)),
        ("1,2,3", (1, 2, 3)),
        ((9, 8, 7), (9, 8, 7)),
    ],
)
def test_a_background_is_a_name_a_hex_number_or_three_levels(text, levels):
    assert color(text) == levels


def test_white_sprites_are_seen_on_another_background_and_the_notice_says_so(tmp_path):
    sprite = np.full((4, 4, 4), 255, np.uint8)
    sprite[:2, :, 3] = 0
    opaque = np.full((4, 4, 4), 255, np.uint8)
    folder = save(tmp_path / "in", a=sprite, b=opaque, c=sprite)
    images, notes = converted(folder)
    assert set(images.ravel().tolist()) == {255}
    assert notes == ["2 images are transparent: laid on white (--background COLOUR)"]
    images, notes = converted(folder, background="#ff0000")
    assert images[0, :, 0, 0].tolist() == [255, 0, 0]
    assert images[0, :, 3, 0].tolist() == [255, 255, 255]
    assert notes == ["2 images are transparent: laid on 255,0,0 (--background COLOUR)"]
    for wrong in ("pink-ish", "1,2", "300,2,3,4"):
        with pytest.raises(UserError, match="use white, black, #RRGGBB or R,G,B"):
            convert(folder, tmp_path / "no.zip", background=wrong)


# ---- several frames ----


@pytest.fixture
def animations(tmp_path) -> Path:
    """Four files of five frames each of another gray, and one plain image; classes by folder."""
    frames = [Image.fromarray(np.full((8, 8, 3), 40 * i + 30, np.uint8)) for i in range(5)]
    for name, options in {"a.gif": {}, "b.png": {}, "c.tif": {}, "d.webp": {"lossless": True}}.items():
        path = tmp_path / "in" / name[0] / name
        path.parent.mkdir(parents=True)
        if name != "c.tif":
            options = options | {"duration": 100}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    (tmp_path / "in" / "e").mkdir()
    frames[0].save(tmp_path / "in" / "e" / "e.bmp")
    return tmp_path / "in"


def test_of_animations_and_pages_the_first_is_used_and_the_others_are_counted(animations):
    images, notes = converted(animations)
    assert images[:, 0, 0, 0].tolist() == [30] * 5
    assert notes == ["4 files hold several images, of which the first was used (--frames all uses every one)"]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_frame_can_be_an_image_with_the_label_of_its_file(animations, tmp_path, workers):
    report = convert(animations, tmp_path / "all.zip", frames="all", workers=workers)
    archive = ImageArchive(tmp_path / "all.zip", cond=True)
    assert (report.found, report.notes) == (21, [])
    assert archive.load_all()[:, 0, 0, 0].tolist() == [30, 70, 110, 150, 190] * 4 + [30]
    assert archive.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5 + [4]
    convert(animations, tmp_path / "some.zip", frames="all", max_images=6, seed=1, workers=workers)
    some = ImageArchive(tmp_path / "some.zip")
    assert len(some) == 6
    assert len(set(some.load_all()[:, 0, 0, 0].tolist())) > 2


def test_the_preview_in_a_cameras_jpeg_is_no_second_frame(tmp_path):
    (tmp_path / "in").mkdir()
    image = Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / "in" / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    for frames in ("first", "all"):
        images, notes = converted(tmp_path / "in", frames=frames)
        assert (len(images), notes) == (1, [])


def test_the_written_archive_holds_small_pngs_quickly_made(tmp_path):
    """Level 1 of zlib says so in the stream's second byte: 0x01, where the default level has 0x9c."""
    convert(save(tmp_path / "in", a=np.zeros((8, 8), np.uint8)), tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        data = archive.read("00000/img00000000.png")
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
    start = data.index(b"IDAT") + 4
    assert data[start : start + 2] == b"\x78\x01"
    assert Image.open(io.BytesIO(data)).size == (8, 8)


@pytest.mark.parametrize(("transform", "said"), [(None, True), ("center-crop", False)])
def test_a_resize_that_stretches_says_of_how_many_images(tmp_path, transform, said):
    (tmp_path / "in").mkdir()
    for name, size in (("a", (40, 20)), ("b", (20, 20)), ("c", (21, 40)), ("d", (41, 41))):
        Image.new("RGB", size).save(tmp_path / "in" / f"{name}.png")
    report = convert(tmp_path / "in", tmp_path / "out.zip", resolution=(10, 10), transform=transform)
    stretched = "2 images have other proportions than before (--transform center-crop keeps them)"
    assert report.notes == [stretched] * said
