import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from m2d.classes import ISIC7
from m2d.data.decode import decode_resized
from m2d.data.reader import ImageReader
from m2d.data.store import PreparedImages, write_images
from m2d.data.views import apply_view
from m2d.errors import DataError

COUNTS = {"DF": 3, "MEL": 4, "NV": 5}  # catalog rows 0-2, 3-6, 7-11
AS_IT_IS = np.zeros(12, dtype=np.int8)
SIZE, MAX_PIXELS = 16, 10_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


@pytest.fixture
def catalog(root: Path, paint_images: Any) -> pa.Table:
    return paint_images(root, COUNTS)


def reader_of(catalog: pa.Table, data_root: Path) -> ImageReader:
    return ImageReader(catalog, str(data_root), image_size=SIZE, max_pixels=MAX_PIXELS)


def path_of(catalog: pa.Table, data_root: Path, row: int) -> Path:
    return data_root / catalog.column("path")[row].as_py()


def test_each_row_is_its_own_file_in_the_view_that_was_asked_for(catalog: pa.Table, root: Path) -> None:
    rows = np.array([11, 0, 5, 0, 3, 4, 8, 9])
    views = np.arange(8, dtype=np.int8)
    columns = reader_of(catalog, root).read(rows, views)
    for image, row, view in zip(columns["images"], rows, views):
        decoded = decode_resized(path_of(catalog, root, row).read_bytes(), SIZE, max_pixels=MAX_PIXELS)
        np.testing.assert_array_equal(image, apply_view(decoded, int(view)))
    assert columns["labels"].tolist() == [ISIC7.codes.index(catalog.column("label")[int(row)].as_py()) for row in rows]
    np.testing.assert_array_equal(columns["catalog_rows"], rows)
    np.testing.assert_array_equal(columns["views"], views)
    assert not columns["substituted"].any()
    types = [column.dtype.name for column in columns.values()]
    assert [*zip(columns, types)] == [
        ("images", "uint8"), ("labels", "int64"), ("catalog_rows", "int64"), ("views", "int8"), ("substituted", "bool")
    ]  # fmt: skip


def test_attached_bytes_give_the_same_images_without_the_files(catalog: pa.Table, root: Path) -> None:
    reader = reader_of(catalog, root)
    expected = reader.read(np.arange(12), AS_IT_IS)
    halves = [reader.load_encoded(0, 5), reader.load_encoded(5)]
    for row in range(12):
        path_of(catalog, root, row).unlink()
    other = pickle.loads(pickle.dumps(reader))  # noqa: S301
    other.attach(pa.chunked_array([*halves[0].chunks, *halves[1].chunks]))
    found = other.read(np.arange(12), AS_IT_IS)
    assert not found["substituted"].any()
    np.testing.assert_array_equal(found["images"], expected["images"])


def test_encoded_bytes_stay_out_of_the_pickle_and_those_of_another_catalog_are_refused(
    catalog: pa.Table, root: Path
) -> None:
    reader = reader_of(catalog, root)
    bare = len(pickle.dumps(reader))
    reader.attach(reader.load_encoded())
    reader.read(np.arange(12), AS_IT_IS)
    assert len(pickle.dumps(reader)) == bare
    with pytest.raises(ValueError, match="11 encoded images for a catalog of 12"):
        reader.attach(reader.load_encoded(1))


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_file_gone_bad_is_replaced_by_the_next_of_its_class(
    catalog: pa.Table, root: Path, damage: str, attached: bool
) -> None:
    good = reader_of(catalog, root).read(np.arange(12), AS_IT_IS)["images"]
    for row in (4, 5, 11):
        path = path_of(catalog, root, row)
        content = path.read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    reader = reader_of(catalog, root)
    if attached:
        reader.attach(reader.load_encoded())
    for _ in range(2):  # the second time from memory of what is bad
        columns = reader.read(np.arange(12), AS_IT_IS)
        shown = np.array([0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10, 7])  # 4 and 5 -> 6; 11 is its class's last -> 7, its first
        np.testing.assert_array_equal(columns["catalog_rows"], shown)
        np.testing.assert_array_equal(columns["images"], good[shown])
        assert np.flatnonzero(columns["substituted"]).tolist() == [4, 5, 11]


def test_the_only_good_file_of_a_class_replaces_all_in_the_view_of_each(catalog: pa.Table, root: Path) -> None:
    for row in (0, 2):
        path_of(catalog, root, row).unlink()
    columns = reader_of(catalog, root).read(np.array([0, 1, 2]), np.array([4, 4, 0], dtype=np.int8))
    assert columns["catalog_rows"].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(columns["images"][0], columns["images"][1])
    assert (columns["images"][0] != columns["images"][2]).any()


def test_the_loss_of_a_whole_class_is_an_error_that_names_a_file_and_the_reason(catalog: pa.Table, root: Path) -> None:
    for row in range(3):
        path_of(catalog, root, row).write_bytes(b"no image")
    reader = reader_of(catalog, root)
    assert not reader.read(np.arange(3, 12), AS_IT_IS[3:])["substituted"].any()
    with pytest.raises(DataError, match=r"DF/DF_1\.png .*has changed since the scan.* images of DF") as error:
        reader.read(np.array([1]), AS_IT_IS[:1])
    assert "\n" not in str(error.value)


def test_an_image_above_max_pixels_is_not_decoded(catalog: pa.Table, root: Path) -> None:
    reader = ImageReader(catalog, str(root), image_size=SIZE, max_pixels=48 * 40 - 1)
    with pytest.raises(DataError, match="max_pixels"):
        reader.read(np.array([0]), AS_IT_IS[:1])


def test_a_uri_is_read_as_a_path_is(catalog: pa.Table, root: Path) -> None:
    by_uri = ImageReader(catalog, root.as_uri(), image_size=SIZE, max_pixels=MAX_PIXELS)
    expected = reader_of(catalog, root).read(np.arange(12), AS_IT_IS)
    np.testing.assert_array_equal(by_uri.read(np.arange(12), AS_IT_IS)["images"], expected["images"])


# --- prepared images --------------------------------------------------------------------------------------------------


def prepared_reader(catalog: pa.Table, data_root: Path, rows: range, image_size: int = SIZE) -> ImageReader:
    """A reader of the catalog, these rows of which are prepared at SIZE in shards of two, beside the dataset."""
    encoded = [path_of(catalog, data_root, row).read_bytes() for row in range(len(catalog))]
    sums = catalog["sha256"].to_pylist()
    cache = data_root.with_name("cache")
    for first in range(rows.start, rows.stop, 2):
        part = range(first, min(first + 2, rows.stop))
        pixels = np.stack([decode_resized(encoded[row], SIZE, max_pixels=MAX_PIXELS) for row in part])
        write_images(cache, SIZE, [sums[row] for row in part], pixels)
    images = PreparedImages(cache, SIZE)
    return ImageReader(catalog, str(data_root), image_size=image_size, max_pixels=MAX_PIXELS, prepared=images)


@pytest.mark.parametrize("attached", [False, True])
def test_prepared_rows_are_the_decoded_ones_bit_for_bit_without_the_files(
    catalog: pa.Table, root: Path, attached: bool
) -> None:
    rows, views = np.array([11, 0, 5, 0, 3, 4, 8, 9]), np.arange(8, dtype=np.int8)
    expected = reader_of(catalog, root).read(rows, views)
    reader = pickle.loads(pickle.dumps(prepared_reader(catalog, root, range(12))))  # noqa: S301
    for row in range(12):
        path_of(catalog, root, row).unlink()
    if attached:
        reader.attach(reader.load_encoded())
    found = reader.read(rows, views)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("attached", [False, True])
def test_rows_that_are_not_prepared_are_decoded_from_their_files(catalog: pa.Table, root: Path, attached: bool) -> None:
    expected = reader_of(catalog, root).read(np.arange(12), AS_IT_IS)
    reader = prepared_reader(catalog, root, range(3, 8))
    for row in range(3, 8):
        path_of(catalog, root, row).unlink()
    if attached:
        halves = [reader.load_encoded(0, 5), reader.load_encoded(5)]
        reader.attach(pa.chunked_array([*halves[0].chunks, *halves[1].chunks]))
    found = reader.read(np.arange(12), AS_IT_IS)
    assert not found["substituted"].any()
    np.testing.assert_array_equal(found["images"], expected["images"])


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_damaged_shard_is_decoded_around(catalog: pa.Table, root: Path, damage: str, attached: bool) -> None:
    expected = reader_of(catalog, root).read(np.arange(12), AS_IT_IS)
    reader = prepared_reader(catalog, root, range(12))
    for path in sorted(root.with_name("cache").rglob("shard_*"))[1:3]:
        content = bytearray(path.read_bytes())
        path.unlink()
        if damage == "flipped":
            content[len(content) // 4] ^= 1  # the pixels are by far the largest part
            path.write_bytes(content)
    if attached:
        reader.attach(reader.load_encoded())
    found = reader.read(np.arange(12), AS_IT_IS)
    assert not found["substituted"].any()
    np.testing.assert_array_equal(found["images"], expected["images"])


def test_sizes_are_those_of_raw_pixels_where_rows_are_prepared(catalog: pa.Table, root: Path) -> None:
    reader = prepared_reader(catalog, root, range(3, 8))
    lengths = [len(blob) for blob in reader.load_encoded().to_pylist()]
    assert lengths[3:8] == [3 * SIZE * SIZE] * 5
    assert reader.sizes.tolist() == lengths
    assert lengths[:3] == [path_of(catalog, root, row).stat().st_size for row in range(3)]


def test_pixels_stay_out_of_the_pickle(catalog: pa.Table, root: Path) -> None:
    reader = prepared_reader(catalog, root, range(12))
    bare = len(pickle.dumps(reader))
    reader.read(np.arange(12), AS_IT_IS)
    assert len(pickle.dumps(reader)) == bare
    assert bare - len(pickle.dumps(reader_of(catalog, root))) < 12 * SIZE * SIZE


def test_images_prepared_at_another_size_are_refused(catalog: pa.Table, root: Path) -> None:
    with pytest.raises(ValueError, match="16 px for a reader of 24 px"):
        prepared_reader(catalog, root, range(12), image_size=24)
