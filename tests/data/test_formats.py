"""Kinds of files that phones and cameras bring."""

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image, features

from diffit.data import ImageArchive, convert
from diffit.data import formats as formats
from diffit.data.formats import suffix_of, unread
from diffit.errors import UserError


def without(monkeypatch, *, heif: bool = True, avif: bool = True):
    """The module as it is where pillow-heif is not installed, or Pillow was built without AVIF."""
    if heif:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
    if avif:
        monkeypatch.setattr(features, "get_supported_modules", list)
    spec = importlib.util.spec_from_file_location("formats_without", formats.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_not_read_is_counted_by_kind_with_its_remedy(monkeypatch):
    bare = without(monkeypatch)
    names = ["a/1.HEIC", "2.heic", "3.heif", "4.avif", "5.CR2", "6.dng", "7.mov", "8.txt", "9.png"]
    lines = bare.unread(names)
    assert lines[0] == "3 HEIC photographs (pip install 'diffit-torch[data]')"
    assert {line.split(" (")[0] for line in lines[1:]} == {"2 RAW photographs", "1 AVIF images", "1 videos"}
    assert not {".heic", ".avif"} & set(bare.IMAGE_SUFFIXES)


def test_a_folder_of_nothing_else_is_refused_with_the_remedy_and_not_the_command_just_typed(tmp_path):
    for name in ("1.CR2", "2.NEF", "3.mov"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no image that can be read: 2 RAW photographs \(export them") as caught:
        convert(tmp_path, tmp_path.parent / "out.zip")
    assert "diffit data convert" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["avif", "heic"])
def test_photographs_of_phones_are_read_where_their_decoder_is_installed(tmp_path, suffix):
    if suffix == "heic":
        pytest.importorskip("pillow_heif", reason="needs the optional package pillow-heif")
    elif "avif" not in features.get_supported_modules():
        pytest.skip("this Pillow was built without AVIF")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 64), (200, 30, 60)).save(tmp_path / "in" / f"IMG_0001.{suffix.upper()}", quality=95)
    report = convert(tmp_path / "in", tmp_path / "out.zip")
    assert report.ignored == []
    image = ImageArchive(tmp_path / "out.zip")[0].numpy()
    np.testing.assert_allclose(image.mean((1, 2)), [200, 30, 60], atol=4)


def test_a_suffix_is_that_of_the_last_part_of_a_name():
    assert [suffix_of(name) for name in ("a.b/c.PNG", "a.tar.gz", "Makefile", ".hidden", "x/y")] == [
        ".png", ".gz", "Makefile", ".hidden", "y",
    ]  # fmt: skip
    assert unread(["a.png", "b.txt"]) == []
