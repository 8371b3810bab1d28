"""Archives are laid out here by hand, as the EDM and StyleGAN tools lay them out, and read back."""

import gzip
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffit.data import ImageArchive, convert
from diffit.data.files import FileTree, map_ordered
from diffit.data.names import natural_key, safe_name
from diffit.errors import UserError


def png(pixels: np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def pixels(i: int, shape: tuple[int, ...] = (6, 8, 3)) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def edm_files(labels: object = "default", count: int = 5, shape: tuple[int, ...] = (6, 8, 3)) -> dict[str, bytes]:
    names = [f"00000/img{i:08d}.png" for i in range(count)]
    if labels == "default":
        labels = [[name, i % 3] for i, name in enumerate(names)]
    files = {name: png(pixels(i, shape)) for i, name in enumerate(names)}
    return files | {"dataset.json": json.dumps({"labels": labels}).encode()}


@pytest.fixture(params=["zip", "compressed zip", "folder"])
def edm_archive(request, tmp_path):
    if request.param == "folder":
        return write_folder(tmp_path / "toys", edm_files())
    compression = zipfile.ZIP_DEFLATED if "compressed" in request.param else zipfile.ZIP_STORED
    return write_zip(tmp_path / "toys.zip", edm_files(), compression)


def test_an_edm_archive_gives_the_pixels_and_labels_that_were_stored(edm_archive):
    archive = ImageArchive(edm_archive, cond=True)
    assert (archive.name, len(archive), archive.image_shape) == ("toys", 5, (3, 6, 8))
    assert (archive.has_labels, archive.num_classes, archive.class_names) == (True, 3, None)
    assert archive.labels is not None
    assert archive.labels.dtype == torch.int64
    assert archive.labels.tolist() == [0, 1, 2, 0, 1]
    expected = np.stack([pixels(i).transpose(2, 0, 1) for i in range(5)])
    torch.testing.assert_close(torch.stack([archive[i] for i in range(5)]), torch.from_numpy(expected))
    for workers in (0, 1, 3):
        torch.testing.assert_close(archive.load_all(workers), torch.from_numpy(expected))


def test_without_cond_labels_are_known_but_not_given(edm_archive):
    archive = ImageArchive(edm_archive)
    assert archive.labels is None
    assert archive.has_labels


def test_dataloader_workers_and_pickled_copies_read_the_same_images(tmp_path):
    archive = ImageArchive(write_zip(tmp_path / "a.zip", edm_files(count=40)))
    expected = archive.load_all()  # opens the zip here, before the workers are forked
    loader = torch.utils.data.DataLoader(archive, batch_size=4, num_workers=2)
    torch.testing.assert_close(torch.cat(list(loader)), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(archive)).load_all(), expected)


@pytest.mark.parametrize(("form", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_other_formats_and_plain_folders_are_read_without_labels(tmp_path, form, options):
    flat = np.full((4, 4, 3), 200, np.uint8)
    suffix = {"JPEG": "jpg", "WEBP": "webp"}[form]
    files = {f"img{i}.{suffix}": png(flat - i, form, **options) for i in (10, 9, 1)}
    archive = ImageArchive(write_folder(tmp_path, files | {"notes.txt": b"", ".DS_Store": b"", "._img1.png": b""}))
    assert archive.file_names == [f"img{i}.{suffix}" for i in (1, 9, 10)]
    assert not archive.has_labels
    assert archive.num_classes == 0
    assert abs(int(archive[2][0, 0, 0]) - 190) <= 2


def test_gray_images_have_one_channel(tmp_path):
    archive = ImageArchive(write_zip(tmp_path / "g.zip", edm_files(shape=(6, 8))))
    assert archive.image_shape == (1, 6, 8)
    np.testing.assert_array_equal(archive[1][0].numpy(), pixels(1, (6, 8)))


def test_labels_may_be_a_dict_have_backslashes_and_class_names_beyond_the_largest_label(tmp_path):
    meta = {"labels": {"a\\x.png": 1, "a/y.png": 0}, "class_names": ["cat", "dog", "owl"]}
    files = {"a/x.png": png(pixels(0)), "a/y.png": png(pixels(1)), "dataset.json": json.dumps(meta).encode()}
    archive = ImageArchive(write_folder(tmp_path, files), cond=True)
    assert archive.labels.tolist() == [1, 0]
    assert (archive.num_classes, archive.class_names) == (3, ["cat", "dog", "owl"])


@pytest.mark.parametrize("label", [1000, 45_000, 2_000_000_000, 2**31 - 1, 10**30])
def test_identity_numbers_are_refused_at_once_with_the_remedy(tmp_path, label):
    path = write_zip(tmp_path / "a.zip", edm_files([[name, label] for name in NAMES]))
    with pytest.raises(
        UserError, match=rf"labels go up to {label}, too far for 5 images: `diffit data convert .*--cond"
    ):
        ImageArchive(path, cond=True)
    assert len(ImageArchive(path)) == 5  # who does not ask for labels is not bothered


def test_labels_with_moderate_gaps_load_as_they_are(tmp_path):
    archive = ImageArchive(write_zip(tmp_path / "a.zip", edm_files([[name, 999] for name in NAMES])), cond=True)
    assert (archive.num_classes, archive.labels.tolist()) == (1000, [999] * 5)


def test_max_images_is_a_seeded_subset_in_order_that_keeps_the_classes(tmp_path):
    path = write_zip(tmp_path / "a.zip", edm_files(count=30))
    first, again = (ImageArchive(path, cond=True, max_images=7, seed=1) for _ in range(2))
    other = ImageArchive(path, cond=True, max_images=7, seed=2)
    numbers = [int(name[-12:-4]) for name in first.file_names]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 7
    assert numbers != list(range(7))
    assert first.file_names == again.file_names != other.file_names
    assert first.labels.tolist() == [i % 3 for i in numbers]
    assert first.num_classes == 3
    assert len(ImageArchive(path, max_images=99)) == 30
    with pytest.raises(UserError, match="max_images is 0"):
        ImageArchive(path, max_images=0)


NAMES = [f"00000/img{i:08d}.png" for i in range(5)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "has no labels.*diffit data convert"),
        ([], "has no labels"),
        ([[name, 0] for name in NAMES[:3]], r"2 of 5 images have no label \(00000/img00000003.png, 00000/img00000004"),
        ([[name, 0.5] for name in NAMES], "is 0.5; labels are class numbers"),
        ([[name, [0, 1]] for name in NAMES], r"is \[0, 1\]; labels"),
        ([[name, True] for name in NAMES], "is True"),
        ([[name, -1] for name in NAMES], "is -1"),
        (["x"], "not a .file name, class number. pair"),
        ("x", "must be null or a list"),
        ([["../../etc/passwd.png", 0]], "unsafe path"),
    ],
)
def test_unusable_labels_are_an_error_that_says_which(tmp_path, labels, message):
    path = write_zip(tmp_path / "a.zip", edm_files(labels))
    with pytest.raises(UserError, match=message):
        ImageArchive(path, cond=True)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000, b"[]"])
def test_a_damaged_dataset_json_is_an_error(tmp_path, text):
    with pytest.raises(UserError, match=r"dataset.json"):
        ImageArchive(write_zip(tmp_path / "a.zip", edm_files() | {"dataset.json": text}))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((7, 8, 3), "is 8x7 RGB but .* is 8x6 RGB: .*--resolution"), ((6, 8), "is 8x6 gray but .* is 8x6 RGB")],
)
def test_an_image_of_another_shape_is_named_with_both_sizes(tmp_path, shape, message):
    files = edm_files() | {NAMES[3]: png(pixels(0, shape))}
    archive = ImageArchive(write_zip(tmp_path / "a.zip", files))
    archive[2]
    with pytest.raises(UserError, match=f"img00000003.png' {message}"):
        archive[3]
    with pytest.raises(UserError, match="img00000003"):
        archive.load_all()


def test_modes_that_would_be_misread_are_refused(tmp_path):
    sideways = Image.Exif()
    sideways[0x0112] = 6
    for i, data in enumerate(
        [png(pixels(0, (6, 8, 4))), png(pixels(0, (6, 8)).astype(np.uint16)), png(pixels(0), "JPEG", exif=sideways)]
    ):
        path = write_folder(tmp_path / str(i), {"a.png": data})
        with pytest.raises(UserError, match=r"a.png' .*diffit data convert"):
            ImageArchive(path)


def test_damaged_files_are_named(tmp_path):
    whole = png(pixels(1, (64, 64, 3)))
    files = edm_files(shape=(64, 64, 3)) | {NAMES[1]: whole[: len(whole) // 2], NAMES[2]: b"", NAMES[4]: b"no image"}
    archive = ImageArchive(write_zip(tmp_path / "a.zip", files))
    for i in (1, 2, 4):
        with pytest.raises(UserError, match=NAMES[i]):
            archive[i]


def test_damaged_zips_are_one_clear_error(tmp_path):
    whole = write_zip(tmp_path / "a.zip", edm_files()).read_bytes()
    for name, data in {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.items():
        (tmp_path / f"{name}.zip").write_bytes(data)
        with pytest.raises(UserError, match="damaged or incomplete"):
            ImageArchive(tmp_path / f"{name}.zip")
    flipped = bytearray(whole)
    flipped[200] ^= 255  # inside the pixels of the first image: its checksum is now wrong
    (tmp_path / "flipped.zip").write_bytes(flipped)
    with pytest.raises(UserError, match=NAMES[0]):
        ImageArchive(tmp_path / "flipped.zip")


def test_wrong_paths_and_raw_formats_point_to_the_remedy(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        ImageArchive(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no images.*empty"):
        ImageArchive(tmp_path / "empty")
    for name in ("cifar-10-python.tar.gz", "train-images-idx3-ubyte.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"x" * 100))
        with pytest.raises(UserError, match="diffit data convert"):
            ImageArchive(tmp_path / name)


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
def test_zip_members_that_point_outside_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="unsafe path"):
        ImageArchive(write_zip(tmp_path / "a.zip", {name: png(pixels(0))}))


def test_links_out_of_a_folder_are_refused_and_links_inside_it_followed(tmp_path):
    folder = write_folder(tmp_path / "in", {"a.png": png(pixels(0))})
    os.symlink("a.png", folder / "b.png")
    assert len(ImageArchive(folder)) == 2
    (tmp_path / "secret.png").write_bytes(png(pixels(1)))
    os.symlink("../secret.png", folder / "c.png")
    with pytest.raises(UserError, match=r"c.png is a link .*cp -rL"):
        ImageArchive(folder)


@pytest.mark.parametrize("limit", [47, 30])  # of 48 pixels
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    path = write_folder(tmp_path, {"a.png": png(pixels(0))})
    monkeypatch.setenv("DIFFIT_MAX_MEGAPIXELS", f"{limit / 1e6:f}")
    with pytest.raises(UserError, match=r"a.png.*decompression bomb"):
        ImageArchive(path)


def test_a_zip_member_that_unfolds_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", {"a.png": b"\0" * 1_000_000}, zipfile.ZIP_DEFLATED)
    monkeypatch.setenv("DIFFIT_MAX_MEGAPIXELS", "0.12")
    with pytest.raises(UserError, match=r"a.png.*more than the limit"):
        ImageArchive(path)


class Undeclared(zipfile.ZipInfo):
    """A member whose name is stored as these bytes, without a word on their encoding."""

    def _encodeFilenameFlags(self):
        return self.stored, 0


@pytest.mark.parametrize(
    ("names", "encoding"),
    [
        (["猫/表1.png", "犬/ソ.png"], "cp932"),  # with a backslash for a second byte
        (["chats/é.png", "chiens/ä.png"], "utf-8"),
        (["löwe/bâton.png", "Köln/ölbild.png"], "cp437"),  # whose bytes could be kanji
    ],
)
def test_zips_that_do_not_say_their_encoding_are_read(tmp_path, names, encoding):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, name in enumerate(names):
            member = Undeclared(f"{i}.png")
            member.stored = name.encode(encoding)
            archive.writestr(member, png(pixels(i)))
    files = FileTree(tmp_path / "a.zip")
    assert sorted(files.names) == sorted(names)
    for i, name in enumerate(names):
        assert files.read(name) == png(pixels(i))
    assert len(ImageArchive(tmp_path / "a.zip").load_all()) == 2


def test_names_on_disk_in_other_encodings_are_read_and_written(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    names = ["Café", "über", "plain"]
    for i, name in enumerate(names):
        try:
            os.makedirs(folder + b"/" + name.encode("latin-1"))
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
        with open(folder + b"/" + name.encode("latin-1") + b"/a.png", "wb") as file:
            file.write(png(pixels(i)))
    os.makedirs(folder + "/Café".encode())  # the same name again, in UTF-8
    with open(folder + "/Café/b.png".encode(), "wb") as file:
        file.write(png(pixels(3)))
    files = FileTree(tmp_path / "in")
    assert files.names == ["Café/a.png", "Café/b.png", "plain/a.png", "über/a.png"]
    assert [files.read(name) for name in files.names] == [png(pixels(i)) for i in (0, 3, 2, 1)]
    assert files.num_bytes() == sum(len(png(pixels(i))) for i in range(4))
    convert(tmp_path / "in", tmp_path / "out.zip")
    archive = ImageArchive(tmp_path / "out.zip", cond=True)
    assert (archive.class_names, archive.labels.tolist()) == (["Café", "plain", "über"], [0, 0, 1, 2])


def test_two_names_that_read_alike_are_both_kept(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, stored in enumerate(["ä.png".encode(), b"x"]):
            member = Undeclared(f"{i}.png")
            member.stored = stored if i == 0 else "ä.png".encode("cp437")
            archive.writestr(member, png(pixels(i)))
    contents = {FileTree(tmp_path / "a.zip").read(name) for name in FileTree(tmp_path / "a.zip").names}
    assert contents == {png(pixels(0)), png(pixels(1))}


@given(st.lists(st.integers(0, 10**30), unique=True))
def test_natural_order_is_numeric_order(numbers):
    names = sorted((f"d{n % 7}/img{n}.png" for n in numbers), key=natural_key)
    assert names == [f"d{n % 7}/img{n}.png" for n in sorted(numbers, key=lambda n: (n % 7, n))]


@given(st.lists(st.text("a1/.0²", max_size=8)))
def test_natural_order_does_not_depend_on_the_order_of_the_names(names):
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


@given(st.text("./\\:Ca\0", max_size=12))
def test_a_name_that_is_let_through_stays_below_its_folder(raw):
    try:
        name = safe_name(raw, "test")
    except UserError:
        return
    assert os.path.normpath("/root/" + name).startswith("/root/")


def test_the_content_hash_follows_pixels_names_labels_and_order_alone(tmp_path):
    files = edm_files()
    zipped = ImageArchive(write_zip(tmp_path / "a.zip", files), cond=True).hash_files()
    packed = write_zip(tmp_path / "b.zip", files | {"notes.txt": b"x"}, zipfile.ZIP_DEFLATED)
    assert ImageArchive(packed, cond=True).hash_files() == zipped
    assert ImageArchive(write_folder(tmp_path / "c", files), cond=True).hash_files() == zipped
    swapped = files | {NAMES[0]: files[NAMES[1]], NAMES[1]: files[NAMES[0]]}
    relabelled = edm_files([[name, 0] for name in NAMES])
    fewer = edm_files(count=4)
    others = [
        ImageArchive(write_zip(tmp_path / f"{i}.zip", other), cond=True).hash_files()
        for i, other in enumerate((swapped, relabelled, fewer))
    ]
    assert len({zipped, *others}) == 4


def test_map_ordered_keeps_order_and_reads_only_a_little_ahead():
    started = []
    results = map_ordered(lambda i: started.append(i) or i * i, range(10_000), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()
    assert len(started) < 500
    assert list(map_ordered(str, range(100), workers=3)) == [str(i) for i in range(100)]


def test_a_zip_with_a_name_that_is_not_utf_8_or_a_method_that_no_one_knows_is_one_line(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"ü.png": png(pixels(0))})
    content = path.read_bytes()
    for old, new in (("ü".encode(), b"\xc3\x28"), (b"PK\x01\x02\x14\x03\x14\x00\x00\x08\x00\x00", None)):
        assert old in content
        path.write_bytes(content.replace(old, old[:-2] + b"\x63\x00" if new is None else new))
        with pytest.raises(UserError, match=str(path)) as caught:
            ImageArchive(path)
        assert "\n" not in str(caught.value)


def test_names_that_a_terminal_would_obey_are_shown_as_text(tmp_path):
    path = write_folder(tmp_path / "a", {"\x1b[2Jb\nerror: all is well.png": b"nothing"})
    with pytest.raises(UserError) as caught:
        ImageArchive(path)
    assert r"\x1b[2Jb\nerror: all is well.png' is not an image" in str(caught.value)


def test_class_names_of_an_archive_cannot_move_the_cursor(tmp_path):
    files = edm_files() | {"dataset.json": json.dumps({"labels": None, "class_names": ["a\x1b[1m\n"]}).encode()}
    assert ImageArchive(write_zip(tmp_path / "a.zip", files)).class_names == [r"a\x1b[1m\n"]


def test_in_place_of_an_image_that_cannot_be_read_the_next_of_its_label_is_shown(tmp_path, caplog):
    files = edm_files(count=6)  # labels 0 1 2 0 1 2
    names = [name for name in files if name.endswith("png")]
    for broken in (0, 1):
        files[names[broken]] = files[names[broken]][:60]
    path = write_zip(tmp_path / "a.zip", files)
    with pytest.raises(UserError, match="img00000000"):
        ImageArchive(path)
    archive = ImageArchive(path, cond=True, skip_broken=True)
    whole = [torch.from_numpy(pixels(i)).permute(2, 0, 1) for i in (3, 4, 2, 3, 4, 5)]
    for _ in range(2):
        assert torch.equal(archive.load_all(), torch.stack(whole))
    said = [record.getMessage() for record in caplog.records]
    assert ["img00000000" in said[0], "img00000001" in said[1], len(said)] == [True, True, 2]
    assert said[1].endswith("left out, the 2. so far")
    files |= {name: files[name][:60] for name in names[4:5]}
    archive = ImageArchive(write_zip(tmp_path / "b.zip", files), cond=True, skip_broken=True)
    with pytest.raises(UserError, match=r"no image can be read in place of '00000/img00000001\.png'"):
        archive[1]
