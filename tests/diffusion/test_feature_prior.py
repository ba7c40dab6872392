"""The feature prior is scikit-learn's Ledoit-Wolf Gaussian for each class, kept small and drawn by given noise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.covariance import LedoitWolf
from torch import Tensor
from torch.testing import assert_close

from m2d.classes import ISIC7
from m2d.diffusion.feature_prior import FeaturePrior
from m2d.errors import DataError

DIM = 12
COUNTS = (40, 10, 3, 100, 30, 29, 25)  # more images than dimensions, fewer, few, both sides of "weak"


def features_and_labels(counts: tuple[int, ...] = COUNTS, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features of very different scales, another Gaussian for each class, in shuffled order."""
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for index, count in enumerate(counts):
        mixing = rng.standard_normal((dim, dim)) * np.geomspace(0.01, 100, dim)
        rows.append(rng.standard_normal((count, dim)) @ mixing + rng.standard_normal(dim))
        labels.append(np.full(count, index))
    order = rng.permutation(sum(counts))
    return np.concatenate(rows)[order], np.concatenate(labels)[order]


def covariance(prior: FeaturePrior, index: int) -> np.ndarray:
    """[D, D] in units of the deviation over all images."""
    factors, isotropic = prior.factors[index].double(), prior.isotropic[index].double()
    return (factors.T @ factors + isotropic**2 * torch.eye(prior.dim)).numpy()


def ledoit_wolf(features: np.ndarray, labels: np.ndarray, index: int) -> np.ndarray:
    of_class: np.ndarray = LedoitWolf().fit((features / features.std(axis=0))[labels == index]).covariance_
    return of_class


def noise_of(prior: FeaturePrior, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, prior.noise_dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def fitted() -> FeaturePrior:
    return FeaturePrior.fit(*features_and_labels())


@pytest.mark.parametrize("index", [0, 1, 3, 4, 5, 6], ids=lambda index: f"{COUNTS[index]} images")
def test_the_covariance_is_scikit_learns(fitted: FeaturePrior, index: int) -> None:
    features, labels = features_and_labels()
    np.testing.assert_allclose(covariance(fitted, index), ledoit_wolf(features, labels, index), atol=1e-5)
    np.testing.assert_allclose(fitted.mean[index], features[labels == index].mean(axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1, 3], ids=lambda index: f"{COUNTS[index]} images")
def test_what_is_left_out_becomes_isotropic_and_keeps_trace_and_leading_variances(index: int) -> None:
    features, labels = features_and_labels()
    prior = FeaturePrior.fit(features, labels, max_rank=4)
    assert prior.factors.shape == (len(ISIC7), 4, DIM)
    both = covariance(prior, index), ledoit_wolf(features, labels, index)
    kept, whole = (np.linalg.eigvalsh(matrix)[::-1] for matrix in both)
    np.testing.assert_allclose(kept[:4], whole[:4], rtol=1e-5)
    np.testing.assert_allclose(kept[4:], np.full(DIM - 4, whole[4:].mean()), rtol=1e-5)


def test_samples_have_the_mean_and_covariance_of_their_class() -> None:
    features, labels = features_and_labels((500, 400), dim=5)
    prior = FeaturePrior.fit(features, labels)
    count = 200_000
    for index in (0, 1):
        drawn = prior.sample(torch.full((count,), index), noise_of(prior, count)).numpy() / features.std(axis=0)
        expected = ledoit_wolf(features, labels, index)
        variance = np.diag(expected)
        mean = features[labels == index].mean(axis=0) / features.std(axis=0)
        # Five standard errors of a mean, and of an entry of a Gaussian's sample covariance.
        assert (np.abs(drawn.mean(0) - mean) <= 5 * np.sqrt(variance / count)).all()
        error = np.sqrt((np.outer(variance, variance) + expected**2) / count)
        assert (np.abs(np.cov(drawn.T) - expected) <= 5 * error).all()


def test_one_or_two_images_get_the_variance_that_classes_have_within_themselves() -> None:
    """-1 and 1, and 5: squared distances 1 + 1 from class means, over 3 images - 2 classes: variance 2."""
    prior = FeaturePrior.fit(np.array([[-1.0], [1.0], [5.0]]), np.array([0, 0, 4]))
    assert prior.noise_dim == 1
    drawn = prior.sample(torch.tensor([0, 4]), torch.ones(2, 1))
    assert_close(drawn, torch.tensor([[2.0**0.5], [5 + 2.0**0.5]]))
    assert prior.weak == [ISIC7.codes[0], ISIC7.codes[4]]


@pytest.mark.parametrize("few", [2, 3, 9])
def test_a_few_images_do_not_decide_where_samples_lie(few: int) -> None:
    """Around their mean, every direction is as likely, with the variance of all classes within themselves."""
    features, labels = features_and_labels((50, few, 60))
    prior = FeaturePrior.fit(features, labels)
    standardized = features / features.std(axis=0)
    groups = [standardized[labels == index] for index in range(3)]
    squared = sum(np.square(group - group.mean(axis=0)).sum() for group in groups)
    expected = squared / ((50 + few + 60 - 3) * DIM) * np.eye(DIM)
    np.testing.assert_allclose(covariance(prior, 1), expected, rtol=1e-5)
    np.testing.assert_allclose(prior.mean[1], features[labels == 1].mean(axis=0), rtol=1e-5, atol=1e-5)


def test_equal_images_of_a_class_do_not_freeze_it() -> None:
    features, labels = features_and_labels((50, 12))
    features[labels == 1] = features[labels == 1][0]
    prior = FeaturePrior.fit(features, labels)
    drawn = prior.sample(torch.ones(8, dtype=torch.long), noise_of(prior, 8))
    assert (drawn.std(dim=0) > 0).all()
    assert_close(prior.mean[1].numpy(), features[labels == 1][0], rtol=1e-6, atol=1e-6, check_dtype=False)


def test_a_class_of_three_images_can_be_drawn_and_is_weak(fitted: FeaturePrior) -> None:
    assert fitted.counts.tolist() == list(COUNTS)
    assert torch.isfinite(fitted.sample(torch.full((64,), 2), noise_of(fitted, 64))).all()
    assert fitted.weak == [ISIC7.codes[index] for index in (1, 2, 5, 6)], "30 images are not weak, 29 are"


def test_a_class_without_images_is_named_with_what_to_do() -> None:
    features, labels = features_and_labels((40, 0, 40))
    prior = FeaturePrior.fit(features, labels)
    assert prior.weak == []
    with pytest.raises(DataError, match=r"no training image was of BCC, so .*--classes AKIEC,BKL\)") as caught:
        prior.sample(torch.tensor([0, 1]), noise_of(prior, 2))
    assert "\n" not in str(caught.value)
    assert torch.isfinite(prior.sample(torch.tensor([0, 2]), noise_of(prior, 2))).all()


def test_a_dimension_that_varies_by_rounding_alone_takes_no_part() -> None:
    features, labels = features_and_labels()
    features[:, 3] = 1000 / 3 + 1e-7 * np.random.default_rng(1).standard_normal(len(labels))
    prior = FeaturePrior.fit(features, labels)
    drawn = prior.sample(torch.from_numpy(labels), noise_of(prior, len(labels)))
    assert_close(drawn[:, 3], torch.full((len(labels),), 1000 / 3), rtol=0, atol=0)
    others = np.delete(np.arange(DIM), 3)
    np.testing.assert_allclose(
        covariance(prior, 0)[np.ix_(others, others)], ledoit_wolf(features[:, others], labels, 0), atol=1e-5
    )


def test_a_sample_is_the_same_bit_for_bit_in_any_batch() -> None:
    features, labels = features_and_labels((200, 150, 90), dim=300)
    prior = FeaturePrior.fit(features, labels)
    chosen, noise = torch.arange(33) % 3, noise_of(prior, 33)
    together = prior.sample(chosen, noise)
    assert together.dtype == torch.float32
    for first in range(33):
        assert torch.equal(prior.sample(chosen[first : first + 1], noise[first : first + 1])[0], together[first])
    assert torch.equal(prior.sample(chosen.flip(0), noise.flip(0)).flip(0), together)
    assert not torch.equal(prior.sample(chosen, noise_of(prior, 33, seed=1)), together)


def test_autocast_does_not_coarsen_a_sample(fitted: FeaturePrior) -> None:
    chosen, noise = torch.arange(7), noise_of(fitted, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        drawn = fitted.sample(chosen, noise)
    assert torch.equal(drawn, fitted.sample(chosen, noise))


def test_half_precision_tensors_are_fitted_as_they_are() -> None:
    features, labels = features_and_labels()
    half = torch.from_numpy(features).half()
    from_half = FeaturePrior.fit(half, torch.from_numpy(labels))
    assert torch.equal(from_half.mean, FeaturePrior.fit(half.double().numpy(), labels).mean)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.zeros((3, 2, 2)), np.zeros(3, int), r"features are \[3, 2, 2\] and labels \[3\]"),
        (np.zeros((3, 2)), np.zeros(4, int), r"features are \[3, 2\] and labels \[4\]"),
        (np.zeros((0, 2)), np.zeros(0, int), "at least one image"),
        (np.zeros((2, 2)), np.array([0, len(ISIC7)]), "whole numbers from 0 to 6"),
        (np.zeros((2, 2)), np.array([0, -1]), "whole numbers from 0 to 6"),
        (np.zeros((2, 2)), np.array([0.0, 1.0]), "whole numbers from 0 to 6"),
        (np.array([[1.0, 2.0], [3.0, np.nan], [np.inf, 0.0]]), np.zeros(3, int), r"2 of 3 images.*first is image 1\)"),
        (np.ones((4, 2)), np.zeros(4, int), "no class has two images with different features"),
        (np.arange(4.0).reshape(2, 2), np.array([0, 1]), "no class has two images with different features"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(features: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        FeaturePrior.fit(features, labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("counts", [COUNTS, (2, 1)], ids=["seven classes", "no covariance"])
def test_a_stored_prior_draws_the_same_samples(tmp_path: Path, counts: tuple[int, ...]) -> None:
    prior = FeaturePrior.fit(*features_and_labels(counts))
    save_file(prior.tensors(), tmp_path / "prior.safetensors")
    loaded = FeaturePrior.from_tensors(load_file(tmp_path / "prior.safetensors"))
    chosen, noise = torch.arange(len(counts)), noise_of(prior, len(counts))
    assert torch.equal(loaded.sample(chosen, noise), prior.sample(chosen, noise))
    assert loaded.weak == prior.weak


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", None, r"lacks \['mean'\]"),
        ("other", torch.zeros(1), r"unknown \['other'\]"),
        ("counts", torch.zeros(7), "counts is torch.float32"),
        ("counts", torch.full((7,), -1), "counts has a negative"),
        ("mean", torch.zeros(7, DIM + 1), rf"mean is torch.float32 \[7, {DIM + 1}\]"),
        ("mean", torch.full((7, DIM), float("nan")), "mean has numbers that are not finite"),
        ("factors", torch.zeros(7, DIM), r"factors is torch.float32 \[7, 12\]"),
        ("factors", torch.zeros(7, 2, DIM, dtype=torch.float16), "factors is torch.float16"),
        ("isotropic", torch.full((7,), -0.5), "isotropic has a negative"),
    ],
)
def test_tensors_that_are_no_prior_are_refused(
    fitted: FeaturePrior, name: str, value: Tensor | None, message: str
) -> None:
    tensors = {**fitted.tensors(), name: value}
    with pytest.raises(ValueError, match=message):
        FeaturePrior.from_tensors({key: tensor for key, tensor in tensors.items() if tensor is not None})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_draws_the_samples_of_the_cpu(fitted: FeaturePrior) -> None:
    noise = noise_of(fitted, 7)
    on_gpu = fitted.sample(torch.arange(7), noise.cuda())
    assert on_gpu.device.type == "cuda"
    assert_close(on_gpu.cpu(), fitted.sample(torch.arange(7), noise), rtol=1e-6, atol=1e-6)
