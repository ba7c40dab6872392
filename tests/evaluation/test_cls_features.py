"""Features are those of the official view, extracted once for each image, whatever happens in between."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image
from torch import Tensor

from m2d.errors import CheckpointError
from m2d.evaluation import cls_features as module
from m2d.evaluation.cls_features import ClsFeatures, ImageFile, cls_features, official_square
from m2d.models.extractors import FeatureExtractor, Features
from m2d.models.settings import FeatureExtractorConfig

KEY = "mean-colour-000000000000-32-official"


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
    monkeypatch.setattr(module, "load_feature_extractor", lambda *_, **__: network)
    return network


def colour_of(number: int) -> tuple[int, int, int]:
    return number % 256, 255 - number % 256, number * 7 % 256


@pytest.fixture
def images(tmp_path: Path) -> list[ImageFile]:
    """Twenty images of one colour each, of two shapes."""
    files = []
    (tmp_path / "data" / "NV").mkdir(parents=True)
    for number in range(20):
        path = tmp_path / "data" / "NV" / f"{number}.png"
        Image.new("RGB", (60, 45) if number % 2 else (40, 50), colour_of(number)).save(path)
        files.append(image_file(tmp_path, number))
    return files


def image_file(tmp_path: Path, number: int) -> ImageFile:
    path = tmp_path / "data" / "NV" / f"{number}.png"
    return ImageFile(str(tmp_path / "data"), f"NV/{number}.png", hashlib.sha256(path.read_bytes()).hexdigest())


def extract(tmp_path: Path, images: list[ImageFile]) -> ClsFeatures:
    return cls_features(
        images,
        FeatureExtractorConfig(crop="official"),
        key=KEY,
        cache_dir=str(tmp_path / "cache"),
        device=torch.device("cpu"),
        batch_size=3,
        max_pixels=10**6,
    )


def test_each_image_has_its_own_features(tmp_path: Path, images: list[ImageFile], extractor: MeanColour) -> None:
    features = extract(tmp_path, images)
    assert (features.extracted, features.unreadable) == (20, {})
    for number, image in enumerate(images):
        assert features.of_image[image.sha256] == pytest.approx(np.array(colour_of(number)), abs=1e-3)


def test_a_second_run_extracts_nothing(tmp_path: Path, images: list[ImageFile], extractor: MeanColour) -> None:
    first = extract(tmp_path, images)
    assert extractor.seen == 20
    second = extract(tmp_path, images)
    assert (extractor.seen, second.extracted) == (20, 0)
    assert {sha256: cls.tolist() for sha256, cls in second.of_image.items()} == {
        sha256: cls.tolist() for sha256, cls in first.of_image.items()
    }


def test_new_images_alone_are_extracted(tmp_path: Path, images: list[ImageFile], extractor: MeanColour) -> None:
    extract(tmp_path, images[:12])
    assert extract(tmp_path, images).extracted == 8


def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, images: list[ImageFile], extractor: MeanColour
) -> None:
    extractor.breaks_after = 9
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, images)
    extractor.breaks_after = None
    assert extract(tmp_path, images).extracted == 11


def test_a_killed_run_loses_one_chunk_at_most(
    tmp_path: Path, images: list[ImageFile], extractor: MeanColour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_IMAGES", 4)
    with monkeypatch.context() as killed:
        killed.setattr(module._CacheWriter, "__exit__", lambda *_: None)  # a kill runs no clean-up
        extractor.breaks_after = 15
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path, images)
    extractor.breaks_after = None
    assert extract(tmp_path, images).extracted == 20 - 12  # of 15 done, 12 filled their chunks


def test_a_slow_extractor_saves_by_time(
    tmp_path: Path, images: list[ImageFile], extractor: MeanColour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_SECONDS", 0.0)
    extract(tmp_path, images)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 20


def test_a_broken_cache_file_is_made_again(tmp_path: Path, images: list[ImageFile], extractor: MeanColour) -> None:
    extract(tmp_path, images)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    assert extract(tmp_path, images).extracted == 20
    assert extract(tmp_path, images).extracted == 0


def test_what_cannot_be_read_is_told_and_the_rest_goes_on(
    tmp_path: Path, images: list[ImageFile], extractor: MeanColour
) -> None:
    data = tmp_path / "data" / "NV"
    (data / "3.png").unlink()
    (data / "4.png").write_bytes((data / "5.png").read_bytes())
    (data / "6.png").write_bytes(b"<html>")
    features = extract(tmp_path, [*images[:6], image_file(tmp_path, 6), *images[7:]])
    reasons = sorted(features.unreadable.values())
    assert reasons[0] == "NV/3.png: is not there"
    assert reasons[1] == "NV/4.png: is another file than when it was catalogued"
    assert reasons[2].startswith("NV/6.png: the content is no image")
    assert (len(reasons), features.extracted, len(features.of_image)) == (3, 17, 17)


def test_features_that_are_not_finite_are_refused_and_not_kept(
    tmp_path: Path, images: list[ImageFile], extractor: MeanColour
) -> None:
    extractor.gives_nan = True
    with pytest.raises(CheckpointError, match="mean-colour gives features that are not finite"):
        extract(tmp_path, images)
    extractor.gives_nan = False
    assert extract(tmp_path, images).extracted == 20


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
