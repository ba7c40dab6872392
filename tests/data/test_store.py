"""The cache folder of a dataset: its name, the catalog's reuse, decoded images in shards."""

import logging
import os
import pickle
from dataclasses import replace
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


def test_two_folders_of_one_name_are_two_datasets(tmp_path: Path) -> None:
    names = {prepared_folder(str(tmp_path), f"/{parent}/isic").name for parent in ("a", "b")}
    assert len(names) == 2
    assert all(name.startswith("isic-") for name in names)


def test_a_cache_dir_that_is_a_uri_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a path"):
        prepared_folder("s3://bucket/cache", "/data")


# --- the catalog's reuse ----------------------------------------------------------------------------------------------


@pytest.fixture
def scanned(tmp_path: Path, paint_images: Any) -> tuple[Path, Path]:
    """A dataset and the folder that keeps its scan."""
    root, folder = tmp_path / "data", tmp_path / "cache"
    paint_images(root, {"DF": 5, "NV": 15})
    config = DataConfig()
    write_scan(folder, scan_dataset(str(root), config), str(root), config, dataset_fingerprint(str(root), config))
    return root, folder


def test_an_unchanged_dataset_is_not_scanned_again(scanned: tuple[Path, Path]) -> None:
    root, folder = scanned
    catalog = reusable_catalog(folder, str(root), DataConfig())
    assert catalog is not None
    assert catalog.equals(scan_dataset(str(root), DataConfig()).catalog)


@pytest.mark.parametrize("change", ["added", "removed", "touched", "metadata", "grown"])
def test_a_changed_file_asks_for_a_new_scan(scanned: tuple[Path, Path], change: str) -> None:
    root, folder = scanned
    path = root / "NV" / "NV_3.png"
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
    assert reusable_catalog(folder, str(root), DataConfig()) is None


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
    root, folder = scanned
    assert (reusable_catalog(folder, str(root), replace(DataConfig(), **settings)) is not None) is reused


@pytest.mark.parametrize("name", ["dataset.json", "catalog.parquet"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_damaged_record_asks_for_a_new_scan(scanned: tuple[Path, Path], name: str, damage: str) -> None:
    root, folder = scanned
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    assert reusable_catalog(folder, str(root), DataConfig()) is None


def test_a_catalog_of_other_settings_than_its_record_is_not_reused(scanned: tuple[Path, Path]) -> None:
    """A run that was killed between the two files leaves such a pair."""
    root, folder = scanned
    other = DataConfig(split_seed=1)
    record = (folder / "dataset.json").read_bytes()
    write_scan(folder, scan_dataset(str(root), other), str(root), other, dataset_fingerprint(str(root), other))
    (folder / "dataset.json").write_bytes(record)
    assert reusable_catalog(folder, str(root), DataConfig()) is None


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
    absent, there = rows.read(np.array([0, 1]))
    assert absent is None
    assert there is not None


def test_images_of_another_size_are_another_folder(tmp_path: Path) -> None:
    write_images(tmp_path, SIZE, SHA[:3], pixels_of(3))
    assert PreparedImages(tmp_path, 32).files == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "of another size"])
def test_a_shard_that_cannot_be_read_counts_as_missing_and_is_told(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, SIZE, SHA[:3], pixels_of(3))
    path = write_images(tmp_path, SIZE, SHA[3:6], pixels_of(3))
    content = path.read_bytes()
    if damage == "of another size":
        other = write_images(tmp_path / "other", 24, SHA[3:6], np.zeros((3, 24, 24, 3), dtype=np.uint8))
        content = other.read_bytes()
    path.write_bytes(content[:-100] if damage == "truncated" else b"" if damage == "empty" else content)
    with caplog.at_level(logging.WARNING):
        images = PreparedImages(tmp_path, SIZE)
    assert images.missing(SHA[:6]).tolist() == [False] * 3 + [True] * 3
    (told,) = caplog.messages
    assert str(path) in told
    assert "\n" not in told


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
    write_images(tmp_path, SIZE, SHA[:3], pixels[:3])
    write_images(tmp_path, SIZE, SHA[1:4], pixels[1:4])
    images = PreparedImages(tmp_path, SIZE)
    for number, found in enumerate(images.rows(SHA[:4]).read(np.arange(4))):
        np.testing.assert_array_equal(found, pixels[number])
