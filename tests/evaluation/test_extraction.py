"""Vectors of image sets: the extractor's own, kept, continued, the same on Ray."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2d.errors import CheckpointError
from m2d.evaluation import extraction
from m2d.evaluation.extraction import FOLDER, Extraction
from m2d.evaluation.feature_set import ImageSet
from m2d.evaluation.image_sets import PIXELS, with_pixels
from m2d.models.extractors import Features, load_feature_extractor
from m2d.models.settings import FeatureExtractorConfig

CONFIG = FeatureExtractorConfig(input_size=64)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Seven images of 16 px, the last a repeat of the first."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    pixels[6] = pixels[0]
    empty = ImageSet("train", "here", (), (), np.zeros(7, np.int64), np.arange(7).astype(object), pixels[:0])
    return with_pixels(empty, name="train", source="here", pixels=pixels, cache_dir=str(tmp_path))


def at(tmp_path: Path, **more: Any) -> Extraction:
    return Extraction(cache_dir=str(tmp_path), device="cpu", **more)


def own_vectors(images: ImageSet, view: int) -> np.ndarray:
    """By the extractor itself; view 1 is the horizontal flip."""
    pixels = images.pixels[:, :, ::-1] if view else images.pixels
    extractor = load_feature_extractor(CONFIG.name, None, CONFIG.input_size, CONFIG.crop)
    with torch.inference_mode():
        tensors = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
        cls: np.ndarray = extractor(extractor.preprocess(tensors)).cls.numpy()
    return cls


def test_vectors_are_the_extractors_own_of_each_view(images: ImageSet, tmp_path: Path) -> None:
    plain, flipped = at(tmp_path).features(images, CONFIG, views=(0, 1))
    np.testing.assert_allclose(plain, own_vectors(images, 0), atol=1e-4)
    np.testing.assert_allclose(flipped, own_vectors(images, 1), atol=1e-4)
    assert plain.dtype == np.float32
    assert np.array_equal(plain[0], plain[6])


def test_a_second_extraction_loads_no_network(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = at(tmp_path).features(images, CONFIG)[0]

    def refuse(*_: object) -> None:
        raise AssertionError("the extractor was loaded although nothing is missing")

    monkeypatch.setattr(extraction, "load_feature_extractor", refuse)
    assert np.array_equal(at(tmp_path).features(images, CONFIG)[0], first)


def test_a_torn_file_alone_is_made_again(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "SHARD_IMAGES", 2)
    first = at(tmp_path).features(images, CONFIG)[0]
    files = sorted((tmp_path / FOLDER).rglob("cls_*"))
    assert len(files) == 3, "six different images, two a file"
    times = {path: path.stat().st_mtime_ns for path in files[1:]}
    files[0].write_bytes(b"torn")
    assert np.array_equal(at(tmp_path).features(images, CONFIG)[0], first)
    assert {path: path.stat().st_mtime_ns for path in files[1:]} == times


def test_a_file_that_the_disk_does_not_give_is_not_removed(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(tmp_path).features(images, CONFIG)
    (file,) = (tmp_path / FOLDER).rglob("cls_*")

    def failing(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(extraction, "load_file", failing)
    assert extraction._read(file.parent, images.sha256) == {}
    assert file.is_file()


def test_features_that_are_not_finite_are_refused(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = extraction.extract_view

    def broken(*arguments: Any) -> Any:
        features = real(*arguments)
        return Features(features.cls * torch.nan, features.patches)

    monkeypatch.setattr(extraction, "extract_view", broken)
    with pytest.raises(CheckpointError, match="not finite"):
        at(tmp_path).features(images, CONFIG)


@pytest.mark.ray
def test_ray_gives_the_same_vectors(
    images: ImageSet, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "SHARD_IMAGES", 2)
    here = at(tmp_path, num_actors=0).features(images, CONFIG)[0]
    for path in (tmp_path / FOLDER).rglob("cls_*"):
        path.unlink()
    assert np.array_equal(at(tmp_path, num_actors=2).features(images, CONFIG)[0], here)


def test_pixels_are_kept_once_by_content(images: ImageSet, tmp_path: Path) -> None:
    again = with_pixels(images, name="test", source="there", pixels=np.array(images.pixels), cache_dir=str(tmp_path))
    assert len(list((tmp_path / PIXELS).iterdir())) == 1
    assert again.sha256 == images.sha256
    assert again.name == "test"
