"""Vectors of image sets and of image files: the extractor's own, extracted once, resumed, the same on Ray."""

import errno
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image
from torch import Tensor

from m2d.data import features as store
from m2d.errors import CheckpointError
from m2d.evaluation import features
from m2d.evaluation.features import FOLDER, ClsFeatures, Extraction, cls_features, official_square
from m2d.evaluation.images import ImageSet, Listed, pixels_sha256, stored_pixels
from m2d.models.extractors import FeatureExtractor, Features, load_feature_extractor
from m2d.models.settings import FeatureExtractorConfig

CONFIG = FeatureExtractorConfig(input_size=64)
KEY = "mean-colour-000000000000-32-official"


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Seven images of 16 px, the last a repeat of the first."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    pixels[6] = pixels[0]
    empty = ImageSet("train", "here", (), (), np.zeros(7, np.int64), np.arange(7).astype(object), pixels[:0])
    sha256 = pixels_sha256(pixels)
    stored = stored_pixels(str(tmp_path), sha256, pixels.shape, lambda out: out.__setitem__(slice(None), pixels))
    return replace(empty, sha256=sha256, pixels=stored)


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


def test_a_torn_file_alone_is_made_again(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SHARD_IMAGES", 2)
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

    monkeypatch.setattr(store, "load_arrays", failing)
    assert store.read_cls(file.parent, images.sha256) == {}
    assert file.is_file()


@pytest.mark.ray
def test_ray_gives_the_same_vectors(
    images: ImageSet, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_IMAGES", 2)
    here = at(tmp_path, num_actors=0).features(images, CONFIG)[0]
    for path in (tmp_path / FOLDER).rglob("cls_*"):
        path.unlink()
    assert np.array_equal(at(tmp_path, num_actors=2).features(images, CONFIG)[0], here)


# --- of image files, for the probe ------------------------------------------------------------------------------------


class MeanColour(FeatureExtractor):
    """Features that a test can predict: the mean of each channel. Counts the images that it has seen."""

    def __init__(self, input_size: int = 32) -> None:
        zeros, ones = torch.zeros(3), torch.ones(3)
        super().__init__("mean-colour", 3, input_size, zeros, ones, num_patches=1, crop="official")
        self.seen = 0
        self.breaks_after: int | None = None
        self.gives_nan = False

    def forward(self, x: Tensor) -> Features:
        if self.breaks_after is not None and self.seen >= self.breaks_after:
            raise KeyboardInterrupt
        self.seen += len(x)
        cls = x.mean(dim=(2, 3))
        return Features(cls=cls * torch.nan if self.gives_nan else cls, patches=cls[:, None])


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> MeanColour:
    network = MeanColour()
    monkeypatch.setattr(store, "load_feature_extractor", lambda *_, **__: network)
    return network


def colour_of(number: int) -> tuple[int, int, int]:
    return number % 256, 255 - number % 256, number * 7 % 256


@pytest.fixture
def files(tmp_path: Path) -> Listed:
    """Twenty images of one colour each, of two shapes."""
    (tmp_path / "data").mkdir()
    for number in range(20):
        size = (60, 45) if number % 2 else (40, 50)
        Image.new("RGB", size, colour_of(number)).save(tmp_path / "data" / f"{number}.png")
    return listed(tmp_path)


def listed(tmp_path: Path) -> Listed:
    paths = sorted((tmp_path / "data").iterdir(), key=lambda path: int(path.stem))
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return Listed("train", "", str(tmp_path / "data"), pa.table({"path": [p.name for p in paths], "sha256": sums}))


def extract(tmp_path: Path, files: Listed) -> ClsFeatures:
    config, cache_dir = FeatureExtractorConfig(crop="official"), str(tmp_path / "cache")
    return cls_features([files], config, key=KEY, cache_dir=cache_dir, device="cpu", batch_size=3, max_pixels=10**6)


def test_each_image_has_its_own_features_extracted_once(tmp_path: Path, files: Listed, extractor: MeanColour) -> None:
    assert extract(tmp_path, replace(files, rows=files.rows.slice(0, 12))).extracted == 12
    found = extract(tmp_path, files)
    assert (found.extracted, found.unreadable, extractor.seen) == (8, [], 20)
    for number, sha256 in enumerate(files["sha256"]):
        assert found.of_image[sha256] == pytest.approx(np.array(colour_of(number)), abs=1e-3)
    again = extract(tmp_path, files)
    assert again.extracted == 0
    assert all(np.array_equal(cls, found.of_image[sha256]) for sha256, cls in again.of_image.items())


def test_a_killed_run_loses_one_batch_at_most(tmp_path: Path, files: Listed, extractor: MeanColour) -> None:
    extractor.breaks_after = 9
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, files)
    extractor.breaks_after = None
    assert extract(tmp_path, files).extracted == 11


def test_a_broken_cache_file_is_made_again(tmp_path: Path, files: Listed, extractor: MeanColour) -> None:
    extract(tmp_path, files)
    path = next((tmp_path / "cache").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    assert extract(tmp_path, files).extracted in (2, 3)  # the 20 are in batches of 3
    assert extract(tmp_path, files).extracted == 0


def test_what_cannot_be_read_is_told_and_the_rest_goes_on(tmp_path: Path, files: Listed, extractor: MeanColour) -> None:
    data = tmp_path / "data"
    (data / "6.png").write_bytes(b"<html>")
    files = listed(tmp_path)
    (data / "3.png").unlink()
    (data / "4.png").write_bytes((data / "5.png").read_bytes())
    found = extract(tmp_path, files)
    reasons = found.unreadable
    assert reasons[:2] == ["3.png: is not there", "4.png: has changed since the scan"]
    assert reasons[2].startswith("6.png: the content is no image")
    assert (len(reasons), found.extracted, len(found.of_image)) == (3, 17, 17)


def test_features_that_are_not_finite_are_refused_and_not_kept(
    tmp_path: Path, files: Listed, extractor: MeanColour
) -> None:
    extractor.gives_nan = True
    with pytest.raises(CheckpointError, match="not finite"):
        extract(tmp_path, files)
    extractor.gives_nan = False
    assert extract(tmp_path, files).extracted == 20


def photographs() -> Iterator[np.ndarray]:
    """Pictures with structure, of the shapes that datasets have: wider, taller, square, smaller than the input."""
    generator = np.random.default_rng(0)
    for height, width in ((450, 600), (601, 450), (300, 300), (150, 200), (767, 1022)):
        coarse = generator.integers(0, 256, size=(height // 15, width // 15, 3), dtype=np.uint8)
        yield np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def test_the_extractor_sees_what_the_authors_transform_gives() -> None:
    """PanDerm's and EfficientNet's: torchvision's Resize(256) and CenterCrop(224) on a PIL image, to the last pixel."""
    authors = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    extractor = MeanColour(input_size=224)
    for image in photographs():
        square = torch.from_numpy(official_square(image, extractor).copy()).permute(2, 0, 1)[None]
        expected = np.asarray(authors(Image.fromarray(image)))
        assert (extractor.preprocess(square)[0].permute(1, 2, 0).numpy() == expected).all(), image.shape
