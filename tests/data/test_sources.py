"""Raw inputs, each written here byte by byte or with the library that defines it."""

import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffit.data.sources import labels_from_folders, open_source
from diffit.errors import UserError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, names: list[str]) -> Path:
    """Images of one gray each: the i-th name gets the value i."""
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(i))
    return path


def values(source) -> list[int]:
    return [source.open(i).getpixel((0, 0))[0] for i in range(len(source.names))]


def test_class_folders_become_labels_in_natural_order(tmp_path):
    source = open_source(write(tmp_path, ["c10/a.png", "c2/b.png", "c2/deep/a.png", "c1/x.png"]))
    assert source.names == ["c1/x.png", "c2/b.png", "c2/deep/a.png", "c10/a.png"]
    assert values(source) == [3, 1, 2, 0]
    assert source.labels == [0, 1, 1, 2]
    assert source.class_names == ["c1", "c2", "c10"]


@pytest.mark.parametrize(
    ("names", "cond", "labels", "classes"),
    [
        (["data/train/cat/1.png", "data/train/dog/1.png"], False, [0, 1], ["cat", "dog"]),  # wrapped in folders
        (["a.png", "b.png"], True, [None, None], None),
        (["all/a.png", "all/b.png"], True, [None, None], None),
        (["00000/a.png", "00001/b.png"], False, [None, None], None),  # the buckets of an archive
        (["00000/a.png", "00001/b.png"], True, [0, 1], ["00000", "00001"]),
        (["0/a.png", "1/b.png"], False, [0, 1], ["0", "1"]),
        (["cat/a.png", "b.png"], False, [0, None], ["cat"]),
    ],
)
def test_which_folders_are_classes(names, cond, labels, classes):
    assert labels_from_folders(names, cond)[:2] == (labels, classes)


def test_a_zip_reads_like_the_folder_and_other_files_are_reported(tmp_path):
    folder = write(tmp_path / "raw", ["b/1.png", "a/1.png"])
    (folder / "LICENSE.txt").write_text("x")
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/a/._1.png", b"x")
    for path in (folder, tmp_path / "raw.zip"):
        source = open_source(path)
        assert (source.names, source.labels, values(source)) == (["a/1.png", "b/1.png"], [0, 1], [1, 0])
        assert source.ignored == ["LICENSE.txt"]


def test_an_archive_keeps_its_labels_and_class_names(tmp_path):
    write(tmp_path, ["00000/a.png", "00000/b.png"])
    meta = {"labels": [["00000/b.png", 1]], "class_names": ["x", "y"]}
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    source = open_source(tmp_path)
    assert (source.labels, source.class_names, source.unlabelled) == ([None, 1], ["x", "y"], ["00000/a.png"])


def py2_string(text: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(text)) + text


def py2_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2's cPickle wrote the real ones: protocol 2, byte strings, numpy's reconstruction."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + py2_string(b"b") + b"\x87R"
    dtype = (
        b"cnumpy\ndtype\n" + py2_string(b"u1") + b"K\x00K\x01\x87R(K\x03" + py2_string(b"|") + b"NNNJ\xff\xff\xff\xff"
    )
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    shape = b"M" + struct.pack("<H", pixels.shape[0]) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86"
    state = b"(K\x01" + shape + dtype + b"\x89" + py2_string(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + py2_string(b"data") + array + state + py2_string(b"labels") + numbers + b"u."


def py3_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2)


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def cifar(make_batch) -> tuple[dict[str, bytes], np.ndarray, list[int]]:
    pixels = np.random.default_rng(0).integers(0, 256, (15, 3072), dtype=np.uint8)
    labels = [i % 10 for i in range(15)]
    files = {f"data_batch_{b + 1}": make_batch(pixels[3 * b : 3 * b + 3], labels[3 * b : 3 * b + 3]) for b in range(5)}
    files["batches.meta"] = pickle.dumps({b"label_names": [f"class{i}".encode() for i in range(10)]}, protocol=2)
    return {"test_batch": b"not read"} | files, pixels, labels


@pytest.mark.parametrize("make_batch", [py2_batch, py3_batch])
def test_cifar_batches_are_read_in_order_as_rgb_planes(tmp_path, make_batch):
    files, pixels, labels = cifar(make_batch)
    shuffled = dict(sorted(files.items(), reverse=True))
    source = open_source(write_tar(tmp_path / "cifar-10-python.tar.gz", shuffled))
    assert source.labels == labels
    assert source.class_names == [f"class{i}" for i in range(10)]
    for i in (0, 7, 14):
        image = np.asarray(source.open(i))
        assert image.shape == (32, 32, 3)
        assert image[1, 2, 0] == pixels[i, 32 + 2]  # red plane, row 1, column 2
        assert image[31, 0, 2] == pixels[i, 2048 + 31 * 32]


class Attack:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("place", ["data_batch_2", "batches.meta"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, place):
    marker = tmp_path / "owned"
    for i, attack in enumerate([Attack(os.system, f"touch {marker}"), Attack(eval, f"open({str(marker)!r}, 'w')")]):
        files, _, _ = cifar(py3_batch)
        files[place] = pickle.dumps({b"data": attack}, protocol=2)
        with pytest.raises(UserError, match=rf"{place}: .*refused as unsafe"):
            open_source(write_tar(tmp_path / f"{i}.tar.gz", files))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_batch_3": None}, "lacks data_batch_3"),
        ({"data_batch_3": b"\x80\x02]."}, "not a CIFAR-10 batch"),
        ({"data_batch_3": b"garbage"}, "data_batch_3 is damaged"),
        ({"data_batch_3": py3_batch(np.zeros((2, 3072), np.uint8), [1])}, "N labels"),
        ({"data_batch_3": py3_batch(np.zeros((1, 3072), np.float32), [1])}, "N labels"),
        ({"data_batch_3": py3_batch(np.zeros((1, 3072), np.uint8), [10])}, "outside 0 to 9"),
    ],
)
def test_damaged_cifar_archives_are_one_clear_error(tmp_path, change, message):
    files = {name: data for name, data in (cifar(py3_batch)[0] | change).items() if data is not None}
    with pytest.raises(UserError, match=message):
        open_source(write_tar(tmp_path / "c.tar.gz", files))


def test_truncated_and_foreign_tars_are_one_clear_error(tmp_path):
    whole = write_tar(tmp_path / "a.tar.gz", cifar(py3_batch)[0]).read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.tar.gz").write_bytes(b"hello")
    for name in ("b.tar.gz", "c.tar.gz"):
        with pytest.raises(UserError, match="damaged"):
            open_source(tmp_path / name)
    with pytest.raises(UserError, match="unpack any other one"):
        open_source(write_tar(tmp_path / "d.tar.gz", {"cat.png": png(0)}))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_files_are_read_with_the_labels_beside_them(tmp_path, suffix):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5, 9], np.uint8)
    pack = gzip.compress if suffix else bytes
    for split, part in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        (tmp_path / f"{split}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images[part])))
        (tmp_path / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels[part])))
    folder = open_source(tmp_path)  # takes the training images
    test = open_source(tmp_path / f"t10k-images-idx3-ubyte{suffix}")
    assert (folder.labels, test.labels) == ([3, 1, 4, 1], [5, 9])
    np.testing.assert_array_equal(np.asarray(folder.open(2)), images[2])
    np.testing.assert_array_equal(np.asarray(test.open(1)), images[5])
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    with pytest.raises(UserError, match="6 labels for the 2 images"):
        open_source(tmp_path / f"t10k-images-idx3-ubyte{suffix}")
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    assert open_source(tmp_path / f"t10k-images-idx3-ubyte{suffix}").labels == [None, None]


def test_damaged_idx_files_are_one_clear_error(tmp_path):
    whole = idx(np.zeros((3, 4, 4), np.uint8))
    path = tmp_path / "train-images-idx3-ubyte"
    for data, message in [
        (whole[:-1], "holds 47 of 48 bytes"),
        (whole[:9], "damaged"),
        (b"\0\0\x0d\x03" + whole[4:], "not an idx file"),
        (whole[:4] + b"\xff" * 12, "claims"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_source(path)
    gz = tmp_path / "train-images-idx3-ubyte.gz"
    gz.write_bytes(gzip.compress(whole)[:-12])
    with pytest.raises(UserError, match="damaged"):
        open_source(gz)


def test_lmdb_values_are_images_in_natural_order_of_their_keys(tmp_path):
    lmdb = pytest.importorskip("lmdb", reason="needs the optional package lmdb")
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 20) as env, env.begin(write=True) as txn:
        for i in (10, 2, 1):
            txn.put(f"img{i}".encode(), png(i))
    source = open_source(tmp_path / "db")
    assert (source.names, values(source)) == (["img1", "img2", "img10"], [1, 2, 10])
    (tmp_path / "db" / "data.mdb").write_bytes(b"garbage" * 1000)
    with pytest.raises(UserError, match="LMDB"):
        open_source(tmp_path / "db")


def test_an_lmdb_entry_that_ends_behind_the_file_is_refused_and_nobody_dies_of_it(tmp_path):
    """LMDB maps its file: who reads behind its end gets SIGBUS. Found by `make faults`."""
    lmdb = pytest.importorskip("lmdb", reason="needs the optional package lmdb")
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 20) as env, env.begin(write=True) as txn:
        txn.put(b"the-key", b"x" * 20_000)
    file = tmp_path / "db/data.mdb"
    data = bytearray(file.read_bytes())
    size = data.rindex(b"the-key") - 8  # of a node: length in two halves, flags, length of the key, the key
    assert struct.unpack_from("<HH", data, size) == (20_000, 0)
    struct.pack_into("<HH", data, size, 0, 30)  # 2 MB, of a file of a few pages
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"data.mdb: damaged, some of it lies behind the end of the file; copy it"):
        open_source(tmp_path / "db")


def test_lmdb_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=r"pip install 'diffit-torch\[data\]'"):
        open_source(tmp_path)


def test_unknown_sources_list_the_known_ones(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF")
    with pytest.raises(UserError, match="none of the known sources"):
        open_source(tmp_path / "a.h5")
    with pytest.raises(UserError, match="no such file"):
        open_source(tmp_path / "b")
