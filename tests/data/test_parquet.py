"""Tables written with pyarrow as the Hub's are, and converted."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffit.data import ImageArchive, convert, parquet
from diffit.data.files import BrokenImageError
from diffit.data.sources import open_source
from diffit.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": ["ant", "bee", "cat"]},
    "weight": {"_type": "Value", "dtype": "int64"},
}


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path, numbers, *, features=FEATURES, group=4, **columns):
    """Images of one gray each, in row groups of ``group``; the label is the number's remainder by 3."""
    path.parent.mkdir(exist_ok=True)
    numbers = list(numbers)
    columns = {
        "weight": pa.array(numbers, pa.int64()),
        "image": pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in numbers], IMAGE),
        "label": pa.array([i % 3 for i in numbers], pa.int64()),
    } | columns
    metadata = None if features is None else {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({name: column for name, column in columns.items() if column is not None}, metadata=metadata)
    pq.write_table(table, path, row_group_size=max(group, len(table) // 9))
    return path


def grays(path) -> list[int]:
    return ImageArchive(path).load_all()[:, 0, 0, 0].tolist()


def test_a_folder_of_tables_is_converted_table_by_table_with_its_classes(tmp_path):
    for part, numbers in ((1, range(10, 15)), (0, range(10))):
        write_table(tmp_path / "toys" / f"train-{part:05d}-of-00002.parquet", numbers)
    (tmp_path / "toys" / "README.md").write_text("toys")
    report = convert(tmp_path / "toys", tmp_path / "toys.zip", cond=True)
    assert (report.kind, report.written) == ("2 Parquet tables", 15)
    archive = ImageArchive(tmp_path / "toys.zip", cond=True)
    assert archive.labels.tolist() == [i % 3 for i in range(15)]
    assert archive.class_names == ["ant", "bee", "cat"]
    assert grays(tmp_path / "toys.zip") == list(range(15))


def test_the_tables_of_a_downloaded_repository_are_found(tmp_path):
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "README.md").write_text("toys")
    write_table(tmp_path / "toys" / "data" / "train-00000-of-00001.parquet", range(3))
    assert len(open_source(tmp_path / "toys").names) == 3
    (tmp_path / "toys" / "a.png").write_bytes(png(0))
    assert open_source(tmp_path / "toys").names == ["a.png"]  # images, with something next to them


def test_rows_come_in_any_order_from_any_thread(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    source = open_source(write_table(tmp_path / "a.parquet", range(40)))
    order = np.random.default_rng(0).permutation(40).tolist() * 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, order)) == [png(i) for i in order]


def test_of_several_splits_the_training_images_are_taken_and_a_line_says_so(tmp_path):
    write_table(tmp_path / "toys" / "test-00000-of-00001.parquet", range(3))
    write_table(tmp_path / "toys" / "train-00000-of-00001-a1b2.parquet", range(5))
    source = open_source(tmp_path / "toys")
    assert len(source.names) == 5
    assert source.notes == [
        "the tables of the split train are read, not of test: put the tables of another into a folder of their own"
    ]
    alone = open_source(tmp_path / "toys" / "test-00000-of-00001.parquet")
    assert (len(alone.names), alone.notes) == (3, [])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_tables_that_nobody_described_are_told_by_types_and_names(tmp_path, kind):
    images = pa.array([png(i) for i in range(3)], kind)
    path = write_table(tmp_path / "a.parquet", range(3), features=None, image=None, picture=images)
    source = open_source(path)
    assert [source.read(i) for i in range(3)] == [png(i) for i in range(3)]
    assert (source.labels, source.class_names) == ([0, 1, 2], None)


def test_the_columns_that_are_not_taken_are_named(tmp_path):
    features = {
        "mask": {"_type": "Image"}, "image": {"_type": "Image"}, "coarse_label": {"_type": "ClassLabel"},
        "fine_label": {"_type": "ClassLabel", "names": ["a", "b"]},
    }  # fmt: skip
    more = {"label": None, "coarse_label": pa.array([0, 0]), "fine_label": pa.array([1, -1])}
    masks = pa.array([{"bytes": png(9), "path": None}] * 2, IMAGE)
    source = open_source(write_table(tmp_path / "a.parquet", range(2), features=features, mask=masks, **more))
    assert source.read(1) == png(1)
    assert (source.labels, source.class_names) == ([1, None], ["a", "b"])
    assert source.notes == [
        "images are those of the column 'image', not of mask",
        "classes are those of the column 'fine_label', not of coarse_label",
        "1 of 2 images have no class in the column 'fine_label'",
    ]


def test_an_image_that_is_not_there_is_named_and_the_others_are_read(tmp_path):
    images = pa.array([{"bytes": None, "path": "/etc/passwd"}, None, {"bytes": png(2), "path": "c"}], IMAGE)
    source = open_source(write_table(tmp_path / "a.parquet", range(3), image=images))
    for row in (0, 1):
        with pytest.raises(BrokenImageError, match=rf"'a\[{row}\]' has no bytes in the table"):
            source.read(row)
    assert source.read(2) == png(2)
    report = convert(tmp_path / "a.parquet", tmp_path / "a.zip", on_error="skip")
    assert report.written == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": None}, "has no column of images: found weight, label"),
        (
            {
                name: pa.nulls(10_000, kind)
                for name, kind in (("image", IMAGE), ("label", pa.int64()), ("weight", pa.int64()))
            },
            "claims 10000 rows, more than it has bytes",
        ),
        ({"label": pa.array([-2], pa.int64())}, "label -2 is no class number"),
        ({"image": pa.array([], IMAGE), "label": pa.array([], pa.int64()), "weight": None}, "without rows"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        open_source(write_table(tmp_path / "a.parquet", range(1), **columns))


def test_tables_with_other_columns_are_refused(tmp_path):
    write_table(tmp_path / "a" / "0.parquet", range(3))
    write_table(tmp_path / "a" / "1.parquet", range(3), label=None)
    with pytest.raises(UserError, match="have other columns; convert them one by one"):
        open_source(tmp_path / "a")


def test_every_damaged_table_is_one_line_or_reads_as_it_was(tmp_path):
    """Cut short anywhere, or with a bit changed: pyarrow checks little, and an image has sums of its own."""
    whole = write_table(tmp_path / "a.parquet", range(8)).read_bytes()
    rng, errors = np.random.default_rng(0), []
    for i in range(120):
        data = bytearray(whole[: rng.integers(4, len(whole))] if i % 3 == 0 else whole)
        if i % 3:
            data[rng.integers(4, len(data))] ^= 1 << rng.integers(8)
        (tmp_path / "a.parquet").write_bytes(data)
        try:
            source = open_source(tmp_path / "a.parquet")
            for row in range(len(source.names)):
                source.read(row)
        except UserError as error:
            errors.append(str(error))
    assert len(errors) > 40
    assert not any("\n" in error for error in errors)


def test_a_row_group_of_too_many_bytes_is_refused(tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.parquet", range(8))
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(UserError, match=r"GiB of images in one row group, .* smaller row groups"):
        open_source(path).read(0)
