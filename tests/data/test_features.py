"""The feature cache: fp16 by image, view and extractor; what is missing, what is damaged, what does not fit."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from m2d.data.features import FeatureStore, FeatureTable, feature_bytes, write_features
from m2d.errors import DataError
from m2d.models.extractors import Features

KEY, SIZE, DIM, PATCHES = "some-net-0123456789ab-32-whole", 16, 6, 4
SHA = [f"{number:064x}" for number in range(20)]


def features_of(count: int, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    cls = torch.randn(count, DIM, generator=generator)
    return Features(cls, torch.randn(count, PATCHES, DIM, generator=generator))


def part(features: Features, first: int, stop: int) -> Features:
    return Features(features.cls[first:stop], features.patches[first:stop])


def write(folder: Path, view: int, first: int, stop: int, features: Features) -> Path:
    return write_features(folder, KEY, SIZE, view, SHA[first:stop], part(features, first, stop))


@pytest.fixture
def views() -> list[Features]:
    """Of 20 images in two views."""
    return [features_of(20, seed) for seed in (0, 1)]


@pytest.fixture
def table(tmp_path: Path, views: list[Features]) -> FeatureTable:
    """All 20 images in reverse order."""
    for view, features in enumerate(views):
        for first, stop in ((0, 7), (7, 8), (8, 20)):
            write(tmp_path, view, first, stop, features)
    return FeatureStore(tmp_path, KEY, SIZE).table(SHA[::-1], 2)


def test_a_batch_is_what_was_written_rounded_to_half_precision(table: FeatureTable, views: list[Features]) -> None:
    rows, of_view = np.array([0, 19, 4, 4, 11]), np.array([0, 1, 1, 0, 1], dtype=np.int8)
    batch = table.batch(rows, of_view)
    for slot, (row, view) in enumerate(zip(rows, of_view)):
        torch.testing.assert_close(batch.cls[slot], views[view].cls[19 - row].half(), rtol=0, atol=0)
        torch.testing.assert_close(batch.patches[slot], views[view].patches[19 - row].half(), rtol=0, atol=0)
    torch.testing.assert_close(table.cls(rows, of_view), batch.cls, rtol=0, atol=0)


def test_a_table_knows_its_shape_and_its_batches_are_the_callers_own(table: FeatureTable) -> None:
    assert (len(table), table.dim, table.num_patches) == (20, DIM, PATCHES)
    rows, view = np.array([3, 1, 4]), np.zeros(3, dtype=np.int8)
    batch = table.batch(rows, view)
    assert (batch.cls.shape, batch.patches.shape) == ((3, DIM), (3, PATCHES, DIM))
    batch.cls.zero_()
    assert table.batch(rows, view).cls.any()


def test_a_pickled_table_holds_places_not_features(table: FeatureTable) -> None:
    table.batch(np.arange(20), np.zeros(20, dtype=np.int8))
    pickled = pickle.dumps(table)
    assert len(pickled) < 20 * feature_bytes(DIM, PATCHES)
    other = pickle.loads(pickled)  # noqa: S301
    rows, of_view = np.arange(20), np.ones(20, dtype=np.int8)
    torch.testing.assert_close(other.batch(rows, of_view).patches, table.batch(rows, of_view).patches, rtol=0, atol=0)


def test_missing_is_exact_and_a_table_with_holes_is_refused(tmp_path: Path, views: list[Features]) -> None:
    assert FeatureStore(tmp_path, KEY, SIZE).missing(SHA[:3], 2).all()  # nothing is there at all
    write(tmp_path, 0, 0, 2, views[0])
    write(tmp_path, 1, 2, 3, views[1])
    store = FeatureStore(tmp_path, KEY, SIZE)
    assert store.missing([SHA[2], SHA[0], SHA[1]], 2).tolist() == [[True, False], [False, True], [False, True]]
    assert len(store.table(SHA[:2], 1)) == 2
    with pytest.raises(DataError, match=r"lacks 3 of 6 image views; .*setup_data --features"):
        store.table(SHA[:3], 2)


@pytest.mark.parametrize("other", [("other-key", SIZE), (KEY, 24)])
def test_another_extractor_or_size_finds_nothing(tmp_path: Path, views: list[Features], other: tuple[str, int]) -> None:
    write(tmp_path, 0, 0, 5, views[0])
    assert FeatureStore(tmp_path, *other).missing(SHA[:5], 1).all()


def test_a_shard_in_the_wrong_folder_is_not_believed(tmp_path: Path, views: list[Features]) -> None:
    path = write(tmp_path, 0, 0, 5, views[0])
    wrong = path.parent.with_name("view_1") / path.name
    wrong.parent.mkdir()
    wrong.write_bytes(path.read_bytes())
    store = FeatureStore(tmp_path, KEY, SIZE)
    assert store.missing(SHA[:5], 2).tolist() == [[False, True]] * 5
    assert list(store.unreadable) == [wrong]


def test_two_shards_that_hold_the_same_image_are_fine(tmp_path: Path, views: list[Features]) -> None:
    write(tmp_path, 0, 0, 5, views[0])
    write(tmp_path, 0, 3, 8, views[0])
    table = FeatureStore(tmp_path, KEY, SIZE).table(SHA[:8], 1)
    found = table.cls(np.arange(8), np.zeros(8, dtype=np.int8))
    torch.testing.assert_close(found, views[0].cls[:8].half(), rtol=0, atol=0)


@pytest.mark.parametrize("kept", [0, 5, -1])
def test_a_truncated_shard_counts_as_missing_and_is_told(
    tmp_path: Path, views: list[Features], kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, 0, 0, 5, views[0])
    path.write_bytes(path.read_bytes()[:kept])
    with caplog.at_level(logging.WARNING):
        assert FeatureStore(tmp_path, KEY, SIZE).missing(SHA[:5], 1).all()
    (told,) = caplog.messages
    assert str(path) in told


@pytest.mark.parametrize("column", ["cls", "patches"])
def test_a_flipped_bit_is_an_error_that_names_the_file(tmp_path: Path, views: list[Features], column: str) -> None:
    path = write(tmp_path, 0, 0, 5, views[0])
    content = bytearray(path.read_bytes())
    value = getattr(views[0], column)[2].half().numpy().tobytes()
    content[content.index(value) + 3] ^= 1
    path.write_bytes(content)
    table = FeatureStore(tmp_path, KEY, SIZE).table(SHA[:5], 1)
    view = np.zeros(1, dtype=np.int8)
    table.batch(np.array([1]), view)
    with pytest.raises(DataError, match=r"shard_\w+\.safetensors is damaged .*delete it") as error:
        table.batch(np.array([2]), view)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [65_520.0, -1e9, float("inf"), float("nan")])
@pytest.mark.parametrize("column", ["cls", "patches"])
def test_a_value_beyond_half_precision_is_an_error_that_names_the_image(
    tmp_path: Path, value: float, column: str
) -> None:
    """65,520 is the least number that fp16 rounds to infinity; 65,504 is its largest."""
    features = features_of(3)
    getattr(features, column)[1].flatten()[-1] = value
    with pytest.raises(DataError, match=r"MEL/b\.jpg, view 5, hold a value"):
        write_features(tmp_path, KEY, SIZE, 5, SHA[:3], features, names=["MEL/a.jpg", "MEL/b.jpg", "NV/c.jpg"])
    assert list(tmp_path.rglob("*.safetensors")) == []
    getattr(features, column)[1].flatten()[-1] = 65_504.0
    write_features(tmp_path, KEY, SIZE, 5, SHA[:3], features)


def test_the_promised_size_is_the_size_on_the_disk(tmp_path: Path) -> None:
    path = write_features(tmp_path, KEY, SIZE, 0, SHA, features_of(20))
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert path.stat().st_size - header == 20 * feature_bytes(DIM, PATCHES)
