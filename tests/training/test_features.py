"""Where features come from, and the moments and the prior that are fitted to them."""

import numpy as np
import pytest
import torch
from conftest import PaintImages
from tiny_networks import IMAGE_SIZE, TinyExtractor
from torch.testing import assert_close

from m2d.classes import ISIC7
from m2d.data.reader import ImageReader
from m2d.models.autoencoder import LinearAutoencoder
from m2d.models.settings import AutoencoderConfig, FeatureExtractorConfig
from m2d.training.features import FeatureSource, class_weighted_moments, fit_features, fit_linear, spread_over_classes
from m2d.training.settings import TrainConfig

CPU = torch.device("cpu")
CONFIG = TrainConfig(batch_size=4, feature_extractor=FeatureExtractorConfig(statistics_images=100))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, paint_images: PaintImages) -> ImageReader:
    root = tmp_path_factory.mktemp("data") / "images"
    catalog = paint_images(root, {"NV": 20, "MEL": 6, "DF": 3})
    return ImageReader(catalog, str(root), image_size=IMAGE_SIZE, max_pixels=10**6)


def test_rare_classes_are_taken_whole_before_a_common_ones_surplus() -> None:
    labels = np.repeat([4, 2, 0], [3, 50, 10])
    chosen = spread_over_classes(labels, 23, seed=0)
    counts = np.bincount(labels[chosen], minlength=5)
    assert counts.tolist() == [10, 0, 10, 0, 3]
    assert (np.diff(chosen) > 0).all()


def test_the_choice_within_a_class_is_the_seeds_and_all_rows_where_no_more_are_wanted() -> None:
    labels = np.zeros(100, dtype=np.int64)
    first, again, other = (spread_over_classes(labels, 10, seed=seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert spread_over_classes(np.array([5, 0, 5]), 100, seed=3).tolist() == [0, 1, 2]


def test_moments_of_a_spread_sample_are_those_of_the_whole_split() -> None:
    """Two classes, 3 to 1: one image each at 0 and 4 stands for a mean of 1 and a variance of 0.75 * 1 + 0.25 * 9."""
    mean, std = class_weighted_moments(torch.tensor([[0.0], [4.0]]), np.array([1, 5]), np.array([0, 30, 0, 0, 0, 10]))
    assert mean.item() == pytest.approx(1.0)
    assert std.item() == pytest.approx(3.0**0.5)


def test_the_fit_is_of_the_splits_own_features(reader: ImageReader) -> None:
    extractor = TinyExtractor()
    read = reader.read(np.arange(29), np.zeros(29, dtype=np.int8))
    with torch.no_grad():
        pixels = torch.from_numpy(read["images"]).permute(0, 3, 1, 2)
        cls = extractor(extractor.preprocess(pixels)).cls
    told = list[tuple[str, int, int]]()
    source = FeatureSource(CPU, extractor)
    prior, mean, std = fit_features(source, reader, CONFIG, rank=0, world_size=1, told=lambda *one: told.append(one))
    assert told[-1] == ("features of training images", 29, 29)
    assert_close(mean, cls.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert_close(std, cls.std(dim=0, correction=0), rtol=1e-4, atol=1e-5)
    counts = dict(zip(ISIC7.codes, prior.counts.tolist(), strict=True))
    assert counts == {"AKIEC": 0, "BCC": 0, "BKL": 0, "DF": 3, "MEL": 6, "NV": 20, "VASC": 0}
    nevi = torch.from_numpy(reader.labels == ISIC7.codes.index("NV"))
    assert_close(prior.mean[ISIC7.codes.index("NV")], cls[nevi].mean(dim=0), rtol=1e-4, atol=1e-4)


def test_block_pca_is_of_the_splits_own_pixels_whoever_reads_them(
    reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its three components of single pixels are those of their colours; two workers' sums are the whole."""
    sums: list[torch.Tensor] = []
    monkeypatch.setattr("m2d.training.features.all_reduce_sum", lambda tensor: sums.append(tensor.clone()) or tensor)
    vae = LinearAutoencoder(latent_channels=3, patch_size=1)
    config = TrainConfig(
        batch_size=4,
        stage="latent",
        autoencoder=AutoencoderConfig(kind="linear", patch_size=1, latent_channels=3, whitening=1),
    )
    for rank, world_size in ((0, 2), (1, 2), (0, 1)):
        fit_linear(vae, reader, CPU, config, rank, world_size)
    moments = [tensor for tensor in sums if tensor.shape == (4, 4)]
    assert_close(moments[0] + moments[1], moments[2])
    pixels = torch.from_numpy(reader.read(np.arange(29), np.zeros(29, dtype=np.int8))["images"])
    colours = pixels.view(-1, 3).double() / 127.5 - 1
    assert_close(vae.decoder.bias.double(), colours.mean(dim=0), rtol=1e-5, atol=1e-6)
    directions = vae.decoder.weight[:, :, 0, 0].double()  # a component's deviation times its unit vector: C = W'W
    assert_close(directions.T @ directions, torch.cov(colours.T, correction=0), rtol=1e-4, atol=1e-6)


def test_workers_fit_the_same_from_their_shares(reader: ImageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker's buffer holds zeros where another extracted, so the sum over workers is the whole."""
    buffers = []
    monkeypatch.setattr("m2d.training.features.all_reduce_sum", lambda tensor: buffers.append(tensor.clone()) or tensor)
    source = FeatureSource(CPU, TinyExtractor())
    for rank, world_size in ((0, 1), (0, 3), (1, 3), (2, 3)):
        fit_features(source, reader, CONFIG, rank, world_size)
    alone, *shares = buffers
    assert_close(sum(shares), alone, rtol=1e-4, atol=1e-5)
    assert [int((share != 0).any(dim=1).sum()) for share in shares] == [10, 10, 9]


def test_cached_features_need_no_pixels_and_no_extractor(reader: ImageReader) -> None:
    class Table:
        dim, num_patches = 2, 4

        def cls(self, rows: np.ndarray, views: np.ndarray) -> torch.Tensor:
            assert not views.any()
            return torch.from_numpy(np.stack([rows, 2 * rows], axis=1)).half()

    few = FeatureExtractorConfig(statistics_images=5)
    source = FeatureSource(CPU, None, Table())  # type: ignore[arg-type]
    assert source.source.num_patches == 4
    assert source.cls(reader, np.array([3, 7])).tolist() == [[3.0, 6.0], [7.0, 14.0]]
    prior, _, _ = fit_features(source, reader, TrainConfig(feature_extractor=few), rank=0, world_size=1)
    assert prior.counts.sum() == 29  # all of them, whatever the limit: they cost nothing
