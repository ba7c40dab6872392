"""The cache folder of a dataset: its name, the catalog's reuse, decoded images in shards."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from m2d.data.catalog import dataset_fingerprint, scan_dataset
from m2d.data.settings import DataConfig
from m2d.data.store import (
    PreparedImages,
    prepared_folder,
    reusable_catalog,
    write_images,
    write_scan,
)
from m2d.errors import ConfigError

SIZE = 16
SHA = [f"{number:064x}" for number in range(40)]


def pixels_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, SIZE, SIZE, 3), dtype=np.uint8)


# --- the folder's name ------------------------------------------------------------------------------------------------


def test_a_path_a_link_to_it_and_its_uri_are_one_dataset(tmp_path: Path) -> None:
    (tmp_path / "my set").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "my set")
    folder = prepared_folder(str(tmp_path / "cache"), str(tmp_path / "my set"))
    assert folder.parent == tmp_path / "cache"
    assert folder.name.startswith("my_set-")
    digits = folder.name.removeprefix("my_set-")
    assert len(digits) == 8
    for other in (f"{tmp_path}/my set/", (tmp_path / "my set").as_uri(), str(tmp_path / "link")):
        assert prepared_folder(str(tmp_path / "cache"), other).name.endswith(digits)


def test_two_folders_of_one_name_are_two_datasets_and_no_uri_is_a_cache() -> None:
    names = {prepared_folder("cache", f"/{parent}/isic").name for parent in ("a", "b")}
    assert len(names) == 2
    assert all(name.startswith("isic-") for name in names)
    with pytest.raises(ConfigError, match=r"cache_dir .*must be a path"):
        prepared_folder("s3://bucket/cache", "/data")


# --- the catalog ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scanned(tmp_path: Path, paint_images: Any) -> tuple[Path, Path]:
    """A dataset and the folder that keeps its scan."""
    root, folder = tmp_path / "data", tmp_path / "cache"
    paint_images(root, {"DF": 5, "NV": 15})
    config = DataConfig()
    write_scan(folder, scan_dataset(str(root), config), str(root), config, dataset_fingerprint(str(root), config))
    return root, folder


def reusable(scanned: tuple[Path, Path], **settings: Any) -> bool:
    root, folder = scanned
    catalog = reusable_catalog(folder, str(root), DataConfig(**settings))
    assert catalog is None or catalog.equals(scan_dataset(str(root), DataConfig()).catalog)
    return catalog is not None


@pytest.mark.parametrize("change", ["added", "removed", "touched", "metadata", "grown"])
def test_a_changed_file_asks_for_a_new_scan(scanned: tuple[Path, Path], change: str) -> None:
    root, _ = scanned
    path = root / "NV" / "NV_3.png"
    assert reusable(scanned)
    if change == "added":
        (root / "NV" / "another.png").write_bytes(path.read_bytes())
    elif change == "removed":
        path.unlink()
    elif change == "touched":
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    elif change == "metadata":
        (root / "metadata.csv").write_text("image_id,lesion_id\nNV_1,a\nNV_2,a\n")
    else:
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=times)
    assert not reusable(scanned)


@pytest.mark.parametrize(
    ("settings", "reused"),
    [
        ({"split_seed": 1}, False),
        ({"val_fraction": 0.2}, False),
        ({"test_fraction": 0.2}, False),
        ({"class_map": {"mole": "NV"}}, False),
        ({"max_pixels": 99}, False),
        ({"image_size": 128, "views": 1, "balance": "natural", "read_cpus": 0.5}, True),
    ],
)
def test_settings_that_shape_the_catalog_ask_for_a_new_scan(
    scanned: tuple[Path, Path], settings: dict[str, Any], reused: bool
) -> None:
    assert reusable(scanned, **settings) is reused


@pytest.mark.parametrize("name", ["dataset.json", "catalog.parquet"])
@pytest.mark.parametrize("kept", [None, 0.5, 0.0])
def test_a_damaged_record_asks_for_a_new_scan(scanned: tuple[Path, Path], name: str, kept: float | None) -> None:
    path = scanned[1] / name
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[: int(len(content) * kept)])
    assert not reusable(scanned)


def test_a_catalog_of_other_settings_than_its_record_is_not_reused(scanned: tuple[Path, Path]) -> None:
    """A run that was killed between the two files leaves such a pair."""
    root, folder = scanned
    other = DataConfig(split_seed=1)
    record = (folder / "dataset.json").read_bytes()
    write_scan(folder, scan_dataset(str(root), other), str(root), other, dataset_fingerprint(str(root), other))
    (folder / "dataset.json").write_bytes(record)
    assert not reusable(scanned)


# --- shards -----------------------------------------------------------------------------------------------------------


def test_written_images_are_read_bit_for_bit_in_any_order(tmp_path: Path) -> None:
    pixels = pixels_of(40)
    for first, stop in ((0, 13), (13, 39), (39, 40)):
        write_images(tmp_path, SIZE, SHA[first:stop], pixels[first:stop])
    images = PreparedImages(tmp_path, SIZE)
    assert not images.missing(SHA).any()
    order = np.random.default_rng(1).permutation(40)
    rows = pickle.loads(pickle.dumps(images.rows([SHA[number] for number in order])))  # noqa: S301
    for place, found in enumerate(rows.read(np.arange(40))):
        np.testing.assert_array_equal(found, pixels[order[place]])


def test_a_shard_is_a_table_that_others_can_read(tmp_path: Path) -> None:
    pixels = pixels_of(3)
    table = pq.read_table(write_images(tmp_path, SIZE, SHA[:3], pixels))
    assert table.column_names == ["sha256", "pixels"]
    assert table["sha256"].to_pylist() == SHA[:3]
    assert table["pixels"].to_pylist() == [image.tobytes() for image in pixels]


def test_images_that_are_not_there_are_missing(tmp_path: Path) -> None:
    write_images(tmp_path, SIZE, SHA[:3], pixels_of(3))
    images = PreparedImages(tmp_path, SIZE)
    assert images.missing([SHA[2], SHA[7], SHA[0]]).tolist() == [False, True, False]
    rows = images.rows([SHA[7], SHA[1]])
    assert rows.present.tolist() == [False, True]
    assert [found is None for found in rows.read(np.array([0, 1]))] == [True, False]
    assert PreparedImages(tmp_path, 32).files == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "of another size"])
def test_a_shard_that_cannot_be_read_counts_as_missing_and_is_reported(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, SIZE, SHA[:3], pixels_of(3))
    path = write_images(tmp_path, SIZE, SHA[3:6], pixels_of(3))
    other = write_images(tmp_path / "other", 24, SHA[3:6], np.zeros((3, 24, 24, 3), dtype=np.uint8)).read_bytes()
    path.write_bytes({"truncated": path.read_bytes()[:-100], "empty": b"", "of another size": other}[damage])
    with caplog.at_level(logging.WARNING):
        images = PreparedImages(tmp_path, SIZE)
    assert images.missing(SHA[:6]).tolist() == [False] * 3 + [True] * 3
    (message,) = caplog.messages
    assert str(path) in message
    assert "\n" not in message


def test_a_flipped_bit_is_noticed_and_never_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = pixels_of(3)
    path = write_images(tmp_path, SIZE, SHA[:3], pixels)
    content = bytearray(path.read_bytes())
    content[content.index(pixels[1].tobytes()) + 5] ^= 1
    path.write_bytes(content)
    images = PreparedImages(tmp_path, SIZE)
    assert images.rows(SHA[:3]).read(np.array([1])) == [None]
    assert any(str(path) in message for message in caplog.messages)


def test_sums_with_zero_bytes_anywhere_are_told_apart(tmp_path: Path) -> None:
    """NumPy's byte strings would drop zeros at their end."""
    ends = ["00" * 32, "00" * 31 + "01", "01" + "00" * 31, "01" + "00" * 30 + "01", "ff" * 31 + "00", "ff" * 32]
    pixels = pixels_of(5)
    for first, stop in ((0, 3), (3, 5)):
        write_images(tmp_path, SIZE, ends[first:stop], pixels[first:stop])
    *found, absent = PreparedImages(tmp_path, SIZE).rows(ends).read(np.arange(6))
    np.testing.assert_array_equal(found, pixels)
    assert absent is None


def test_two_shards_that_hold_the_same_image_are_fine(tmp_path: Path) -> None:
    pixels = pixels_of(4)
    for first in (0, 1):
        write_images(tmp_path, SIZE, SHA[first : first + 3], pixels[first : first + 3])
    np.testing.assert_array_equal(PreparedImages(tmp_path, SIZE).rows(SHA[:4]).read(np.arange(4)), pixels)
